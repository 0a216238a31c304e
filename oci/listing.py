# SPDX-License-Identifier: Apache-2.0
"""Read the index of a layout: which entries have a tag, and which are attached to an image."""

import contextlib
from collections.abc import Callable, Collection, Sequence

from oci import cosign_tags, media_types
from oci.descriptor import Descriptor
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError
from rekindle.fields import Fields

TAG_ANNOTATION = "org.opencontainers.image.ref.name"

# What `cosign save` calls an entry of its layout.
_KIND = "kind"
_SAVED = {
    cosign_tags.SIGNATURES: "dev.cosignproject.cosign/sigs",
    cosign_tags.ATTESTATIONS: "dev.cosignproject.cosign/atts",
}

_MANIFEST_LIMIT_BYTES = 64 << 20  # of manifests that are in a layout already


class Listing:
    """The entries of the index of a layout, as they were when it was read."""

    def __init__(self, entries: Sequence[Descriptor], read: Callable[[Descriptor, int], bytes]) -> None:
        """`read` returns the content of a manifest, given the greatest size that is read."""
        self.entries = entries
        self._read = read
        self._subjects: dict[tuple[Digest, str], Digest | None] = {}

    def tags(self) -> dict[str, Descriptor]:
        """Return every tag with the manifest it names."""
        return {d.annotations[TAG_ANNOTATION]: d for d in self.entries if TAG_ANNOTATION in d.annotations}

    def tagged(self, tag: str) -> Descriptor | None:
        """Return the manifest that was attached under a tag of its own, or that others gave this tag."""
        for each in self.entries:
            if tag in {each.annotations.get(media_types.OWN_TAG), each.annotations.get(TAG_ANNOTATION)}:
                return each
        return self._saved(tag)

    def _saved(self, tag: str) -> Descriptor | None:
        """Return what `cosign save` stored of the tag of an image, beside that image."""
        kind, images = _SAVED.get(tag.rpartition(".")[2]), self.untagged()
        if kind is None or [each.digest for each in images] != [cosign_tags.subject_of(tag)]:
            return None
        return next((each for each in self.entries if each.annotations.get(_KIND) == kind), None)

    def untagged(self) -> list[Descriptor]:
        """Return the images without a tag."""
        beside = {TAG_ANNOTATION, media_types.OWN_TAG}
        return [
            each
            for each in self.entries
            if each.media_type in media_types.DOCUMENTS
            and not beside & each.annotations.keys()
            and each.annotations.get(_KIND) not in _SAVED.values()
            and self.subject(each) is None
        ]

    def referrers(self, digest: Digest, artifact_type: str = "") -> list[Descriptor]:
        """Return the entries without a tag that refer to a manifest; see `Blobs.referrers`."""
        wanted = {artifact_type, media_types.EMPTY, ""}
        return [
            each
            for each in self.entries
            if (not artifact_type or each.artifact_type in wanted) and self.subject(each) == digest
        ]

    def attached_to(self, parts: Collection[Digest]) -> list[Descriptor]:
        """Return the entries that refer to one of some manifests, or to what refers to it, and so on."""
        found: list[Descriptor] = []
        there, rest = set(parts), list(self.entries)
        while True:
            new: list[Descriptor] = []
            others: list[Descriptor] = []
            for each in rest:
                (new if self.subject(each) in there else others).append(each)
            if not new:
                return found
            found += new
            there |= {each.digest for each in new}
            rest = others

    def subject(self, entry: Descriptor) -> Digest | None:
        """Return what an entry without a tag refers to, or None."""
        if TAG_ANNOTATION in entry.annotations or entry.media_type not in media_types.DOCUMENTS:
            return None
        if (key := key_of(entry)) not in self._subjects:
            self._subjects[key] = cosign_tags.subject_of(key[1]) if key[1] else self._subject(entry)
        return self._subjects[key]

    def _subject(self, entry: Descriptor) -> Digest | None:
        with contextlib.suppress(FormatError, IntegrityError):
            content = self._read(entry, _MANIFEST_LIMIT_BYTES)
            fields = Fields.parse(content, "manifest", limit_bytes=_MANIFEST_LIMIT_BYTES)
            if fields.has("subject"):
                return Descriptor.from_json(fields.json("subject"), "manifest.subject").digest
        return None


def key_of(entry: Descriptor) -> tuple[Digest, str]:
    """Return what tells an attachment from others: its digest, and cosign's tag if it is under one."""
    return entry.digest, entry.annotations.get(media_types.OWN_TAG, "")
