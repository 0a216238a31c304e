# SPDX-License-Identifier: Apache-2.0
"""Fetch the blocks of memory files: first what is waited for, then what is needed first, then the rest.

Nothing of a block is written before its digest has matched, and nothing is answered from a file before all of
its blocks are written. Threads fetch; a failure that is final ends all of them.
"""

import collections
import contextlib
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import zstandard

from oci.blocks import Block, BlockIndex
from oci.descriptor import Descriptor
from oci.dump_layers import unpack_block
from oci.frames import PIECE_BYTES
from oci.progress import Limiter, Tally
from oci.registry.transport import PIECE_BYTES as HTTP_BYTES
from oci.registry.transport import Answer
from rekindle.errors import (
    CapabilityError,
    FormatError,
    IntegrityError,
    RegistryError,
    RekindleError,
    SpaceError,
)
from rekindle.fuse import Read
from rekindle.record import StoredFile

_FIRST_RUN_BYTES = 1 << 20  # of what is needed first, in one request
_REST_RUN_BYTES = 2 << 20
_REST_THREADS = 2
_REST_NICE = 10
_WRONG_LIMIT = 3
_LONGEST_PAUSE_SECONDS = 5.0
_LOOK_SECONDS = 0.5


class Parts(Protocol):
    """Where parts of blobs come from: `oci.registry.repository.Repository`."""

    def part(self, blob: Descriptor, begin: int, end: int, *, broken: Answer | None) -> Answer:
        """Return the answer to a request for `blob[begin:end]`; see `oci.registry.download.Fetch`."""


class NoRangesError(CapabilityError):
    """The registry does not give parts of blobs."""


class Fill:
    """The memory files in `tree`, which exist in their sizes, and what of them is here.

    `needed_first` are the numbers of the blocks that are needed first, in order. `arrived` is called with
    each part of these that was written, as (file, offset, length). `answer` gets each read that can be
    answered from its file, `failed` the error that ended everything.
    """

    def __init__(
        self,
        parts: Parts,
        blocks: Sequence[Block],
        files: Mapping[int, StoredFile],
        tree: Path,
        *,
        needed_first: Sequence[int],
        tally: Tally,
        limiter: Limiter,
        patience_seconds: float,
        rest_rate: float,
        answer: Callable[[Read], None],
        arrived: Callable[[int, int, int], None],
        failed: Callable[[RekindleError], None],
        changed: Callable[[], None],
    ) -> None:
        self._parts, self._blocks, self._files = parts, blocks, files
        self._patience_seconds = patience_seconds
        self._tally, self._limiter, self._rest_limiter = tally, limiter, Limiter(rest_rate)
        self._answer, self._arrived, self._failed, self._changed = answer, arrived, failed, changed
        self._index = BlockIndex(blocks)
        self._first = frozenset(needed_first)
        self._queue = collections.deque(needed_first)
        self._rest = collections.deque(n for n in range(len(blocks)) if n not in self._first)
        self._asked: collections.deque[int] = collections.deque()
        self._begun: set[int] = set()
        self._done = bytearray(len(blocks))
        self._left = len(blocks)
        self._waiting: dict[int, list[_WaitingRead]] = {}
        self._condition = threading.Condition()
        self._error: RekindleError | None = None
        self._is_over = False
        self._may_rest = False
        self.memory = {
            number: os.open(tree / file.path, os.O_RDWR | os.O_CLOEXEC)
            for number, file in files.items()
            if file.path.parts[0] == "memory"
        }
        self.first_left = len(self._first)
        self._threads: list[threading.Thread] = []

    def start(self, threads: int) -> None:
        """Begin to fetch. Some of the threads fetch the rest, at a lower priority."""
        for number in range(threads):
            thread = threading.Thread(target=self._work, args=[number < _REST_THREADS], daemon=True)
            self._threads.append(thread)
            thread.start()

    def begin_rest(self) -> None:
        """Fetch the rest, too: what is needed first is in use now."""
        with self._condition:
            self._may_rest = True
            self._condition.notify_all()

    @property
    def is_complete(self) -> bool:
        return not self._left

    @property
    def has_begun(self) -> bool:
        """Whether the registry has given a part of a blob."""
        return self._left < len(self._done)

    def end(self) -> list[Read]:
        """Fetch no more; return the reads that were not answered."""
        with self._condition:
            self._is_over = True
            self._condition.notify_all()
            left = {each for waiting in self._waiting.values() for each in waiting}
            self._waiting.clear()
            return [each.read for each in left]

    def take(self, read: Read, number: int) -> bool:
        """Answer a read of a file now or when its blocks are here; False if that will never be."""
        blocks = self._index.between(number, read.offset, read.offset + read.size)
        missing = {block for block in blocks if not self._done[block]}
        if missing:
            with self._condition:
                missing = {block for block in missing if not self._done[block]}
                if missing:
                    if self._is_over:
                        return False
                    waiting = _WaitingRead(read, missing)
                    for block in missing:
                        self._waiting.setdefault(block, []).append(waiting)
                        self._asked.append(block)
                    self._condition.notify_all()
                    return True
        self._answer(read)
        return True

    def _work(self, takes_rest: bool) -> None:
        decompressor = zstandard.ZstdDecompressor()
        room = memoryview(bytearray(PIECE_BYTES))
        while run := self._next(takes_rest):
            is_rest = run[0] not in self._first and not self._is_waited_for(run)
            if is_rest:
                size = sum(self._blocks[number].length for number in run)
                self._rest_limiter.wait(size, lambda: self._is_over or bool(self._asked))
            try:
                content = self._fetch(run)
                if content is None:
                    return
                self._write(run, content, decompressor, room)
            except RekindleError as error:
                self._fail(error)
            except OSError as error:
                self._fail(SpaceError("the memory of the server cannot be written", cause=str(error)))
            except Exception as error:
                self._fail(RegistryError("the memory of the server cannot be fetched", cause=repr(error)))

    def _is_waited_for(self, run: Sequence[int]) -> bool:
        with self._condition:
            return any(number in self._waiting for number in run)

    def _next(self, takes_rest: bool) -> list[int]:
        """Return blocks that follow each other in a layer; none at the end."""
        with self._condition:
            while not self._is_over and self._left:
                if run := self._run(self._asked, 0):
                    return run
                if run := self._run(self._queue, _FIRST_RUN_BYTES):
                    return run
                if takes_rest and self._may_rest and (run := self._run(self._rest, _REST_RUN_BYTES)):
                    return run
                self._condition.wait(_LOOK_SECONDS)
            return []

    def _run(self, queue: collections.deque[int], most: int) -> list[int]:
        """Take blocks off a queue: one, and those that follow it up to so many bytes."""
        run: list[int] = []
        size = 0
        while queue:
            number = queue[0]
            if number in self._begun:
                queue.popleft()
                continue
            block = self._blocks[number]
            if run:
                before = self._blocks[run[-1]]
                follows = number == run[-1] + 1 and block.layer is before.layer
                if not follows or size + block.length > most:
                    break
            run.append(queue.popleft())
            self._begun.add(number)
            size += block.length
            if size >= most:
                break
        return run

    def _fetch(self, run: Sequence[int]) -> memoryview | None:
        """Return the verified content of some blocks; None if it is not needed any more."""
        first, last = self._blocks[run[0]], self._blocks[run[-1]]
        begin, end = first.offset, last.offset + last.length
        content = memoryview(bytearray(end - begin))
        broken: Answer | None = None
        began, pause, wrong = time.monotonic(), 0.2, 0
        while not self._is_over:
            try:
                answer = self._receive(first.layer, begin, end, content, broken)
                if self._is_right(run, content):
                    return content
                wrong += 1
                broken = answer  # from now on, only the registry itself is asked for this
                error: RekindleError = IntegrityError(
                    f"a part of layer {first.layer.digest} does not match its digest",
                    cause=f"bytes {begin} to {end}, from {answer.url}",
                    hint="fetch the image again, or create it again",
                )
                if wrong >= _WRONG_LIMIT:
                    raise error
            except (IntegrityError, FormatError, CapabilityError):
                raise
            except RekindleError as failure:
                error = failure
            except OSError as failure:
                error = RegistryError(f"layer {first.layer.digest} cannot be fetched", cause=str(failure))
            if time.monotonic() - began > self._patience_seconds:
                raise error
            with self._condition:
                self._condition.wait_for(lambda: self._is_over, pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        return None

    def _receive(
        self, layer: Descriptor, begin: int, end: int, content: memoryview, broken: Answer | None
    ) -> Answer:
        with self._parts.part(layer, begin, end, broken=broken) as answer:
            if answer.status == 200 and (begin, end) != (0, layer.size):
                raise NoRangesError("the registry does not give parts of blobs", cause=str(answer.url))
            count = 0
            while count < end - begin:
                got = answer.readinto(content[count:][: self._limiter.piece_bytes(HTTP_BYTES)])
                if not got:
                    raise ConnectionError(f"{answer.url}: the body is shorter than it should be")
                count += got
                self._tally.fetch(got)
                self._limiter.wait(got, lambda: self._is_over)
        return answer

    def _is_right(self, run: Sequence[int], content: memoryview) -> bool:
        at = 0
        for number in run:
            block = self._blocks[number]
            if hashlib.sha256(content[at : at + block.length]).digest() != block.digest:
                return False
            at += block.length
        return True

    def _write(
        self,
        run: Sequence[int],
        content: memoryview,
        decompressor: zstandard.ZstdDecompressor,
        room: memoryview,
    ) -> None:
        at = 0
        for number in run:
            block = self._blocks[number]
            part = content[at : at + block.length]
            written = unpack_block(part, block, self._files, self.memory, decompressor, room)
            at += block.length
            with self._condition:
                self._done[number] = 1
                self._left -= 1
                waiting = self._waiting.pop(number, [])
                for each in waiting:
                    each.missing.discard(number)
                is_first = number in self._first
                self.first_left -= is_first
            for each in waiting:
                if not each.missing:
                    self._answer(each.read)
            if is_first:
                for file, offset, length in written:
                    self._arrived(file, offset, length)
            if not self._left or is_first:
                self._changed()
        with self._condition:
            if not self._left:
                self._condition.notify_all()

    def _fail(self, error: RekindleError) -> None:
        with self._condition:
            if self._error is not None or self._is_over:
                return
            self._error = error
            self._is_over = True
            self._condition.notify_all()
        self._failed(error)

    def close(self) -> None:
        """Close the files; after `end`."""
        for fd in self.memory.values():
            with contextlib.suppress(OSError):
                os.close(fd)


class _WaitingRead:
    """A read that waits for some blocks."""

    __slots__ = ("missing", "read")

    def __init__(self, read: Read, missing: set[int]) -> None:
        self.read, self.missing = read, missing
