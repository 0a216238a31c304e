# SPDX-License-Identifier: Apache-2.0
"""Looks for credentials in a dump before it is packed. Values are never shown. See docs/secrets.md.

GNU grep searches for many strings at once several times faster than anything in Python does. It gets the
values and the beginnings of tokens; what it finds is looked at here. Nothing secret is written to a disk
or an argument: strings and bytes go to grep by memory and pipes.

What grep reads is cut into pieces with a line feed after each, for two reasons. Bytes that are neighbours
in a pages file but not in memory must not be read as one; and grep keeps a line in memory, which may have
gigabytes. Pieces of one stretch of memory overlap by more than a string's length. Lines must not end with
zero bytes (`--null-data`): grep 3.8 passes over buffers full of them and does not count them in its offsets.
"""

import contextlib
import fcntl
import os
import re
import shutil
import stat
import threading
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO, RawIOBase
from itertools import chain
from pathlib import Path

from rekindle import run
from rekindle.criu import images as criu_images
from rekindle.errors import CapabilityError, DumpError, FormatError, RekindleError, SecretError
from rekindle.files import PAGE_BYTES, data_extents
from rekindle.secrets.forms import FORMS, Form, find_token, is_secret_value
from rekindle.secrets.redact import HIDDEN, Secret, command_secrets, environment_secrets

# Shorter values are part of too much else: they are looked for with their name alone, NAME=value.
_ALONE_CHARACTERS = 6
_DISTINCT_CHARACTERS = 3  # so that no stretch of equal bytes is a million hits
_STRING_LIMIT_BYTES = 512
_OVERLAP_BYTES = 2 * _STRING_LIMIT_BYTES
_AROUND_BYTES = 64, 1024  # what is looked at before and after a token's beginning
_PIECE_BYTES = 1 << 20
_READ_BYTES = 64 << 10
_TIMEOUT_SECONDS = 600.0
_WORKERS_LIMIT = 8
_CORE_MAGIC = 0x55053847
_TRIAL = bytes(100) + b"a\0a\n\xff"
_LINE_FEED = 10
_END_OF_WORD = b"\0 \t\r\n\"',;&"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A string that must not be found, the names that it has, and whether a word must end behind it."""

    names: frozenset[str]
    content: bytes
    ends: bool

    @property
    def needle(self) -> bytes:
        """What grep looks for: it can do so within a line, and its file of strings has no zero bytes."""
        return max(re.split(rb"[\r\n\0]", self.content), key=len)[:_STRING_LIMIT_BYTES]

    def is_at(self, content: bytes, position: int) -> bool:
        """Whether this is where the needle was found. Of what is long, the needle is enough."""
        if not self.ends:
            return True
        start = position - self.content.index(self.needle)
        end = start + len(self.content)
        return start >= 0 and content[start:end] == self.content and content[end : end + 1] in _ENDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A credential in a dump: its name or kind, and where it was found first."""

    name: str
    title: str
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a server was given: the strings to look for, and those that may be found."""

    texts: Sequence[Text]
    allowed: Sequence[bytes]
    kinds: frozenset[str]  # of tokens that may be found
    values: frozenset[str]  # of all of them, to keep them out of what is told

    @classmethod
    def of(
        cls, environment: Mapping[str, str], argv: Sequence[str], allow: Collection[str] = ()
    ) -> "Credentials":
        """`allow` has names of variables, options (dashes or not) and kinds of tokens."""
        allow = {_plain(name) for name in allow}
        secrets = [
            secret
            for secret in (*environment_secrets(environment), *command_secrets(argv))
            if is_secret_value(secret.name if secret.by_name else "PASSWORD", secret.value)
        ]
        # Who may read a value under one of its names may read it under the others.
        allowed = {secret.value for secret in secrets if _plain(secret.name) in allow}
        texts: dict[tuple[bytes, bool], set[str]] = {}
        for secret in secrets:
            if secret.value not in allowed:
                for form in _forms_of(secret):
                    texts.setdefault(form, set()).add(secret.name)
        return cls(
            texts=[
                Text(names=frozenset(names), content=content, ends=ends)
                for (content, ends), names in texts.items()
            ],
            allowed=[os.fsencode(value) for value in allowed],
            kinds=frozenset(allow),
            values=frozenset(secret.value for secret in secrets if _stands_alone(secret.value)),
        )

    @contextlib.contextmanager
    def kept_out_of_errors(self) -> Iterator[None]:
        """Takes the values out of errors that pass through, and of the logs that these name."""
        try:
            yield
        except RekindleError as error:
            error.message = self._hide(error.message)
            error.cause = self._hide(error.cause)
            error.hint = self._hide(error.hint)
            error.command = tuple(map(self._hide, error.command))
            error.args = (error.message,)
            if error.log is not None:
                with contextlib.suppress(OSError):
                    _hide_in_file(error.log, [os.fsencode(value) for value in self.values])
            raise

    def _hide(self, text: str) -> str:
        for value in sorted(self.values, key=len, reverse=True):
            text = text.replace(value, HIDDEN)
        return text


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-").lower()


def _stands_alone(value: str) -> bool:
    return len(value) >= _ALONE_CHARACTERS and len(set(value)) >= _DISTINCT_CHARACTERS


def _forms_of(secret: Secret) -> Iterator[tuple[bytes, bool]]:
    """How a value lies in memory, and whether a word must end behind it."""
    name, value = os.fsencode(secret.name), os.fsencode(secret.value)
    if _stands_alone(secret.value):
        yield value, False
        return
    yield name + b"=" + value, True
    if name.startswith(b"-"):
        yield name + b"\0" + value, True


def _hide_in_file(path: Path, values: Sequence[bytes]) -> None:
    content = path.read_bytes()
    for value in sorted(values, key=len, reverse=True):
        content = content.replace(value, HIDDEN.encode())
    path.write_bytes(content)


def refuse(tree: Path, credentials: Credentials) -> None:
    """Raises SecretError, which names all that was found in `tree/{criu,shm}` and where, or returns."""
    found = search(tree, credentials)
    if not found:
        return
    names = ", ".join(each.title for each in found)
    options = " ".join(f"--allow-secret {each.name.lstrip('-')}" for each in found)
    raise SecretError(
        f"the server's memory holds {names}",
        cause="\n".join(f"{each.name}: {each.place}" for each in found),
        hint="start the server without it, or let whoever can read the image read it, too: " + options,
    )


def require_grep() -> str:
    """Where GNU grep is. Raises CapabilityError if there is none, or another that lacks what it must do."""
    path = shutil.which("grep")
    if path is not None:
        with (
            _memory(b"needle\n") as strings,
            _memory(_TRIAL + b"needle\0a\n") as content,
            _memory(b"") as out,
        ):
            argv = _grep(path, strings, content)
            process = run.spawn(argv, env=_ENVIRONMENT, stdout=out, pass_fds=(strings, content))
            try:
                status = process.wait(_TIMEOUT_SECONDS)
            finally:
                if process.poll() is None:
                    run.end_group(process)
            if status == 0 and os.pread(out, 100, 0) == b"%d:needle\n" % len(_TRIAL):
                return path
    raise CapabilityError(
        "the dump cannot be searched for secrets",
        cause=f"{path} is not GNU grep" if path else "there is no grep",
        hint="install GNU grep (Debian: apt-get install grep)",
    )


def search(tree: Path, credentials: Credentials) -> list[Found]:
    """What of the credentials, and which kinds of tokens, a dump holds: each name once."""
    grep = require_grep()
    needles = _Needles(credentials)
    pieces = _Shared(_pieces(tree))
    stop = threading.Event()
    workers = min(_WORKERS_LIMIT, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_search, grep, pieces, needles, stop) for _ in range(workers)]
        try:
            found = list(chain.from_iterable(job.result() for job in jobs))
        except BaseException:
            stop.set()
            raise
    first: dict[str, Found] = {}
    for each in sorted(found, key=lambda each: (each.name, each.place)):
        first.setdefault(each.name, each)
    return list(first.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extent:
    """Bytes of a file that follow one another in memory, too."""

    path: Path
    offset: int
    length: int
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    extent: _Extent
    offset: int
    length: int


def _pieces(tree: Path) -> Iterator[_Piece]:
    for extent in chain(_memory_extents(tree / "criu"), _file_extents(tree)):
        end = extent.offset + extent.length
        for offset in range(extent.offset, end, _PIECE_BYTES):
            length = min(_PIECE_BYTES + _OVERLAP_BYTES, end - offset)
            yield _Piece(extent=extent, offset=offset, length=length)


def _memory_extents(dump: Path) -> Iterator[_Extent]:
    for pagemap in sorted(dump.glob("pagemap-*.img")):
        pages_id, stretches = criu_images.read_pagemap(pagemap)
        pages = dump / f"pages-{pages_id}.img"
        place = _process(dump, pagemap.stem.removeprefix("pagemap-"))
        offset = length = next_address = 0
        for stretch in stretches:
            if not stretch.flags & criu_images.PE_PRESENT:
                continue
            if stretch.address != next_address and length:
                yield _Extent(path=pages, offset=offset, length=length, place=place)
                offset, length = offset + length, 0
            length += stretch.pages * PAGE_BYTES
            next_address = stretch.address + stretch.pages * PAGE_BYTES
        if length:
            yield _Extent(path=pages, offset=offset, length=length, place=place)


def _process(dump: Path, pid: str) -> str:
    """Words for the process whose memory a pagemap describes."""
    if not pid.isdecimal():
        return "in shared memory"
    core = dump / f"core-{pid}.img"
    name = b""
    with contextlib.suppress(FormatError):
        for message in criu_images.read_messages(core, _CORE_MAGIC):
            task = criu_images.parse_message(message, core).get(3)
            comm = criu_images.parse_message(task, core).get(6) if isinstance(task, bytes) else None
            name = comm if isinstance(comm, bytes) else b""
    return f"in the memory of process {pid}" + (f" ({name.decode(errors='replace')})" if name else "")


def _file_extents(tree: Path) -> Iterator[_Extent]:
    """All other files: pipes, sockets and deleted files as CRIU stored them, and /dev/shm."""
    seen: set[int] = set()
    for top, place in (("criu", "in what CRIU stored in {}"), ("shm", "in /dev/shm/{}")):
        for path in sorted((tree / top).rglob("*")):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_ino in seen:
                continue
            if top == "criu" and path.name.startswith("pages-"):
                continue
            seen.add(status.st_ino)
            where = place.format(_redacted(str(path.relative_to(tree / top))))
            with open(path, "rb", buffering=0) as file:
                for offset, length in data_extents(file.fileno(), status.st_size):
                    yield _Extent(path=path, offset=offset, length=length, place=where)


def _redacted(name: str) -> str:
    return HIDDEN if find_token(os.fsencode(name)) else name


class _Shared:
    """Pieces for several threads, each to one of them."""

    def __init__(self, pieces: Iterator[_Piece]) -> None:
        self._pieces = pieces
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[_Piece]:
        while True:
            with self._lock:
                piece = next(self._pieces, None)
            if piece is None:
                return
            yield piece


class _Needles:
    """The strings for grep, and what each may be the beginning of."""

    def __init__(self, credentials: Credentials) -> None:
        self._allowed = [value for value in credentials.allowed if len(value) >= _ALONE_CHARACTERS]
        self._texts: dict[bytes, list[Text]] = {}
        self._forms: dict[bytes, Form] = {}
        for text in credentials.texts:
            self._texts.setdefault(text.needle, []).append(text)
        for form in FORMS:
            if _plain(form.name) not in credentials.kinds:
                self._forms |= dict.fromkeys(form.anchors, form)

    def lines(self) -> bytes:
        return b"".join(needle + b"\n" for needle in (*self._texts, *self._forms))

    def look(self, needle: bytes, content: bytes, at: int) -> Iterator[tuple[str, str]]:
        """The names and titles of what is at `at` in `content`, where grep found a needle."""
        for text in self._texts.get(needle, ()):
            if text.is_at(content, at):
                for name in text.names:
                    yield name, f"the value of {name}"
        if (form := self._forms.get(needle)) and (drawn := form.token_at(content, at)):
            behind = content[at:]
            if not any(drawn in value or behind.startswith(value) for value in self._allowed):
                yield form.name, form.title


_ENDS = frozenset({b"", *(bytes([byte]) for byte in _END_OF_WORD)})
_ENVIRONMENT = {"LC_ALL": "C"}


def _grep(path: str, strings: int, content: int) -> list[str]:
    return [
        path,
        *("--text", "--only-matching", "--byte-offset", "--no-filename"),
        *("--fixed-strings", "--file", f"/proc/self/fd/{strings}"),
        *("--", f"/proc/self/fd/{content}"),
    ]


@contextlib.contextmanager
def _memory(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("rekindle")
    try:
        os.write(fd, content)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


@dataclass(slots=True, kw_only=True)
class _Stream:
    """What was written to a grep: where in the stream each piece began. One thread writes, one reads."""

    starts: list[int] = field(default_factory=list)
    pieces: list[_Piece] = field(default_factory=list)
    error: OSError | None = None

    def feed(self, pieces: _Shared, fd: int, stop: threading.Event) -> None:
        """Writes pieces, each with a line feed after it, and closes `fd`."""
        buffer = memoryview(bytearray(_PIECE_BYTES + _OVERLAP_BYTES + 1))
        position = 0
        try:
            for piece in pieces:
                if stop.is_set():
                    return
                with open(piece.extent.path, "rb", buffering=0) as file:
                    length = os.preadv(file.fileno(), [buffer[: piece.length]], piece.offset)
                buffer[length] = _LINE_FEED
                self.pieces.append(piece)
                self.starts.append(position)
                position += length + 1
                rest = buffer[: length + 1]
                while rest:
                    rest = rest[os.write(fd, rest) :]
        except OSError as error:
            self.error = error
        finally:
            os.close(fd)

    def around(self, position: int) -> tuple[_Piece, bytes, int]:
        """The piece at a position of the stream, bytes around that, and where in them it is."""
        index = bisect_right(self.starts, position) - 1
        piece = self.pieces[index]
        extent = piece.extent
        at = piece.offset + position - self.starts[index]
        start = max(extent.offset, at - _AROUND_BYTES[0])
        end = min(extent.offset + extent.length, at + _AROUND_BYTES[1])
        with open(extent.path, "rb", buffering=0) as file:
            return piece, os.pread(file.fileno(), end - start, start), at - start


def _search(grep: str, pieces: _Shared, needles: _Needles, stop: threading.Event) -> set[Found]:
    """Runs one grep over as many pieces as it gets."""
    found: dict[str, Found] = {}
    stream = _Stream()
    with _memory(needles.lines()) as strings, contextlib.ExitStack() as stack:
        reader, writer = os.pipe()
        out_reader, out_writer = os.pipe()
        results = stack.enter_context(FileIO(out_reader))
        try:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIECE_BYTES)
            argv = _grep(grep, strings, reader)
            process = run.spawn(argv, env=_ENVIRONMENT, stdout=out_writer, pass_fds=(strings, reader))
        except BaseException:
            os.close(writer)
            raise
        finally:
            os.close(reader)
            os.close(out_writer)
        feeder = threading.Thread(target=stream.feed, args=(pieces, writer, stop))
        feeder.start()
        try:
            for position, needle in _hits(results):
                piece, content, at = stream.around(position)
                if not content.startswith(needle, at):
                    raise DumpError("the dump could not be searched for secrets", cause="grep counts wrongly")
                for name, title in needles.look(needle, content, at):
                    found.setdefault(name, Found(name=name, title=title, place=piece.extent.place))
                if stop.is_set():
                    break
            status = process.wait(_TIMEOUT_SECONDS)
        finally:
            if process.poll() is None:
                run.end_group(process)  # so the feeder's pipe breaks
            feeder.join()
    if not stop.is_set() and (stream.error or status not in {0, 1}):
        raise DumpError(
            "the dump could not be searched for secrets",
            cause=str(stream.error) if stream.error else f"grep ended with status {status}",
        )
    return set(found.values())


def _hits(results: RawIOBase) -> Iterator[tuple[int, bytes]]:
    """What grep prints: the position, a colon, the string, a line feed."""
    rest = b""
    while content := results.read(_READ_BYTES):
        *lines, rest = (rest + content).split(b"\n")
        for line in lines:
            position, _, needle = line.partition(b":")
            yield int(position), needle
