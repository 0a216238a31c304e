# SPDX-License-Identifier: Apache-2.0
"""An OCI image layout: a directory of blobs by digest and an index of tags (image specification 1.1).

DIR/
    oci-layout
    index.json                  which manifest each tag names; replaced in one step
    blobs/sha256/HEX
    .lock                       held by whoever changes the index
    .reading                    shared by readers, so that nobody removes a blob under them
    .garbage                    there while blobs may be there that no tag needs
"""

import contextlib
import dataclasses
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from oci import media_types
from oci.descriptor import Descriptor
from rekindle.digest import Digest
from rekindle.engine import JSON
from rekindle.errors import BusyError, FormatError, IntegrityError, NotFoundError
from rekindle.fields import Fields
from rekindle.files import locked, naming_full_disk, sync_directory, try_lock, write_atomically

TAG_ANNOTATION = "org.opencontainers.image.ref.name"

MANIFEST_LIMIT_BYTES = 4 << 20
_INDEX_LIMIT_BYTES = 16 << 20
_DESCRIPTORS_LIMIT = 10_000
_WAIT_SECONDS = 3600.0  # who reads a large image holds the lock for minutes


class Layout:
    """A layout on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs" / "sha256"

    @classmethod
    def create(cls, root: Path) -> "Layout":
        """Makes an empty layout, or opens the one that is there. Idempotent."""
        layout = cls(root)
        with naming_full_disk(root):
            layout._blobs.mkdir(parents=True, exist_ok=True)
            if not (root / "oci-layout").exists():
                write_atomically(root / "oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
            if not (root / "index.json").exists():
                with locked(root / ".lock"):
                    if not (root / "index.json").exists():
                        layout._write_index({"schemaVersion": 2, "mediaType": media_types.INDEX})
        return layout

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keeps every blob in place while an image is read."""
        try:
            fd = os.open(self.root / ".reading", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:  # a layout that we may not write to: nobody with our locks changes it
            yield
            return
        try:
            if not try_lock(fd, shared=True, timeout=_WAIT_SECONDS):
                raise BusyError(f"garbage is being collected in {self.root}", hint="try again")
            yield
        finally:
            os.close(fd)

    def tags(self) -> dict[str, Descriptor]:
        """Every tag and what it names. Raises FormatError for a malformed index."""
        return {d.annotations[TAG_ANNOTATION]: d for d in self._entries() if TAG_ANNOTATION in d.annotations}

    def resolve(self, tag: str) -> Descriptor:
        """What a tag names. Raises NotFoundError."""
        tags = self.tags()
        if tag not in tags:
            known = ", ".join(sorted(tags)[:8]) or "nothing"
            raise NotFoundError(f"there is no image {tag}", cause=f"{self.root} holds {known}")
        return tags[tag]

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        """A small blob, whole and checked against its digest. Raises IntegrityError, FormatError."""
        if descriptor.size > limit_bytes:
            raise FormatError(f"blob {descriptor.digest} has {descriptor.size} bytes, more than is sane")
        with self.open_blob(descriptor) as file:
            content = file.read(descriptor.size + 1) or b""
        if len(content) != descriptor.size or Digest.of_bytes(content) != descriptor.digest:
            raise IntegrityError(
                f"the bytes of blob {descriptor.digest} are not those of its digest",
                hint="make the snapshot anew, or fetch it again",
            )
        return content

    def open_blob(self, descriptor: Descriptor) -> io.RawIOBase:
        """A blob's bytes, unchecked. Raises IntegrityError if it is missing or has another size."""
        try:
            file = open(self._blobs / descriptor.digest.hex, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            raise IntegrityError(
                f"blob {descriptor.digest} is missing from {self.root}", hint="make the snapshot anew"
            ) from None
        size = os.fstat(file.fileno()).st_size
        if size != descriptor.size:
            file.close()
            raise IntegrityError(
                f"blob {descriptor.digest} has {size} bytes and should have {descriptor.size}",
                hint="make the snapshot anew, or fetch it again",
            )
        return file

    def put(self, content: bytes, media_type: str, *, artifact_type: str = "") -> Descriptor:
        """Stores a small blob."""
        digest = Digest.of_bytes(content)
        write_atomically(self._blobs / digest.hex, content)
        return Descriptor(
            media_type=media_type, digest=digest, size=len(content), artifact_type=artifact_type
        )

    @contextlib.contextmanager
    def staging(self) -> Iterator[tuple[BinaryIO, Callable[[Digest], None]]]:
        """A file to write a blob to, and the function that makes it one; without that call it is gone."""
        import tempfile

        fd, name = tempfile.mkstemp(prefix=".staged-", dir=self._blobs)
        staged = Path(name)

        def finish(digest: Digest) -> None:
            file.flush()
            os.fsync(fd)
            staged.chmod(0o644)
            staged.replace(self._blobs / digest.hex)

        try:
            with naming_full_disk(self.root), open(fd, "wb", buffering=1 << 20) as file:
                yield file, finish
        finally:
            staged.unlink(missing_ok=True)

    def publish(self, source: "Layout", descriptor: Descriptor, tag: str) -> None:
        """Takes over an image from another layout on the same disk, tag last.

        Readers see what the tag named before, or all of the new image. A publisher that is killed midway
        leaves blobs at most, for `collect_garbage`. Other entries of the index stay as they are.
        """
        with locked(self.root / ".lock", timeout=_WAIT_SECONDS), naming_full_disk(self.root):
            for digest in source.reachable([descriptor]):
                # One that is there already may be damaged, and ours is whole: it takes its place.
                if source is not self:
                    _move(source._blobs / digest.hex, self._blobs / digest.hex)
            sync_directory(self._blobs)
            document = self._document()
            entries = document.get("manifests")
            others = [e for e in entries if not _is_tagged(e, tag)] if isinstance(entries, list) else []
            annotations = {**descriptor.annotations, TAG_ANNOTATION: tag}
            ours = dataclasses.replace(descriptor, annotations=annotations)
            self._write_index({**document, "manifests": [*others, ours.to_json()]})

    def reachable(self, roots: list[Descriptor]) -> set[Digest]:
        """The digests of all blobs below some manifests and indexes."""
        found: set[Digest] = set()
        queue = list(roots)
        while queue:
            descriptor = queue.pop()
            if descriptor.digest in found:
                continue
            found.add(descriptor.digest)
            if descriptor.media_type in {media_types.INDEX, media_types.MANIFEST}:
                content = self.read(descriptor, limit_bytes=MANIFEST_LIMIT_BYTES)
                document = Fields.parse(content, "manifest", limit_bytes=MANIFEST_LIMIT_BYTES)
                for name in ("manifests", "layers"):
                    if document.has(name):
                        queue += document.list_of(name, Descriptor.from_json, at_most=_DESCRIPTORS_LIMIT)
                if document.has("config"):
                    queue.append(Descriptor.from_json(document.json("config"), "manifest.config"))
        return found

    def expect_garbage(self) -> None:
        """Notes that there will be garbage to collect, whatever happens to us before we come to it."""
        (self.root / ".garbage").touch()

    def has_garbage(self) -> bool:
        """Whether a collection is due: somebody was killed, or it was put off."""
        return (self.root / ".garbage").exists()

    def collect_garbage(self) -> None:
        """Removes the blobs that no tag needs. For a layout that nobody else puts blobs into.

        Puts it off, without an error, while somebody reads or as long as one of the images is damaged.
        """
        with locked(self.root / ".lock", timeout=_WAIT_SECONDS):
            fd = os.open(self.root / ".reading", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if not try_lock(fd):
                    return
                keep = {digest.hex for digest in self.reachable(self._entries())}
                for path in self._blobs.iterdir():
                    if path.name not in keep:
                        path.unlink()
                for path in self.root.glob(".index.json.*"):  # of a writer that was killed: we hold the lock
                    path.unlink()
                (self.root / ".garbage").unlink(missing_ok=True)
            except (FormatError, IntegrityError):
                return
            finally:
                os.close(fd)

    def _entries(self) -> list[Descriptor]:
        document = Fields(self._document(), "index.json")
        return document.list_of("manifests", Descriptor.from_json, at_most=_DESCRIPTORS_LIMIT)

    def _document(self) -> dict[str, JSON]:
        """The index as it is written."""
        try:
            with open(self.root / "index.json", "rb") as file:
                content = file.read(_INDEX_LIMIT_BYTES + 1)
        except FileNotFoundError:
            raise NotFoundError(
                f"{self.root} holds no images", hint="make one: rekindle snapshot NAME -- COMMAND"
            ) from None
        fields = Fields.parse(content, "index.json", limit_bytes=_INDEX_LIMIT_BYTES)
        fields.list_of("manifests", Descriptor.from_json, at_most=_DESCRIPTORS_LIMIT)
        return fields.as_json()

    def _write_index(self, document: dict[str, JSON]) -> None:
        content = {"manifests": [], **document}
        write_atomically(self.root / "index.json", json.dumps(content, indent=1).encode())


def _is_tagged(entry: JSON, tag: str) -> bool:
    return bool(entry.get("annotations", {}).get(TAG_ANNOTATION) == tag)


def _move(source: Path, target: Path) -> None:
    """Moves a blob; from another disk by way of a copy, so that the target is whole or not there."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        staged = target.with_name(f".staged-{target.name}")
        try:
            shutil.copyfile(source, staged)
            with open(staged, "rb") as file:
                os.fsync(file.fileno())
            staged.replace(target)
        finally:
            staged.unlink(missing_ok=True)
