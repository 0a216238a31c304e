# SPDX-License-Identifier: Apache-2.0
"""The process rung: restore a dump into a cell, and check the server's answer before opening its port."""

import contextlib
import functools
import importlib
import json
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from oci.image import Image
from rekindle import criu
from rekindle.cell import Cell, Network, exit_status, hook, processes
from rekindle.cell.settings import to_apply
from rekindle.criu import Criu
from rekindle.engine import Engine
from rekindle.engine.choose import from_record
from rekindle.errors import MismatchError, OracleError, PortError, RekindleError, RestoreError
from rekindle.fields import JSON
from rekindle.files import copy_sparse_tree
from rekindle.home import Home
from rekindle.os_errors import naming_full_disk
from rekindle.record import Record
from rekindle.report import MemoryMode, MemoryUse, OracleAnswer, Report, Rung
from restore import dumps
from restore.decide import match_loaded
from restore.decide.decision import Decision
from restore.decide.difference import Difference
from restore.decide.match_api_key import ApiKeys, requires_key
from restore.decide.plan import Step
from restore.decide.rules import reason_for
from restore.decide.source import Source
from restore.options import Lazy, Memory, Output
from restore.rungs.cuda_state import CudaRestore, GpuMemory, end, must_suspend, restore_cuda
from restore.rungs.ladder import TakenRung
from restore.rungs.memory import Shown, restore_with_memory
from restore.rungs.run import Run
from restore.rungs.same_secrets import require_same_secrets
from restore.serve.address import Addresses

if TYPE_CHECKING:
    from restore.lazy.client import LazyMemory
    from restore.serve.foreground import Serving
    from restore.serve.gate import NewGate

_ANSWER_SECONDS = 60.0
_RESEED_SECONDS = 10.0
_NOTICE_SECONDS = 0.5  # between the end of a server and the reason for it


def take(
    run: Run,
    decision: Decision,
    addresses: Addresses,
    cell: Cell,
    step: Step,
    stack: contextlib.ExitStack,
) -> TakenRung:
    """Fetch the dump, restore it into a booted cell, ask the oracle, and publish its addresses.

    Pushes onto `stack` what ends the server again. Raises RekindleError or DeadlinePassed.
    """
    report, source, home = run.report, decision.source, decision.home
    assert source is not None
    assert home is not None
    image = source.image.value
    record, tool = image.record, decision.facts.abilities.criu
    assert tool is not None
    driver = decision.facts.node.devices.driver
    with run.signals.raising(_seconds_left(run, step)):
        work = stack.enter_context(home.work("restore"))
        require_same_weights = stack.enter_context(_comparing_weights(record, report))
        if record.process.network is Network.HOST:
            addresses.release()  # the server binds them itself; binding only checked that they are free
        if step.roots:
            with report.phase("extract"):
                _extract_mapped_files(run, source, step, stack)
        end_cell = functools.partial(end, cell, record, driver, home, report)
        stack.push(lambda _, error, __: end_cell(error))
        with contextlib.ExitStack() as using:
            with run.listener.progress(source.tally):
                lazy = _lazy_memory(run, source, home, using)
                dump = lazy.tree if lazy else _ready_dump(run, source, home, work, step, using)
            cuda = None
            if source.cuda is not None:
                cuda = CudaRestore(search=source.cuda, device_map=decision.plan.device_map)
            with _ending_with(lazy, cell):
                restore(
                    cell,
                    record,
                    dump,
                    tool=tool,
                    home=home,
                    work=work,
                    output=run.options.output,
                    report=report,
                    # A server that asks for no key gets none from us either: its memory may be saved.
                    engine=from_record(
                        record.engine.name,
                        record.endpoint,
                        record.engine.options,
                        decision.facts.api_keys.keys if requires_key(record) else (),
                    ),
                    cuda=cuda,
                    memory=run.options.memory,
                    shown=Shown(lazy.mount, lazy.whole) if lazy else None,
                    check=functools.partial(require_same_secrets, run, decision, cell),
                    require_same_weights=require_same_weights,
                )
            if lazy is not None:
                lazy.restored()
                report.lazy = lazy.how_far()
            # Memory files must not change while the server maps them. A copied dump is not needed any longer:
            # other restores may remove it to make room.
            if report.memory is not None and report.memory.mode is MemoryMode.MAPPED:
                stack.push(using.pop_all().__exit__)
                stack.push(lambda _, error, __: end_cell(error))  # before the dump is unlocked
    report.bytes.reused = image.size_bytes if not report.bytes.written else 0
    mapped = report.memory is not None and report.memory.mode is MemoryMode.MAPPED
    kill = end_cell if must_suspend(record, driver) else None
    where = functools.partial(_where, lazy, dump if mapped else None)
    serving = _serve(run, cell, image, kill, where, stack)
    if record.process.network is Network.PRIVATE:
        with report.phase("publish"):
            _publish(addresses, serving, record, _gate(record, decision.facts.api_keys))
    taken = TakenRung(rung=Rung.PROCESS, serving=serving, cell_init=cell.init_pid)
    check = functools.partial(lazy.check, _NOTICE_SECONDS) if lazy else taken.require_memory
    return structs.replace(taken, require_memory=check)


def _ready_dump(
    run: Run, source: Source, home: Home, work: Path, step: Step, using: contextlib.ExitStack
) -> Path:
    """Fetch and unpack the dump, unless it is here already."""
    with _measured(source, home, step):
        return using.enter_context(
            dumps.ready(
                home,
                work,
                source.image,
                run.report,
                paranoid=run.options.paranoid,
                expect=source.tally.expect if source.tally else None,
            )
        )


def _lazy_memory(run: Run, source: Source, home: Home, using: contextlib.ExitStack) -> "LazyMemory | None":
    """Return the memory of a dump that is fetched while the server runs; None to fetch all of it before."""
    if run.options.lazy is Lazy.NEVER or source.tally is None:  # most restores are from the local store
        return None
    from restore.lazy import client

    return using.enter_context(client.opened(run.options, source, home, run.report))


@contextlib.contextmanager
def _ending_with(lazy: "LazyMemory | None", cell: Cell) -> Iterator[None]:
    """End the cell with the memory that its processes map, and raise why that cannot be had."""
    if lazy is None:
        yield
        return

    def kill() -> None:
        if cell.init_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(cell.init_pid, signal.SIGKILL)

    lazy.watch(kill)
    try:
        yield
        lazy.check()
    except BaseException as error:
        kill()  # before the memory goes: nobody is to die of SIGBUS
        if isinstance(error, Exception):
            lazy.check(_NOTICE_SECONDS)
        raise


def _measured(source: Source, home: Home, step: Step) -> contextlib.AbstractContextManager[None]:
    from restore import fetch_rates

    if source.tally is None:
        return fetch_rates.measured_unpacking(home, step.unpack_bytes)
    return fetch_rates.measured(home, source.reference, source.tally)


def _serve(
    run: Run,
    cell: Cell,
    image: Image,
    kill: Callable[[], None] | None,
    where: Callable[[], tuple[Path | None, bool]],
    stack: contextlib.ExitStack,
) -> "Serving":
    """Begin to serve the restored server, which maps the memory of the dump `mapped`, if any."""
    from restore.serve.control import Control
    from restore.serve.foreground import RestoredServer, Serving  # now, while the server already answers

    facts = functools.partial(_facts, image, where)
    output = (run.options.output.stdout, run.options.output.stderr)
    replica = RestoredServer(cell, image.record.process, kill, output, facts)
    serving = stack.enter_context(Serving(replica, run.signals, run.announcer.asked_to_end))
    serving.client_address = run.options.client_address
    if run.registration is not None:
        with contextlib.suppress(OSError):  # a server without it is served as well
            stack.enter_context(Control(run.registration.directory, serving, replica))
    return serving


def _where(lazy: "LazyMemory | None", mapped: Path | None) -> tuple[Path | None, bool]:
    """Return the dump whose memory a server maps, and whether all of it is here."""
    if lazy is None or mapped is None:
        return mapped, True
    return lazy.dump, lazy.dump is not None


def _facts(image: Image, where: Callable[[], tuple[Path | None, bool]]) -> dict[str, JSON]:
    """Return what a command that acts on the replica needs to know."""
    mapped, is_whole = where()
    return {"image": image.to_json(), "dump": str(mapped) if mapped else None, "whole": is_whole}


def _gate(record: Record, api_keys: ApiKeys) -> "NewGate | None":
    """Return what makes the gate of a connection; None if a start today would require no key."""
    if not api_keys.keys:
        return None
    from rekindle.engine.vllm_authentication import Guard
    from restore.serve.gate import ApiKeyGate

    version = record.node.packages.get("vllm", "")
    guard = Guard.of(api_keys.keys, version=version, root_path=api_keys.root_path)
    hides_key = not requires_key(record)  # the saved server asks for none, and what it gets can be saved
    return functools.partial(ApiKeyGate, guard, str(record.endpoint), hides_key=hides_key)


def _publish(addresses: Addresses, serving: "Serving", record: Record, new_gate: "NewGate | None") -> None:
    try:
        for sock, target in addresses.listen(record.endpoint):
            serving.publish(sock, target, new_gate if target.port == record.endpoint.port else None)
        for port, target in addresses.shared(record.endpoint):
            serving.share(port, target, new_gate if target.port == record.endpoint.port else None)
    except PortError as error:
        raise RestoreError(error.message, cause=error.cause, hint=error.hint) from error


def _seconds_left(run: Run, step: Step) -> float | None:
    """Return the seconds left for this rung; --process-deadline counts from the start of rekindle."""
    if run.options.process_deadline is None:
        return step.deadline_seconds
    return max(0.001, run.options.process_deadline - (time.monotonic() - run.report.began))


@contextlib.contextmanager
def _comparing_weights(record: Record, report: Report) -> Iterator[Callable[[], None]]:
    """Compare the weights that the server reloads with the recorded ones, within the context.

    Yields what waits for the result, and raises MismatchError if they differ. Reading gigabytes takes seconds
    of two cores, which pass while CRIU, the driver and the server work.
    """
    if not record.reloads:
        yield lambda: None
        return
    from rekindle.engine import weights

    comparison = weights.Comparison(record.weights, os.environ)

    def require_same() -> None:
        with report.phase("weights"):
            names = comparison.changed()
        if names:
            raise MismatchError(
                "the model to reload differs from the recorded one",
                cause=", ".join(names[:10]),
                hint="fetch the recorded revision of the model",
            )

    try:
        yield require_same
    finally:
        comparison.stop()


def _extract_mapped_files(run: Run, source: Source, step: Step, stack: contextlib.ExitStack) -> None:
    """Extract the kernel-cache files that the process has mapped, to their recorded paths.

    Raises MismatchError if a mapped file is still missing or different afterwards.
    """
    from restore.rungs.place_cache import extract

    record = source.image.value.record
    extract(run, source, {root.name: Path(root.recorded) for root in source.roots(step)}, stack)
    left = match_loaded.mapped(record)
    missing = [file.path for file in record.mapped_files if file.path in left]
    if missing:
        raise MismatchError(
            "the kernel cache lacks files that the process has mapped",
            cause=", ".join(f"{path}: {left[path]}" for path in missing[:5]),
        )


def restore(
    cell: Cell,
    record: Record,
    dump: Path,
    *,
    tool: Criu,
    home: Home,
    work: Path,
    output: Output,
    report: Report,
    engine: Engine | None = None,
    cuda: CudaRestore | None = None,
    memory: Memory = Memory.MAP,
    shown: Shown | None = None,
    check: Callable[[], None] | None = None,
    require_same_weights: Callable[[], None] = lambda: None,
) -> None:
    """Restore the server into a cell that was just booted, and ask the oracle.

    `engine` defaults to the one that the record names. `cuda` is required for a server with CUDA state.
    `shown` are memory files that are not mapped from the dump itself. `check` is called as soon as the
    processes are there.

    Raises RestoreError or OracleError. Ending the cell, which is left to the caller, undoes everything.
    """
    process = record.process
    with contextlib.ExitStack() as undo:
        with report.phase("cell"):
            cell.enter(process.network, process.clocks)
            with naming_full_disk("the cell's /dev/shm", hint="the node is out of memory"):
                copy_sparse_tree(dump / "shm", cell.root / "dev/shm")
                hook.renew_generation(cell.root)
            made = [each.path for each in process.directories if each.made]
            if process.private or process.made or made:
                from rekindle.cell import private

                undo.push(private.give(cell, process.private, made, process.made))
        gpu_memory = GpuMemory(process)  # asked while CRIU works
        used = call_criu(cell, record, dump, tool, home, work, output, report, memory, shown)
        if check is not None:
            check()
        engine = engine or from_record(record.engine.name, record.endpoint, record.engine.options)
        if process.cuda_pids:
            with report.phase("cuda"):
                restore_cuda(cell, process, cuda, gpu_memory)
        if process.hooked:  # not before: a thread may hold Python's lock while it waits for the GPU
            with report.phase("reseed"):
                _reseed(cell, process.hooked)
        try:
            if engine.options().get("asleep"):
                _wake(cell, record, engine, report)
            with report.phase("oracle"):
                _ask_oracle(cell, record, engine, report)
                own, files = processes.memory_bytes(cell)
                report.memory = structs.replace(used, own_bytes=own, file_bytes=files)
        except RekindleError:
            require_same_weights()
            raise
        require_same_weights()
        undo.pop_all()


def call_criu(
    cell: Cell,
    record: Record,
    dump: Path,
    tool: Criu,
    home: Home,
    work: Path,
    output: Output,
    report: Report,
    memory: Memory,
    shown: Shown | None,
) -> MemoryUse:
    """Let CRIU restore the processes; return how they got their memory."""
    process = record.process
    # Importing the HTTP client takes 30 ms: do it while CRIU works.
    threading.Thread(target=importlib.import_module, args=["rekindle.engine.client"], daemon=True).start()
    with report.phase("restore"), contextlib.ExitStack() as opened:
        inherit = {
            Path(path): _seen_in_cell(cell, fd, opened)
            for path, fd in ((process.stdout, output.stdout), (process.stderr, output.stderr))
            if path != os.devnull  # of a server that was started otherwise: its output stays where it went
        }
        if process.stdin is not None:
            inherit[Path(process.stdin)] = _seen_in_cell(cell, 0, opened)
        call = functools.partial(criu.restore, tool, cell, inherit=inherit, log_directory=work, home=home)
        used = restore_with_memory(call, record, dump, work, memory, shown)
        _adjust(cell, record, report)
    return used


def _adjust(cell: Cell, record: Record, report: Report) -> None:
    """Give the server the limits and places of today, and what it had set itself."""
    if record.process.settings is None:
        return
    problems = cell.adjust(to_apply(record.process.settings))
    report.reasons += [reason_for(Difference("setting", "setting", "", each)) for each in problems]


def _seen_in_cell(cell: Cell, fd: int, opened: contextlib.ExitStack) -> int:
    """Return a descriptor for the server's output that CRIU can dump again.

    CRIU can treat our files, pipes and terminals as external, but a device like /dev/null must be the cell's
    (CRIU 4.2.1: "Can't lookup mount").
    """
    status = os.fstat(fd)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != Path(os.devnull).stat().st_rdev:
        return fd
    inside = os.open(cell.root / os.devnull.lstrip("/"), os.O_RDWR | os.O_CLOEXEC)
    opened.callback(os.close, inside)
    return inside


def _reseed(cell: Cell, hooked: Sequence[int]) -> None:
    """Reseed the random numbers of the restored processes, before any of them is asked something."""
    try:
        hook.call(cell, hook.HookPhase.AFTER_RESTORE, _RESEED_SECONDS, expected=hooked)
    except hook.HookError as error:
        raise RestoreError(
            f"process {error.pid} ({processes.command(cell, error.pid)}) could not be reseeded",
            cause=error.problem,
            hint="if replicas may share random numbers: take a snapshot with --reseed none",
        ) from error


def _wake(cell: Cell, record: Record, engine: Engine, report: Report) -> None:
    from rekindle.engine.client import Client

    def connect(host: str, port: int, timeout: float) -> socket.socket:
        status = cell.wait(record.process.root_pid, 0.0)
        if status is not None:  # an engine that waits for a port would otherwise wait until its deadline
            raise RestoreError(f"the restored server exited with status {exit_status(status)} while waking")
        return cell.connect(host, port, timeout)

    engine.enter(cell.root)
    engine.wake(Client(record.endpoint, connect), report.phase)


def _ask_oracle(cell: Cell, record: Record, engine: Engine, report: Report) -> None:
    """Ask the oracle and report its answer. Raise OracleError if it differs from the recorded one."""
    from rekindle.engine.client import Client

    client = Client(record.endpoint, cell.connect)
    request = engine.authorize(record.oracle.request, os.environ)
    asked = time.monotonic()
    try:
        response = client.ask(request, timeout=_ANSWER_SECONDS)
    except OSError as error:
        status = cell.wait(record.process.root_pid, 0.1)
        ended = "" if status is None else f": it exited with status {exit_status(status)}"
        raise RestoreError(f"the restored server does not answer{ended}", cause=str(error)) from error
    report.first_token_seconds = response.first_byte - report.began
    answer = engine.answer(response)
    agree = engine.agree(record.oracle.answer, answer)
    report.oracle = OracleAnswer(
        expected=record.oracle.answer,
        got=answer,
        match=agree,
        first_token_seconds=response.first_byte - asked,
    )
    if not agree:
        raise OracleError(
            "the restored server's answer differs from the recorded one",
            cause=f"expected {json.dumps(record.oracle.answer)[:300]}, got {json.dumps(answer)[:300]}",
        )
    engine.require_accepted(client)
