# SPDX-License-Identifier: Apache-2.0
"""Proxies from the environment, by the variables and rules of curl and of Go's net/http.

    http_proxy, https_proxy     for that scheme, in lower or upper case, lower first
    all_proxy                   for both, where the scheme's own is not set
    no_proxy                    hosts to reach directly, separated by commas

A value is `[http[s]://][user:password@]host[:port]`; the port is 80 by default, 443 for an https proxy.
HTTP_PROXY is ignored where REQUEST_METHOD is set, since a CGI server sets it to the `Proxy` header of any
client (httpoxy).

An entry of no_proxy is `*` for all hosts, an address, a network in CIDR notation, or a name; an address or
a name may have a port. `example.com` covers that host and the names below it; `.example.com` and
`*.example.com` cover only the names below it, as in Go (in curl, also the host). Loopback is always reached
directly.
"""

import base64
import ipaddress
import urllib.parse
from collections.abc import Mapping

from msgspec import Struct

from oci.registry.url import DEFAULT_PORTS, Url, is_host, is_loopback
from rekindle.errors import RegistryError

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Proxy(Struct, frozen=True, kw_only=True):
    """A proxy. `authorization` is the value of Proxy-Authorization, or "" for none."""

    scheme: str
    host: str
    port: int
    authorization: str = ""

    def __str__(self) -> str:
        """Return its URL, without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def proxy_for(url: Url, environment: Mapping[str, str]) -> Proxy | None:
    """Return the proxy to reach a URL through, or None to reach it directly.

    Raises RegistryError for a proxy that cannot be used.
    """
    name, value = _setting(url.scheme, environment)
    if not value or _is_direct(url, environment.get("no_proxy") or environment.get("NO_PROXY") or ""):
        return None
    return _parse(name, value)


def _setting(scheme: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the variable that names the proxy for a scheme, with its value."""
    names = [f"{scheme}_proxy", f"{scheme}_proxy".upper(), "all_proxy", "ALL_PROXY"]
    if environment.get("REQUEST_METHOD"):
        names = [name for name in names if name != "HTTP_PROXY"]
    return next(((name, environment[name]) for name in names if environment.get(name)), ("", ""))


def _parse(name: str, value: str) -> Proxy:
    try:
        parts = urllib.parse.urlsplit(value if "://" in value else f"http://{value}")
        host, port = parts.hostname or "", parts.port
        if parts.scheme not in DEFAULT_PORTS:
            raise ValueError(f"{parts.scheme} proxies are not supported, only http and https")
        if not is_host(host):
            raise ValueError("it names no host")
    except ValueError as error:
        # The parser's message may quote a part of the password.
        secret = "@" in value
        raise RegistryError(
            f"the proxy of ${name} cannot be used",
            cause="it is not a URL" if secret else str(error),
            hint="in a user or a password, write special characters as %XX" if secret else f"see ${name}",
        ) from None
    authorization = ""
    if parts.username is not None:
        user, password = (urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
        authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    port = port or DEFAULT_PORTS[parts.scheme]
    return Proxy(scheme=parts.scheme, host=host, port=port, authorization=authorization)


def _is_direct(url: Url, no_proxy: str) -> bool:
    host = url.host.rstrip(".")
    address = _address(host)
    if is_loopback(host) or (address is not None and address.is_loopback):
        return True
    return any(_matches(entry.lower(), host, address, str(url.port)) for entry in _split(no_proxy))


def _split(no_proxy: str) -> list[str]:
    return no_proxy.replace(",", " ").split()


def _matches(entry: str, host: str, address: _Address | None, port: str) -> bool:
    """Tell whether an entry of no_proxy means a host at a port."""
    if entry == "*":
        return True
    if "/" in entry:
        try:
            return address is not None and address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    name, entry_port = _host_and_port(entry)
    if entry_port and entry_port != port:
        return False
    named = _address(name)
    if named is not None or address is not None:
        return named == address
    name = _ascii(name[1:] if name.startswith("*.") else name).rstrip(".")
    if name.startswith("."):
        return host.endswith(name) and len(name) > 1
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _host_and_port(entry: str) -> tuple[str, str]:
    """Split an entry; an IPv6 address needs brackets to have a port."""
    if entry.startswith("["):
        name, _, rest = entry[1:].partition("]")
        return name, rest.removeprefix(":")
    name, _, port = entry.partition(":")
    return (entry, "") if ":" in port else (name, port)


def _address(text: str) -> _Address | None:
    """Return an IP address, as IPv4 if it is mapped into IPv6; None for a name."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _ascii(name: str) -> str:
    """Return an international name in the form that URLs use."""
    try:
        return name if name.isascii() else ".".join(p.encode("idna").decode() for p in name.split("."))
    except UnicodeError:
        return name
