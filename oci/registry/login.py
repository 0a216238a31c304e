# SPDX-License-Identifier: Apache-2.0
"""Log in to a registry and out of it: where docker and podman keep credentials, for them as well."""

import base64
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from msgspec import structs

from oci.reference import DOCKER_HUB, RegistryReference, parse
from oci.registry import credentials
from oci.registry.access import Access
from oci.registry.credentials import HUB_KEY, Credentials, Place
from oci.registry.hosts import Hosts
from rekindle.errors import CredentialsError, UsageError
from rekindle.fields import JSON
from rekindle.files import locked, write_atomically

_OK = frozenset({200})
_PROBED = "rekindle/login"  # a name for a reference to a registry as a whole


def check(name: str, given: Credentials, access: Access) -> None:
    """Show credentials to a registry. Raises CredentialsError if it refuses them."""
    host = name.partition("/")[0]
    reference = parse(f"{host}/{_PROBED}")
    if not isinstance(reference, RegistryReference):
        raise UsageError(f"{name} is not a registry", hint="write HOST[:PORT]")
    alone = structs.replace(access, mirrors=(), find_credentials=lambda _: given)
    routes = structs.replace(alone.routes(reference), mirrors=())
    hosts = Hosts(reference, routes, alone)
    try:
        with hosts.origin.ask("GET", "", scope="", expected=_OK):
            pass
    finally:
        hosts.close()


def store(name: str, given: Credentials) -> str:
    """Store credentials for a registry, or for repositories below HOST/PATH; return where they are now.

    A credential helper that docker's configuration names is used; otherwise they are in the file, in base64.
    """
    place, path = Place.parse(name), _file()
    with _changed(path) as document:
        auths = _table(document, "auths")
        if helper := credentials.helper_for(document, place):
            request = {
                "ServerURL": credentials.server_of(place),
                "Username": given.name,
                "Secret": given.password,
            }
            credentials.run_helper(helper, "store", json.dumps(request))
            auths[_key(place)] = {}
            return f"docker-credential-{helper}"
        text = base64.b64encode(f"{given.name}:{given.password}".encode()).decode()
        auths[_key(place)] = {"auth": text}
    return str(path)


def erase(name: str) -> list[str]:
    """Remove the credentials for a registry from every file and helper; return where they were."""
    place = Place.parse(name)
    gone: list[str] = []
    for path in credentials.configurations():
        document = credentials.read(path)
        if document is None:
            continue
        if (helper := credentials.helper_for(document, place)) and credentials.ask_helper(helper, place):
            credentials.run_helper(helper, "erase", credentials.server_of(place))
            gone.append(f"docker-credential-{helper}")
        if any(_is_for(key, place) for key in _table(document, "auths")):
            with _changed(path) as changed:
                auths = _table(changed, "auths")
                for key in [key for key in auths if _is_for(key, place)]:
                    del auths[key]
            gone.append(str(path))
    return gone


def _is_for(key: str, place: Place) -> bool:
    found = Place.parse(key)
    same = found.host == place.host or credentials.are_hub(found.host, place.host)
    return same and found.path == place.path


def _key(place: Place) -> str:
    if credentials.are_hub(place.host, DOCKER_HUB) and not place.path:
        return HUB_KEY
    return f"{place.host}/{place.path}" if place.path else place.host


def _file() -> Path:
    """Return the file to which credentials are written: docker's, unless only podman's is named."""
    named = os.environ.get("REGISTRY_AUTH_FILE")
    if named and not os.environ.get("DOCKER_CONFIG"):
        return Path(named)
    docker = credentials.docker_directory()
    if docker is None:
        raise CredentialsError(
            "there is no place for credentials",
            cause="this user has no home directory",
            hint="set DOCKER_CONFIG to a directory",
        )
    return docker / "config.json"


@contextlib.contextmanager
def _changed(path: Path) -> Iterator[dict[str, JSON]]:
    """Give the content of a file to be changed, and write it at the end. Raises CredentialsError."""
    target = Path(os.path.realpath(path))  # a link stays
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(target.with_name(f".{target.name}.lock")):
            document = credentials.read(path) or {}
            yield document
            content = document["auths"] if path.name == credentials.OLD_FILE else document
            write_atomically(target, json.dumps(content, indent="\t").encode(), mode=0o600)
            target.with_name(f".{target.name}.lock").unlink(missing_ok=True)
    except OSError as error:
        raise CredentialsError(f"cannot write {path}", cause=str(error)) from None


def _table(document: dict[str, JSON], name: str) -> dict[str, JSON]:
    """Return a table of a document, which is made if there is none."""
    if document.get(name) is None:
        document[name] = {}
    table = document[name]
    if not isinstance(table, dict):
        raise CredentialsError(f"{name} in docker's configuration is not a table", cause=f"{table!r:.40}")
    return table
