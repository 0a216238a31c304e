# SPDX-License-Identifier: Apache-2.0
"""Names and passwords for registries, from where docker and podman keep them, by way of oras."""

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from rekindle.errors import CredentialsError
from rekindle.home import expand_user

_HUB = "registry-1.docker.io"
_HUB_NAMES = ("https://index.docker.io/v1/", "docker.io", _HUB)  # the first by `docker login` without a name


class Credentials(Struct, frozen=True, kw_only=True):
    """A name and password; or, if `identity` is set, a refresh token in the password's place."""

    name: str
    password: str
    identity: bool = False

    @property
    def basic(self) -> str:
        """The value of a header that shows them."""
        return "Basic " + base64.b64encode(f"{self.name}:{self.password}".encode()).decode()


def find(host: str) -> Credentials | None:
    """Return what docker's configuration and credential helpers hold for a registry, or else podman's.

    Raises CredentialsError if they cannot be read.
    """
    for path in _configurations():
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CredentialsError(f"cannot read {path}", cause=str(error)) from None
        try:
            if found := _find(json.loads(content), _HUB_NAMES if host == _HUB else (host,)):
                return found
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            raise CredentialsError(
                f"cannot read the credentials for {host} in {path}",
                cause=f"{type(error).__name__}: {error}",
            ) from None
    return None


def advise(login: str, known: Credentials | None) -> str:
    """Return a hint for a user whom a registry refuses access, with the credentials that `find` returned."""
    if known is None and _docker_directory() is None:
        return "this user has no home directory: set DOCKER_CONFIG to the directory of docker's config.json"
    what = "no credentials" if known is None else "other credentials"
    return f"docker's configuration has {what} for it: `docker login {login}`, or `oras login {login}`"


def _docker_directory() -> Path | None:
    return expand_user(os.environ.get("DOCKER_CONFIG") or "~/.docker")


def _configurations() -> list[Path]:
    docker = _docker_directory()
    found = [docker / "config.json"] if docker else []
    if podman := os.environ.get("REGISTRY_AUTH_FILE"):
        found.append(Path(podman))
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(runtime) / "containers" / "auth.json")
    return found


def _find(
    configuration: Mapping[str, Mapping[str, Mapping[str, str]]], names: tuple[str, ...]
) -> Credentials | None:
    # The import takes 0.2 s, so it waits until a registry asks for credentials.
    from oras.auth.base import AuthBackend
    from oras.utils import iter_localhosts

    # Left to itself, it reads ~/.docker alone, and mixes it with other files in no certain order.
    backend = AuthBackend()
    backend._auth_config = configuration
    for name in (alias for each in names for alias in iter_localhosts(each)):
        if identity := configuration.get("auths", {}).get(name, {}).get("identitytoken"):
            return Credentials(name="<token>", password=str(identity), identity=True)
        if backend._load_auth(name):
            user, _, password = base64.b64decode(backend._basic_auth).decode().partition(":")
            return Credentials(name=user, password=password, identity=user == "<token>")
    return None
