# SPDX-License-Identifier: Apache-2.0
"""Compare what a server has loaded with what a start would load here: code, packages, model, other files.

Reads file contents where `Findings` does not know them already, and of large files only parts.
"""

import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import structs

from rekindle.engine import weights
from rekindle.node import loaded, packages, sampled
from rekindle.node.loaded import CodeDirectory, LoadedFile, LoadedKind
from rekindle.node.mapped import difference
from rekindle.record import Record
from restore.decide.difference import Difference
from restore.decide.remembered import NOTHING_KNOWN, Findings

_MISSING = "missing"
_RULES = {
    LoadedKind.NAMED: "named-file",
    LoadedKind.MODEL: "model-changed",
    LoadedKind.CODE: "code-file",
    LoadedKind.OTHER: "read-file",
}
_AS_READ, _ANOTHER, _UNKNOWN = "as it was read", "different", "without the key to compare it"
_CREDENTIAL = re.compile(r"/run/(?:user/[0-9]+/)?credentials/[^/]+/(.+)")  # systemd.exec(5)
_NOT_PLUGINS = {"console_scripts", "gui_scripts"}
_ENTRY_POINTS_BYTES = 256 << 10


def mapped(record: Record, findings: Findings = NOTHING_KNOWN) -> dict[str, str]:
    """Return, by path, what is here instead of each mapped file that differs, unless a restore makes it."""
    files = record.mapped_files
    expected = (f"{file.path} {file.size} {file.identity or file.mtime_ns}" for file in files)
    found = findings.find(
        expected,
        [file.path for file in files],
        lambda: {file.path: what for file in files if (what := difference(file))},
    )
    assert isinstance(found, dict)
    made = {*record.process.made}  # a restore makes them
    return {path: str(what) for path, what in found.items() if what != _MISSING or path not in made}


def compare(
    record: Record,
    given: Sequence[str],
    environment: Mapping[str, str],
    findings: Findings = NOTHING_KNOWN,
) -> list[Difference]:
    """Return the differences between what the server has loaded and what a start would load here.

    `given` is the command of today, if the user gave one; it starts in our working directory.
    """
    base = _directory(record, given)
    command = list(given or record.command)
    modules = record.loaded.modules()
    found: list[Difference] = []
    for directory in record.loaded.code:
        found += _code(directory, base, modules, findings)
    found += _search_path(record, [str(path) for path in packages.search_path(command, environment)])
    for kind in LoadedKind:
        files = [file for file in record.loaded.files if file.kind is kind]
        found += _files(files, [_place(file, base, environment) for file in files], findings)
    return [*found, *_model(record, base, environment, findings)]


def compare_secret_files(
    record: Record, given: Sequence[str], environment: Mapping[str, str], key: bytes
) -> list[Difference]:
    """Return the secret files of today that the restored process has not read.

    `key` is that of the process, b"" if it has none. The others are those of `compare`.
    """
    base = _directory(record, given)
    found = []
    for file in _secret(record.loaded.files):
        try:
            here = sampled.keyed_identity(_place(file, base, environment), key) if key else _UNKNOWN
        except (OSError, ValueError) as error:
            here = _what(error)
        if here != file.identity:
            shown = _ANOTHER if here.startswith(sampled.KEYED) else here
            found.append(Difference(_RULES[file.kind], file.path, _AS_READ, shown))
    return found


def _secret(files: Sequence[LoadedFile]) -> list[LoadedFile]:
    return [file for file in files if file.identity.startswith(sampled.KEYED)]


def _place(file: LoadedFile, base: str, environment: Mapping[str, str]) -> str:
    """Return where a file is here. systemd gives each unit's credentials a directory of their own."""
    credential = _CREDENTIAL.fullmatch(file.path)
    today = environment.get("CREDENTIALS_DIRECTORY")
    return posixpath.join(today, credential[1]) if credential and today else posixpath.join(base, file.path)


def _directory(record: Record, given: Sequence[str]) -> str:
    """Return the working directory of a start, as on the lower rungs."""
    if not given and os.access(f"{record.directory}/.", os.X_OK):
        return record.directory
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:
        return record.directory


def _remember(
    findings: Findings, expected: Iterator[str], paths: Sequence[str], differences: Iterator[Difference]
) -> list[Difference]:
    found = findings.find(expected, paths, lambda: [list(structs.astuple(each)) for each in differences])
    assert isinstance(found, list)
    return [Difference(*map(str, each)) for each in found if isinstance(each, list) and len(each) == 4]


def _code(
    recorded: CodeDirectory, base: str, modules: frozenset[str], findings: Findings
) -> list[Difference]:
    place = posixpath.normpath(posixpath.join(base, recorded.path))
    real = os.path.realpath(place)  # followed once, not thousands of times
    paths = [real, *(f"{real}/{path}" for path in recorded.files)]
    expected = [place, *recorded.files, *recorded.files.values(), *recorded.entries, *recorded.used]
    expected += [*recorded.distributions, *recorded.distributions.values(), *sorted(modules)]
    return _remember(findings, iter(expected), paths, _code_differences(recorded, place, modules))


def _code_differences(recorded: CodeDirectory, place: str, modules: frozenset[str]) -> Iterator[Difference]:
    try:
        distributions, entries = loaded.listing(place, modules)
    except OSError as error:
        if recorded.files:
            yield Difference("code-file", place, f"{len(recorded.files)} loaded files", _what(error))
        return
    yield from _packages(recorded, place, distributions)
    for name in sorted({*entries} - {*recorded.entries}):
        yield Difference("package", f"{place}/{name}", _MISSING, "there, and a start could run or load it")
    yield from _changed_code(recorded, place)


def _packages(recorded: CodeDirectory, place: str, here: Mapping[str, str]) -> Iterator[Difference]:
    for name in sorted({*here, *recorded.distributions}):
        was, now = recorded.distributions.get(name, _MISSING), here.get(name, _MISSING)
        if was != now:
            matters = name in recorded.used or (was == _MISSING and _has_plugins(place, name))
            yield Difference("package" if matters else "package-other", name, was, now)


def _has_plugins(place: str, name: str) -> bool:
    """Return whether a distribution has entry points other than commands: programs may load those."""
    for directory in Path(place).glob("*-*.*-info"):
        if loaded.normalized(directory.name.partition("-")[0]) == name:
            try:
                with open(directory / "entry_points.txt", "rb") as file:
                    lines = file.read(_ENTRY_POINTS_BYTES).decode(errors="replace").splitlines()
            except OSError:
                continue
            groups = {line.strip(" []") for line in lines if line.startswith("[")}
            return bool(groups - _NOT_PLUGINS)
    return False


def _changed_code(recorded: CodeDirectory, place: str) -> Iterator[Difference]:
    """Yield the first differing file of each package, with the number of others."""
    by_module: dict[str, list[tuple[str, str, str]]] = {}
    for path, was in recorded.files.items():
        try:
            here = sampled.short_digest(f"{place}/{path}")
        except (OSError, ValueError) as error:
            here = _what(error)
        if here != was:
            by_module.setdefault(loaded.module(path), []).append((path, was, here))
    for changed in by_module.values():
        path, was, here = changed[0]
        more = f" and {len(changed) - 1} others of its package" if len(changed) > 1 else ""
        yield Difference("code-file", f"{place}/{path}{more}", f"sha256:{was}", _shown(here))


def _search_path(record: Record, here: Sequence[str]) -> Iterator[Difference]:
    """Compare the directories in which a start looks for packages, if they are known."""
    recorded = record.loaded.search_path
    if not recorded or not here:
        return
    if missing := [path for path in recorded if path not in here]:
        yield Difference("package", "Python's search path", ", ".join(missing), f"not searched: {here[0]} is")
    modules = record.loaded.modules()
    for place in here:
        if place in recorded:
            continue
        try:
            distributions, entries = loaded.listing(place, modules)
        except OSError:
            continue
        yield from _packages(CodeDirectory(path=place), place, distributions)
        for name in entries:
            yield Difference(
                "package", f"{place}/{name}", _MISSING, "there, and a start could run or load it"
            )


def _files(files: Sequence[LoadedFile], places: Sequence[str], findings: Findings) -> list[Difference]:
    expected = (f"{file.kind} {file.path} {file.size} {file.identity}" for file in files)
    differences = (
        Difference(
            "model-file" if here == _MISSING and file.kind is LoadedKind.MODEL else _RULES[file.kind],
            file.path,
            _shown(file.identity),
            _shown(here),
        )
        for file, place in zip(files, places, strict=True)
        if (here := _other(place, file.size, file.identity))
    )
    found = _remember(findings, iter([*places, *expected]), places, differences)
    known = {each.field for each in found}
    unknown = [file.path for file in _secret(files) if file.path not in known]
    return found + [Difference("secret-unknown", path, _AS_READ, "to be compared") for path in unknown]


def _other(place: str, size: int, identity: str) -> str:
    """Return what a file is instead of a recorded one; "" if it is the same, as far as was recorded."""
    try:
        status = os.stat(place)  # noqa: PTH116
        if identity.startswith(sampled.KEYED):
            return ""
        if status.st_size != size:
            return f"{status.st_size:,} bytes"
        here = sampled.identity(place) if identity else ""
    except (OSError, ValueError) as error:
        return _what(error)
    return "" if here == identity else here


def _model(
    record: Record, base: str, environment: Mapping[str, str], findings: Findings
) -> Iterator[Difference]:
    """Compare the files of the model with those that a start would load."""
    missing, changed = ("model-reloaded",) * 2 if record.reloads else ("model-file", "model-changed")
    model = weights.recorded(record.weights)
    if model is None:
        return
    place, revision = weights.locate(model.name, model.asked, environment, base)
    if revision != model.revision and revision:
        yield Difference(changed, f"revision of {model.name}", model.revision, revision)
        return
    names = sorted(file.name for file in model.files)
    paths = [str(place), *(f"{place}/{name}" for name in names)]

    def differences() -> Iterator[Difference]:
        for file in model.files:
            path = f"{place}/{file.name}"
            if file.sha256 and weights.hub_digest(path) == file.sha256:
                continue
            if here := _other(path, file.size, file.identity):
                code = missing if here == _MISSING else changed
                yield Difference(code, path, f"{file.size:,} bytes, {_shown(file.identity)}", _shown(here))
        for name in sorted({*weights.names(place)} - {*names}) if not revision else ():
            yield Difference(changed, f"{place}/{name}", _MISSING, "there, and a start would find it")

    expected = [str(place), missing, *(f"{each.name} {each.size} {each.identity}" for each in model.files)]
    yield from _remember(findings, iter(expected), paths, differences())


def _what(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
        return _MISSING
    return error.strerror or str(error)


def _shown(identity: str) -> str:
    """Shorten a digest for people."""
    if len(identity) == 16 and identity.isalnum():
        return f"sha256:{identity}"
    kind, colon, digest = identity.partition(":")
    return f"{kind}:{digest[:16]}" if colon and len(digest) == 64 else identity
