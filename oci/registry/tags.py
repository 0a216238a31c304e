# SPDX-License-Identifier: Apache-2.0
"""The tags of a repository (distribution specification 1.1, "Listing Tags")."""

import re
from typing import TYPE_CHECKING

from oci.registry.host import Host, target_of
from oci.registry.url import Url
from rekindle.errors import FormatError, RegistryError
from rekindle.fields import Fields, text_item

if TYPE_CHECKING:
    from http.client import HTTPMessage

_LIMIT = 100_000
_PAGES_LIMIT = 1000
_BYTES_LIMIT = 4 << 20
_LINK_LIMIT = 4096
_NEXT = re.compile(r'<([^<>]*)>\s*;[^,]*\brel="?next"?')
# Fallback tags of referrers, and cosign's signatures, attestations and SBOMs.
_OF_ATTACHMENTS = re.compile(r"sha256-[0-9a-f]{64}(\.(sig|att|sbom))?")


def listed(host: Host, repository: str) -> list[str]:
    """Return the tags of a repository, page after page, without those of attachments.

    Raises NotFoundError, RegistryError, CredentialsError, FormatError.
    """
    scope = f"repository:{repository}:pull"
    where: str | Url = f"{repository}/tags/list"
    found: list[str] = []
    for _ in range(_PAGES_LIMIT):
        headers: HTTPMessage
        with host.ask("GET", where, scope=scope, expected=frozenset({200})) as answer:
            headers = answer.headers
            try:
                content = answer.read(_BYTES_LIMIT + 1)
            except OSError as error:
                raise RegistryError(f"{host.name} fails", cause=str(error)) from None
            fields = Fields.parse(content, "the list of tags", limit_bytes=_BYTES_LIMIT)
            if fields.has("tags") and fields.json("tags") is not None:  # null in an empty repository
                found += fields.list_of("tags", text_item, at_most=_LIMIT)
            more = _NEXT.search(headers.get("Link", "")[:_LINK_LIMIT])
            if more is None:
                return sorted(tag for tag in found if not _OF_ATTACHMENTS.fullmatch(tag))
            where = target_of(answer, more[1])
        if len(found) > _LIMIT:
            break
    raise FormatError(f"{repository} has more than {_LIMIT:,} tags")
