# SPDX-License-Identifier: Apache-2.0
"""Lists of the manifests that refer to another: by the referrers API, or else under a fallback tag."""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from oci import media_types
from oci.descriptor import Descriptor
from oci.registry.host import Host, target_of
from oci.registry.retry import RETRYABLE
from oci.registry.url import Url
from rekindle.digest import Digest
from rekindle.errors import FormatError, RegistryError
from rekindle.fields import Fields

if TYPE_CHECKING:
    from http.client import HTTPMessage

_LIMIT = 1000
_BYTES_LIMIT = 4 << 20
_PAGES_LIMIT = 100
_LINK_LIMIT = 4096
_NEXT = re.compile(r'<([^<>]*)>\s*;[^,]*\brel="?next"?')
_SETTLED = frozenset(range(100, 600)) - RETRYABLE  # what another attempt would not change


def ask(host: Host, repository: str, digest: Digest) -> list[Descriptor] | None:
    """Return what the API lists, page after page; None if a registry does not have it.

    Raises RegistryError if that cannot be told, FormatError for more than `_LIMIT`.
    """
    scope = f"repository:{repository}:pull"
    where: str | Url = f"{repository}/referrers/{digest}"
    found: list[Descriptor] = []
    for _ in range(_PAGES_LIMIT):
        with host.ask("GET", where, scope=scope, expected=_SETTLED, attempts=2) as answer:
            if answer.status != 200 or media_type_of(answer.headers) != media_types.INDEX:
                return None
            try:
                found += listed(answer.read(_BYTES_LIMIT))
            except OSError as error:
                raise RegistryError(f"{host.name} fails", cause=str(error)) from None
            if len(found) > _LIMIT:
                break
            more = _NEXT.search(answer.headers.get("Link", "")[:_LINK_LIMIT])
            if more is None:
                return found
            where = target_of(answer, more[1])
    raise FormatError(f"{digest} has more than {_LIMIT} referrers")


def listed(content: bytes) -> list[Descriptor]:
    """Return the entries of an index of referrers. Raises FormatError."""
    fields = Fields.parse(content, "the list of referrers", limit_bytes=_BYTES_LIMIT)
    return fields.list_of("manifests", Descriptor.from_json, at_most=_LIMIT)


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


def index_of(entries: Sequence[Descriptor]) -> bytes:
    """Return an index of referring manifests."""
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": media_types.INDEX,
            "manifests": [each.to_json() for each in entries],
        }
    ).encode()


def media_type_of(headers: "HTTPMessage") -> str:
    """Return the media type of an answer, without parameters."""
    return headers.get("Content-Type", "").partition(";")[0].strip().lower()
