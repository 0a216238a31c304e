# SPDX-License-Identifier: Apache-2.0
"""Lists of the manifests that refer to another: by the referrers API, or else under a fallback tag.

Anyone may attach anything, so a list may be long and hold odd entries. What is not asked for is left out
before anything is counted, and an entry that cannot be read costs that entry only.
"""

import json
import re
import urllib.parse
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from oci import media_types
from oci.descriptor import Descriptor, readable
from oci.registry.host import Host, target_of
from oci.registry.retry import RETRYABLE
from oci.registry.url import Url
from rekindle.digest import Digest
from rekindle.errors import FormatError, RegistryError
from rekindle.fields import JSON, Fields

if TYPE_CHECKING:
    from http.client import HTTPMessage

_LIMIT = 1000
_BYTES_LIMIT = 4 << 20
_PAGES_LIMIT = 100
_LINK_LIMIT = 4096
_NEXT = re.compile(r'<([^<>]*)>\s*;[^,]*\brel="?next"?')
_SETTLED = frozenset(range(100, 600)) - RETRYABLE  # what another attempt would not change
_WRITES_LIMIT = 10


def ask(host: Host, repository: str, digest: Digest, artifact_type: str = "") -> list[Descriptor] | None:
    """Return what the API lists, page after page; None if a registry does not have it.

    With an `artifact_type`, the registry is asked for those alone, and others are left out if it sends all.
    Raises RegistryError if that cannot be told, FormatError for more than `_LIMIT`.
    """
    scope = f"repository:{repository}:pull"
    query = f"?{urllib.parse.urlencode({'artifactType': artifact_type})}" if artifact_type else ""
    where: str | Url = f"{repository}/referrers/{digest}{query}"
    found: list[Descriptor] = []
    for _ in range(_PAGES_LIMIT):
        with host.ask("GET", where, scope=scope, expected=_SETTLED, attempts=2) as answer:
            if answer.status != 200 or media_type_of(answer.headers) != media_types.INDEX:
                return None
            try:
                found += listed(answer.read(_BYTES_LIMIT), artifact_type)
            except OSError as error:
                raise RegistryError(f"{host.name} fails", cause=str(error)) from None
            if len(found) > _LIMIT:
                break
            more = _NEXT.search(answer.headers.get("Link", "")[:_LINK_LIMIT])
            if more is None:
                return found
            where = target_of(answer, more[1])
    raise FormatError(f"{digest} has more than {_LIMIT} referrers")


def listed(content: bytes, artifact_type: str = "") -> list[Descriptor]:
    """Return the entries of an index of referrers, or those that may be of one type.

    Raises FormatError for what is no index, and for more than `_LIMIT`.
    """
    found = [each for each in readable(entries(content)) if _may_be(each, artifact_type)]
    if len(found) > _LIMIT:
        raise FormatError(f"the list of referrers has more than {_LIMIT} entries")
    return found


def entries(content: bytes) -> list[JSON]:
    """Return the entries of an index of referrers as they are. Raises FormatError for what is no index."""
    fields = Fields.parse(content, "the list of referrers", limit_bytes=_BYTES_LIMIT)
    return fields.list_of("manifests", lambda value, _: value, at_most=_BYTES_LIMIT)


def _may_be(entry: Descriptor, artifact_type: str) -> bool:
    """Tell whether an entry may be of a type: some clients list the type of the empty config instead."""
    return not artifact_type or entry.artifact_type in {artifact_type, media_types.EMPTY, ""}


def fallback_tag(digest: Digest) -> str:
    """Return the tag under which a registry without the API has the index of referrers."""
    return f"sha256-{digest.hex}"


def entry(fields: Fields, media_type: str, digest: Digest, size: int) -> Descriptor:
    """Return a referring manifest, whose content `fields` is, as an index lists it."""
    artifact_type = fields.text("artifactType", "")
    if not artifact_type and fields.has("config"):
        artifact_type = fields.inner("config").text("mediaType", "")
    return Descriptor(
        media_type=media_type,
        digest=digest,
        size=size,
        artifact_type=artifact_type,
        annotations=fields.text_map("annotations", {}),
    )


def index_of(manifests: Sequence[JSON]) -> bytes:
    """Return an index of referring manifests."""
    document = {"schemaVersion": 2, "mediaType": media_types.INDEX, "manifests": list(manifests)}
    return json.dumps(document).encode()


def media_type_of(headers: "HTTPMessage") -> str:
    """Return the media type of an answer, without parameters."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower()


class FallbackIndexes:
    """Lists referrers for a registry that does not: in an index under the fallback tag of their subject.

    Other clients may write the same index, and no registry compares before it replaces one. So an entry that
    was written is read again at once and later (`keep`), and written again until it stays.
    """

    def __init__(
        self,
        read: Callable[[str], bytes | None],
        write: Callable[[bytes, str], object],
        has: Callable[[Descriptor], bool],
        keep: Callable[[str, Callable[[], bool]], object],
    ) -> None:
        """`read` returns the index under a tag, or None; `write` puts one there; `has` tells whether a
        manifest is there; `keep` is `Destination.keep`."""
        self._read = read
        self._write = write
        self._has = has
        self._keep = keep
        self._written: dict[Digest, dict[Digest, Descriptor]] = {}

    def add(self, subject: Digest, ours: Descriptor) -> None:
        """List a manifest, unless it is listed. Raises RegistryError if it does not stay."""
        if self._missing(subject, [ours]):
            written = self._written.setdefault(subject, {})
            written[ours.digest] = ours
            self._keep(fallback_tag(subject), lambda: self._missing(subject, written.values()))

    def _missing(self, subject: Digest, ours: Collection[Descriptor]) -> bool:
        """Add the entries that are missing from an index; tell whether there were any."""
        tag = fallback_tag(subject)
        for number in range(_WRITES_LIMIT):
            content = self._read(tag)
            there = entries(content) if content is not None else []
            known = {each.get("digest") for each in there if isinstance(each, dict)}
            missing = [each for each in ours if each.digest not in known]
            if not missing:
                return number > 0
            ours_too = [each.to_json() for each in missing]
            try:
                self._write(index_of([*there, *ours_too]), tag)
            except RegistryError:
                # Many registries take no index that lists something odd, or what was deleted meanwhile.
                kept = [each.to_json() for each in readable(there) if self._has(each)]
                if len(kept) == len(there):
                    raise
                self._write(index_of([*kept, *ours_too]), tag)
        raise _unlisted(subject)


def _unlisted(subject: Digest) -> RegistryError:
    return RegistryError(
        f"what was attached to {subject} does not stay listed",
        cause=f"other clients replace the index under {fallback_tag(subject)}",
        hint="try again when they are done",
    )
