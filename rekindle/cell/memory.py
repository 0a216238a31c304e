# SPDX-License-Identifier: Apache-2.0
"""Pass the system calls that distinguish file mappings from anonymous memory to a supervisor.

A restored process has its private memory mapped from a memory file (MAP_PRIVATE). That differs from anonymous
memory in a few calls only: MADV_DONTNEED restores the file's bytes instead of zeros, and a mapping that grows
shows the next bytes of the file. A seccomp filter passes those calls, and no others, to a supervisor
(SECCOMP_RET_USER_NOTIF), which answers them or lets the OS kernel carry them out. docs/memory.md lists them.

The cell's init uses this module under `python -I -S`: it imports only the standard library, and little of it.

Sources: seccomp_unotify(2), linux/seccomp.h, linux/filter.h.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from select import POLLIN, poll

# madvise(2). MADV_GUARD_INSTALL drops pages, too.
MADV_DONTNEED, MADV_FREE, MADV_DONTNEED_LOCKED, MADV_GUARD_INSTALL = 4, 8, 24, 102
# mremap(2)
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


class _Machine:
    """An architecture's numbers: its audit word and system calls, and those of its 32-bit programs."""

    __slots__ = ("address_bits", "compat", "native", "seccomp")

    def __init__(
        self, seccomp: int, address_bits: int, native: tuple[int, int, int], compat: tuple[int, int, int]
    ) -> None:
        self.seccomp = seccomp
        self.address_bits = address_bits  # the bits above are a tag that system calls ignore
        self.native = native  # audit word, madvise, mremap
        self.compat = compat


_MACHINES = {
    "x86_64": _Machine(317, 64, native=(0xC000003E, 28, 25), compat=(0x40000003, 219, 163)),
    "aarch64": _Machine(277, 56, native=(0xC00000B7, 233, 216), compat=(0x40000028, 220, 163)),
}
_MACHINE = _MACHINES.get(os.uname().machine)
_PROCESS_MADVISE = 440  # the same number everywhere
_X32_BIT = 0x40000000
_PLACES_LIMIT = 32  # so that no jump is longer than 255 instructions

_LOAD, _TO_X, _GIVE = 0x20, 0x07, 0x06  # BPF_LD|W|ABS, BPF_MISC|TAX, BPF_RET|K
_IF_EQUAL, _IF_GREATER, _IF_NOT_LESS, _IF_ANY_BIT = 0x15, 0x25, 0x35, 0x45  # BPF_JMP|JEQ, JGT, JGE, JSET |K
_IF_EQUAL_X, _IF_GREATER_X = 0x1D, 0x2D
_AND = 0x54  # BPF_ALU|AND|K
_ALLOW, _NOTIFY, _ERRNO = 0x7FFF0000, 0x7FC00000, 0x00050000
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data


def _argument(number: int, *, high: bool = False) -> int:
    """Return the offset of half an argument in struct seccomp_data, on a little-endian machine."""
    return 16 + 8 * number + 4 * high


_Line = str | tuple[int, int] | tuple[int, int, str, str]
"""A label, an instruction with its operand, or a jump with its two target labels; "" is the next line."""


def _assemble(lines: Sequence[_Line]) -> bytes:
    labels: dict[str, int] = {}
    instructions: list[tuple[int, int] | tuple[int, int, str, str]] = []
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(instructions)
        else:
            instructions.append(line)
    program = b""
    for at, (code, operand, *targets) in enumerate(instructions, 1):
        jumps = [labels[target] - at if target else 0 for target in targets] or [0, 0]
        program += struct.pack("HBBI", code, *jumps, operand)
    return program


def _filter(machine: _Machine) -> bytes:
    """Return a program that stops the calls that need special treatment, and allows all others.

    For moves by mremap, it continues with the result of `_places`, with the high half of the address loaded.

    32-bit calls have the same arguments and are treated alike. x32 calls (x86-64 only; CRIU restores no x32
    process) fail as on an OS kernel without them. Since Linux 6.13, process_madvise accepts every advice for
    a process's own memory, but its arguments are in memory that may change after we read it, so it fails as
    before.
    """
    dropping = (MADV_DONTNEED, MADV_FREE, MADV_DONTNEED_LOCKED, MADV_GUARD_INSTALL)
    lines: list[_Line] = [
        (_LOAD, _ARCHITECTURE),
        (_IF_EQUAL, machine.native[0], "native", ""),
        (_IF_EQUAL, machine.compat[0], "compat", "allow"),
    ]
    for label, (_, madvise, mremap) in (("native", machine.native), ("compat", machine.compat)):
        lines += [
            label,
            (_LOAD, _NUMBER),
            (_IF_NOT_LESS, _X32_BIT, "unknown", ""),
            (_IF_EQUAL, madvise, "madvise", ""),
            (_IF_EQUAL, mremap, "mremap", ""),
            (_IF_EQUAL, _PROCESS_MADVISE, "process_madvise", "allow"),
        ]
    lines += ["madvise", (_LOAD, _argument(2))]
    lines += [(_IF_EQUAL, advice, "notify", "") for advice in dropping]
    lines += [(_GIVE, _ALLOW), "process_madvise", (_LOAD, _argument(3))]
    lines += [(_IF_EQUAL, advice, "invalid", "") for advice in dropping]
    lines += [
        "allow",
        (_GIVE, _ALLOW),
        "unknown",
        (_GIVE, _ERRNO | errno.ENOSYS),
        "invalid",
        (_GIVE, _ERRNO | errno.EINVAL),
        "mremap",
        (_LOAD, _argument(1, high=True)),
        (_TO_X, 0),
        (_LOAD, _argument(2, high=True)),
        (_IF_GREATER_X, 0, "notify", ""),
        (_IF_EQUAL_X, 0, "", "no growth"),
        (_LOAD, _argument(1)),
        (_TO_X, 0),
        (_LOAD, _argument(2)),
        (_IF_GREATER_X, 0, "notify", ""),
        "no growth",
        (_LOAD, _argument(3)),
        (_IF_ANY_BIT, MREMAP_DONTUNMAP, "notify", ""),
        (_IF_ANY_BIT, MREMAP_FIXED, "", "stays"),
        (_LOAD, _argument(1, high=True)),
        (_IF_EQUAL, 0, "move", "notify"),
        "stays",
        (_GIVE, _ALLOW),
        "notify",
        (_GIVE, _NOTIFY),
        "move",
        (_LOAD, _argument(0, high=True)),
        (_AND, (1 << machine.address_bits - 32) - 1),
    ]
    return _assemble(lines)


def _places(ranges: Sequence[Sequence[int]]) -> bytes:
    """Return the rest of the program, which stops moves of less than 4 GiB that may start or end in a range.

    CRIU moves a few thousand mappings during a restore, from other places; stopping them costs 7 us each.
    """
    places: list[list[int]] = []  # by the high halves of addresses
    for start, end in ranges:
        first, last = max((start >> 32) - 1, 0), (end - 1) >> 32
        if places and first <= places[-1][1] + 1:
            places[-1][1] = max(places[-1][1], last)
        else:
            places.append([first, last])
    while len(places) > _PLACES_LIMIT:
        at = min(range(1, len(places)), key=lambda i: places[i][0] - places[i - 1][1])
        places[at - 1 : at + 1] = [[places[at - 1][0], places[at][1]]]
    lines: list[_Line] = []
    for first, last in places:
        after = f"after {last:x}"
        lines += [(_IF_NOT_LESS, first, "", "allow"), (_IF_GREATER, last, after, "notify"), after]
    return _assemble([*lines, "allow", (_GIVE, _ALLOW), "notify", (_GIVE, _NOTIFY)])


FILTER = _filter(_MACHINE) if _MACHINE else b""
"""The beginning of every such filter's program, also in a dump's seccomp.img; b"" on other machines."""

_SET_MODE_FILTER = 1
_FLAG_SPEC_ALLOW = 4  # this is not a sandbox: do not switch on mitigations of speculative execution
_FLAG_NEW_LISTENER = 8
_FLAG_WAIT_KILLABLE_RECV = 0x20  # Linux 5.19: a signal waits until a call that we have received is answered


def check_kernel() -> None:
    """Raise OSError if a supervisor cannot work on this OS kernel.

    The parameter proc_mem.force_override= (Linux 6.12) can prevent /proc/PID/mem from writing to pages that
    the process itself may not write to.
    """
    if _MACHINE is None:
        raise OSError(errno.ENOSYS, f"no filter for {os.uname().machine}")
    size, prot_read, private_anonymous = ctypes.c_size_t(os.sysconf("SC_PAGE_SIZE")), 1, 0x22
    _libc.mmap.restype = ctypes.c_void_p
    address = _libc.mmap(None, size, prot_read, private_anonymous, -1, ctypes.c_long(0))
    mem = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(mem, b"\0", address)
    except OSError as error:
        raise OSError(error.errno, "the OS kernel protects read-only pages from /proc/PID/mem") from None
    finally:
        os.close(mem)
        _libc.munmap(ctypes.c_void_p(address), size)


def give_listener(channel: socket.socket, ranges: Sequence[Sequence[int]]) -> None:
    """Install the filter in this process and send the listener to its supervisor.

    Sends the error and exits if that fails.
    """
    try:
        listener = install(FILTER + _places(ranges))
    except OSError as error:
        channel.send(struct.pack("i", error.errno))
        os._exit(1)
    socket.send_fds(channel, [struct.pack("i", 0)], [listener])
    os.close(listener)


def take_listener(channel: socket.socket) -> int:
    """Receive the listener from `give_listener`. Raises OSError."""
    message, fds, _, _ = socket.recv_fds(channel, 4, 1)
    number = struct.unpack("i", message)[0] if message else errno.ECHILD
    if not fds:
        raise OSError(number, f"seccomp filter with a listener: {os.strerror(number)}")
    return fds[0]


def install(program: bytes) -> int:
    """Install a filter for this process, and return its listener. Raises OSError."""
    assert _MACHINE is not None
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    flags = _FLAG_NEW_LISTENER | _FLAG_SPEC_ALLOW
    for extra in (_FLAG_WAIT_KILLABLE_RECV, 0):
        listener = int(_libc.syscall(_MACHINE.seccomp, _SET_MODE_FILTER, flags | extra, header))
        if listener >= 0:
            return listener
        if ctypes.get_errno() != errno.EINVAL:
            break
    raise OSError(ctypes.get_errno(), "seccomp")


# SECCOMP_IOCTL_NOTIF_*; IS_VALID has the number of all versions, not the corrected one of Linux 5.17.
_RECEIVE, _SEND, _IS_VALID, _SET_FLAGS = 0xC0502100, 0xC0182101, 0x80082102, 0x40082104
_SYNC_WAKE_UP = 1  # Linux 6.6
_CONTINUE = 1
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # id, tid, flags, number, architecture, pointer, arguments
_RESPONSE = struct.Struct("=Qqii")  # id, value, error, flags


class GoneError(Exception):
    """A call ended before it was answered: its task died, or a signal came first."""


class Call:
    """A system call that waits for its answer."""

    __slots__ = ("_listener", "arguments", "id", "is_mremap", "number", "tid")

    def __init__(self, listener: int, notification: bytes | bytearray) -> None:
        assert _MACHINE is not None
        self._listener = listener
        self.id, self.tid, _, self.number, architecture, _, *self.arguments = _NOTIFICATION.unpack(
            notification
        )
        names = _MACHINE.native if architecture == _MACHINE.native[0] else _MACHINE.compat
        self.is_mremap = self.number == names[2]
        self.arguments[0] &= (1 << _MACHINE.address_bits) - 1

    def check(self) -> None:
        """Raise GoneError if the call does not wait any more."""
        try:
            _ioctl(self._listener, _IS_VALID, struct.pack("=Q", self.id))
        except FileNotFoundError:
            raise GoneError from None

    def answer(self, error: int = 0) -> None:
        """Make the call return 0, or fail with an error's number."""
        self._send(-error, 0)

    def resume(self) -> None:
        """Let the OS kernel carry out the call, whose arguments are in registers and cannot have changed."""
        self._send(0, _CONTINUE)

    def _send(self, error: int, flags: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # the task died
            _ioctl(self._listener, _SEND, _RESPONSE.pack(self.id, 0, error, flags))


def _ioctl(fd: int, operation: int, argument: bytes) -> None:
    """Call ioctl, and repeat it if a signal interrupts its wait for the listener's lock."""
    while True:
        with contextlib.suppress(InterruptedError):
            fcntl.ioctl(fd, operation, argument)
            return


class CallSource:
    """The source of the calls of all tasks under one filter; readable when there is one."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._poll = poll()
        self._poll.register(fd, POLLIN)
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, _SET_FLAGS, _SYNC_WAKE_UP)

    def is_readable(self) -> bool:
        return any(event & POLLIN for _, event in self._poll.poll(0))

    def receive(self) -> Call | None:
        """Return a call, or None if its task has died or a signal came."""
        notification = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self.fd, _RECEIVE, notification)
        except (FileNotFoundError, InterruptedError):
            return None
        return Call(self.fd, notification)
