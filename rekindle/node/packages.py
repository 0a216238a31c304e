# SPDX-License-Identifier: Apache-2.0
"""Find the versions of vLLM, torch, Triton and others that a command would run with, from their metadata.

Nothing is imported or run: importing torch takes more than a second, and a restore needs the versions before
it has decided to start anything. A command leads to its packages as follows, with the specifications:

- the first line of a script names its interpreter: execve(2), with one optional argument; env(1). For
  a long or movable path it names a shell, which passes the file to Python in its second line: distlib's
  `ScriptMaker._build_shebang`, used by pip, and `format_shebang` of uv's `uv-install-wheel`.
- `pyvenv.cfg` beside or above the interpreter makes a virtual environment: PEP 405.
- the directories that it searches, in order: Python's documentation of `site`; PEP 370 for the user's own;
  Debian's Python policy for `dist-packages`.
- `NAME-VERSION.dist-info` is an installed distribution: "Recording installed projects" in PyPA's
  specifications (PEP 376); its name is escaped as in a wheel's (PEP 427) and compared as in PEP 503.
- `torch/version.py` names the platform of torch: `tools/generate_torch_version.py` in torch's sources.

Ignored are `.pth` files, PYTHONHOME, the working directory, and other shell scripts.
"""

import contextlib
import itertools
import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from rekindle.command_line import UnclearCommand, unwrap

# Our names for distributions. Several distributions provide the same package.
_DISTRIBUTIONS = {
    "vllm": "vllm",
    "torch": "torch",
    "triton": "triton",
    "pytorch-triton": "triton",
    "pytorch-triton-rocm": "triton",
    "triton-rocm": "triton",
    "flashinfer-python": "flashinfer",
    "deep-gemm": "deep-gemm",
    "sglang": "sglang",
    "transformers": "transformers",
    "nvidia-nccl-cu12": "nccl",
    "nvidia-nccl-cu13": "nccl",
}

_HEAD_BYTES = 8 << 10
_ENTRIES_LIMIT = 50_000
# The longest chain of scripts and env(1). Linux follows four scripts.
_STEPS_LIMIT = 8
# The errors of pathlib: of the system; for a NUL in a name; for a loop of links, up to Python 3.12.
_UNREADABLE = (OSError, ValueError, RuntimeError)

_VERSION = r"[0-9][0-9A-Za-z.+!_]{0,63}"
_PACKAGE = re.compile(rf"torch|([0-9A-Za-z][0-9A-Za-z._-]{{0,99}})-({_VERSION})\.dist-info")
_LIBRARY = re.compile(r"python(3\.[0-9]{1,3}t?)")
_BUILT_FOR = re.compile(
    r"""^(cuda|hip)[ \t]*(?::[^=\n]{0,80})?=[ \t]*(["'])([0-9][0-9A-Za-z.+_-]{0,63})\2[ \t]*$""",
    re.MULTILINE,
)
# `"$(dirname -- "$(realpath -- "$0")")"` is the directory of the script, in a movable environment.
_OWN_DIRECTORY = re.compile(r'\$\(dirname(?: --)? "\$\(realpath(?: --)? "\$0"\)"\)')
_OWN_DIRECTORY_WORD = "$OWN_DIRECTORY"


def versions(argv: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the versions that a command would run with, as {"python": "3.11", "torch": "2.13.0+cpu"}.

    The names are "python" (major and minor version only), vllm, torch, triton, flashinfer, deep-gemm,
    sglang, transformers, nccl, and "cuda" or "hip", for which torch was built. Names that were not found are
    left out: all of them for a command that is not Python's. Raises nothing. Relative paths start at the
    working directory.
    """
    python = _python(argv, environment)
    if python is None:
        return {}
    version, directories = _search_path(python)
    found = {"python": version} if version else {}
    distributions: dict[str, str] = {}
    built_for: dict[str, str] | None = None
    for directory in directories:
        here, has_torch = _installed(directory)
        distributions = here | distributions  # the first directory on the path wins
        if has_torch and built_for is None:
            text = _head(directory / "torch" / "version.py")
            built_for = None if text is None else {m[1]: m[3] for m in _BUILT_FOR.finditer(_text(text))}
    names = dict.fromkeys(_DISTRIBUTIONS.values())
    return found | {name: distributions[name] for name in names if name in distributions} | (built_for or {})


class _Python(Struct, frozen=True, kw_only=True):
    """An interpreter as it would be called, with symbolic links in its path not resolved."""

    path: Path
    options: frozenset[str]
    environment: Mapping[str, str]

    def variable(self, name: str) -> str:
        """Return a PYTHON* variable; "" if it is not set or the options -E or -I ignore it."""
        return "" if self.options & {"E", "I"} else self.environment.get(name, "")


def major_minor(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version, the ones that a change of features increments."""
    return tuple(int(number) for number in re.findall(r"\d+", version[:64])[:2])


def interpreter(argv: Sequence[str], environment: Mapping[str, str]) -> Path | None:
    """Return the Python interpreter that a command runs; None if unknown."""
    python = _python(argv, environment)
    return python.path if python else None


def program(argv: Sequence[str], environment: Mapping[str, str]) -> Path | None:
    """Return the file that a command executes; None if there is none."""
    return _find(argv[0], environment) if argv else None


def search_path(argv: Sequence[str], environment: Mapping[str, str]) -> list[Path]:
    """Return the directories in which a command finds installed packages; [] if it is not Python's."""
    python = _python(argv, environment)
    return _search_path(python)[1] if python else []


def _python(argv: Sequence[str], environment: Mapping[str, str]) -> _Python | None:
    """Follow a command through scripts and env(1) to its Python interpreter."""
    try:
        command = unwrap(argv, environment)
    except UnclearCommand:
        return None
    words, environment = list(command.argv), command.environment
    for _ in range(_STEPS_LIMIT):
        path = _find(words[0], environment) if words else None
        head = _head(path) if path else None
        if path is None or head is None:
            return None
        if head.startswith(b"#!"):
            front = _interpreter(path, _text(head))
            words = [*front, *words[1:]] if front else []
        elif path.name == "env":
            words, environment = _after_env(words[1:], environment)
        elif path.name.startswith("python"):
            return _Python(path=_absolute(path), options=_options(words[1:]), environment=environment)
        else:
            return None
    return None


def _find(command: str, environment: Mapping[str, str]) -> Path | None:
    """Return the file that execvp(3) would execute."""
    if "/" in command:
        return Path(command)
    for directory in environment.get("PATH", os.defpath).split(os.pathsep):
        path = Path(directory or ".", command)
        try:
            if os.access(path, os.X_OK) and path.is_file():
                return path
        except _UNREADABLE:
            continue
    return None


def _interpreter(script: Path, head: str) -> list[str]:
    """Return the command that a script's first lines put in front of its arguments; [] if there is none."""
    first, _, rest = head.removeprefix("#!").partition("\n")
    second = rest.partition("\n")[0]
    interpreter, *argument = first.strip(" \t").split(None, 1)[:2] or [""]
    if "/" not in interpreter:
        return []
    if not second.startswith("'''exec' "):
        return [interpreter, *argument, str(script)]
    try:
        words = shlex.split(_OWN_DIRECTORY.sub(_OWN_DIRECTORY_WORD, second))
        own = str(script.resolve().parent)
    except _UNREADABLE:
        return []
    if "$0" not in words:
        return []
    return [word.replace(_OWN_DIRECTORY_WORD, own) for word in words[1 : words.index("$0")]] + [str(script)]


def _after_env(words: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return the command that env(1) would run and its environment. Knows assignments, -i and -S."""
    left, here = list(words), dict(environment)
    while left:
        word = left.pop(0)
        if word in {"-i", "-", "--ignore-environment"}:
            here = {}
        elif word.startswith(("-S", "--split-string")):
            text = word.removeprefix("-S").removeprefix("--split-string").removeprefix("=")
            try:
                left = shlex.split(text or left.pop(0)) + left
            except (ValueError, IndexError):
                return [], here
        elif word.startswith("-"):
            return [], here
        elif "=" in word:
            name, _, value = word.partition("=")
            here[name] = value
        else:
            return [word, *left], here
    return [], here


def _options(words: Sequence[str]) -> frozenset[str]:
    """Return the letters of Python's options before the program; one word may hold several, as -Es does."""
    letters: set[str] = set()
    left = iter(words)
    for word in left:
        if not (word.startswith("-") and word[1:2].isalpha()):
            break
        flags = "".join(itertools.takewhile(lambda letter: letter not in "mcWX", word[1:]))
        letters.update(flags)
        rest = word[1 + len(flags) :]
        if rest[:1] in {"m", "c"}:
            break
        if len(rest) == 1:  # -W or -X, whose value is the next word
            next(left, None)
    return frozenset(letters)


def _search_path(python: _Python) -> tuple[str, list[Path]]:
    """Return Python's version, or "" if unknown, and the directories that it searches, each once."""
    prefix = python.path.parent.parent
    venv = _venv(python.path.parent)
    home = Path(venv["home"]) if venv and "home" in venv else _resolved(python.path).parent
    base = _resolved(home).parent
    version = _version(python.path, venv or {}, prefix)
    added = python.variable("PYTHONPATH")
    candidates = [Path(entry or ".") for entry in added.split(os.pathsep)] if added else []
    if version and venv is not None:
        candidates += _site_packages(prefix, version)
    if version and (venv is None or venv.get("include-system-site-packages", "true").lower() == "true"):
        candidates += [*_user_site(python, version), *_site_packages(base, version)]
    return version, list(_distinct(candidates))


def _venv(directory: Path) -> dict[str, str] | None:
    """Read the pyvenv.cfg of the environment that an interpreter's directory belongs to, if any."""
    for place in (directory, directory.parent):
        text = _head(place / "pyvenv.cfg")
        if text is not None:
            lines = (line.partition("=") for line in _text(text).splitlines() if "=" in line)
            return {key.strip().lower(): value.strip() for key, _, value in lines}
    return None


def _version(path: Path, venv: Mapping[str, str], prefix: Path) -> str:
    """Return Python's major and minor version, or "" if unknown.

    The path usually resolves to python3.11 or the like, but `python3` may be a copy in an environment.
    """
    known = _LIBRARY.match(_resolved(path).name) or re.match(
        r"(3\.[0-9]{1,3})\b", venv.get("version") or venv.get("version_info", "")
    )
    if known:
        return known[1]
    libraries = [match[1] for match in _directories(prefix / "lib", _LIBRARY)]
    return libraries[0] if len(libraries) == 1 else ""


def _user_site(python: _Python, version: str) -> Iterator[Path]:
    if python.options & {"I", "s"} or python.variable("PYTHONNOUSERSITE"):
        return
    home = python.environment.get("HOME")
    base = python.environment.get("PYTHONUSERBASE") or (home and f"{home}/.local")  # also with -E
    if base:
        yield Path(base, "lib", f"python{version}", "site-packages")


def _site_packages(prefix: Path, version: str) -> Iterator[Path]:
    """Yield the directories for packages below a prefix; each Linux distribution has some of them."""
    name = f"python{version}"
    yield prefix / "local" / "lib" / name / "dist-packages"
    yield prefix / "lib64" / name / "site-packages"
    yield prefix / "lib" / name / "site-packages"
    yield prefix / "lib" / "python3" / "dist-packages"
    yield prefix / "lib" / name / "dist-packages"


def _distinct(candidates: Sequence[Path]) -> Iterator[Path]:
    """Yield the directories that exist, each once: lib64 is often a link to lib."""
    seen = set()
    for path in candidates:
        try:
            there = path.stat()
        except _UNREADABLE:
            continue
        if stat.S_ISDIR(there.st_mode) and (there.st_dev, there.st_ino) not in seen:
            seen.add((there.st_dev, there.st_ino))
            yield path


def _installed(directory: Path) -> tuple[dict[str, str], bool]:
    """Return the versions of the distributions in a directory, and whether it has a package `torch`.

    A broken upgrade can leave several versions of one; the highest is returned, since the order of entries
    differs between nodes.
    """
    found: dict[str, str] = {}
    has_torch = False
    for match in _directories(directory, _PACKAGE):
        if match[1] is None:
            has_torch = True
        elif known := _DISTRIBUTIONS.get(re.sub(r"[-_.]+", "-", match[1]).lower()):
            found[known] = max(match[2], found.get(known, ""), key=_sort_key)
    return found, has_torch


def _sort_key(version: str) -> tuple[list[int], str]:
    return [int(number) for number in re.findall(r"[0-9]+", version)], version


def _directories(directory: Path, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Yield the directories in a directory whose names match, among at most _ENTRIES_LIMIT entries."""
    with contextlib.suppress(*_UNREADABLE), os.scandir(directory) as entries:
        for entry in itertools.islice(entries, _ENTRIES_LIMIT):
            if (match := pattern.fullmatch(entry.name)) and _is_directory(entry):
                yield match


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except _UNREADABLE:  # the working directory is gone
        return path


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except _UNREADABLE:
        return path


def _head(path: Path) -> bytes | None:
    """Read the first bytes of a regular file; return None if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except _UNREADABLE:
        return None
    try:
        return os.pread(fd, _HEAD_BYTES, 0) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    except OSError:
        return None
    finally:
        os.close(fd)


def _text(content: bytes) -> str:
    return content.decode(errors="surrogateescape")
