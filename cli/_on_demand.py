# SPDX-License-Identifier: Apache-2.0
"""`rekindle restore --on-demand`: keep a port open, and a server behind it only while it is asked.

This process holds the listening sockets, in which clients wait, and starts a `rekindle restore` that inherits
them when the first client connects. When no client has asked for a while, it saves the server as `hibernate`
does, and the next client brings it back with its state.
"""

import argparse
import contextlib
import select
import signal
import sys
import time
from collections.abc import Sequence

from cli import _arguments, _replica_options, _report
from cli._afterwards import Afterwards
from cli._restoring import options_of
from rekindle import replicas
from rekindle.errors import BusyError, NotFoundError, RekindleError, UsageError
from rekindle.home import Home
from rekindle.report import Outcome, Report, Rung
from rekindle.run import spawn
from restore.borrow import Lender
from restore.flow import plan, require_one
from restore.serve.address import Addresses

_POLL_SECONDS = 0.5
_END_SECONDS = 30.0


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
    image, wakes = args.image, False
    with Addresses(decision.publications, is_early=True) as addresses:
        tell(f"{addresses.main} is open; the server will be restored when a client connects")
        while True:
            if not _wait_for_client(addresses.filenos(), home, args.name if wakes else None):
                return 0
            with _Restored(args, command, image, addresses.filenos(), wakes=wakes) as child:
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


def _wait_for_client(fds: Sequence[int], home: Home, hibernated: str | None) -> bool:
    """Wait until a client connects; return False if the replica that hibernates is stopped before."""
    while not select.select(fds, [], [], _POLL_SECONDS)[0]:
        with contextlib.suppress(NotFoundError):
            if hibernated and not replicas.find(home, hibernated).can_wake:
                return False
    return True


class _Restored:
    """The rekindle that restores and serves, as a context that ends it."""

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
        words += ["--listen-fds", ",".join(map(str, fds))]
        words += _arguments.option_words(args, ("process_deadline", "paranoid", "quiet"))
        # This machine has saved a replica that wakes, and trusts its own key.
        origin = (*_arguments.TRUST, *_arguments.REGISTRY)
        words += ["--wakes"] if wakes else _arguments.option_words(args, origin)
        argv = [sys.executable, "-m", "rekindle", "restore", *words, *(["--", *command] if command else [])]
        self._process = spawn(argv, stdout=1, stderr=2, pass_fds=fds)

    def __enter__(self) -> "_Restored":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(Exception):
                self._process.wait(_END_SECONDS)

    def wait_until_idle(self, home: Home, name: str, idle_seconds: float) -> int | None:
        """Wait until no client has asked for a while; return the exit status if the server ends before."""
        while (code := self._process.poll()) is None:
            time.sleep(min(_POLL_SECONDS, idle_seconds / 4))
            with contextlib.suppress(RekindleError):  # it is not ready yet, or has just ended
                entry = replicas.running(home, name)
                if entry.state is replicas.ReplicaState.READY:
                    with Lender(entry) as lender:
                        if lender.idle_seconds() >= idle_seconds:
                            return None
        return code if code >= 0 else 128 - code
