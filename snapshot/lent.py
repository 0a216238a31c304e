# SPDX-License-Identifier: Apache-2.0
"""Save a server that another rekindle serves, and that serves on.

from snapshot import ReplicaOptions, save_running

image = save_running("web-1", ReplicaOptions(image="tiny-monday", runs_on=True))
"""

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from oci import store
from oci.image import Image
from oci.layout import Layout
from oci.reference import parse
from rekindle import documents, replicas
from rekindle.cell import Cell, Network
from rekindle.cell.hook import Reseed
from rekindle.engine import Engine
from rekindle.engine.choose import Weights, from_record
from rekindle.engine.client import Client
from rekindle.errors import BusyError, OracleError, UsageError, WorkloadError
from rekindle.home import Home
from rekindle.record import Record
from rekindle.report import OracleAnswer, Pause, Report
from restore import dumps
from restore.borrow import Lender
from restore.decide.match_api_key import requires_key
from snapshot import make
from snapshot.flow import snapshot
from snapshot.hooks import after_dump
from snapshot.options import Progress, ReplicaOptions, SnapshotOptions
from snapshot.outside_connections import Outside
from snapshot.replica import RunningReplica, save_borrowed
from snapshot.run import BegunServer
from snapshot.server import Server
from snapshot.warm import known_oracle

_ANSWER_SECONDS = 60.0


def save_running(
    name: str,
    options: ReplicaOptions,
    report: Report | None = None,
    progress: Progress | None = None,
    *,
    drain_seconds: float = 10.0,
    unless_asked: bool = False,
    home: Home | None = None,
) -> Image:
    """Save a replica that another process serves, by its name, and fill the report.

    The server is asked its oracle and looked at while it serves on. Then new requests wait while those in
    flight finish, for at most `drain_seconds`, and it is frozen while it is dumped. No request fails. With
    `options.runs_on` the server then serves on, and the rest is done beside it. Otherwise it has ended when
    this returns.

    With `unless_asked`, a server that was going to end runs on, and BusyError is raised, if a client has sent
    something meanwhile.

    Raises NotFoundError if there is no such replica, CapabilityError for one without a cell, BusyError,
    OracleError for a server that answers wrongly by now, and the errors of `save_replica`. The server serves
    on after an error.
    """
    home = home or store.open_home()
    report = report or Report(verb="snapshot")
    entry = replicas.running(home, name)
    with Lender(entry) as lender:
        report.replica, report.pause = name, Pause()
        facts = lender.facts()
        if "run" in facts:
            begun = documents.read(facts["run"], BegunServer, "the server's start")
            return _save_begun(lender, begun, options, report, progress, drain_seconds)
        image = Image.from_json(facts["image"], Layout(home.store))
        reference, dump = parse(entry.status.image), facts["dump"]
        if not facts.get("whole", True):
            raise BusyError(
                f"the memory of the replica '{name}' is not all here yet", hint="try again in a minute"
            )

        @contextlib.contextmanager
        def borrow() -> Iterator[RunningReplica]:
            assert report.pause is not None
            with contextlib.ExitStack() as stack:
                cell, output = stack.enter_context(lender.lent(report.pause))
                with report.phase("oracle"):
                    _ask(cell, image.record, report)
                yield RunningReplica(
                    hold=_once(lambda: _hold(lender, drain_seconds, report)),
                    cell=cell,
                    image=image,
                    reference=reference,
                    dump=Path(dump) if dump else None,
                    output=output,
                )

        def before_end() -> None:
            if unless_asked and lender.waiting():
                raise BusyError(f"a client has asked the replica '{name}' meanwhile")

        return save_borrowed(
            image, reference, borrow, options, report, progress, home=home, before_end=before_end
        )


def hibernate(
    name: str,
    report: Report | None = None,
    *,
    secrets: Sequence[str] = (),
    drain_seconds: float = 10.0,
    unless_asked: bool = False,
    home: Home | None = None,
) -> None:
    """Save a replica as hibernated/NAME, where `rekindle wake` finds it, and end it; see `save_running`."""
    home = home or store.open_home()
    entry, image = replicas.running(home, name), f"hibernated/{name}"
    options = ReplicaOptions(image=image, runs_on=False, prove=False, secrets=tuple(secrets))
    with Lender(entry) as lender:
        dump = lender.facts().get("dump")
    save_running(name, options, report, drain_seconds=drain_seconds, unless_asked=unless_asked, home=home)
    replicas.wait(entry)
    replicas.hibernate(home, name, image)
    if dump and entry.status.image == image:  # it was woken from what this replaces
        dumps.remove_superseded(Path(dump))


def _save_begun(
    lender: Lender,
    begun: BegunServer,
    options: ReplicaOptions,
    report: Report,
    progress: Progress | None,
    drain_seconds: float,
) -> Image:
    """Save a server that was started by `rekindle run`, as a snapshot of its command would be."""
    if not options.runs_on or options.outside is not Outside.REFUSE:
        raise UsageError(
            "a server that was started by `rekindle run` can only be saved as it is, and runs on"
        )

    @contextlib.contextmanager
    def start(_: make.ServerSpec, engine: Engine, __: Path, report: Report) -> Iterator[make.WarmServer]:
        assert report.pause is not None
        with contextlib.ExitStack() as stack:
            cell, _output = stack.enter_context(lender.lent(report.pause))
            output = Path(begun.stdout), Path(begun.stderr)
            server = Server.running(cell, begun.root_pid, begun.given, *output, begun.reseed)
            with report.phase("oracle"):
                oracle = known_oracle(server, engine, Client(engine.endpoint, cell.connect))
            if begun.reseed is not Reseed.NONE:
                stack.callback(after_dump, cell, report)
            yield make.WarmServer(
                cell=cell,
                server=server,
                oracle=oracle,
                reads=_Reads(begun),
                began_ns=begun.began_ns,
                start_seconds=begun.start_seconds,
                stop_watching=lambda: None,
                runs_on=True,
                hold=_once(lambda: _hold(lender, drain_seconds, report)),
            )

    asked = SnapshotOptions(
        image=options.image,
        command=begun.argv,
        network=begun.network,
        ready_url=begun.ready_url,
        oracle_file=Path(begun.oracle_file) if begun.oracle_file else None,
        weights=Weights.AS_IS if begun.ready_url is None else None,
        prove=options.prove and begun.network is Network.PRIVATE,
        secrets=options.secrets,
        sign=options.sign,
        registry=options.registry,
    )
    with contextlib.chdir(begun.directory):
        return snapshot(asked, report, progress, start=start, given=begun.environment)


def _hold(lender: Lender, drain_seconds: float, report: Report) -> None:
    assert report.pause is not None
    with report.phase("drain"):
        lender.hold(drain_seconds, report.pause)


def _once(call: Callable[[], None]) -> Callable[[], None]:
    """Return a function that makes this call when it is called first."""
    left = [call]

    def once() -> None:
        if left:
            left.pop()()

    return once


class _Reads:
    def __init__(self, begun: BegunServer) -> None:
        self.read, self.problem = set(begun.read), begun.problem
        self.written = set(begun.written)
        self._lasting = begun.lasting

    def lasting(self, pids: Collection[int]) -> Sequence[str]:  # noqa: ARG002
        """Return what was found where the server's processes are known by other PIDs."""
        return self._lasting


def _ask(cell: Cell, record: Record, report: Report) -> None:
    """Raise OracleError unless the server still gives the recorded answer."""
    keys = None if requires_key(record) else ()
    engine = from_record(record.engine.name, record.endpoint, record.engine.options, keys)
    client = Client(record.endpoint, cell.connect)
    try:
        got = engine.answer(
            client.ask(engine.authorize(record.oracle.request, os.environ), timeout=_ANSWER_SECONDS)
        )
    except OSError as error:
        raise WorkloadError("the server does not answer", cause=str(error)) from error
    agree = engine.agree(record.oracle.answer, got)
    report.oracle = OracleAnswer(expected=record.oracle.answer, got=got, match=agree)
    if not agree:
        raise OracleError(
            "the server's answer differs from the recorded one by now",
            cause=f"expected {json.dumps(record.oracle.answer)[:300]}, got {json.dumps(got)[:300]}",
        )
