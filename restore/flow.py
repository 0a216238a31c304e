# SPDX-License-Identifier: Apache-2.0
"""Run one restore, from its options to the server's exit: decide, go down the ladder, announce, serve."""

import contextlib
import functools
import os
import threading
import time

from oci import store
from rekindle import replicas
from rekindle.cell import Cell, Network
from rekindle.criu import Criu, kernel_facts
from rekindle.errors import Interrupted, RekindleError, RestoreError
from rekindle.home import Home
from rekindle.proc import process_age
from rekindle.replicas import Registration
from rekindle.report import Outcome, Report, Rung, ServerAddress
from restore.decide.decision import Decision, decide, os_errors_as_capability
from restore.decide.plan import Step, require_possible
from restore.decide.publications import unpublished
from restore.listener import Listener, announced
from restore.options import Options
from restore.read_ahead import ReadAhead
from restore.rungs import ladder
from restore.rungs.ladder import TakenRung
from restore.rungs.run import Run
from restore.serve import notify
from restore.serve.address import Addresses
from restore.serve.announce import Announcer
from restore.signals import Signals

LOWER_STATUS = 3
"""The exit status instead of 0 if the server ran on a lower rung than requested."""

_OUTCOMES = {
    Rung.PROCESS: Outcome.RESTORED,
    Rung.NEUTRAL: Outcome.NEUTRAL,
    Rung.CACHE: Outcome.CACHE,
    Rung.COLD: Outcome.COLD,
}


def restore(
    options: Options,
    listener: Listener | None = None,
    cell: Cell | None = None,
    registration: Registration | None = None,
) -> int:
    """Restore a saved server on the best rung that this node allows, and serve until it exits.

    `cell` is one that has not been entered yet, if the caller wanted it to boot earlier; it is ended here.
    `registration` is the entry of this replica among those of the home, if it has one; it is kept up to date.

    Call this in the main thread: signals are passed on to the server. Returns the server's exit status, 128
    + N for signal N, but 3 instead of 0 on a rung below `options.rung`. Raises RekindleError if no rung could
    be taken, Interrupted if a signal came before the server was ready; nothing is left behind then.
    """
    listener = listener or Listener()
    began = time.monotonic() - process_age() + options.waited_seconds
    report = Report(verb="restore", asked=options.rung, tell=listener.say, began=began)
    report.replica = registration.name if registration else None
    with Signals() as signals, contextlib.ExitStack() as stack:
        announcer = Announcer(report, listener, options.ready_file, registration)
        run = Run(
            options=options,
            report=report,
            listener=listener,
            signals=signals,
            announcer=announcer,
            read_ahead=stack.enter_context(ReadAhead()),
            registration=registration,
        )
        try:
            decision, taken = _bring_up(run, cell, stack)
        except BaseException as error:
            report.fail(error)
            listener.failed(report)
            raise
        return _serve(run, decision, taken)


def plan(options: Options) -> Decision:
    """Return what a restore would do here. Fetches only manifests and records, and starts nothing."""
    report = Report(verb="restore", asked=options.rung)
    with Signals() as signals, contextlib.ExitStack() as connections:
        return decide(options, report, signals, connections, prepares=False, with_cache=True)


def require_one(decision: Decision, lowest: Rung) -> None:
    """Raise CapabilityError or MismatchError, as a restore would, if no rung down to `lowest` is possible."""
    rungs = list(Rung)
    steps = [step for step in decision.plan.steps if rungs.index(step.rung) <= rungs.index(lowest)]
    if not any(step.possible for step in steps):
        require_possible(steps[-1].reasons)


def _bring_up(run: Run, cell: Cell | None, stack: contextlib.ExitStack) -> tuple[Decision, TakenRung]:
    """Decide, take the best possible rung, and fill the report."""
    options, report = run.options, run.report
    wants_process = options.rung is Rung.PROCESS and os.geteuid() == 0
    if cell is None and wants_process:
        cell = Cell()  # it boots while we decide
    if cell is not None:
        stack.enter_context(cell)
    connections = stack.enter_context(contextlib.ExitStack())
    stack.enter_context(notify.ready_file(options.ready_file))
    with report.phase("decide"):
        decision = decide(
            options,
            report,
            run.signals,
            connections,
            prepares=cell is not None,
            with_cache=options.rung in {Rung.NEUTRAL, Rung.CACHE},
            read_ahead=run.read_ahead,
        )
        addresses = stack.enter_context(_addresses_of(decision, options))
    take = functools.partial(_take, run, decision, addresses, cell)
    taken = ladder.descend(decision.plan, take, report, stack, require=options.require)
    connections.close()
    source = decision.source
    report.bytes.written = report.bytes.written or 0
    report.bytes.fetched = source.tally.fetched_bytes if source and source.tally else 0
    report.endpoint = str(addresses.main) if addresses.main else None
    report.addresses = _addresses(decision, addresses, taken.rung)
    report.pid = os.getpid()
    if taken.status is None:
        report.outcome, report.error = _OUTCOMES[taken.rung], None
        run.announcer.say_ready(taken.rung)
    return decision, taken


def _addresses_of(decision: Decision, options: Options) -> Addresses:
    """Bind what is to be published. Raises PortError."""
    ports = None
    if options.shared_port:
        assert decision.home is not None  # only the process rung is taken
        ports = decision.home.ports
    return Addresses(decision.publications, options.listening, ports=ports, is_early=options.listen_early)


def _take(
    run: Run,
    decision: Decision,
    addresses: Addresses,
    cell: Cell | None,
    step: Step,
    stack: contextlib.ExitStack,
) -> TakenRung:
    try:
        with os_errors_as_capability():
            match step.rung:
                case Rung.PROCESS:
                    from restore.rungs import process

                    assert cell is not None
                    return process.take(run, decision, addresses, cell, step, stack)
                case Rung.NEUTRAL:
                    from restore.rungs import neutral

                    return neutral.take(run, decision, addresses, cell, step, stack)
                case Rung.CACHE:
                    from restore.rungs import cache

                    return cache.take(run, decision, addresses, cell, step, stack)
                case Rung.COLD:
                    from restore.rungs import cold

                    return cold.take(run, decision, addresses, cell, stack)
    except Interrupted as interrupted:
        run.announcer.asked_to_end(interrupted.signum)  # before the clean-up, which may take a while
        raise


def _addresses(decision: Decision, addresses: Addresses, rung: Rung) -> list[ServerAddress]:
    """Return where the server listens and where clients reach it, as far as that is known."""
    record = decision.facts.image.record if decision.facts.image else None
    if rung is not Rung.PROCESS or record is None:
        return addresses.published(decision.engine.endpoint if decision.engine else None)
    if record.process.network is Network.HOST:
        return [ServerAddress(server=str(each), published=str(each)) for each in record.listeners]
    return addresses.published(record.endpoint) + [
        ServerAddress(server=str(each)) for each in unpublished(decision.publications, record)
    ]


def _serve(run: Run, decision: Decision, taken: TakenRung) -> int:
    """Announce that the server is ready and serve until it exits; return the exit status."""
    if taken.status is None:
        run.announcer.register(taken.rung, taken.cell_init, decision.facts.api_keys.keys)
    run.listener.ready(run.report)
    # Killed commands may have left gigabytes: do not wait for their removal.
    if decision.home is not None:
        criu = decision.facts.abilities.criu if taken.rung is Rung.PROCESS else None
        threading.Thread(target=_tidy, args=[decision.home, criu], daemon=True).start()
    status = taken.status
    if status is None:
        run.announcer.ready()
    with announced(run.listener, run.report):
        if status is None:
            status = _served(run, taken)
    return status or (0 if taken.rung == run.options.rung else LOWER_STATUS)


def _served(run: Run, taken: TakenRung) -> int | None:
    """Serve until the server exits; return its status. Raises the error by which it lost its memory."""
    try:
        try:
            status = taken.serving.run()
        except RestoreError:  # the cell has ended
            taken.require_memory()
            raise
        run.announcer.stopping()
        if status:
            taken.require_memory()
    except RekindleError as error:
        run.report.fail(error)
        run.listener.failed(run.report)
        raise
    return status


def _tidy(home: Home, criu: Criu | None) -> None:
    """Do for the next restore what this one need not wait for."""
    store.sweep(home)
    replicas.sweep(home)
    if criu is not None:
        kernel_facts.learn(home, criu.path)
