# SPDX-License-Identifier: Apache-2.0
"""What `rekindle restore` does, once its command line has been read."""

import argparse
import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli import _plan, _progress, _report
from oci import image as images
from oci import resolve, store
from oci.reference import Reference, RegistryReference, parse
from oci.trust.verifier import Verified
from rekindle import engine
from rekindle.cell import Cell, Network
from rekindle.cuda import search
from rekindle.engine import Endpoint, Engine
from rekindle.engine.choose import for_command, restored
from rekindle.errors import (
    CapabilityError,
    Interrupted,
    MismatchError,
    PortError,
    RekindleError,
    RestoreError,
    UsageError,
    WorkloadError,
)
from rekindle.home import Home
from rekindle.record import Oracle, Record
from rekindle.report import Outcome, Reason, Report, Rung
from restore import dumps, options
from restore.decide import facts as _facts
from restore.decide import match_process, plan, rules
from restore.decide.facts import _DECIDE_SECONDS, _naming_lacks
from restore.decide.plan import Facts, Step
from restore.rungs import ladder, process
from restore.rungs.ladder import Taken
from restore.serve import address, notify
from restore.serve.foreground import Restored, Serving
from restore.signals import DeadlinePassed, Signals

if TYPE_CHECKING:  # what only a lower rung needs is imported when one is taken
    from oci.cache.image import CacheImage
    from oci.cache.inventory import StoredRoot
    from oci.progress import Tally
    from rekindle.cuda.search import Search
    from restore.rungs.proof import Watched
    from restore.rungs.readiness import Ready

_OUTCOMES = {Rung.PROCESS: Outcome.RESTORED, Rung.CACHE: Outcome.CACHE, Rung.COLD: Outcome.COLD}
_LOWER_STATUS = 3


def run(args: argparse.Namespace, command: Sequence[str], required: Rung) -> int:
    """Does what the command line asks for; returns the exit status. `required` is the lowest rung to take."""
    report = Report(verb="restore", asked=args.rung, quiet=args.quiet)
    with Signals() as signals, contextlib.ExitStack() as stack:
        if args.plan:
            return _Restore(args, command, report, signals, stack).show_plan(required)
        with _report.reporting(report, args):
            restore = _Restore(args, command, report, signals, stack)
            taken = restore.climb(required)
        return restore.serve(taken)


class _Restore:
    """One run of the command. What has to be undone at its end is on `stack`.

    Work is done where `signals` raises, so that it can be broken off at any moment; clean-up never is.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        given: Sequence[str],
        report: Report,
        signals: Signals,
        stack: contextlib.ExitStack,
    ) -> None:
        self._args = args
        self._given = given
        self._report = report
        self._signals = signals
        self._stack = stack
        self._reference: Reference = parse(args.image)
        self._found: Verified[images.Image] | None = None
        self._tally: Tally | None = None
        self._cache: Verified[CacheImage] | None = None
        self._bound: socket.socket | None = None
        self._cell: Cell | None = None
        self._cuda: Search | None = None
        self._tried = False
        if args.rung is Rung.PROCESS and os.geteuid() == 0 and not args.plan:
            self._cell = stack.enter_context(Cell())  # it boots while we decide
        self._sources = stack.enter_context(contextlib.ExitStack())
        stack.enter_context(notify.ready_file(args.ready_file))
        self._ready = False

    def climb(self, required: Rung) -> Taken:
        """Takes the best rung that can be taken, and fills the report."""
        report = self._report
        with report.phase("decide"):
            made = self._decide(required, with_cache=self._args.rung is Rung.CACHE)
            self._device_map = made.device_map
            self._engine = self._find_engine()
            self._endpoint = self._find_endpoint(made)
            if self._endpoint is not None:
                self._bound = self._stack.enter_context(address.bind(self._endpoint))
        taken = ladder.climb(made, self._take, report, self._stack, require=required)
        self._sources.close()
        if taken.status is None:
            report.outcome, report.error = _OUTCOMES[taken.rung], None
            self._say_ready(taken.rung)
        report.bytes.setdefault("written", 0)
        report.bytes["fetched"] = self._tally.fetched_bytes if self._tally else 0
        report.endpoint = str(self._endpoint) if self._endpoint else None
        report.pid = os.getpid()
        return taken

    def serve(self, taken: Taken) -> int:
        """Tells that the server is ready, and looks after it to its end; the exit status."""
        self._write_report(to_stdout=self._args.json)
        # What killed commands left may be gigabytes: nobody who restores has to wait for its removal.
        if self._found is not None:
            threading.Thread(target=store.sweep, args=[self._home], daemon=True).start()
        status = taken.status
        if status is None:
            self._ready = True
            notify.ready(self._args.ready_file)
            if self._args.ready_file is not None and not self._args.ready_file.exists():
                self._report.say(f"WARNING: --ready-file {self._args.ready_file} cannot be made")
            status = taken.serving.run()
            self._stop()
        return status or (0 if taken.rung == self._args.rung else _LOWER_STATUS)

    def show_plan(self, required: Rung) -> int:
        """Prints what would be done; the exit status that a restore would have, if all went well."""
        made = self._decide(required, with_cache=True)
        digest = self._report.image.get("digest", "")
        _plan.show(made, self._facts, self._args.image, digest, as_json=self._args.json)
        rungs = list(Rung)
        steps = [step for step in made.steps if rungs.index(step.rung) <= rungs.index(required)]
        if not any(step.possible for step in steps):
            plan.require_possible(steps[-1].reasons)
        return 0 if made.steps[0].possible else _LOWER_STATUS

    # The decision.

    def _decide(self, required: Rung, *, with_cache: bool) -> plan.Plan:
        """Gathers the facts and makes the plan. If the image cannot be had, and a cold start of the given
        command may take its place, that is the plan."""
        replaceable = bool(self._given) and required is Rung.COLD
        patience = self._args.process_deadline or _DECIDE_SECONDS
        try:
            with self._signals.raising(patience if replaceable else None), _naming_lacks():
                self._facts = self._gather(with_cache=with_cache)
        except (Exception, DeadlinePassed) as error:
            if not replaceable or (isinstance(error, RekindleError) and not error.descends):
                raise
            self._sources.close()
            with self._signals.raising():
                self._facts = self._unreached(rules.failure(Rung.PROCESS, "image", error))
        return self._plan(self._facts)

    def _gather(self, *, with_cache: bool) -> Facts:
        """Finds the image, verifies it, reads its record and looks at this node. No layer is touched."""
        self._home = self._open_home()
        source = self._sources.enter_context(resolve.source(self._reference, self._home, self._args))
        self._tally = source.tally
        verified = resolve.verified(source, self._reference, self._home, self._args, self._report)
        self._found = found = _facts.trusted(verified)
        self._report.image = {"reference": self._args.image, "digest": found.value.index.digest}
        if self._cell is not None:
            self._cuda = self._sources.enter_context(search.starting_cuda(found.value.record, self._home))
        facts = _facts.gather(
            found.value,
            self._reference,
            self._home,
            self._given,
            with_cache=with_cache,
            with_abilities=self._args.rung is Rung.PROCESS,
            starting=self._cuda,
        )
        if (kernels := facts.cache) is not None:
            self._cache = found.map(lambda _: kernels)
        return facts

    def _unreached(self, reason: Reason) -> Facts:
        """The facts where the image cannot be had: its place is taken by the given command, cold."""
        self._report.image.setdefault("reference", self._args.image)
        self._report.say(f"WARNING: cold start: {reason.here}")
        return dataclasses.replace(_facts.of_nothing(self._given), unreached=reason)

    def _plan(self, facts: Facts) -> plan.Plan:
        made = plan.make(facts, self._args.rung, rules.strictness(self._args.policy))
        chosen = {Rung.PROCESS: self._args.process_deadline, Rung.CACHE: self._args.cache_deadline}
        steps = [
            dataclasses.replace(step, deadline_seconds=chosen.get(step.rung) or step.deadline_seconds)
            for step in made.steps
        ]
        return dataclasses.replace(made, steps=steps)

    @property
    def _image(self) -> Verified[images.Image]:
        """Of a step above the cold start: there is none without an image."""
        assert self._found is not None
        return self._found

    @property
    def _kernels(self) -> "Verified[CacheImage]":
        """Of a step that has roots."""
        assert self._cache is not None
        return self._cache

    def _roots(self, step: Step) -> "list[StoredRoot]":
        return [root for root in self._kernels.value.inventory.roots if root.name in step.roots]

    def _open_home(self) -> Home:
        try:
            return Home.from_environment()
        except UsageError as error:  # as in a container that may write nowhere
            raise CapabilityError(error.message, cause=error.cause, hint=error.hint) from None

    def _find_engine(self) -> Engine | None:
        """Who talks to the command that a lower rung starts; None if nobody knows how."""
        record = self._facts.image.record if self._facts.image else None
        if not self._given:
            return restored(record.engine, record.endpoint, record.engine_options) if record else None
        known = record if record and match_process.same_command(record.command, self._given) else None
        if self._args.ready_url or known is None or known.engine == "vllm":
            try:
                engine = for_command(self._given, ready_url=self._args.ready_url)
            except UsageError:
                if self._args.ready_url:
                    raise
                return None
            if known is None or known.engine != engine.name or known.engine == "vllm":
                return engine
            # The recorded server elsewhere: what counts of its answer is known.
            options = {**known.engine_options, "ready_path": engine.options()["ready_path"]}
            return restored(known.engine, engine.endpoint, options)
        return restored(known.engine, known.endpoint, known.engine_options)

    def _find_endpoint(self, made: plan.Plan) -> Endpoint | None:
        """The host's address that leads to the server; None if nobody says where it will listen."""
        image = self._facts.image
        listens = self._engine.endpoint if self._engine else None
        if listens is None and image and made.steps[0].rung is Rung.PROCESS and made.steps[0].possible:
            listens = image.record.endpoint
        if self._args.publish is None:
            return listens
        if image and image.record.process.network is Network.HOST:
            raise UsageError(
                "--publish does not go with a snapshot that has the host's network",
                hint=f"it listens on {image.record.endpoint} itself",
            )
        if listens is None:
            raise UsageError("--publish needs to know where the command listens", hint="say --ready-url URL")
        return engine.parse_endpoint(self._args.publish, listens.host)

    # The rungs.

    def _take(self, step: Step, stack: contextlib.ExitStack) -> Taken:
        try:
            with _naming_lacks():
                match step.rung:
                    case Rung.PROCESS:
                        return self._take_process(step, stack)
                    case Rung.CACHE:
                        return self._take_cache(step, stack)
                    case Rung.COLD:
                        return self._take_cold(stack)
        except Interrupted as interrupted:
            self._asked_to_end(interrupted.signum)  # now: the clean-up may take a while
            raise

    def _take_process(self, step: Step, stack: contextlib.ExitStack) -> Taken:
        report, image, home = self._report, self._image.value, self._home
        record, cell, endpoint, tool = image.record, self._cell, self._endpoint, self._facts.abilities.criu
        assert tool is not None
        assert cell is not None
        assert endpoint is not None
        self._tried = True
        with self._signals.raising(self._left(step)):
            work = stack.enter_context(home.work("restore"))
            self._check_weights(record)
            if record.process.network is Network.HOST:
                self._release()  # the server takes the address itself; we only looked if it is free
            if step.roots:
                with report.phase("extract"):
                    self._bring_files(step, stack)
            stack.callback(cell.end)
            # Nothing of the dump is needed any more once it is restored: others may make room then.
            with contextlib.ExitStack() as using:
                if self._tally is not None:
                    self._tally.expect(sum(layer.size for layer in image.layers))
                with _progress.progress(self._tally, report):
                    dump = using.enter_context(
                        dumps.ready(home, work, self._image, report, paranoid=self._args.paranoid)
                    )
                process.restore(
                    cell,
                    record,
                    dump,
                    tool=tool,
                    home=home,
                    work=work,
                    output=self._output(),
                    report=report,
                    cuda=process.Cuda(search=self._cuda, device_map=self._device_map) if self._cuda else None,
                )
        report.bytes["reused"] = image.size_bytes if not report.bytes.get("written") else 0
        replica = Restored(cell, record.process)
        serving = stack.enter_context(Serving(replica, record.endpoint, self._signals, self._asked_to_end))
        if self._bound is not None and record.process.network is Network.PRIVATE:
            with report.phase("publish"):
                try:
                    address.listen(self._bound, endpoint)
                except PortError as error:
                    raise RestoreError(error.message, cause=error.cause, hint=error.hint) from error
                serving.publish(self._bound)
        return Taken(rung=Rung.PROCESS, serving=serving)

    def _left(self, step: Step) -> float | None:
        """How many seconds the process has yet to serve: a deadline that was given counts from our start."""
        if self._args.process_deadline is None:
            return step.deadline_seconds
        gone = time.monotonic() - self._report.began
        return max(0.001, float(self._args.process_deadline) - gone)

    def _check_weights(self, record: Record) -> None:
        """Weights that the server reads again must be those that it had. Raises MismatchError."""
        if not record.reloads:
            return
        from rekindle.engine import weights

        with self._report.phase("weights"):
            if names := weights.changed(record.weights, os.environ):
                raise MismatchError(
                    "the model that the server would read again is not the one that it had",
                    cause=", ".join(names[:10]),
                    hint="fetch the recorded revision of the model",
                )

    def _bring_files(self, step: Step, stack: contextlib.ExitStack) -> None:
        """Extracts of the kernel cache what the process has mapped: at the recorded places, or not at all."""
        record = self._image.value.record
        self._extract({root.name: Path(root.recorded) for root in self._roots(step)}, stack)
        left = match_process.look(record)
        lacking = [file.path for file in record.mapped_files if file.path in left]
        if lacking:
            raise MismatchError(
                "the kernel cache does not bring what the process has mapped",
                cause=", ".join(f"{path}: {left[path]}" for path in lacking[:5]),
            )

    def _take_cache(self, step: Step, stack: contextlib.ExitStack) -> Taken:
        with self._signals.raising(step.deadline_seconds):
            self._connect_again()
            step = self._read_cache(step)
        with self._signals.raising(step.deadline_seconds):
            environment, where = self._place_cache(step, stack)
        from restore.rungs.proof import Watched

        with Watched(self._roots(step), where) as watched:
            return self._start(Rung.CACHE, stack, environment, watched)

    def _take_cold(self, stack: contextlib.ExitStack) -> Taken:
        environment: Mapping[str, str] = os.environ
        if self._facts.image is not None and not self._given:
            from restore.rungs import place_cache

            environment = place_cache.environment(self._facts.image.record, os.environ)
        return self._start(Rung.COLD, stack, environment, None)

    def _connect_again(self) -> None:
        """A try that failed in the middle has cut every connection to the registry. The digests stay."""
        if isinstance(self._reference, RegistryReference) and self._tried:
            from oci.registry.repository import Repository

            self._sources.close()
            access = resolve.access(self._args, self._home)
            if self._tally is not None:
                access = dataclasses.replace(access, tally=self._tally)
            blobs = self._sources.enter_context(Repository(self._reference, access))
            self._found = self._image.map(lambda image: dataclasses.replace(image, blobs=blobs))
            if self._cache is not None:
                self._cache = self._cache.map(lambda kernels: dataclasses.replace(kernels, blobs=blobs))

    def _read_cache(self, step: Step) -> Step:
        """The cache's step once its inventory has been read, if it was not before."""
        if not self._facts.cache_unread:
            return step
        from oci.cache import image as cache_image

        descriptor = self._image.value.cache
        assert descriptor is not None
        with self._report.phase("decide"):
            self._cache = self._image.map(
                lambda image: cache_image.load(image.blobs, descriptor, image.limits)
            )
            facts = dataclasses.replace(self._facts, cache=self._cache.value, cache_unread=False)
            step = next(each for each in self._plan(facts).steps if each.rung is Rung.CACHE)
        self._report.reasons += step.reasons
        plan.require_possible(step.reasons)
        return step

    def _place_cache(
        self, step: Step, stack: contextlib.ExitStack
    ) -> tuple[dict[str, str], Mapping[str, Path]]:
        """Puts the kernel cache where the server will look; its environment, and where each root is."""
        from restore.rungs import place_cache

        record, roots = self._image.value.record, self._roots(step)
        environment = place_cache.environment(record, os.environ)
        command = self._facts.command or ()
        self._report.reasons += place_cache.differences(record, environment, command)
        where, variables = place_cache.places(roots, os.environ, self._args.cache_dir)
        with self._report.phase("extract"):
            try:
                self._extract(where, stack)
            except CapabilityError as error:
                if self._args.cache_dir is not None:
                    raise
                directory = self._home.root / "caches" / self._kernels.value.manifest.digest.hex
                self._report.say(f"{error.message}: the kernel cache goes to {directory}")
                where, variables = place_cache.places(roots, {}, directory)
                self._extract(where, stack)
        return {**environment, **variables}, where

    def _extract(self, where: Mapping[str, Path], stack: contextlib.ExitStack) -> None:
        """Writes caches to their places; removed again if the rung fails."""
        from oci.cache import extract

        above = {directory for path in where.values() for directory in path.parents}
        made = sorted((each for each in above if not os.access(each, os.F_OK)), reverse=True)
        with _progress.progress(self._tally, self._report):
            try:
                done = extract.extract(self._kernels, where, limits=self._image.value.limits)
            except UsageError as error:
                raise CapabilityError(error.message, cause=error.cause, hint="--cache-dir DIR") from None

        def undo(kind: object, *_: object) -> None:
            if kind is not None:
                done.undo()
                for directory in made:  # the inner ones first
                    with contextlib.suppress(OSError):
                        directory.rmdir()

        stack.push(undo)
        written = self._report.bytes.get("written", 0)
        self._report.bytes["written"] = written + done.written_bytes

    def _as_compiled(self, command: Sequence[str]) -> Sequence[str]:
        """The command, with what of its options decides whether a saved kernel is found."""
        record, here = self._image.value.record, self._facts.node.devices.gpus
        if record.engine != "vllm" or not any(gpu.vendor == "nvidia" for gpu in here):
            return command
        from rekindle.engine.choose import as_compiled

        return as_compiled(command, record.engine_options)

    def _start(
        self,
        rung: Rung,
        stack: contextlib.ExitStack,
        environment: Mapping[str, str],
        watched: "Watched | None",
    ) -> Taken:
        """Starts the command, and waits until it answers."""
        from restore.rungs import server

        command, report, image, engine = self._facts.command, self._report, self._facts.image, self._engine
        assert command
        if rung is Rung.CACHE:
            command = self._as_compiled(command)
        self._sources.close()
        if self._cell is not None:
            self._cell.end()
        report.oracle, report.first_token_seconds = {}, None  # of a process that was given up
        forwarded = self._is_forwarded()
        if not forwarded:
            self._release()  # the server takes it itself
        elif engine is not None:
            address.bind(engine.endpoint).close()  # or another server would be taken for ours
        known = image and engine and image.record.engine == engine.name
        oracle = image.record.oracle if image and known else None
        recorded = image.record.directory if image and not self._given else ""
        here = Path(recorded) if recorded and os.access(f"{recorded}/.", os.X_OK) else Path.cwd()
        self._signals.check()
        with report.phase("server"):
            up = server.bring_up(
                stack,
                command,
                environment={name: value for name, value in environment.items() if name != "NOTIFY_SOCKET"},
                directory=here,
                output=self._output(),
                engine=engine,
                oracle=oracle,
                signals=self._signals,
                asked_to_end=self._asked_to_end,
                listen=watched is not None,
            )
        if up.status is not None:
            lost = WorkloadError(f"the server ended with status {up.status} before it was ready")
            if rung is Rung.CACHE:
                raise lost
            report.error = {"code": lost.code, "message": lost.message, "cause": "", "hint": lost.hint}
            return Taken(rung=rung, serving=up.serving, status=up.status)
        if up.ready is not None:
            if oracle is not None and engine is not None:
                self._tell_answer(up.ready, oracle, engine)
        else:
            report.say("nobody can tell when this server is ready: say --ready-url URL")
        if watched is not None and engine is not None:
            report.cache = watched.proof(engine.compiled(up.started.log)).to_json()
        if forwarded and self._bound is not None:
            assert self._endpoint is not None
            address.listen(self._bound, self._endpoint)
            up.serving.publish(self._bound)
        return Taken(rung=rung, serving=up.serving)

    def _tell_answer(self, ready: "Ready", oracle: Oracle, engine: Engine) -> None:
        """What came of the oracle's question, which decides nothing on a lower rung: told, with its time."""
        report = self._report
        report.split_phase("oracle", at=ready.at)
        agrees = ready.answer is not None and engine.agree(oracle.answer, ready.answer)
        report.oracle = {"expected": oracle.answer, "got": ready.answer, "match": agrees}
        if ready.first_byte is not None:
            report.first_token_seconds = ready.first_byte - report.began
            report.oracle["first_token_seconds"] = round(ready.first_byte - ready.at, 6)
        if ready.lack:
            report.oracle["lack"] = ready.lack

    def _is_forwarded(self) -> bool:
        """Whether the published address is another than what the command will listen on."""
        own, published = self._engine.endpoint if self._engine else None, self._endpoint
        if own is None or published is None or published == own:
            return False
        return not (published.port == own.port and own.host in {"", "0.0.0.0", "::"})

    def _release(self) -> None:
        if self._bound is not None:
            self._bound.close()

    def _output(self) -> options.Output:
        """With --json, stdout carries the report alone."""
        return options.Output(stdout=2 if self._args.json else 1, stderr=2)

    # What others are told.

    def _asked_to_end(self, signum: int) -> None:
        """The platform ends us, and may not wait: what is known is written now."""
        if self._report.outcome is Outcome.FAILED:
            self._report.error = {"code": "interrupted", "message": f"ended by signal {signum}"}
            self._write_report(to_stdout=False)
        elif signum != signal.SIGHUP:  # which lets some servers read their configuration again
            self._stop()

    def _stop(self) -> None:
        """Nobody is to send requests any more."""
        if self._ready:
            self._ready = False
            notify.stopping(self._args.ready_file)

    def _write_report(self, *, to_stdout: bool) -> None:
        """A server that runs is worth more than what is told of it."""
        try:
            self._report.write(self._args.report, to_stdout=to_stdout)
        except OSError as error:
            self._report.say(f"WARNING: the report cannot be written: {error}")

    def _say_ready(self, rung: Rung) -> None:
        report = self._report
        how = {Rung.PROCESS: "restored", Rung.CACHE: "on the kernel cache", Rung.COLD: "cold"}[rung]
        first = report.first_token_seconds
        after = f" after {first:.2f} s to the first token" if first else ""
        report.say(f"ready ({how}) on {self._endpoint or 'its address'}{after}")
        if report.cache is not None:
            proof = report.cache
            report.say(
                f"kernel cache: {proof['verdict']}; {proof['used']} of {proof['entries']} entries used, "
                f"{proof['made']} made anew"
            )
