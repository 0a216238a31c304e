# SPDX-License-Identifier: Apache-2.0
"""Unwrap a command: find the program that a command line comes to, with its words and its variables.

`tini -- env X=1 numactl -N 0 sh -c 'exec vllm serve m'` comes to `vllm serve m`. Nothing is run: the
options of known wrappers are read as their manual pages describe them, and the text of a shell by
`rekindle.shell_text`. An unknown wrapper is taken for the program itself; an unknown option of a known one
makes the command unclear.
"""

import contextlib
import functools
import posixpath
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct, field

from rekindle.shell_text import UnclearCommand, last_command

__all__ = ["UnclearCommand", "Unwrapped", "unwrap", "with_words"]

_DEPTH_LIMIT = 8
_SHELLS = frozenset({"sh", "bash", "dash", "ash", "zsh", "ksh", "busybox"})
_VARIABLE = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)")
_ASSIGNMENT = re.compile(r"([^=\s-][^=]*)=(.*)", re.DOTALL)


class Unwrapped(Struct, frozen=True, kw_only=True):
    """A command without its wrappers.

    `argv` is the program and its words. `wrappers` are the words before it that change how it runs, such as
    numactl's, without shells, `env` and `exec`. `environment` is that of the program. `assigned` are the
    variables that the command itself sets, and `unset` those that it removes, `*` for all. `directory` is
    relative to ours, "" if it is ours.
    """

    argv: tuple[str, ...]
    wrappers: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    assigned: Mapping[str, str] = field(default_factory=dict)
    unset: frozenset[str] = frozenset()
    directory: str = ""


class _Reading(Struct, kw_only=True):
    """The words that are left, and what the wrappers before them did."""

    words: list[str]
    environment: dict[str, str]
    wrappers: list[str] = field(default_factory=list)
    assigned: dict[str, str] = field(default_factory=dict)
    unset: set[str] = field(default_factory=set)
    directory: str = ""

    def assign(self, name: str, value: str) -> None:
        self.environment[name] = self.assigned[name] = value
        self.unset.discard(name)

    def remove(self, name: str) -> None:
        self.environment.pop(name, None)
        self.assigned.pop(name, None)
        self.unset.add(name)

    def enter(self, directory: str) -> None:
        self.directory = posixpath.join(self.directory, directory)


def unwrap(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> Unwrapped:
    """Return the program that a command starts in an environment. Raises UnclearCommand."""
    reading = _Reading(words=list(argv), environment=dict(environment or {}))
    for _ in range(_DEPTH_LIMIT):
        name = posixpath.basename(reading.words[0]) if reading.words else ""
        wrapper = "shell" if name in _SHELLS and len(reading.words) > 1 else name
        read = _WRAPPERS.get(wrapper)
        if read is None or not read(reading):
            return Unwrapped(
                argv=tuple(reading.words),
                wrappers=tuple(reading.wrappers),
                environment=reading.environment,
                assigned=reading.assigned,
                unset=frozenset(reading.unset),
                directory=reading.directory,
            )
        if not reading.words:
            raise UnclearCommand(f"{name} starts no command")
    raise UnclearCommand(f"more than {_DEPTH_LIMIT} wrappers")


def variables_in(argv: Sequence[str]) -> frozenset[str]:
    """Return the variables whose values a shell may put into a command."""
    return frozenset(match[1] for word in argv for match in _VARIABLE.finditer(word))


def with_words(argv: Sequence[str], added: Sequence[str]) -> list[str]:
    """Return a command whose program gets more words at its end. Raises UnclearCommand."""
    plain = [*argv, *added]
    wanted = (*unwrap(argv).argv, *added)
    if unwrap(plain).argv == wanted:
        return plain
    for place, word in enumerate(argv):  # into the text of a shell
        longer = [*argv[:place], f"{word.rstrip().rstrip(';')} {shlex.join(added)}", *argv[place + 1 :]]
        with contextlib.suppress(UnclearCommand):
            if unwrap(longer).argv == wanted:
                return longer
    raise UnclearCommand("the shell's text cannot be given more words")


def _shell(reading: _Reading) -> bool:
    """Read `sh [options] -c TEXT [NAME [ARGUMENT…]]`. A script is a program of its own."""
    at = _text_index(reading.words)
    if at is None:
        return False
    text, positional = reading.words[at], reading.words[at + 1 :]
    reading.words, assigned, directory = last_command(text, reading.environment, positional)
    for name, value in assigned.items():
        reading.assign(name, value)
    if directory:
        reading.enter(directory)
    return True


def _text_index(words: Sequence[str]) -> int | None:
    """Return the index of a shell's text; None if it runs a script or is interactive."""
    at = 2 if posixpath.basename(words[0]) == "busybox" else 1
    has_text = False
    while at < len(words) and words[at].startswith(("-", "+")) and words[at] != "--":
        word = words[at]
        if not word.startswith("--"):
            has_text = has_text or (word.startswith("-") and "c" in word)
            at += word.count("o") + word.count("O")  # each takes the name of a setting
        at += 1
    if at < len(words) and words[at] == "--":
        at += 1
    return at if has_text and at < len(words) else None


def _env(reading: _Reading) -> bool:
    words = reading.words[1:]
    while words:
        word = words.pop(0)
        if word in {"-i", "-", "--ignore-environment"}:
            reading.environment.clear()
            reading.assigned.clear()
            reading.unset.add("*")
        elif word == "--":
            break
        elif (value := _value(word, words, "u", "unset")) is not None:
            reading.remove(value)
        elif (value := _value(word, words, "C", "chdir")) is not None:
            reading.enter(value)
        elif (value := _value(word, words, "S", "split-string")) is not None:
            words = [*_split(value), *words]
        elif word.startswith("-"):
            raise UnclearCommand(f"the option {word} of env")
        elif not _assign(reading, word):
            words.insert(0, word)
            break
    while words and _assign(reading, words[0]):
        del words[0]
    reading.words = words
    return True


def _assign(reading: _Reading, word: str) -> bool:
    found = _ASSIGNMENT.fullmatch(word)
    if found:
        reading.assign(found[1], found[2])
    return found is not None


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        raise UnclearCommand("an open quote in the words of env -S") from None


def _value(word: str, rest: list[str], short: str, long: str) -> str | None:
    """Return the value of an option in any of its forms, taken from `rest` if it is a word of its own."""
    if word in {f"-{short}", f"--{long}"}:
        if not rest:
            raise UnclearCommand(f"{word} without its value")
        return rest.pop(0)
    if word.startswith(f"--{long}="):
        return word.partition("=")[2]
    return word[2:] if word.startswith(f"-{short}") and not word.startswith("--") else None


class _Options(Struct, frozen=True):
    """The options of a wrapper, with a value or without, and the words between them and the command."""

    flags: str = ""
    valued: str = ""
    long_flags: tuple[str, ...] = ()
    long_valued: tuple[str, ...] = ()
    words: int = 0
    numbers: bool = False  # -10 is an option
    first: str = ""  # a word that must come first: `uv run`
    changes: bool = True  # it changes how the program runs


def _wrapper(options: _Options, reading: _Reading) -> bool:
    """Read a wrapper whose options end at the first word that is none, as with getopt's `+`."""
    name = reading.words[0]
    words = reading.words[1:]
    if options.first:
        if words[:1] != [options.first]:
            return False
        words = words[1:]
    while words and words[0].startswith("-") and words[0] not in {"-", "--"}:
        word = words.pop(0)
        if word.startswith("--"):
            long, equals, _ = word[2:].partition("=")
            if long in options.long_valued:
                if not equals and words:
                    del words[0]
            elif long not in options.long_flags:
                raise UnclearCommand(f"the option {word} of {posixpath.basename(name)}")
        elif not (options.numbers and word[1:].lstrip("-").isdecimal()):
            _letters(options, name, word, words)
    if words[:1] == ["--"]:
        del words[0]
    del words[: options.words]
    if options.changes:
        used = len(reading.words) - len(words)
        reading.wrappers += [posixpath.basename(name), *reading.words[1:used]]
    reading.words = words
    return True


def _letters(options: _Options, name: str, word: str, words: list[str]) -> None:
    """Read a word of short options; the rest of it or the next word is the value of one that takes one."""
    for index, letter in enumerate(word[1:], start=1):
        if letter in options.valued:
            if index == len(word) - 1 and words:
                del words[0]
            return
        if letter not in options.flags:
            raise UnclearCommand(f"the option {word} of {posixpath.basename(name)}")


def _uv(reading: _Reading) -> bool:
    """Read `uv run`, which can also run a module."""
    if "-m" in reading.words[2:] or "--module" in reading.words[2:]:
        raise UnclearCommand("the option -m of uv run (write: uv run python -m …)")
    return _wrapper(_UV_RUN, reading)


_UV_RUN = _Options(
    first="run",
    flags="qvn",
    valued="pPw",
    long_flags=(
        *("quiet", "verbose", "no-sync", "frozen", "locked", "offline", "active", "isolated", "no-project"),
        *(
            "no-env-file",
            "no-dev",
            "exact",
            "no-cache",
            "native-tls",
            "all-extras",
            "all-groups",
            "no-config",
        ),
        *("managed-python", "no-managed-python", "no-progress", "compile-bytecode", "no-editable"),
    ),
    long_valued=(
        *(
            "with",
            "with-editable",
            "with-requirements",
            "python",
            "project",
            "directory",
            "extra",
            "no-extra",
        ),
        *("group", "no-group", "only-group", "env-file", "package", "index", "index-url", "extra-index-url"),
        *("default-index", "find-links", "cache-dir", "config-file", "torch-backend", "index-strategy"),
    ),
)
_RUNNERS = _Options(first="run", flags="qv", long_flags=("quiet", "verbose", "no-ansi"))

_TABLE: Mapping[str, _Options] = {
    # numactl(8), taskset(1), nice(1), ionice(1), chrt(1), prlimit(1)
    "numactl": _Options(
        flags="alsbHh",
        valued="NmCipPw",
        long_flags=("all", "localalloc", "balancing"),
        long_valued=(
            *("cpunodebind", "membind", "physcpubind", "interleave", "preferred", "preferred-many"),
            "weighted-interleave",
        ),
    ),
    "taskset": _Options(flags="ac", long_flags=("all-tasks", "cpu-list"), words=1),
    "nice": _Options(valued="n", long_valued=("adjustment",), numbers=True),
    "ionice": _Options(flags="t", valued="cn", long_flags=("ignore",), long_valued=("class", "classdata")),
    "chrt": _Options(
        flags="abdfiorReT",
        long_flags=("all-tasks", "batch", "deadline", "fifo", "idle", "other", "rr", "reset-on-fork"),
        words=1,
    ),
    # tini, dumb-init: their READMEs
    **dict.fromkeys(
        ("tini", "tini-static", "docker-init"),
        _Options(flags="svgw", valued="pe", changes=False),
    ),
    "catatonit": _Options(flags="gP", changes=False),
    "dumb-init": _Options(
        flags="cv",
        valued="r",
        long_flags=("single-child", "verbose"),
        long_valued=("rewrite",),
        changes=False,
    ),
    # nohup(1), setsid(1), stdbuf(1), timeout(1)
    "nohup": _Options(changes=False),
    "setsid": _Options(flags="cfw", long_flags=("ctty", "fork", "wait"), changes=False),
    "stdbuf": _Options(valued="ioe", long_valued=("input", "output", "error"), changes=False),
    "timeout": _Options(
        flags="v",
        valued="ks",
        long_flags=("foreground", "preserve-status", "verbose"),
        long_valued=("kill-after", "signal"),
        words=1,
    ),
    # setpriv(1), choom(1)
    "setpriv": _Options(
        flags="d",
        long_flags=(
            *("clear-groups", "keep-groups", "init-groups", "no-new-privs", "nnp", "reset-env"),
            *("list-caps", "dump"),
        ),
        long_valued=(
            *("ambient-caps", "bounding-set", "inh-caps", "groups", "ruid", "euid", "rgid", "egid"),
            *("reuid", "regid", "securebits", "pdeathsig", "selinux-label", "apparmor-profile"),
        ),
    ),
    "choom": _Options(valued="n", long_valued=("adjust",)),
    # gosu, su-exec: the user is the first word
    **dict.fromkeys(("gosu", "su-exec"), _Options(words=1)),
    **dict.fromkeys(("poetry", "pipenv", "pdm", "hatch", "pixi", "rye"), _RUNNERS),
    "conda": _Options(
        first="run",
        flags="v",
        valued="np",
        long_flags=("no-capture-output", "live-stream", "verbose"),
        long_valued=("name", "prefix", "cwd"),
    ),
}

_WRAPPERS: Mapping[str, Callable[[_Reading], bool]] = {
    "shell": _shell,
    **dict.fromkeys(sorted(_SHELLS), _shell),
    "env": _env,
    "uv": _uv,
    **{name: functools.partial(_wrapper, options) for name, options in _TABLE.items()},
}


def directory_of(command: Unwrapped) -> str:
    """Return the absolute path of the directory that a command starts in."""
    return posixpath.normpath(posixpath.join(str(Path.cwd()), command.directory))
