# SPDX-License-Identifier: Apache-2.0
"""Pass signals on to a server, unless whoever sent them has sent them to the server, too.

systemd (KillMode=control-group) and others send a signal to every process of a control group: to rekindle, to
the server, and to the process of the relay. The server must not get it twice, since to many a second SIGTERM
means to end at once. So a relay survives the signals and notes them; one that rekindle asks it to pass on it
holds for a moment, and drops it if it has got the same.

The relay of a cell is its init. A server outside of cells has this file as a program for it, which also runs
under `python -I -S` and imports only the standard library:

    relay.py DESCRIPTOR    of a SOCK_SEQPACKET socket. A message is a signal's number as a byte, with a pidfd

It ends when the socket closes.
"""

import contextlib
import ctypes
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from select import POLLIN, poll
from typing import Final

SIGNALS: Final = frozenset(
    {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
)
"""The signals that reach the server: init and we pass them on, and the root shell outlives them."""

# Whoever signals a control group goes through its processes one after the other, in less than a millisecond.
_HOLD_SECONDS = 0.05
_HEARD_SECONDS = 1.0
_INFO_BYTES = 128  # struct signalfd_siginfo: the number, errno, code and the sender's PID come first
_SFD_NONBLOCK, _SFD_CLOEXEC = 0o4000, 0o2000000


def block_signals() -> set[int]:
    """Block the signals for this process, so that they stay pending; return what was blocked before."""
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


class Relay:
    """Passes signals on. Block them first; call `receive` if `fd` is readable, and `step` at each turn."""

    def __init__(self, *, from_outside: bool = False) -> None:
        """Create a relay; with `from_outside`, signals of processes of our own PID namespace do not count."""
        mask = sum(1 << (signum - 1) for signum in SIGNALS).to_bytes(128, sys.byteorder)
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = libc.signalfd(-1, mask, _SFD_NONBLOCK | _SFD_CLOEXEC)
        if self.fd == -1:
            raise OSError(ctypes.get_errno(), "signalfd")
        self._from_outside = from_outside
        self._heard: dict[int, list[float]] = {}
        self._held: list[tuple[float, int, Callable[[], None]]] = []

    def receive(self) -> None:
        """Note the signals that we got."""
        with contextlib.suppress(BlockingIOError):
            while True:
                signum, _, _, sender = struct.unpack_from("IiiI", os.read(self.fd, _INFO_BYTES))
                if not (sender and self._from_outside):  # 0: it is in no PID namespace that we see
                    self._heard.setdefault(signum, []).append(time.monotonic())

    def hold(self, signum: int, deliver: Callable[[], None]) -> None:
        """Call `deliver` soon, unless we get the same signal, or got it just now."""
        self._held.append((time.monotonic() + _HOLD_SECONDS, signum, deliver))

    def step(self) -> float | None:
        """Deliver what is due; return the milliseconds until the next is, None if nothing is held."""
        if not self._held:
            return None
        self.receive()
        now, held = time.monotonic(), self._held
        self._held = []
        for due, signum, deliver in held:
            heard = [at for at in self._heard.get(signum, []) if now - at < _HEARD_SECONDS]
            self._heard[signum] = heard[1:]
            if heard:
                continue
            if due <= now:
                with contextlib.suppress(ProcessLookupError):
                    deliver()
            else:
                self._held.append((due, signum, deliver))
        return min((due - now for due, _, _ in self._held), default=0.0) * 1000 if self._held else None


def main() -> None:
    block_signals()
    relay, control = Relay(), socket.socket(fileno=int(sys.argv[1]))
    poller = poll()
    poller.register(relay.fd, POLLIN)
    poller.register(control, POLLIN)
    while True:
        ready = dict(poller.poll(relay.step()))
        if relay.fd in ready:
            relay.receive()
        if control.fileno() in ready:
            message, fds, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                return
            relay.hold(message[0], Delivery(fds[0], message[0]))


class Delivery:
    """A signal to the process of a pidfd, which it closes with itself."""

    def __init__(self, pidfd: int, signum: int) -> None:
        self._pidfd, self._signum = pidfd, signum

    def __call__(self) -> None:
        signal.pidfd_send_signal(self._pidfd, self._signum)

    def __del__(self) -> None:
        os.close(self._pidfd)


if __name__ == "__main__":
    main()
