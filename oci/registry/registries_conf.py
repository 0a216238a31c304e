# SPDX-License-Identifier: Apache-2.0
"""registries.conf, by which podman, skopeo and CRI-O know mirrors, and registries without TLS (version 2).

    $CONTAINERS_REGISTRIES_CONF, or else ~/.config/containers/registries.conf, or else
    /etc/containers/registries.conf
    /etc/containers/registries.conf.d/*.conf        in the order of their names; the last entry for a prefix
                                                    counts
    ~/.config/containers/registries.conf.d/*.conf

    [[registry]]
    prefix = "docker.io/library"                    the longest that fits the name counts; by default location
    location = "registry.example.com/hub"           takes the place of the prefix
    insecure = true                                 TLS is not verified; without TLS, plain HTTP
    blocked = true
    [[registry.mirror]]
    location = "mirror.example.com/hub"             takes the place of the prefix, too
    insecure = true

Tags are always resolved by the registry itself, so mirrors for tags alone are left out.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct, field

from rekindle.errors import FormatError, UsageError
from rekindle.fields import JSON, Fields, text_item
from rekindle.home import expand_user

_SYSTEM = Path("/etc/containers")
_FILE_LIMIT_BYTES = 1 << 20
_ENTRIES_LIMIT = 1000
_MIRRORS_LIMIT = 16
_TAGS_ONLY = "tag-only"


class Location(Struct, frozen=True, kw_only=True):
    """A host, and the name of a repository there. `insecure`: TLS is not verified, or not spoken."""

    host: str
    repository: str
    insecure: bool


class Locations(Struct, frozen=True, kw_only=True):
    """Where an image is: at its registry, and before that at mirrors."""

    origin: Location
    mirrors: Sequence[Location] = ()


class _Mirror(Struct, frozen=True, kw_only=True):
    location: str
    insecure: bool


class RegistryEntry(Struct, frozen=True, kw_only=True):
    """One `[[registry]]`."""

    prefix: str
    location: str
    insecure: bool = False
    blocked: bool = False
    mirrors: Sequence[_Mirror] = field(default_factory=tuple)

    def fits(self, name: str) -> bool:
        """Tell whether a name, `HOST/REPOSITORY`, begins with the prefix."""
        if self.prefix.startswith("*."):
            return name.partition("/")[0].partition(":")[0].endswith(self.prefix[1:])
        return name == self.prefix or name.startswith((f"{self.prefix}/", f"{self.prefix}:"))

    def locations(self, name: str) -> Locations:
        """Return where a name that fits is. Raises UsageError if it is blocked."""
        if self.blocked:
            raise UsageError(f"{name} is blocked", cause=f"registries.conf blocks {self.prefix}")
        origin = self._moved(name, self.location, self.insecure)
        mirrors = [self._moved(name, each.location, each.insecure) for each in self.mirrors]
        return Locations(origin=origin, mirrors=mirrors)

    def _moved(self, name: str, location: str, insecure: bool) -> Location:
        """Return a name with a location in the place of the prefix."""
        rest = name.removeprefix(self.prefix) if not self.prefix.startswith("*.") else ""
        moved = f"{location}{rest}" if location and not self.prefix.startswith("*.") else name
        host, _, repository = moved.partition("/")
        return Location(host=host, repository=repository, insecure=insecure)


def find(name: str) -> Locations | None:
    """Return where the files say that an image is, by its name `HOST/REPOSITORY`; None if they do not.

    Raises UsageError for a file that cannot be used.
    """
    entries = {}
    for path in _paths():
        for entry in _read(path):
            entries[entry.prefix] = entry
    fitting = [entry for entry in entries.values() if entry.fits(name)]
    return max(fitting, key=lambda entry: len(entry.prefix)).locations(name) if fitting else None


def _paths() -> list[Path]:
    named = os.environ.get("CONTAINERS_REGISTRIES_CONF")
    config = expand_user(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    own = config / "containers" if config is not None else None
    if named:
        mains = [Path(named)]
    else:
        mains = [directory / "registries.conf" for directory in (own, _SYSTEM) if directory is not None]
    found = [path for path in mains if path.is_file()][:1]
    for directory in (_SYSTEM, own):
        if directory is not None:
            found += sorted((directory / "registries.conf.d").glob("*.conf"))
    return found


def _read(path: Path) -> list[RegistryEntry]:
    try:
        fields = Fields.parse_toml(path.read_bytes(), "it", limit_bytes=_FILE_LIMIT_BYTES)
        if not fields.has("registry"):
            return []
        return fields.list_of("registry", _entry, at_most=_ENTRIES_LIMIT)
    except OSError as error:
        raise UsageError(f"cannot read {path}", cause=str(error)) from None
    except FormatError as error:
        raise UsageError(f"cannot use {path}", cause=error.summary) from None


def _entry(value: JSON, where: str) -> RegistryEntry:
    fields = Fields(value, where)
    location = fields.text("location", "").rstrip("/")
    prefix = fields.text("prefix", "").rstrip("/") or location
    if not prefix:
        raise FormatError(f"{where} has neither a prefix nor a location")
    mirrors: list[_Mirror | None] = []
    if fields.has("mirror"):
        mirrors = fields.list_of("mirror", _mirror, at_most=_MIRRORS_LIMIT)
    return RegistryEntry(
        prefix=prefix,
        location=location or prefix,
        insecure=fields.boolean("insecure", default=False),
        blocked=fields.boolean("blocked", default=False),
        mirrors=[each for each in mirrors if each is not None],
    )


def _mirror(value: JSON, where: str) -> _Mirror | None:
    fields = Fields(value, where)
    location = text_item(fields.text("location"), where).rstrip("/")
    if fields.text("pull-from-mirror", "") == _TAGS_ONLY:
        return None
    return _Mirror(location=location, insecure=fields.boolean("insecure", default=False))
