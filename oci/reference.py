# SPDX-License-Identifier: Apache-2.0
"""Image references: the names by which users call images."""

import re
from pathlib import Path

from msgspec import Struct

from rekindle.digest import Digest
from rekindle.errors import UsageError

# OCI distribution specification 1.1, "Pulling manifests".
_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_HOST = re.compile(r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?")
_NAME_LIMIT = 255

DOCKER_HUB = "docker.io"
DEFAULT_TAG = "latest"


class LayoutReference(Struct, frozen=True, kw_only=True):
    """An image in an OCI layout: the one in `directory`, or the local store if that is None.

    `tag` is its name in the layout's index: `name:tag` in the store, the tag alone in a directory.
    """

    text: str
    directory: Path | None
    tag: str

    @property
    def in_store(self) -> bool:
        """Whether the image is in the local store."""
        return self.directory is None

    @property
    def policy_name(self) -> str:
        """The name that a policy's patterns are compared with."""
        return f"oci:{self.directory}" if self.directory is not None else self.tag.partition(":")[0]

    def __str__(self) -> str:
        return self.text


class RegistryReference(Struct, frozen=True, kw_only=True):
    """An image in a repository of a registry. If there is a digest, the tag is ignored."""

    text: str
    host: str
    repository: str
    tag: str
    digest: Digest | None

    @property
    def api_host(self) -> str:
        """The host that serves the API."""
        return "registry-1.docker.io" if self.host == DOCKER_HUB else self.host

    @property
    def policy_name(self) -> str:
        """The name that a policy's patterns are compared with. The host is in lower case, as in DNS."""
        return f"{self.host.lower()}/{self.repository}"

    def __str__(self) -> str:
        return self.text


Reference = LayoutReference | RegistryReference


def parse(text: str) -> Reference:
    """Parse `name[:tag]`, `oci:DIR[:tag]` or `HOST[:PORT]/repository[:tag][@digest]`.

    The first part is a host if it contains a dot or a port, or is `localhost`. Raises UsageError for anything
    else.
    """
    if text.startswith("oci:"):
        directory, _, tag = text.removeprefix("oci:").partition(":")
        tag = tag or DEFAULT_TAG
        if not directory or not _TAG.fullmatch(tag):
            raise UsageError(f"invalid image name {text!r}", hint="write oci:DIR[:TAG]")
        return LayoutReference(text=text, directory=Path(directory).absolute(), tag=tag)
    host, slash, rest = text.partition("/")
    if slash and ("." in host or ":" in host or host == "localhost"):
        return _registry(text, host, rest)
    name, colon, tag = text.partition(":")
    if not _NAME.fullmatch(name) or (colon and not _TAG.fullmatch(tag)):
        raise UsageError(
            f"invalid image name {text!r}",
            hint="write name[:tag]: lower-case letters and digits, with single . _ - / between them",
        )
    return LayoutReference(text=text, directory=None, tag=f"{name}:{tag or DEFAULT_TAG}")


def _registry(text: str, host: str, rest: str) -> RegistryReference:
    rest, at, digest = rest.partition("@")
    name, colon, tag = rest.partition(":")
    # Docker reads docker.io/vllm as docker.io/library/vllm, and so does everyone else.
    if host == DOCKER_HUB and "/" not in name:
        name = f"library/{name}"
    port = re.search(r":(\d+)$", host)
    if (
        not _HOST.fullmatch(host)
        or (port and not 0 < int(port[1]) < 65536)
        or not _NAME.fullmatch(name)
        or len(name) > _NAME_LIMIT
        or (colon and not _TAG.fullmatch(tag))
    ):
        raise UsageError(f"invalid image name {text!r}", hint="write HOST[:PORT]/repository[:tag][@sha256:…]")
    try:
        parsed = Digest.parse(digest) if at else None
    except ValueError as error:
        raise UsageError(f"invalid digest in image name {text!r}", cause=str(error)) from None
    return RegistryReference(text=text, host=host, repository=name, tag=tag or DEFAULT_TAG, digest=parsed)
