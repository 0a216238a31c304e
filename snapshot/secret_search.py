# SPDX-License-Identifier: Apache-2.0
"""Search a dump for credentials before it is packed. See docs/secrets.md.

Hyperscan searches for all values and beginnings of tokens at once; Python checks each hit. Values are never
shown, and never leave this process's memory.

Pages that are adjacent in a file may be far apart in memory. So the search covers extents: bytes that are
adjacent in both. Threads search them in pieces. A hit belongs to the piece that it begins in, and a piece is
read with some bytes before and after it, so a string across a border is found exactly once.
"""

import contextlib
import os
import re
import stat
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import hyperscan
from msgspec import Struct

from rekindle.criu import image_files
from rekindle.criu.protobuf import content, read_fields
from rekindle.errors import DumpError, FormatError, RekindleError, SecretError
from rekindle.files import PAGE_BYTES, data_extents
from rekindle.secrets import HIDDEN
from rekindle.secrets.forms import FORMS, Form, find_token, is_secret_value
from rekindle.secrets.redact import Secret, command_secrets, environment_secrets

# Shorter values occur by chance: they are searched for only with their name, NAME=value.
_ALONE_CHARACTERS = 6
_DISTINCT_CHARACTERS = 3  # or a run of equal bytes would be a million hits
_STRING_LIMIT_BYTES = 512
_AROUND_BYTES = _STRING_LIMIT_BYTES, 4096  # read before and after the beginning of a hit
_PIECE_BYTES = 512 << 10  # stays in a core's cache
_WORKERS_LIMIT = 8
_CORE_MAGIC = 0x55053847
_END_OF_WORD = b"\0 \t\r\n\"',;&"
_ENDS = frozenset({b"", *(bytes([byte]) for byte in _END_OF_WORD)})


class Text(Struct, frozen=True, kw_only=True):
    """A string that must not be in a dump. `ends`: it only counts if a word ends after it."""

    names: frozenset[str]
    content: bytes
    ends: bool

    @property
    def needle(self) -> bytes:
        """Return the longest line, up to a limit.

        It has no zero byte: the binding would end the string there (`strlen`, python-hyperscan 0.9.1).
        """
        return max(re.split(rb"[\r\n\0]", self.content), key=len)[:_STRING_LIMIT_BYTES]

    def is_at(self, content: bytes, position: int) -> bool:
        """Return whether the text is where its needle was found. For a long text, the needle is enough."""
        if not self.ends:
            return True
        start = position - self.content.index(self.needle)
        end = start + len(self.content)
        return start >= 0 and content[start:end] == self.content and content[end : end + 1] in _ENDS


class Found(Struct, frozen=True, kw_only=True):
    """A credential in a dump: its name or kind, and the first place where it was found."""

    name: str
    title: str
    place: str


class KnownSecrets(Struct, frozen=True, kw_only=True):
    """The secrets that a server was given: strings to search for, and those that are allowed."""

    texts: Sequence[Text]
    allowed: Sequence[bytes]
    kinds: frozenset[str]  # of allowed tokens
    values: frozenset[str]  # all values that are distinctive, to hide them in messages

    @classmethod
    def of(
        cls, environment: Mapping[str, str], argv: Sequence[str], allow: Collection[str] = ()
    ) -> "KnownSecrets":
        """Collect the secrets of a server.

        `allow` holds names of variables and options, with or without dashes, and kinds of tokens.
        """
        allow = {_plain(name) for name in allow}
        secrets = [
            secret
            for secret in (*environment_secrets(environment), *command_secrets(argv))
            if is_secret_value(secret.name if secret.by_name else "PASSWORD", secret.value)
        ]
        # A value that is allowed under one name is allowed under all its names.
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
            values=frozenset(secret.value for secret in secrets if _is_distinctive(secret.value)),
        )

    @contextlib.contextmanager
    def kept_out_of_errors(self) -> Iterator[None]:
        """Hide the values in errors raised within the context, and in the logs that they name."""
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


def _is_distinctive(value: str) -> bool:
    return len(value) >= _ALONE_CHARACTERS and len(set(value)) >= _DISTINCT_CHARACTERS


def _forms_of(secret: Secret) -> Iterator[tuple[bytes, bool]]:
    """Yield the forms that a secret has in memory, and whether a word must end after each."""
    name, value = os.fsencode(secret.name), os.fsencode(secret.value)
    if _is_distinctive(secret.value):
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


def require_no_secrets(tree: Path, credentials: KnownSecrets) -> None:
    """Raise SecretError if `tree/{criu,shm}` holds credentials; it names each and where it was found.

    Raises DumpError if the dump cannot be searched.
    """
    found = search(tree, credentials)
    if not found:
        return
    names = ", ".join(each.title for each in found)
    options = " ".join(f"--allow-secret {each.name.lstrip('-')}" for each in found)
    raise SecretError(
        f"the server's memory holds {names}",
        cause="\n".join(f"{each.name}: {each.place}" for each in found),
        hint="start the server without it, or allow it in the image, where all its readers can see it: "
        + options,
    )


def search(tree: Path, credentials: KnownSecrets) -> list[Found]:
    """Return the credentials and the kinds of tokens that a dump holds, each name once.

    Raises DumpError if any part of the dump cannot be searched.
    """
    needles = _Needles(credentials)
    if not needles:
        return []
    pieces = _Shared(_pieces(tree))
    stop = threading.Event()
    workers = min(_WORKERS_LIMIT, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_search, pieces, needles, stop) for _ in range(workers)]
        try:
            found = list(chain.from_iterable(job.result() for job in jobs))
        except (OSError, hyperscan.error) as error:
            raise DumpError("cannot search the dump for secrets", cause=str(error)) from error
        finally:
            stop.set()
    first: dict[str, Found] = {}
    for each in sorted(found, key=lambda each: (each.name, each.place)):
        first.setdefault(each.name, each)
    return list(first.values())


def _search(pieces: "_Shared", needles: "_Needles", stop: threading.Event) -> Collection[Found]:
    """Search the pieces that this thread gets. Reading and scanning release the GIL."""
    scratch = needles.scratch()
    buffer = memoryview(bytearray(_AROUND_BYTES[0] + _PIECE_BYTES + _AROUND_BYTES[1]))
    found: dict[str, Found] = {}
    for piece in pieces:
        if stop.is_set():
            break
        for name, title in needles.search(piece.read(buffer), piece.own, scratch):
            found.setdefault(name, Found(name=name, title=title, place=piece.extent.place))
    return found.values()


class _Extent(Struct, frozen=True, kw_only=True):
    """Bytes of a file that are adjacent in memory, too."""

    path: Path
    offset: int
    length: int
    place: str


class _Piece(Struct, frozen=True, kw_only=True):
    """A part of an extent, with some of the bytes around it."""

    extent: _Extent
    start: int  # of the bytes to read, in the file
    length: int
    own: range  # of the part itself, in the bytes read

    def read(self, buffer: memoryview) -> memoryview:
        """Read the bytes into the buffer and return them. Raises OSError; DumpError for a short file."""
        with open(self.extent.path, "rb", buffering=0) as file:
            length = os.preadv(file.fileno(), [buffer[: self.length]], self.start)
        if length != self.length:
            raise DumpError("cannot search the dump for secrets", cause=f"{file.name} is too short")
        return buffer[:length]


def _pieces(tree: Path) -> Iterator[_Piece]:
    for extent in chain(_memory_extents(tree / "criu"), _file_extents(tree)):
        extent_end = extent.offset + extent.length
        for offset in range(extent.offset, extent_end, _PIECE_BYTES):
            start = max(extent.offset, offset - _AROUND_BYTES[0])
            end = min(extent_end, offset + _PIECE_BYTES + _AROUND_BYTES[1])
            own = range(offset - start, offset - start + _PIECE_BYTES)
            yield _Piece(extent=extent, start=start, length=end - start, own=own)


def _memory_extents(dump: Path) -> Iterator[_Extent]:
    for pagemap in sorted(dump.glob("pagemap-*.img")):
        pages_id, stretches = image_files.read_pagemap(pagemap)
        pages = dump / f"pages-{pages_id}.img"
        place = _process(dump, pagemap.stem.removeprefix("pagemap-"))
        offset = length = next_address = 0
        for stretch in stretches:
            if not stretch.flags & image_files.PE_PRESENT:
                continue
            if stretch.address != next_address and length:
                yield _Extent(path=pages, offset=offset, length=length, place=place)
                offset, length = offset + length, 0
            length += stretch.pages * PAGE_BYTES
            next_address = stretch.address + stretch.pages * PAGE_BYTES
        if length:
            yield _Extent(path=pages, offset=offset, length=length, place=place)


def _process(dump: Path, pid: str) -> str:
    """Describe the process whose memory a pagemap lists."""
    if not pid.isdecimal():
        return "in shared memory"
    core = dump / f"core-{pid}.img"
    name = b""
    with contextlib.suppress(FormatError):
        for message in image_files.read_messages(core, _CORE_MAGIC):
            task = content(read_fields(message, core), 3)
            comm = content(read_fields(task, core), 6) if task is not None else None
            name = comm if isinstance(comm, bytes) else b""
    return f"in the memory of process {pid}" + (f" ({name.decode(errors='replace')})" if name else "")


def _file_extents(tree: Path) -> Iterator[_Extent]:
    """Yield the extents of all other files: memory files, CRIU's image files, and those in /dev/shm."""
    seen: set[int] = set()
    places = {"criu": "in CRIU's file {}", "memory": "", "shm": "in /dev/shm/{}"}
    for top, place in places.items():
        if (tree / top).is_symlink():  # the memory of another image
            continue
        for path in sorted((tree / top).rglob("*")):
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_ino in seen:
                continue
            if top == "criu" and path.name.startswith("pages-"):
                continue
            seen.add(status.st_ino)
            if top == "memory":
                where = _process(tree / "criu", path.name)
            else:
                where = place.format(_redacted(str(path.relative_to(tree / top))))
            with open(path, "rb", buffering=0) as file:
                for offset, length in data_extents(file.fileno(), status.st_size):
                    yield _Extent(path=path, offset=offset, length=length, place=where)


def _redacted(name: str) -> str:
    return HIDDEN if find_token(os.fsencode(name)) else name


class _Shared:
    """An iterator that several threads share: each piece goes to one of them."""

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
    """The strings to search for, and the secrets that each may be the beginning of."""

    def __init__(self, credentials: KnownSecrets) -> None:
        self._allowed = [value for value in credentials.allowed if len(value) >= _ALONE_CHARACTERS]
        self._texts: dict[bytes, list[Text]] = {}
        self._forms: dict[bytes, Form] = {}
        for text in credentials.texts:
            self._texts.setdefault(text.needle, []).append(text)
        for form in FORMS:
            if _plain(form.name) not in credentials.kinds:
                self._forms |= dict.fromkeys(form.anchors, form)
        self._strings = list(self._texts.keys() | self._forms.keys())
        self._database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
        if self._strings:
            self._database.compile(self._strings, elements=len(self._strings), literal=True)

    def __bool__(self) -> bool:
        return bool(self._strings)

    def scratch(self) -> hyperscan.Scratch:
        """Return scratch space for one thread."""
        return hyperscan.Scratch(self._database)

    def search(
        self, content: memoryview, own: range, scratch: hyperscan.Scratch
    ) -> Iterator[tuple[str, str]]:
        """Yield the names and titles of the credentials that begin in a part of `content`.

        A token within a value is reported only under the value's name.
        """
        value_end = 0
        for at, length, needle in self._hits(content, scratch):
            start = max(0, at - _AROUND_BYTES[0])
            around = bytes(content[start : at + _AROUND_BYTES[1]])
            form = self._forms.get(needle) if at in own and at >= value_end else None
            if form and self._is_token(form, around, at - start):
                yield form.name, form.title
            for text in self._texts.get(needle, ()):
                if text.is_at(around, at - start):
                    value_end = max(value_end, at + length)
                    if at in own:
                        for name in text.names:
                            yield name, f"the value of {name}"

    def _hits(self, content: memoryview, scratch: hyperscan.Scratch) -> list[tuple[int, int, bytes]]:
        """Return the strings in the content as (position, length, string), the longest first per position."""
        ends: list[tuple[int, int]] = []

        def note(string: int, _: int, end: int, *__: object) -> None:
            ends.append((string, end))

        # The stub allows str and bytes; the code accepts any buffer.
        self._database.scan(content, match_event_handler=note, scratch=scratch)  # type: ignore[type-var]
        hits = (
            (end - len(needle), len(needle), needle)
            for string, end in ends
            if (needle := self._strings[string])
        )
        return sorted(hits, key=lambda hit: (hit[0], -hit[1]))

    def _is_token(self, form: Form, content: bytes, at: int) -> bool:
        token = form.token_at(content, at)
        if token is None:
            return False
        rest = content[at:]
        return not any(token in value or rest.startswith(value) for value in self._allowed)
