# SPDX-License-Identifier: Apache-2.0
"""Notice the system calls of a server whose effect leaves no trace in /proc, and which CRIU does not save.

A process that has restricted itself with Landlock would come back without that; keys and keyrings of the OS
kernel would be missing. A seccomp filter shows such calls to the cell's init (SECCOMP_RET_USER_NOTIF), which
notes them and lets the OS kernel carry them out. The filter is taken out of the dump.

The cell's init uses this module under `python -I -S`: it imports only the standard library, and little of it.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Callable

from rekindle.cell import memory

LANDLOCK, KEYS = "landlock", "keys"

_LANDLOCK_RESTRICT_SELF = 446  # the same number on every architecture
# The audit word, add_key, keyctl.
_MACHINES = {"x86_64": (0xC000003E, 248, 250), "aarch64": (0xC00000B7, 217, 219)}
_MACHINE = _MACHINES.get(os.uname().machine)
# keyctl's operations that give a process a keyring, or put a key into one.
_KEYCTL_KEEPS = {1, 8, 18, 22}  # JOIN_SESSION_KEYRING LINK SESSION_TO_PARENT GET_PERSISTENT


def _filter(machine: tuple[int, int, int]) -> bytes:
    word, add_key, keyctl = machine
    load, if_equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    allow, notify = 0x7FFF0000, 0x7FC00000
    program = (
        (load, 0, 0, 4),  # seccomp_data.arch
        (if_equal, 0, 4, word),
        (load, 0, 0, 0),  # seccomp_data.nr
        (if_equal, 3, 0, _LANDLOCK_RESTRICT_SELF),
        (if_equal, 2, 0, add_key),
        (if_equal, 1, 0, keyctl),
        (give, 0, 0, allow),
        (give, 0, 0, notify),
    )
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


FILTER = _filter(_MACHINE) if _MACHINE else b""
"""The program of the filter, also in a dump's seccomp.img; b"" on other machines."""


class Watcher:
    """Notes the calls of every task under one filter: `note` gets the kind of each, and the process's PID.

    It is served as a Supervisor is, and never busy.
    """

    busy = False

    def __init__(self, listener: memory.CallSource, note: Callable[[str, int], None]) -> None:
        self.listener = listener
        self._note = note

    def receive(self) -> None:
        """Receive a call, note it, and let it continue."""
        call = self.listener.receive()
        if call is None:
            return
        if call.number == _LANDLOCK_RESTRICT_SELF:
            self._note(LANDLOCK, _process(call.tid))
        elif _MACHINE and (call.number == _MACHINE[1] or call.arguments[0] in _KEYCTL_KEEPS):
            self._note(KEYS, _process(call.tid))
        call.resume()

    def step(self) -> None:
        """Do nothing."""


def watched(
    spawn: Callable[[Callable[[], None]], int], note: Callable[[str, int], None]
) -> tuple[int, Watcher | None]:
    """Start a process under the filter; return its PID, and None where the OS kernel has no such filter.

    `spawn` starts a process that first calls its argument, and returns its PID.
    """
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            pid = spawn(lambda: _offer_listener(theirs))
        _, listeners, _, _ = socket.recv_fds(ours, 1, 1)
    return pid, Watcher(memory.CallSource(listeners[0]), note) if listeners else None


def _offer_listener(channel: socket.socket) -> None:
    """Install the filter in this process and send its listener, or go on without where that is impossible."""
    with contextlib.suppress(OSError):
        if FILTER:
            listener = memory.install(FILTER)
            socket.send_fds(channel, [b"!"], [listener])
            os.close(listener)
    channel.close()


def _process(tid: int) -> int:
    """Return the PID of a thread's process."""
    with contextlib.suppress(OSError), open(f"/proc/{tid}/status") as file:
        for line in file:
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    return tid
