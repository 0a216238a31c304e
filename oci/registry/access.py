# SPDX-License-Identifier: Apache-2.0
"""Access to registries for one command."""

from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct, structs

from oci.progress import Limiter, Tally
from oci.registry import credentials
from oci.registry.url import Url, is_loopback, without_login
from rekindle.config import Config, RegistrySettings
from rekindle.errors import UsageError

_CERTS_D = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))


class Access(Struct, frozen=True, kw_only=True):
    """The configuration, what the command line adds to it, and the counter of what is moved.

    `certs_d` are the directories with certificates by host; see `certificates`.
    """

    config: Config
    tally: Tally
    limiter: Limiter
    mirrors: Sequence[str] = ()
    plain_http: bool | None = None
    find_credentials: Callable[[str], credentials.Credentials | None] = credentials.find
    certs_d: Sequence[Path] = _CERTS_D

    def settings(self, host: str) -> RegistrySettings:
        """Return the settings of one registry."""
        settings = self.config.registry(host)
        if self.plain_http is not None:
            settings = structs.replace(settings, plain_http=self.plain_http)
        return structs.replace(settings, mirrors=(*self.mirrors, *settings.mirrors))


def base_of(host: str, plain_http: bool | None) -> Url:
    """Return the URL of a registry; None stands for plain HTTP on loopback alone. Raises UsageError."""
    try:
        url = Url.parse(f"https://{host}/")
        plain = is_loopback(url.host) if plain_http is None else plain_http
        return Url.parse(f"{'http' if plain else 'https'}://{host}/")
    except ValueError as error:
        raise UsageError(f"{host} is not a registry", cause=str(error)) from None


def base_of_mirror(url: str) -> Url:
    """Return the URL of a mirror as it was configured. Raises UsageError."""
    try:
        if "?" in url or "#" in url:
            raise ValueError("it has more than a path")
        return Url.parse(url)
    except ValueError as error:
        # What the parser says of a URL may be a part of the password.
        cause = "it must not hold a user or a password" if "@" in url else str(error)
        raise UsageError(
            f"{without_login(url)} is not a mirror",
            cause=cause,
            hint="write http://HOST:PORT or https://HOST",
        ) from None
