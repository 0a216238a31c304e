# SPDX-License-Identifier: Apache-2.0
"""An OCI image layout: a directory of blobs by digest and an index of tags (image specification 1.1).

DIR/
    oci-layout
    index.json                  the manifest of each tag; replaced atomically
    blobs/sha256/HEX
    .lock                       held while the index is changed
    .reading                    shared by readers, exclusive for the collection of garbage
    .garbage                    exists while there may be blobs that no tag needs; in a directory of the user,
                                it lists those that replaced images needed
    .incoming/HEX/              a layout with what was received so far of an image, by its manifest's digest
    .incoming/HEX.lock          held while the image is being fetched
"""

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from msgspec import structs

from oci import media_types
from oci.descriptor import BlobSource, Descriptor, open_verified
from oci.listing import TAG_ANNOTATION, Listing, key_of
from oci.reference import DEFAULT_TAG
from rekindle.digest import READ_BYTES, Digest
from rekindle.errors import BusyError, FormatError, IntegrityError, NotFoundError
from rekindle.fields import JSON, Fields
from rekindle.files import (
    locked,
    move_file,
    open_regular,
    remove_tree,
    sync_directory,
    try_lock,
    write_atomically,
)
from rekindle.os_errors import naming_full_disk

# For blobs that are here already. The limits for images from elsewhere are set in the configuration.
_MANIFEST_LIMIT_BYTES = 64 << 20
_CHILDREN_LIMIT = 100_000
_INDEX_LIMIT_BYTES = 16 << 20
_DESCRIPTORS_LIMIT = 10_000
_FORGOTTEN_SECONDS = 24 * 3600.0
_WAIT_SECONDS = 3600.0  # reading a large image holds the lock for minutes


class Layout:
    """A layout on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs" / "sha256"
        self._frozen: Listing | None = None

    @classmethod
    def create(cls, root: Path) -> "Layout":
        """Open a layout, and make an empty one if there is none. Idempotent."""
        layout = cls(root)
        with naming_full_disk(root):
            # A snapshot holds the memory of a process: other users must not read it.
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
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
        """Keep every blob in place while an image is read."""
        try:
            fd = os.open(self.root / ".reading", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError:  # a read-only layout: no rekindle changes it either
            yield
            return
        try:
            if not try_lock(fd, shared=True, timeout=_WAIT_SECONDS):
                raise BusyError(f"garbage is being collected in {self.root}", hint="try again")
            yield
        finally:
            os.close(fd)

    def frozen(self) -> "Layout":
        """Return the layout with its index as it is now, for someone who only reads, and often."""
        layout = Layout(self.root)
        layout._frozen = self._listing()
        return layout

    def tags(self) -> dict[str, Descriptor]:
        """Return every tag with the manifest it names. Raises FormatError if the index is malformed."""
        return self._listing().tags()

    def resolve(self, tag: str) -> Descriptor:
        """Return the manifest that a tag names. Raises NotFoundError.

        A layout with one image and no tag, as skopeo, crane and `cosign save` write it, has that image as its
        default.
        """
        listing = self._listing()
        tags = listing.tags()
        if tag in tags:
            return tags[tag]
        untagged = listing.untagged()
        if tag == DEFAULT_TAG and not tags and len(untagged) == 1:
            return untagged[0]
        raise self._without(tag, listing)

    def _without(self, tag: str, listing: Listing) -> NotFoundError:
        untagged = len(listing.untagged())
        known = ", ".join(sorted(listing.tags())[:8]) or (
            f"{untagged} without a tag" if untagged else "nothing"
        )
        return NotFoundError(f"there is no image {tag}", cause=f"{self.root} holds {known}")

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        """Return a small blob, checked against its digest. Raises IntegrityError, FormatError."""
        if descriptor.size > limit_bytes:
            raise FormatError(
                f"blob {descriptor.digest} has {descriptor.size} bytes; the limit is {limit_bytes}"
            )
        with self.open_blob(descriptor) as file:
            content = file.read(descriptor.size + 1) or b""
        if len(content) != descriptor.size or Digest.of_bytes(content) != descriptor.digest:
            raise IntegrityError(
                f"the bytes of blob {descriptor.digest} do not match its digest",
                hint="make the snapshot again, or fetch it again",
            )
        return content

    def open_blob(self, descriptor: Descriptor) -> io.RawIOBase:
        """Open a blob, unchecked. Raises IntegrityError if it is missing or has another size."""
        try:
            file = open_regular(self._blobs / descriptor.digest.hex)
        except FileNotFoundError:
            raise IntegrityError(
                f"blob {descriptor.digest} is missing from {self.root}", hint="make the snapshot again"
            ) from None
        size = os.fstat(file.fileno()).st_size
        if size != descriptor.size:
            file.close()
            raise IntegrityError(
                f"blob {descriptor.digest} has {size} bytes instead of {descriptor.size}",
                hint="make the snapshot again, or fetch it again",
            )
        return file

    def cancel(self) -> None:
        """Do nothing: reads of files are short. See `Blobs`."""

    def fall_back_to_origin(self) -> bool:
        """Return False: there is no origin but these files. See `Blobs`."""
        return False

    def put(self, content: bytes, media_type: str, *, artifact_type: str = "") -> Descriptor:
        """Store a small blob."""
        digest = Digest.of_bytes(content)
        write_atomically(self._blobs / digest.hex, content)
        return Descriptor(
            media_type=media_type, digest=digest, size=len(content), artifact_type=artifact_type
        )

    @contextlib.contextmanager
    def staging(self) -> Iterator[tuple[BinaryIO, Callable[[Digest], None]]]:
        """Open a file to write a blob to; the function with it, given the digest, makes it a blob.

        Without that call the file is removed.
        """
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

    def publish(
        self, source: "Layout", descriptor: Descriptor, tag: str, attached: Sequence[Descriptor] = ()
    ) -> None:
        """Move an image and its attachments here from another layout on the same disk, and tag it last.

        Readers see the old image of the tag or all of the new one. A publisher that is killed leaves at most
        some blobs, for `collect_garbage`. Other entries of the index are not changed.
        """
        with locked(self.root / ".lock", timeout=_WAIT_SECONDS), naming_full_disk(self.root):
            self._take_all(source, [descriptor, *attached])
            document = self._document()
            others = [entry for entry in document["manifests"] if not _is_tagged(entry, tag)]
            annotations = {**descriptor.annotations, TAG_ANNOTATION: tag}
            ours = structs.replace(descriptor, annotations=annotations)
            entries = [*_with_attached(others, attached), ours.to_json()]
            self._write_index({**document, "manifests": entries})

    @contextlib.contextmanager
    def incoming(self, digest: Digest) -> Iterator["Arrival"]:
        """Open the place to fetch an image to, with what an interrupted attempt has fetched already.

        Another process that fetches the same image waits. `Arrival.publish` removes the place; after an
        interruption, everything stays there for a day.
        """
        directory = self.root / ".incoming"
        with contextlib.ExitStack() as stack:
            with naming_full_disk(self.root):
                lock = directory / f"{digest.hex}.lock"
                while True:
                    directory.mkdir(exist_ok=True)
                    # The last one to finish removes the directory, maybe while we wait for the lock in it.
                    with contextlib.suppress(FileNotFoundError):
                        stack.enter_context(locked(lock, timeout=_WAIT_SECONDS))
                        break
                stack.enter_context(self.reading())
                layout = Layout.create(directory / digest.hex)
            for staged in layout._blobs.glob(".staged-*"):  # left by a killed process: we hold the lock
                staged.unlink()
            os.utime(lock)
            yield Arrival(self, layout, lock)

    def drop_forgotten(self) -> None:
        """Remove what was received of images whose fetching was interrupted more than a day ago."""
        for lock in (self.root / ".incoming").glob("*.lock"):
            with contextlib.suppress(OSError, BusyError):
                if time.time() - lock.stat().st_mtime > _FORGOTTEN_SECONDS:
                    with locked(lock, timeout=0.0):
                        _remove_incoming(lock)

    def contains(self, descriptor: Descriptor) -> bool:
        """Tell whether there is a blob of that name, whatever its content."""
        return (self._blobs / descriptor.digest.hex).exists()

    def has(self, descriptor: Descriptor) -> bool:
        """Tell whether a blob is there and matches its digest. Its name alone does not prove that."""
        with contextlib.suppress(OSError, IntegrityError), open_verified(self, descriptor) as stream:
            stream.finish()
            return True
        return False

    def upload(self, descriptor: Descriptor, source: BlobSource) -> None:
        """Store a blob from elsewhere. It appears once its digest has matched. Raises IntegrityError."""
        buffer = memoryview(bytearray(READ_BYTES))
        with open_verified(source, descriptor) as stream, self.staging() as (staged, finish):
            while count := stream.readinto(buffer):
                staged.write(buffer[:count])
            finish(descriptor.digest)

    def attach(self, source: "Layout", attached: Sequence[Descriptor]) -> None:
        """Move manifests that refer to an image of this layout here, and list them in the index."""
        with locked(self.root / ".lock", timeout=_WAIT_SECONDS), naming_full_disk(self.root):
            self._take_all(source, attached)
            document = self._document()
            self._write_index({**document, "manifests": _with_attached(document["manifests"], attached)})

    def tagged(self, tag: str) -> Descriptor | None:
        """Return the manifest that was attached under a tag of its own, or that others gave this tag."""
        return self._listing().tagged(tag)

    def referrers(self, digest: Digest, *, artifact_type: str = "") -> list[Descriptor]:
        """Return the entries of the index without a tag that refer to a manifest. See `Blobs`."""
        return self._listing().referrers(digest, artifact_type)

    def reachable(self, roots: Sequence[Descriptor]) -> set[Digest]:
        """Return the digests of all blobs that are reachable from some manifests and indexes."""
        found: set[Digest] = set()
        queue = list(roots)
        while queue:
            descriptor = queue.pop()
            if descriptor.digest in found:
                continue
            found.add(descriptor.digest)
            if descriptor.media_type in media_types.DOCUMENTS:
                content = self.read(descriptor, limit_bytes=_MANIFEST_LIMIT_BYTES)
                document = Fields.parse(content, "manifest", limit_bytes=_MANIFEST_LIMIT_BYTES)
                for name in ("manifests", "layers"):
                    if document.has(name):
                        queue += document.list_of(name, Descriptor.from_json, at_most=_CHILDREN_LIMIT)
                if document.has("config"):
                    queue.append(Descriptor.from_json(document.json("config"), "manifest.config"))
        return found

    def expect_garbage(self, tag: str | None = None) -> None:
        """Note that there will be garbage, in case this process is killed before it collects it.

        With a tag, that is only what the image of this tag needs, with its attachments, and what was noted
        before.
        """
        if tag is None:
            (self.root / ".garbage").touch()
            return
        with contextlib.suppress(FormatError, IntegrityError, NotFoundError):
            parts = self.reachable([self.resolve(tag)])
            attached = self._listing().attached_to(parts)
            noted = sorted(self._noted() | parts | self.reachable(attached))
            write_atomically(self.root / ".garbage", "\n".join(noted).encode())

    def _noted(self) -> set[Digest]:
        """Return the blobs that `expect_garbage` has noted."""
        with contextlib.suppress(OSError, IntegrityError, ValueError):
            with open_regular(self.root / ".garbage") as file:
                text = file.read(_INDEX_LIMIT_BYTES) or b""
            return {Digest.parse(line) for line in text.decode().splitlines()}
        return set()

    def untag(self, tag: str) -> Descriptor:
        """Remove a tag; its blobs stay until garbage is collected. Raises NotFoundError."""
        with locked(self.root / ".lock", timeout=_WAIT_SECONDS), naming_full_disk(self.root):
            listing = self._listing()
            if (descriptor := listing.tags().get(tag)) is None:
                raise self._without(tag, listing)
            document = self._document()
            others = [entry for entry in document["manifests"] if not _is_tagged(entry, tag)]
            self._write_index({**document, "manifests": others})
        return descriptor

    def has_garbage(self) -> bool:
        """Tell whether garbage was left by a killed process, or its collection was postponed."""
        return (self.root / ".garbage").exists()

    def collect_garbage(self, *, only_noted: bool = False) -> None:
        """Remove the blobs that no tag needs.

        `only_noted` is for a layout of the user, into which others may have put blobs: it removes none but
        those that `expect_garbage` has noted, with the attachments of images that are gone.

        While the layout is being read, or one of its images is damaged, this does nothing and raises nothing.
        """
        with locked(self.root / ".lock", timeout=_WAIT_SECONDS):
            fd = os.open(self.root / ".reading", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if not try_lock(fd):
                    return
                noted = self._noted() if only_noted else None
                self._drop_unattached(noted)
                keep = {digest.hex for digest in self.reachable(self._listing().entries)}
                names = (
                    [path.name for path in self._blobs.iterdir()]
                    if noted is None
                    else {digest.hex for digest in noted}
                )
                for name in names:
                    if name not in keep:
                        (self._blobs / name).unlink(missing_ok=True)
                for path in self.root.glob(".index.json.*"):  # left by a killed writer: we hold the lock
                    path.unlink()
                (self.root / ".garbage").unlink(missing_ok=True)
            except (FormatError, IntegrityError):
                return
            finally:
                os.close(fd)

    def _drop_unattached(self, noted: Collection[Digest] | None) -> None:
        """Remove the entries of the index that refer to images that are gone, or to those of `noted`."""
        listing, kept = self._listing(), []
        there = self.reachable([each for each in listing.entries if listing.subject(each) is None])
        attached = {key_of(each) for each in listing.attached_to(there)}
        document = self._document()
        for entry, raw in zip(listing.entries, document["manifests"], strict=True):
            subject = listing.subject(entry)
            if subject is None or key_of(entry) in attached or (noted is not None and subject not in noted):
                kept.append(raw)
        if len(kept) < len(listing.entries):
            self._write_index({**document, "manifests": kept})

    def _take_all(self, source: "Layout", roots: Sequence[Descriptor]) -> None:
        """Move everything that is reachable from some manifests here."""
        for digest in source.reachable(roots):
            # A blob that is here already may be damaged; the new one was checked and replaces it.
            if source is not self:
                self._take(source, digest)
        sync_directory(self._blobs)

    def _take(self, source: "Layout", digest: Digest) -> None:
        """Move a blob here. It may be missing from the source if it is here already."""
        try:
            move_file(source._blobs / digest.hex, self._blobs / digest.hex)
        except FileNotFoundError:
            if not (self._blobs / digest.hex).exists():
                raise IntegrityError(
                    f"blob {digest} is missing from {self.root}",
                    hint="another process has removed it: try again",
                ) from None

    def _listing(self) -> Listing:
        if self._frozen is not None:
            return self._frozen
        document = Fields(self._document(), "index.json")
        entries = document.list_of("manifests", Descriptor.from_json, at_most=_DESCRIPTORS_LIMIT)
        return Listing(entries, lambda entry, limit: self.read(entry, limit_bytes=limit))

    def _document(self) -> dict[str, JSON]:
        """Return the index as a JSON object."""
        try:
            with open_regular(self.root / "index.json") as file:
                content = file.read(_INDEX_LIMIT_BYTES + 1) or b""
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


class Arrival:
    """An image that is being fetched into a layout. Implements `oci.destination.Destination`."""

    def __init__(self, layout: Layout, incoming: Layout, lock: Path) -> None:
        self._own_tags: dict[str, Descriptor] = {}
        self._layout = layout
        self._incoming = incoming
        self._lock = lock

    def has(self, descriptor: Descriptor) -> bool:
        """Tell whether a blob is in the layout already, or was received before an interruption."""
        if descriptor.media_type in media_types.DOCUMENTS:  # publish reads them from there again
            return self._incoming.has(descriptor)
        return self._layout.has(descriptor) or self._incoming.has(descriptor)

    def mount(self, _: Descriptor) -> bool:
        """Return False: a layout has no other repositories."""
        return False

    def upload(self, descriptor: Descriptor, source: BlobSource) -> None:
        """Copy a blob. See `Destination`."""
        self._incoming.upload(descriptor, source)

    def put_manifest(self, content: bytes, media_type: str, name: str | None = None) -> Digest:
        """Store a manifest. The image's name is set by `publish`; `name` is one for an attachment."""
        put = self._incoming.put(content, media_type)
        if name is not None:
            self._own_tags[name] = structs.replace(put, annotations={media_types.OWN_TAG: name})
        return put.digest

    def tagged(self, tag: str) -> Descriptor | None:
        """Return the manifest of attachments under a tag of their own, or None."""
        return self._own_tags.get(tag) or self._layout.tagged(tag)

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        """See `Blobs.read`."""
        place = self._incoming if self._incoming.contains(descriptor) else self._layout
        return place.read(descriptor, limit_bytes=limit_bytes)

    def keep(self, tag: str, write_again: Callable[[], bool]) -> None:
        """Do nothing: `publish` lists attachments under a lock. See `Destination`."""

    def settle(self) -> None:
        """Do nothing. See `keep`."""

    def cancel(self) -> None:
        """Do nothing: writes to files are short. See `Destination`."""

    def publish(self, root: Descriptor, tag: str, attached: Sequence[Descriptor] = ()) -> None:
        """Move the image and its attachments into the layout, and tag it last."""
        self._layout.publish(self._incoming, root, tag, [*attached, *self._own_tags.values()])
        _remove_incoming(self._lock)


def _remove_incoming(lock: Path) -> None:
    """Remove what was received of an image. The caller holds the lock."""
    remove_tree(lock.with_suffix(""))
    lock.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other images may be in it
        lock.parent.rmdir()


def _is_tagged(entry: JSON, tag: str) -> bool:
    return bool(entry.get("annotations", {}).get(TAG_ANNOTATION) == tag)


def _with_attached(entries: Sequence[JSON], attached: Sequence[Descriptor]) -> list[JSON]:
    """Return the entries of an index with the attachments that are not listed yet.

    Attachments under a tag of their own replace those that had it.
    """
    tags = {each.annotations.get(media_types.OWN_TAG) for each in attached} - {None}
    kept = [e for e in entries if e.get("annotations", {}).get(media_types.OWN_TAG) not in tags]
    known = {entry.get("digest") for entry in kept}
    new = [e for e in attached if media_types.OWN_TAG in e.annotations or e.digest not in known]
    return [*kept, *(each.to_json() for each in new)]
