# SPDX-License-Identifier: Apache-2.0
"""The process that fetches an image's memory while servers run on it: `python -m restore.lazy.filler`.

It reads an order (`restore.lazy.order.Order`) from its standard input, and talks to restores over sockets
(SOCK_SEQPACKET, one JSON object per message): over one that it inherits, and over those that connect to
`socket` in its directory.

    from a restore        from the filler
                          {"here": true} with the mount, once the rest of the dump is unpacked and the
                          registry has given a part of a blob
    {"unpacked": true}    the first restore has unpacked all but the memory
    {"restored": true}    the files of the dump are not needed by their paths any more
    {"how far": true}     {"fetched": bytes, "first_left": blocks, "complete": bool}
                          {"complete": seconds since it began}
                          {"error": …, "lazy": bool} and its end; with false, fetch the whole image instead
    {"ended": true}       what ran on the memory has been killed

It ends when no restore is connected any more, or after an error. Whatever ends it ends the file system.
"""

import bisect
import contextlib
import ctypes
import json
import os
import selectors
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from oci import resolve
from oci.blocks import Block, read_blocks
from oci.image import Image
from oci.reference import RegistryReference, parse
from oci.registry.repository import Repository
from rekindle import dump_tree, fuse
from rekindle.errors import CapabilityError, RekindleError
from rekindle.fields import JSON
from rekindle.home import Home
from rekindle.record import FileKind, StoredFile, numbered
from restore import dumps
from restore.lazy.fill import Fill, NoRangesError
from restore.lazy.order import MESSAGE_BYTES, Order, Places
from restore.lazy.reader_ahead import ReaderAhead

_THREADS = 8
_REST_BYTES_PER_SECOND = 50e6  # at least, and so much that the rest takes a minute
_REST_SECONDS = 60.0
_PATIENCE_SECONDS = 60.0
_END_SECONDS = 3.0
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000


class Filler:
    """Serves the memory files of one image to all restores that are connected."""

    def __init__(self, order: Order, first: socket.socket) -> None:
        self._began = time.monotonic()
        self._order, self._places = order, Places(Path(order.directory))
        self._home = Home(Path(order.home))
        reference = parse(order.reference)
        assert isinstance(reference, RegistryReference)
        self._access = resolve.access(order.registry, self._home)
        self._repository = Repository(reference, self._access)
        self._image = Image.from_json(json.loads(order.image), self._repository)
        files = numbered(self._image.record.dump.files)
        self._memory = {n: file for n, file in files.items() if file.path.parts[0] == "memory"}
        self._numbers = [n for n, file in self._memory.items() if file.kind is FileKind.FILE]
        self._positions = {number: at for at, number in enumerate(self._numbers)}
        self._make_files()
        shown = [fuse.File(files[n].path.name, files[n].size) for n in self._numbers]
        self._directory = fuse.Directory(shown, self._take)
        _leave_mounts()
        fuse.attach(self._directory.mount, self._places.mount)
        names = [file.name for file in shown]
        self._ahead = ReaderAhead(
            self._places.mount, names, [*self._directory.descriptors(), first.fileno(), *order.kept]
        )
        blocks = self._blocks()
        self._fill = Fill(
            self._repository,
            blocks,
            files,
            self._places.tree,
            needed_first=_needed_first(blocks, self._image, files),
            tally=self._access.tally,
            limiter=self._access.limiter,
            patience_seconds=_PATIENCE_SECONDS,
            rest_rate=self._rest_rate(blocks),
            answer=self._answer,
            arrived=self._arrived,
            failed=self._note_error,
            changed=self._wake,
        )
        self._error: RekindleError | None = None
        self._kept = contextlib.ExitStack()  # locks the dump that it makes
        self._unpacked = self._is_complete = False
        self._selector = selectors.DefaultSelector()
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._clients: dict[socket.socket, _Connected] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._add(first)

    def _make_files(self) -> None:
        (self._places.tree / "memory").mkdir(mode=0o700)
        for number in self._numbers:
            file = self._memory[number]
            with open(self._places.tree / file.path, "xb") as new:
                os.fchmod(new.fileno(), 0o600)
                new.truncate(file.size)

    def _blocks(self) -> list[Block]:
        layers = {layer.digest: layer for layer in self._image.layers if layer.is_memory}
        stored = {each.layer: each for each in self._image.record.dump.blocks}
        return [block for digest, layer in layers.items() for block in read_blocks(stored[digest], layer)]

    def _rest_rate(self, blocks: Sequence[Block]) -> float:
        total = sum(block.length for block in blocks)
        return max(_REST_BYTES_PER_SECOND, total / _REST_SECONDS)

    def run(self) -> None:
        """Serve until nobody is connected any more."""
        serving = threading.Thread(target=self._directory.serve, daemon=True)
        serving.start()
        self._fill.start(min(_THREADS, self._access.config.transfer.jobs))
        with self._places.short() as place:
            self._listener.bind(f"{place}/{self._places.socket.name}")
        self._listener.listen()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, self._look)
        try:
            while self._clients and self._error is None:
                for key, _ in self._selector.select():
                    key.data(key.fileobj)
                self._progress()
            if self._error is not None:
                self._tell_error(self._error)
        finally:
            for read in self._fill.end():
                self._directory.refuse(read)
            self._directory.close()
            fuse.detach(self._places.mount)
            serving.join(_END_SECONDS)

    # In the thread of the file system, and in those of the fill.

    def _take(self, read: fuse.Read) -> None:
        if not self._fill.take(read, self._numbers[read.file]):
            self._directory.refuse(read)

    def _answer(self, read: fuse.Read) -> None:
        fd = self._fill.memory[self._numbers[read.file]]
        try:
            content = os.pread(fd, read.size, read.offset)
        except OSError as error:
            self._directory.refuse(read, error.errno or 5)
            return
        self._directory.answer(read, content)

    def _arrived(self, number: int, offset: int, length: int) -> None:
        self._ahead.arrived(self._positions[number], offset, length)

    def _note_error(self, error: RekindleError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._woken, 1)

    # In the main thread.

    def _look(self, _: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._woken)

    def _accept(self, _: object) -> None:
        with contextlib.suppress(OSError):
            self._add(self._listener.accept()[0])

    def _add(self, sock: socket.socket) -> None:
        sock.settimeout(_END_SECONDS)
        self._clients[sock] = _Connected()
        self._selector.register(sock, selectors.EVENT_READ, self._hear)

    def _hear(self, sock: object) -> None:
        assert isinstance(sock, socket.socket)
        try:
            content = sock.recv(MESSAGE_BYTES)
        except OSError:
            content = b""
        if not content:
            self._drop(sock)
            return
        client = self._clients[sock]
        match json.loads(content):
            case {"unpacked": True}:
                self._unpacked = True
            case {"restored": True}:
                client.needs_paths = False
                self._fill.begin_rest()
            case {"how far": True}:
                self._send(sock, self._how_far())
            case {"ended": True}:
                client.ended = True

    def _drop(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        del self._clients[sock]
        sock.close()

    def _send(self, sock: socket.socket, message: JSON, fds: Sequence[int] = ()) -> None:
        try:
            socket.send_fds(sock, [json.dumps(message).encode()], list(fds))
        except OSError:
            self._drop(sock)

    def _how_far(self) -> JSON:
        return {
            "fetched": self._access.tally.fetched_bytes,
            "first_left": self._fill.first_left,
            "complete": self._fill.is_complete,
        }

    def _progress(self) -> None:
        """Tell the restores what they may begin with, and finish the dump when all of it is here."""
        if self._unpacked and self._fill.has_begun:
            for sock, client in list(self._clients.items()):
                if not client.was_told:
                    client.was_told = True
                    mount = fuse.another(self._places.mount)
                    self._send(sock, {"here": True}, [mount])
                    os.close(mount)
        ready = self._unpacked and self._fill.is_complete and not self._is_complete
        if ready and not any(client.needs_paths for client in self._clients.values()):
            self._is_complete = True
            self._finish()
            for sock in list(self._clients):
                self._send(sock, {"complete": time.monotonic() - self._began})

    def _finish(self) -> None:
        """Make an ordinary dump of what has come, unless there is one already."""
        dump_tree.finish(list(self._memory.values()), self._places.tree)
        self._kept.enter_context(dumps.adopted(self._home, self._image, self._places.tree))

    def _tell_error(self, error: RekindleError) -> None:
        """Tell the error, and wait until what runs on the memory has been killed."""
        for sock in list(self._clients):
            is_lazy = not isinstance(error, NoRangesError)
            self._send(sock, {"error": error.to_json(), "kind": type(error).__name__, "lazy": is_lazy})
        deadline = time.monotonic() + _END_SECONDS
        while any(not client.ended for client in self._clients.values()):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            for key, _ in self._selector.select(left):
                key.data(key.fileobj)


class _Connected:
    """A restore that is connected."""

    def __init__(self) -> None:
        self.was_told = self.ended = False
        self.needs_paths = True


def _needed_first(blocks: Sequence[Block], image: Image, files: dict[int, StoredFile]) -> list[int]:
    """Return the blocks that hold nothing but what the proof touched, in order."""
    by_path = {file.path: number for number, file in files.items()}
    touched = {
        by_path[each.path]: sorted((offset, offset + length) for offset, length in each.working_set)
        for each in image.record.dump.memory
    }

    def is_touched(block: Block) -> bool:
        for file, start, end in block.spans:
            stretches = touched.get(file, [])
            at = bisect.bisect_right(stretches, (start, 1 << 62)) - 1
            if at < 0 or not stretches[at][0] <= start < end <= stretches[at][1]:
                return False
        return bool(block.spans)

    return [number for number, block in enumerate(blocks) if is_touched(block)]


def _leave_mounts() -> None:
    """Enter a mount namespace of our own, whose mounts end with us."""
    libc = ctypes.CDLL(None, use_errno=True)
    private = ctypes.c_ulong(_MS_REC | _MS_PRIVATE)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(None, b"/", None, private, None):
        number = ctypes.get_errno()
        raise OSError(number, f"mount namespace: {os.strerror(number)}")


def main() -> int:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    order = Order.read(sys.stdin.buffer.read())
    with socket.socket(fileno=order.socket) as first:
        try:
            filler = Filler(order, first)
        except (OSError, RekindleError) as error:
            failure: RekindleError = CapabilityError("FUSE cannot be had", cause=str(error))
            failure = error if isinstance(error, RekindleError) else failure
            message = {"error": failure.to_json(), "kind": type(failure).__name__, "lazy": False}
            with contextlib.suppress(OSError):
                first.send(json.dumps(message).encode())
            return 1
        filler.run()
    shutil.rmtree(order.directory, ignore_errors=True)
    os._exit(0)  # threads may still wait for a registry


if __name__ == "__main__":
    sys.exit(main())
