# SPDX-License-Identifier: Apache-2.0
"""Names and passwords for registries, from where docker, podman and Kubernetes keep them.

The files are looked at in this order, and the first that has credentials for the registry counts:

    $DOCKER_CONFIG/config.json          by default ~/.docker; also a mounted pull secret, whose file is
                                        .dockerconfigjson, or the older .dockercfg
    $REGISTRY_AUTH_FILE                 or else
    $XDG_RUNTIME_DIR/containers/auth.json
    /run/containers/UID/auth.json
    ~/.config/containers/auth.json

In a file, a credential helper comes before what is written down in `auths`. The keys there are what the
programs have written over the years: HOST, HOST/team, https://HOST, https://HOST/v1/, *.example.com. The one
that fits best counts: the same host before a pattern, the longest path that the repository lies in, and last,
as docker and crane do, any other path on the same host.
"""

import base64
import binascii
import fnmatch
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from rekindle.errors import CredentialsError, FormatError
from rekindle.fields import JSON, Fields
from rekindle.home import expand_user

HUB_KEY = "https://index.docker.io/v1/"  # where `docker login` without a name puts its credentials
OLD_FILE = ".dockercfg"
_HUB_HOSTS = frozenset({"index.docker.io", "docker.io", "registry-1.docker.io"})
_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1"})
_FILE_LIMIT_BYTES = 4 << 20
_HELPER_SECONDS = 60.0  # it may ask a cloud's API
_ABSENT = (FileNotFoundError, NotADirectoryError)
_UNKNOWN = "credentials not found"
_TOKEN_NAME = "<token>"  # noqa: S105 - in place of a name, it says that the password is a refresh token


class Credentials(Struct, frozen=True, kw_only=True):
    """A name and password; or a token in the password's place.

    With `identity`, it is a refresh token; with `is_bearer`, one that is shown to the registry as it is.
    """

    name: str
    password: str
    identity: bool = False
    is_bearer: bool = False

    @property
    def basic(self) -> str:
        """The value of a header that shows them."""
        return "Basic " + base64.b64encode(f"{self.name}:{self.password}".encode()).decode()


class Place(Struct, frozen=True, kw_only=True):
    """A registry as credentials name it: its host, and a repository or a path that leads to some."""

    host: str
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> "Place":
        """Parse a key of `auths`, or the name of a registry or repository."""
        rest = text.strip().partition("://")[2] or text.strip()
        host, _, path = rest.partition("/")
        path = path.strip("/")
        return cls(host=host.lower(), path="" if path in {"v1", "v2"} else path)

    def rank(self, key: "Place") -> tuple[int, ...] | None:
        """Return how well a key fits this repository, the least for the best; None if it does not."""
        far = 0
        if key.host != self.host and not are_hub(key.host, self.host):
            if _same_local(key.host, self.host):
                far = 1
            elif _matches(key.host, self.host):
                far = 2
            else:
                return None
        if not key.path or f"{self.path}/".startswith(f"{key.path}/"):
            return (0, far, -len(key.path))
        return (1, far, 0)


def are_hub(*hosts: str) -> bool:
    """Tell whether hosts are all names of Docker Hub."""
    return set(hosts) <= _HUB_HOSTS


def _same_local(key: str, host: str) -> bool:
    (name, _, port), (other, _, other_port) = key.partition(":"), host.partition(":")
    return {name, other} <= _LOCAL_HOSTS and port == other_port


def _matches(key: str, host: str) -> bool:
    """Tell whether a pattern of Kubernetes covers a host: it has as many labels, and the same port."""
    (pattern, _, port), (name, _, own_port) = key.partition(":"), host.partition(":")
    labels, own = pattern.split("."), name.split(".")
    return (
        "*" in pattern
        and port == own_port
        and len(labels) == len(own)
        and all(map(fnmatch.fnmatchcase, own, labels))
    )


def find(where: str) -> Credentials | None:
    """Return the credentials for a registry, `HOST[:PORT]`, or a repository of it, `HOST[:PORT]/NAME`.

    Raises CredentialsError if they cannot be read.
    """
    place = Place.parse(where)
    for path in configurations():
        document = read(path)
        if document is None:
            continue
        try:
            if found := _find(document, place):
                return found
        except FormatError as error:
            raise CredentialsError(
                f"cannot read the credentials for {place.host} in {path}",
                cause=error.summary,
            ) from None
    return None


def advise(login: str, known: Credentials | None) -> str:
    """Return a hint for a user whom a registry refuses access, with the credentials that `find` returned."""
    if known is None and docker_directory() is None:
        return "this user has no home directory: set DOCKER_CONFIG to the directory of docker's config.json"
    what = "no credentials" if known is None else "other credentials"
    return f"this user has {what} for it: `rekindle login {login}`, or `docker login {login}`"


# Files.


def docker_directory() -> Path | None:
    """Return the directory of docker's configuration; None without a home directory."""
    return expand_user(os.environ.get("DOCKER_CONFIG") or "~/.docker")


def configurations() -> list[Path]:
    """Return the files that may hold credentials, in order. Most do not exist."""
    found: list[Path] = []
    if docker := docker_directory():
        found += [docker / name for name in ("config.json", ".dockerconfigjson", OLD_FILE)]
    if named := os.environ.get("REGISTRY_AUTH_FILE"):
        return [*found, Path(named)]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(runtime) / "containers" / "auth.json")
    place = Path(f"/run/containers/{os.geteuid()}")
    if os.access(place, os.X_OK):  # /run/containers is root's alone where only root has used podman
        found.append(place / "auth.json")
    if config := expand_user(os.environ.get("XDG_CONFIG_HOME") or "~/.config"):
        found.append(config / "containers" / "auth.json")
    return found


def read(path: Path) -> dict[str, JSON] | None:
    """Return the content of a file; None if there is none. Raises CredentialsError."""
    try:
        content = path.read_bytes()
    except _ABSENT:
        return None
    except OSError as error:
        raise CredentialsError(f"cannot read {path}", cause=str(error)) from None
    try:
        document = Fields.parse(content, "it", limit_bytes=_FILE_LIMIT_BYTES).as_json()
    except FormatError as error:
        raise CredentialsError(f"cannot read the credentials in {path}", cause=error.summary) from None
    # The older form of Kubernetes has what is in `auths` now, and nothing else.
    return {"auths": document} if path.name == OLD_FILE else document


# What is in them.


def _find(document: Mapping[str, JSON], place: Place) -> Credentials | None:
    problem: CredentialsError | None = None
    if helper := helper_for(document, place):
        try:
            if found := ask_helper(helper, place):
                return found
        except CredentialsError as error:
            problem = error
    for _, entry in sorted(_entries(document, "auths", place)):
        if found := _parse(entry):
            return found
    if problem is not None:
        raise problem
    return None


class _Entry(Struct, frozen=True, order=True):
    """An entry of a file, by its key."""

    rank: tuple[int, ...]
    key: str


def _entries(document: Mapping[str, JSON], name: str, place: Place) -> Iterator[tuple[_Entry, JSON]]:
    """Yield the entries that fit a place."""
    table = document.get(name)
    if table is None:
        return
    for key, value in Fields(table, name).as_json().items():
        rank = place.rank(Place.parse(key))
        if rank is not None and value is not None:
            yield _Entry((*rank, int("://" in key)), key), value


def helper_for(document: Mapping[str, JSON], place: Place) -> str | None:
    """Return the name of the credential helper for a registry, or None. Raises FormatError."""
    names = [name for _, name in sorted(_entries(document, "credHelpers", place))]
    for name in (*names, document.get("credsStore")):
        if name is not None and not isinstance(name, str):
            raise FormatError("the name of a credential helper is not text", cause=f"{name!r:.80}")
        if name:
            return name
    return None


def _parse(entry: JSON) -> Credentials | None:
    """Return the credentials in an entry of `auths`; None if there are none. Raises FormatError."""
    values = Fields(entry, "the entry").as_json()
    fields = Fields({name: value for name, value in values.items() if value is not None}, "the entry")
    if token := fields.text("identitytoken", ""):
        return Credentials(name=_TOKEN_NAME, password=token, identity=True)
    if token := fields.text("registrytoken", ""):
        return Credentials(name=_TOKEN_NAME, password=token, is_bearer=True)
    name, password = fields.text("username", ""), fields.text("password", "")
    if auth := fields.text("auth", ""):
        name, password = _decode(auth)
    if not name and not password:
        return None
    return Credentials(name=name, password=password, identity=name == _TOKEN_NAME)


def _decode(auth: str) -> tuple[str, str]:
    """Return the name and the password in `auth`. Errors do not quote it."""
    try:
        text = base64.b64decode(auth + "=" * (-len(auth) % 4), validate=True).decode()
    except (binascii.Error, ValueError):
        raise FormatError("auth is not text in base64") from None
    name, colon, password = text.partition(":")
    if not colon:
        raise FormatError("auth is not a name and a password", cause="it has no colon")
    return name, password.strip("\0")


# Credential helpers.


def server_of(place: Place) -> str:
    """Return what helpers call a registry."""
    return HUB_KEY if are_hub(place.host) else place.host


def ask_helper(name: str, place: Place) -> Credentials | None:
    """Return what a credential helper knows of a registry. Raises CredentialsError if it fails."""
    done = run_helper(name, "get", server_of(place))
    if done is None:
        return None
    try:
        fields = Fields.parse(done.encode(), "its answer", limit_bytes=_FILE_LIMIT_BYTES)
        user, secret = fields.text("Username", ""), fields.text("Secret", "")
    except FormatError as error:
        raise CredentialsError(
            f"docker-credential-{name} gives no credentials", cause=error.message
        ) from None
    if not user and not secret:
        return None
    return Credentials(name=user, password=secret, identity=user == _TOKEN_NAME)


def run_helper(name: str, action: str, text: str) -> str | None:
    """Run a credential helper with a text as its input; return its output, None if it knows nothing.

    Raises CredentialsError.
    """
    from rekindle import run  # subprocess takes 8 ms

    program = f"docker-credential-{name}"
    try:
        if "/" in name:
            raise FileNotFoundError(f"a helper's name has no slash: {name!r}")
        status, answer = run.ask([program, action], text.encode(), timeout=_HELPER_SECONDS)
    except OSError as error:
        raise CredentialsError(
            f"the credential helper {program} cannot be run",
            cause=str(error),
            hint="install it, or remove it from docker's configuration",
        ) from None
    said = answer.decode(errors="replace")
    if status == 0:
        return said
    if _UNKNOWN in said:
        return None
    raise CredentialsError(f"{program} fails", cause=said.strip()[:300] or f"it exits with {status}")
