# SPDX-License-Identifier: Apache-2.0
"""Describe for the record what a server has loaded: code, a model, and the files that its command names.

From the files that it has opened, without those that it has written itself, that are in its kernel caches, or
that are gone. Python opens `__pycache__/NAME.TAG.pyc` in place of `NAME.py` (PEP 3147), which is what counts.
"""

import contextlib
import os
import posixpath
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct, structs

from rekindle.errors import WorkloadError
from rekindle.node import loaded, packages, sampled
from rekindle.node.loaded import CodeDirectory, Loaded, LoadedFile, LoadedKind
from snapshot import secret_files

_SCRIPTS = (
    ".py",
    ".pyc",
    ".js",
    ".mjs",
    ".cjs",
    ".rb",
    ".pl",
    ".pm",
    ".lua",
    ".php",
    ".jar",
    ".class",
    ".sh",
)
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx")
# Made for each container, machine or boot, or by the package manager when libraries are installed.
_OF_THE_PLACE = {
    *("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab", "/etc/machine-id"),
    *("/etc/ld.so.cache",),
}
_BESIDE = ("/proc/", "/sys/", "/dev/")
_RUN = ("/run/", "/var/run/")  # only what is named or a secret is part of a deployment
_TOO_WIDE = {
    *("/", "/bin", "/boot", "/etc", "/home", "/lib", "/lib64", "/media", "/mnt", "/opt", "/root", "/sbin"),
    *("/run", "/srv", "/tmp", "/usr", "/usr/lib", "/usr/local", "/var"),  # noqa: S108
}

_CACHED = re.compile(r"(.*/)__pycache__/([^/]+?)\.[^./]+-[^./]+(?:\.opt-[^./]+)?\.pyc")
_PACKAGES = re.compile(r"(.*/(?:site-packages|dist-packages|lib/python3\.[0-9]+t?))/")
_NODE_PACKAGES = re.compile(r"(.*?/node_modules)/")
_HUB = re.compile(r"(.*/models--[^/]+)/(?:blobs|snapshots|refs)/")
# Kubernetes shows DIR/FILE as a link to DIR/..TIME/FILE, with a new TIME for every pod: the kubelet's
# AtomicWriter (pkg/volume/util/atomic_writer.go).
_ATOMIC = re.compile(r"/\.\.[0-9]{4}_[^/]+(?=/)")
_SEPARATORS = re.compile(r"""[=,:;"'{}\[\]\s]+""")
_WORDS_LIMIT = 10_000
_FILES_LIMIT = 20_000  # of each kind: more would make the record too large, and each restore slow
_OTHERS_LIMIT = 2_000
# What compilers read: it is in the kernels that they made, and those are in their caches.
_HEADERS = (".h", ".hpp", ".hh", ".cuh", ".inl", ".inc", ".pch", ".gch")
_OF_COMPILERS = ("/usr/include/", "/usr/lib/gcc/", "/usr/local/include/", "/usr/local/cuda/include/")
_OF_THE_SHELL = {"_", "SHELL"}


class Sources(Struct, frozen=True, kw_only=True):
    """A server's command and files, and the means to tell the files apart.

    `opened` are the paths of the files that it has opened, `written` the devices and inodes of those that it
    has written. `since_ns` is when it was started. `left_out` are directories whose files do not count.
    `mapped` are the files that are compared because they are mapped, `described` those of the model. Unless
    `watched`, it is unknown what was opened: the files that the command names count, and every package.
    `file_key` is the key to the digests of secret files; without one, these are always different.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    directory: str
    opened: Iterable[str]
    written: Collection[tuple[int, int]]
    since_ns: int
    left_out: Sequence[str]
    mapped: Collection[str]
    described: Collection[str] = ()
    watched: bool = True
    file_key: bytes = b""


def describe(sources: Sources) -> tuple[Loaded, int]:
    """Describe what a server has loaded; also return the number of files that were left out as too many.

    Raises WorkloadError if a file of it was changed since the server was started: then it is unknown what the
    server has read.
    """
    names = _Names.of(sources)
    code: dict[str, dict[str, str]] = {directory: {} for directory in names.search_path}
    files: dict[str, LoadedFile] = {}
    room = {kind: _OTHERS_LIMIT if kind is LoadedKind.OTHER else _FILES_LIMIT for kind in LoadedKind}
    left_out = 0
    opened = _sources(sources) if sources.watched else set(names.files)
    for path in sorted(opened):
        status = _compared(path, sources, names)
        if status is None:
            continue
        kind = _kind(path, names)
        if kind is not LoadedKind.OTHER and status.st_ctime_ns > sources.since_ns:
            raise WorkloadError(
                f"{path} was changed while the server was running",
                cause="it is unknown whether the server has loaded the old file or the new one",
                hint="make the snapshot again",
            )
        small = status.st_size <= sampled.WHOLE_BYTES
        secret = small and _is_secret(path, kind, names)
        if path in sources.mapped and names.is_plain(path) and not secret:
            continue
        if not room[kind]:
            left_out += 1
            continue
        room[kind] -= 1
        with contextlib.suppress(FileNotFoundError):
            if kind is LoadedKind.CODE and small:
                root = _root(path)
                place = code.setdefault(names.roots.get(root, root), {})
                place[posixpath.relpath(path, root)] = sampled.short_digest(path)
            if kind is not LoadedKind.CODE or not small or path in names.files:
                named = names.name(path)
                here = LoadedKind.NAMED if path in names.files else kind
                identity = _keyed(path, sources) if secret else sampled.identity(path)
                size = 0 if secret else status.st_size
                files[named] = LoadedFile(path=named, size=size, identity=identity, kind=here)
    modules = frozenset(loaded.module(path) for found in code.values() for path in found)
    directories = [_directory(path, found, modules) for path, found in sorted(code.items())]
    if not sources.watched:
        directories = [structs.replace(each, used=tuple(each.distributions)) for each in directories]
    described = Loaded(
        search_path=tuple(names.search_path),
        code=tuple(directories),
        files=tuple(files[path] for path in sorted(files)),
    )
    return described, left_out


class _Names(Struct, frozen=True, kw_only=True):
    """The names of files in the command: by real path, the files and directories that its words name.

    `named_by` are the options and variables whose values the files are.
    """

    files: Mapping[str, str]
    named_by: Mapping[str, Collection[str]]
    directories: Mapping[str, str]
    search_path: Sequence[str]
    roots: Mapping[str, str]

    @classmethod
    def of(cls, sources: Sources) -> "_Names":
        files: dict[str, str] = {}
        directories: dict[str, str] = {}
        roots: dict[str, str] = {}
        named_by: dict[str, set[str]] = {}
        home = sources.environment.get("HOME")
        for name, word in _options(sources.argv):
            named_by.setdefault(os.path.realpath(posixpath.join(sources.directory, word)), set()).add(name)
        for word in _words(sources):
            real = os.path.realpath(posixpath.join(sources.directory, word))
            if os.path.isfile(real) and real not in sources.mapped:  # noqa: PTH113
                files.setdefault(real, word)
                if posixpath.basename(real) == posixpath.basename(word):
                    roots.setdefault(posixpath.dirname(real), posixpath.dirname(word) or ".")
            elif os.path.isdir(real) and real not in {*_TOO_WIDE, home}:  # noqa: PTH112
                directories.setdefault(real, word)
        for name, value in sources.environment.items():
            if value.startswith("/") and name not in _OF_THE_SHELL and os.path.isfile(value):  # noqa: PTH113
                files.setdefault(os.path.realpath(value), value)
                named_by.setdefault(os.path.realpath(value), set()).add(name)
        if sources.directory not in _TOO_WIDE:
            roots.setdefault(sources.directory, ".")  # where `python -m` looks first
        found = [str(path) for path in packages.search_path(sources.argv, sources.environment)]
        roots |= {os.path.realpath(path): path for path in found}
        return cls(files=files, named_by=named_by, directories=directories, search_path=found, roots=roots)

    def is_plain(self, path: str) -> bool:
        """Return whether the command does not call a file or its directory otherwise, by way of a link."""
        root = _root(path)
        return self.name(path) == path and self.roots.get(root, root) == root

    def within(self, path: str) -> bool:
        """Return whether a word names a file or a directory above it."""
        return path in self.files or any(path.startswith(f"{each}/") for each in self.directories)

    def name(self, path: str) -> str:
        """Return a path with what the command calls its beginning."""
        if path in self.files:
            return self.files[path]
        above = [each for each in self.directories if path.startswith(f"{each}/")]
        if above:
            longest = max(above, key=len)
            path = self.directories[longest].rstrip("/") + path[len(longest) :]
        return _ATOMIC.sub("", path)


def _words(sources: Sources) -> list[str]:
    """Return the words of the command that may name files, in whole and in parts, without its program's.

    Parts are values after `=`, items of lists, and texts in JSON. A program that is a script counts.
    """
    program = packages.program(sources.argv, sources.environment)
    words = [str(program)] if program else []
    for word in sources.argv[1:]:
        words += [word, *_SEPARATORS.split(word)]
    return [word for word in dict.fromkeys(words[:_WORDS_LIMIT]) if word and "\0" not in word]


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the values of a command that may name files, with the option or variable of each."""
    option = ""
    for word in argv[1:_WORDS_LIMIT]:
        name, equals, value = word.partition("=")
        if equals:
            found = name, value
        elif word.startswith("-"):
            option = word
            continue
        else:
            found = option, word
        if found[1] and "\0" not in found[1]:
            yield found


def _sources(sources: Sources) -> set[str]:
    """Return the opened paths, with the sources of Python's cached modules in their place."""
    prefix = sources.environment.get("PYTHONPYCACHEPREFIX", "")
    found = set()
    for path in sources.opened:
        source = path
        if match := _CACHED.fullmatch(path):
            source = f"{match[1]}{match[2]}.py"
        elif prefix and path.startswith(f"{prefix.rstrip('/')}/") and path.endswith(".pyc"):
            source = re.sub(r"\.[^./]+-[^./]+(?:\.opt-[^./]+)?\.pyc$", ".py", path[len(prefix.rstrip("/")) :])
        found.add(source if source == path or os.path.exists(source) else path)  # noqa: PTH110
    hubs = {match[1] for path in found if (match := _HUB.match(path))}
    return found | {str(path) for hub in hubs for path in Path(hub, "refs").rglob("*")}


def _compared(path: str, sources: Sources, names: _Names) -> os.stat_result | None:
    """Return the status of a file that a start would read again; None for any other."""
    if path.endswith(_HEADERS) or path.startswith(_OF_COMPILERS):
        return None
    if path in _OF_THE_PLACE or path in sources.described or path.startswith((*_BESIDE, *sources.left_out)):
        return None
    if secret_files.is_issued_anew(path):
        return None
    if path.startswith(_RUN) and not (names.within(path) or secret_files.PLACES.match(path)):
        return None
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    # What a download has left in the hub's cache is what a start would find, too.
    written = (status.st_dev, status.st_ino) in sources.written and not _HUB.match(path)
    return status if stat.S_ISREG(status.st_mode) and not written else None


def _kind(path: str, names: _Names) -> LoadedKind:
    installed = _PACKAGES.match(path)
    if path.endswith(_SCRIPTS) or (installed and "/RECORD" not in path) or _NODE_PACKAGES.match(path):
        return LoadedKind.CODE
    if names.within(path) or secret_files.PLACES.match(path):
        return LoadedKind.NAMED
    if path.endswith(_WEIGHTS) or _HUB.match(path):
        return LoadedKind.MODEL
    return LoadedKind.OTHER


def _is_secret(path: str, kind: LoadedKind, names: _Names) -> bool:
    """Tell whether a small file may hold a secret that a person has chosen, and so could guess."""
    if kind not in {LoadedKind.NAMED, LoadedKind.OTHER}:
        return False
    content = None
    if kind is LoadedKind.NAMED:
        with contextlib.suppress(OSError):
            content = Path(path).read_bytes()
    return secret_files.is_secret(path, names.named_by.get(path, ()), content)


def _keyed(path: str, sources: Sources) -> str:
    return sampled.keyed_identity(path, sources.file_key) if sources.file_key else sampled.KEYED


def _is_package(directory: str) -> bool:
    return os.path.exists(f"{directory}/__init__.py")  # noqa: PTH110


def _root(path: str) -> str:
    """Return the directory of the search path that a file of code was found in."""
    if match := _PACKAGES.match(path) or _NODE_PACKAGES.match(path):
        return match[1]
    directory = posixpath.dirname(path)
    while path.endswith((".py", ".pyc")) and directory != "/" and _is_package(directory):
        directory = posixpath.dirname(directory)
    return directory


def _directory(path: str, files: Mapping[str, str], modules: Collection[str]) -> CodeDirectory:
    try:
        distributions, entries = loaded.listing(path, modules)
    except OSError:
        distributions, entries = {}, []
    here = {loaded.module(each) for each in files}
    used = sorted({name for name, provided in _provided(path) if here & provided})
    return CodeDirectory(
        path=path, files=files, distributions=distributions, used=tuple(used), entries=tuple(entries)
    )


def _provided(directory: str) -> Iterator[tuple[str, set[str]]]:
    """Yield the name and the top-level modules of each distribution in a directory."""
    for place in Path(directory).glob("*-*.*-info"):
        name = loaded.normalized(place.name.partition("-")[0])
        modules = {name.replace("-", "_")}  # all that is known if its metadata do not tell
        for source in ("RECORD", "top_level.txt"):
            with contextlib.suppress(OSError):
                text = (place / source).read_text(errors="replace")
                modules |= {loaded.module(line) for line in text.splitlines()}
        yield name, modules
