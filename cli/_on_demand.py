# SPDX-License-Identifier: Apache-2.0
"""`rekindle restore --on-demand`: keep a port open, and a server behind it only while it is asked.

This process holds the listening sockets, in which clients wait, and starts a `rekindle restore` that inherits
them when the first client connects. When no client has asked for a while, it saves the server as `hibernate`
does, and the next client brings it back with its state.
"""

import argparse
import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence

from cli import _arguments, _replica_options, _report
from cli._afterwards import Afterwards
from cli._restoring import options_of
from rekindle import replicas
from rekindle.errors import BusyError, NotFoundError, RekindleError, UsageError
from rekindle.home import Home
from rekindle.replicas import ReplicaEntry
from rekindle.report import Outcome, Report, Rung
from rekindle.run import spawn
from rekindle.stop import stop
from restore.borrow import Lender
from restore.flow import plan, require_one
from restore.serve.address import Addresses

_POLL_SECONDS = 0.5
_END_SECONDS = 30.0
_ASKED_SECONDS = 60  # or else it is taken for one with a protocol in which the server speaks first


def serve(args: argparse.Namespace, command: Sequence[str]) -> int:
    """Serve until the server ends in another way than by hibernating; return its exit status."""
    if args.detach or args.replicas or args.ready_file or args.report or args.json:
        raise UsageError("--on-demand runs in the foreground, and cannot be combined with options of a start")
    if not args.name:
        raise UsageError("--on-demand needs --name NAME")
    _arguments.require_root()
    args.require = Rung.PROCESS
    home = Home.from_environment()
    decision = plan(options_of(args, command))
    require_one(decision, Rung.PROCESS)
    tell = _report.console(quiet=args.quiet)
    before = _of_before(home, args.name)
    image, wakes = args.image, False
    if before is not None and before.can_wake:
        image, wakes = before.status.hibernated, True
    with Addresses(decision.publications, args.listen_fds, is_early=True) as addresses:
        # Who has connected and not asked yet stays in the queue, where the end of a server does not reach it.
        for fd in addresses.filenos():
            with socket.socket(fileno=os.dup(fd)) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _ASKED_SECONDS)
        tell(f"{addresses.main} is open; the server will be restored when a client connects")
        while True:
            running: _Running
            if before is not None and before.runs:
                running, before = _Orphan(home, before), None
            else:  # it does what it can before a client connects
                running = _Restored(args, command, image, addresses.filenos(), wakes=wakes)
            with running as child:
                if not _wait_for_client(child, addresses.filenos(), home, args.name if wakes else None):
                    return child.status() or 0
                while True:
                    status = child.wait_until_idle(home, args.name, args.idle)
                    if status is not None:
                        return status
                    from snapshot.lent import hibernate

                    report = Report(verb="hibernate")
                    with contextlib.suppress(BusyError):  # a client was quicker
                        hibernate(args.name, report, unless_asked=True, home=home)
                        report.outcome = Outcome.SAVED
                        Afterwards(report).run()
                        break
                image, wakes = f"hibernated/{args.name}", True
            tell(f"{args.name} hibernates")


def _of_before(home: Home, name: str) -> ReplicaEntry | None:
    """Return the server of an earlier command like this one that was killed: it hibernates, or serves on."""
    with contextlib.suppress(NotFoundError):
        return replicas.find(home, name)
    return None


def _wait_for_client(child: "_Running", fds: Sequence[int], home: Home, hibernated: str | None) -> bool:
    """Wait until a client connects, and `child` serves it.

    Return False if the replica that hibernates is stopped before, or the child ends.
    """
    while not child.is_needed and not select.select(fds, [], [], _POLL_SECONDS)[0]:
        if child.status() is not None:
            return False
        with contextlib.suppress(NotFoundError):
            if hibernated and not replicas.find(home, hibernated).can_wake:
                return False
    child.is_needed = True
    return True


class _Running:
    """The rekindle that restores and serves, as a context that ends it. Until `is_needed`, it only waits."""

    is_needed = False

    def __enter__(self) -> "_Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def status(self) -> int | None:
        """Return its exit status; None while it runs."""
        raise NotImplementedError

    def end(self) -> None:
        """Let it end, if it has not yet."""
        raise NotImplementedError

    def wait_until_idle(self, home: Home, name: str, idle_seconds: float) -> int | None:
        """Wait until no client has asked for a while; return the exit status if the server ends before."""
        while (status := self.status()) is None:
            time.sleep(min(_POLL_SECONDS, idle_seconds / 4))
            with contextlib.suppress(RekindleError):  # it is not ready yet, or has just ended
                entry = replicas.running(home, name)
                if entry.state is replicas.ReplicaState.READY:
                    with Lender(entry) as lender:
                        if lender.idle_seconds() >= idle_seconds:
                            return None
        return status


class _Orphan(_Running):
    """One of a command like this one that was killed. It has the listening sockets, too."""

    is_needed = True

    def __init__(self, home: Home, entry: ReplicaEntry) -> None:
        self._home, self._entry = home, entry

    def status(self) -> int | None:
        self._entry = replicas.look_again(self._entry)
        return None if self._entry.runs else self._entry.exit_status

    def end(self) -> None:
        if self.status() is None:
            stop(self._home, [self._entry.name], _END_SECONDS)


class _Restored(_Running):
    """A child of ours."""

    def __init__(
        self,
        args: argparse.Namespace,
        command: Sequence[str],
        image: str,
        fds: Sequence[int],
        *,
        wakes: bool,
    ) -> None:
        words = [image, *_replica_options.words(args), "--name", args.name, "--require", "process"]
        words += ["--listen-fds", ",".join(map(str, fds)), "--await-client", str(os.getpid())]
        words += _arguments.option_words(args, ("process_deadline", "paranoid", "quiet"))
        # This machine has saved a replica that wakes, and trusts its own key.
        origin = (*_arguments.TRUST, *_arguments.REGISTRY)
        words += ["--wakes"] if wakes else _arguments.option_words(args, origin)
        argv = [sys.executable, "-m", "rekindle", "restore", *words, *(["--", *command] if command else [])]
        self._process = spawn(argv, stdout=1, stderr=2, pass_fds=fds)

    def status(self) -> int | None:
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def end(self) -> None:
        if self._process.poll() is None:
            # One that only waits heeds no other signal, and has nothing to clean up.
            self._process.send_signal(signal.SIGTERM if self.is_needed else signal.SIGKILL)
            with contextlib.suppress(Exception):
                self._process.wait(_END_SECONDS)
