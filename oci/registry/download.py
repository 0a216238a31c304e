# SPDX-License-Identifier: Apache-2.0
"""Blobs over many connections at once, given out as streams.

A blob is fetched in stretches, each by a request of its own, and the stretches are put together in order. So
one blob is as fast as many, a broken connection costs only the rest of its stretch, and a stretch that is
slower than the others is requested once more over another connection. A registry that does not support
ranges is read from the beginning to the end instead.

Nothing here is verified: see `open_verified`.
"""

import collections
import io
import queue
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from oci.descriptor import Descriptor
from oci.progress import Limiter, Tally
from oci.registry.retry import with_retries
from oci.registry.transport import PIECE_BYTES, Answer
from rekindle.config import TransferSettings
from rekindle.errors import IntegrityError, RegistryError, RekindleError

STRETCH_BYTES = 4 << 20
_WINDOW = 24  # stretches in memory, of all open streams together
_LEAST_WINDOW = 2
_LOOK_SECONDS = 0.25
_STRAGGLER_SECONDS = 2.0  # and three times as long as the others took


class Fetch(Protocol):
    """Ways to request a stretch."""

    def __call__(self, blob: Descriptor, begin: int, end: int, *, broken: Answer | None) -> Answer:
        """Return the answer to a request for `blob[begin:end]`: 206 with just that, or 200 with all of it.

        `broken` is the answer before, if it broke. Raises OSError if another attempt may help,
        RekindleError if not.
        """


class _Read(Protocol):
    """One attempt to read something; False if it has to be read in another way."""

    def __call__(self, broken: Answer | None) -> bool: ...


class _OverError(Exception):
    """The bytes that an attempt was to bring are not needed any more."""


class Downloads:
    """Fetches stretches for the streams that are open, in threads of its own."""

    def __init__(self, fetch: Fetch, settings: TransferSettings, *, tally: Tally, limiter: Limiter) -> None:
        self._fetch = fetch
        self._settings = settings
        self._tally = tally
        self._limiter = limiter
        self.condition = threading.Condition()
        self._tasks: queue.SimpleQueue[_Stretch | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._streams: set[BlobStream] = set()
        self._buffers: list[bytearray] = []
        self._running: dict[_Attempt, float] = {}
        self._took: collections.deque[float] = collections.deque(maxlen=32)
        self.closed = False
        self.ranges_work = False  # until the first answer that is one

    def open(self, blob: Descriptor) -> "BlobStream":
        """Begin to fetch a blob, and return it as a stream. Raises RegistryError after `close`."""
        stream = BlobStream(self, blob)
        with self.condition:
            if self.closed:
                raise ended()
            if not self._threads:
                for number in range(self._settings.jobs):
                    thread = threading.Thread(target=self._work, name=f"download-{number}", daemon=True)
                    self._threads.append(thread)
                    thread.start()
            self._streams.add(stream)
            stream.ask_for_more()
        return stream

    def close(self) -> None:
        """End all threads and streams at once."""
        with self.condition:
            self.closed = True
            for attempt in self._running:
                attempt.abort()
            self.condition.notify_all()
            for _ in self._threads:
                self._tasks.put(None)

    def join(self, timeout: float) -> None:
        """Wait for the threads to end, after `close`."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # For streams. The caller holds the condition.

    def window(self) -> int:
        return max(_LEAST_WINDOW, _WINDOW // max(1, len(self._streams)))

    def submit(self, stretch: "_Stretch") -> None:
        self._tasks.put(stretch)

    def forget(self, stream: "BlobStream") -> None:
        self._streams.discard(stream)
        for attempt in self._running:
            if attempt.stretch.stream is stream:
                attempt.abort()
        for other in self._streams:
            other.ask_for_more()

    def give_buffer(self) -> bytearray:
        return self._buffers.pop() if self._buffers else bytearray(STRETCH_BYTES)

    def take_buffer(self, buffer: bytearray) -> None:
        if len(self._buffers) < _WINDOW:  # fresh memory costs page faults
            self._buffers.append(buffer)

    # In the threads.

    def _work(self) -> None:
        while not self.closed:
            try:
                stretch = self._tasks.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                stretch = self._straggler()
                if stretch is None:
                    continue
            if stretch is None:
                return
            self._bring(stretch)

    def _straggler(self) -> "_Stretch | None":
        """Return a stretch that takes much longer than others did, and that only one thread fetches."""
        now = time.monotonic()
        with self.condition:
            if len(self._took) < 4 or self.closed:
                return None
            limit = max(_STRAGGLER_SECONDS, 3 * statistics.median(self._took))
            tries = collections.Counter(attempt.stretch for attempt in self._running)
            for attempt, began in self._running.items():
                stretch = attempt.stretch
                alone = tries[stretch] == 1 and not stretch.given_up
                if now - began > limit and alone and not stretch.stream.whole:
                    return stretch
        return None

    def _bring(self, stretch: "_Stretch") -> None:
        """Fetch a stretch, as often as the policy allows, unless another thread is faster."""
        stream = stretch.stream
        with self.condition:
            if self.closed or not stream.wants(stretch):
                return
            attempt = _Attempt(stretch, whole=stream.whole)
            buffer = self.give_buffer()
            self._running[attempt] = time.monotonic()
        try:
            if attempt.whole:
                self._read_whole(attempt, buffer)
            else:
                self._read_stretch(attempt, buffer)
        except RekindleError as error:
            self._fail(attempt, error)
        except Exception as error:
            self._fail(attempt, RegistryError(f"{stream.blob.digest} cannot be fetched", cause=repr(error)))
        finally:
            with self.condition:
                began = self._running.pop(attempt)
                if stretch.content is not None and not attempt.whole:
                    self._took.append(time.monotonic() - began)
                if stretch.content is not buffer:
                    self.take_buffer(buffer)
                self.condition.notify_all()

    def _fail(self, attempt: "_Attempt", error: RekindleError) -> None:
        """Give a stream up, unless another thread still tries the same or reads all of it instead."""
        stream = attempt.stretch.stream
        with self.condition:
            attempt.failed = True
            attempt.stretch.given_up = True  # a thread that still tries is the last: no other helps it
            others = [o for o in self._running if o.stretch is attempt.stretch and o.whole == attempt.whole]
            if all(other.failed for other in others) and stream.whole == attempt.whole:
                stream.fail(error)

    def _read_stretch(self, attempt: "_Attempt", buffer: bytearray) -> None:
        stretch = attempt.stretch
        view, length = memoryview(buffer), stretch.end - stretch.begin
        count = 0

        def read(broken: Answer | None) -> bool:
            nonlocal count
            begin = stretch.begin + count
            with self._fetch(stretch.stream.blob, begin, stretch.end, broken=broken) as answer:
                self._begin(attempt, answer)
                if answer.status == 200 and stretch.stream.parts > 1:
                    return False
                if answer.status == 200:
                    count = 0  # it begins at the beginning, even if the rest was requested
                else:
                    with self.condition:
                        stretch.stream.begin_all()
                while count < length and stretch.is_wanted():
                    count += self._receive(answer, view[count:length])
                if count == length and _has_trailing_bytes(answer):
                    raise too_long(stretch.stream.blob)
            return True

        if not self._with_retries(attempt, read, lambda: count):
            with self.condition:
                stretch.stream.go_whole()
            return
        with self.condition:
            if count == length and stretch.is_wanted():
                stretch.content = buffer
                for other in self._running:
                    if other.stretch is stretch and other is not attempt:
                        other.abort()

    def _read_whole(self, attempt: "_Attempt", buffer: bytearray) -> None:
        """Read a blob from its beginning, and hand out stretch after stretch."""
        stream = attempt.stretch.stream
        total = 0

        def read(broken: Answer | None) -> bool:
            nonlocal total
            position = 0
            with self._fetch(stream.blob, 0, stream.blob.size, broken=broken) as answer:
                self._begin(attempt, answer)
                for index in range(stream.parts):
                    with self.condition:
                        stretch = stream.stretch(index)
                    position += self._fill(stretch, answer, buffer)
                    total = max(total, position)
                    if not self._hand_out(stretch, buffer):
                        return True
                if _has_trailing_bytes(answer):
                    raise too_long(stream.blob)
            return True

        self._with_retries(attempt, read, lambda: total)

    def _begin(self, attempt: "_Attempt", answer: Answer) -> None:
        """Take note of what an attempt waits for now, so that it can be aborted."""
        with self.condition:
            attempt.answer = answer
            if attempt.aborted:
                answer.abort()

    def _fill(self, stretch: "_Stretch", answer: Answer, buffer: bytearray) -> int:
        view, length = memoryview(buffer), stretch.end - stretch.begin
        count = 0
        while count < length:
            count += self._receive(answer, view[count:length])
        return count

    def _hand_out(self, stretch: "_Stretch", buffer: bytearray) -> bool:
        """Wait until there is room for a stretch; False if the rest is no longer needed."""
        stream = stretch.stream
        with self.condition:
            while not self.closed and not stream.closed and stretch.index >= stream.at + self.window():
                self.condition.wait()
            if self.closed or stream.closed:
                return False
            if stretch.index >= stream.at and stretch.content is None:
                content = self.give_buffer()
                content[: stretch.end - stretch.begin] = buffer[: stretch.end - stretch.begin]
                stretch.content = content
                self.condition.notify_all()
            return True

    def _receive(self, answer: Answer, room: memoryview) -> int:
        count = answer.readinto(room[: self._limiter.piece_bytes(PIECE_BYTES)])
        if not count:
            raise ConnectionError(f"{answer.url}: the body is shorter than it should be")
        self._tally.fetch(count)
        self._limiter.wait(count, lambda: self.closed)
        return count

    def _with_retries(self, attempt: "_Attempt", read: "_Read", progress: Callable[[], int]) -> bool:
        """Return what `read` returns. Broken connections do not count as long as each brings something."""
        broken: Answer | None = None

        def read_once() -> bool:
            nonlocal broken
            attempt.answer = None
            try:
                return read(broken)
            except OSError:
                broken = attempt.answer or broken
                raise

        policy = self._settings.retry
        try:
            return with_retries(read_once, policy, pause=partial(self._pause, attempt), progress=progress)
        except _OverError:
            return True
        except OSError as error:
            if self._is_over(attempt):
                return True
            raise RegistryError(
                f"blob {attempt.stretch.stream.blob.digest} cannot be fetched",
                cause=f"{error}, {policy.attempts} times in a row",
            ) from None

    def _pause(self, attempt: "_Attempt", seconds: float) -> None:
        with self.condition:
            if self.condition.wait_for(lambda: self._is_over(attempt), seconds):
                raise _OverError

    def _is_over(self, attempt: "_Attempt") -> bool:
        return attempt.aborted or self.closed or attempt.stretch.stream.closed


def _has_trailing_bytes(answer: Answer) -> bool:
    """Tell whether there is more after all that was requested. What breaks after it does no harm."""
    try:
        return answer.readinto(memoryview(bytearray(1))) > 0
    except OSError:
        return False


class _Stretch:
    """A part of a blob: bytes `begin` to `end`. `content` is there once all of it is."""

    __slots__ = ("begin", "content", "end", "given_up", "index", "stream")

    def __init__(self, stream: "BlobStream", index: int) -> None:
        self.stream = stream
        self.index = index
        self.begin = index * STRETCH_BYTES
        self.end = min(self.begin + STRETCH_BYTES, stream.blob.size)
        self.content: bytearray | None = None
        self.given_up = False

    def is_wanted(self) -> bool:
        return self.content is None and not self.stream.closed and self.index >= self.stream.at


class _Attempt:
    """One thread's work on a stretch."""

    __slots__ = ("aborted", "answer", "failed", "stretch", "whole")

    def __init__(self, stretch: _Stretch, *, whole: bool) -> None:
        self.stretch = stretch
        self.whole = whole  # from the beginning of the blob to its end
        self.answer: Answer | None = None
        self.aborted = False
        self.failed = False

    def abort(self) -> None:
        self.aborted = True
        if self.answer is not None:
            self.answer.abort()


class BlobStream(io.RawIOBase):
    """A blob, read in order, while what follows is being fetched."""

    def __init__(self, downloads: Downloads, blob: Descriptor) -> None:
        super().__init__()
        self.blob = blob
        self.parts = max(1, -(-blob.size // STRETCH_BYTES))
        self.at = 0  # the stretch that is being read
        self.whole = False  # the registry does not support ranges
        self._downloads = downloads
        self._condition = downloads.condition
        self._offset = 0  # within that stretch
        self._asked = 0  # how many stretches were asked for
        self._whole_begun = False
        self._stretches: dict[int, _Stretch] = {}
        self._error: RekindleError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, into: object, /) -> int:
        """Read the next bytes; 0 at the end. Raises RegistryError if they cannot be fetched."""
        target = memoryview(into).cast("B")  # type: ignore[arg-type]
        if self.blob.size == 0 or self.at == self.parts:
            return 0
        with self._condition:
            stretch = self.stretch(self.at)
            while stretch.content is None:
                if self._error is not None:
                    raise self._error
                if self._downloads.closed or self.closed:
                    raise ended()
                self._condition.wait()
        length = stretch.end - stretch.begin
        count = min(len(target), length - self._offset)
        target[:count] = memoryview(stretch.content)[self._offset : self._offset + count]
        self._offset += count
        if self._offset == length:
            with self._condition:
                self._downloads.take_buffer(stretch.content)
                self._stretches.pop(self.at, None)
                self.at, self._offset = self.at + 1, 0
                self.ask_for_more()
                self._condition.notify_all()
        return count

    def close(self) -> None:
        if not self.closed:
            super().close()
            with self._condition:
                self._downloads.forget(self)
                self._stretches.clear()
                self._condition.notify_all()

    # For the threads. The caller holds the condition.

    def stretch(self, index: int) -> _Stretch:
        if index < self.at:  # read again on the way to what is needed
            return _Stretch(self, index)
        if index not in self._stretches:
            self._stretches[index] = _Stretch(self, index)
        return self._stretches[index]

    def ask_for_more(self) -> None:
        """Request as many stretches as may be under way. The first goes alone, and tells if ranges work."""
        if self.whole or self.closed or self.blob.size == 0:
            return
        end = min(self.parts, self.at + self._downloads.window()) if self._downloads.ranges_work else 1
        while self._asked < end:
            self._downloads.submit(self.stretch(self._asked))
            self._asked += 1

    def begin_all(self) -> None:
        """Take note that the registry supports ranges."""
        self._downloads.ranges_work = True
        self.ask_for_more()

    def wants(self, stretch: _Stretch) -> bool:
        """Tell whether to begin with a stretch; without ranges, the first thread begins with all of them."""
        if not self.whole:
            return stretch.is_wanted()
        begun, self._whole_begun = self._whole_begun, True
        return not begun and not self.closed

    def go_whole(self) -> None:
        """Let one thread read all of it, since ranges do not work."""
        if not self.whole:
            self.whole = True
            self._downloads.submit(self.stretch(self.at))

    def fail(self, error: RekindleError) -> None:
        self._error = self._error or error
        self._condition.notify_all()


def ended() -> RegistryError:
    """Return the error for threads that still read."""
    return RegistryError("the transfer was ended")


def too_long(blob: Descriptor) -> IntegrityError:
    """Return the error for a registry that sends more than it should."""
    said = f"blob {blob.digest} is longer than its descriptor says"
    return IntegrityError(said, cause=f"{blob.size} bytes")
