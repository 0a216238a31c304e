# SPDX-License-Identifier: Apache-2.0
"""Access to registries for one command."""

from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct, structs

from oci.progress import Limiter, Tally
from oci.reference import RegistryReference
from oci.registry import credentials, registries_conf
from oci.registry.url import Url, is_loopback, without_login
from rekindle.config import Config, RegistrySettings
from rekindle.errors import UsageError

_PROBE_SECONDS = 3.0
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

    def routes(self, reference: RegistryReference) -> "Routes":
        """Return where an image is: by the options and the configuration, and what these leave open by
        registries.conf. Raises UsageError."""
        settings = self.settings(reference.host)
        found = registries_conf.find(f"{reference.host}/{reference.repository}")
        host, repository, insecure = reference.api_host, reference.repository, False
        if found is not None:
            origin = found.origin
            insecure = origin.insecure and settings.plain_http is None
            if (origin.host, origin.repository) != (reference.host, reference.repository):
                host, repository = origin.host, origin.repository
        mirrors = [
            Route(url=base_of_mirror(url), repository=reference.repository, name=url)
            for url in settings.mirrors
        ]
        if found is not None and not mirrors:
            mirrors = [
                Route(
                    url=self._base(each.host, None, insecure=each.insecure),
                    repository=each.repository,
                    name=each.host,
                    is_verified=not each.insecure,
                )
                for each in found.mirrors
            ]
        return Routes(
            origin=Route(
                url=self._base(host, settings.plain_http, insecure=insecure),
                repository=repository,
                name=host,
                is_verified=not insecure,
            ),
            mirrors=mirrors,
        )

    def _base(self, host: str, plain_http: bool | None, *, insecure: bool) -> Url:
        """Return the URL of a registry. One that is insecure is asked whether it speaks TLS."""
        if not insecure:
            return base_of(host, plain_http)
        from oci.registry.certificates import speaks_tls  # ssl takes 5 ms

        url = base_of(host, plain_http=False)
        seconds = min(_PROBE_SECONDS, self.config.transfer.connect_seconds)
        return url if speaks_tls(url.host, url.port, seconds) else base_of(host, plain_http=True)


class Route(Struct, frozen=True, kw_only=True):
    """A host that has an image, and the name of the repository there.

    `name` is what the host is called in messages. Without `is_verified`, any certificate will do.
    """

    url: Url
    repository: str
    name: str
    is_verified: bool = True


class Routes(Struct, frozen=True, kw_only=True):
    """The registry of an image, and mirrors to try before it."""

    origin: Route
    mirrors: Sequence[Route] = ()


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
