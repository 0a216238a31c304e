# SPDX-License-Identifier: Apache-2.0
"""What `rekindle restore` does, once its command line has been read."""

import argparse
import contextlib
import dataclasses
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oci import image as images
from oci.reference import Reference, parse
from oci.trust.verifier import Verified
from rekindle import notify
from rekindle.cell import Cell, Network
from rekindle.engine import Endpoint, Engine, for_command, restored
from rekindle.errors import (
    CapabilityError,
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
from rekindle.verbs import _facts, _options, _plan, _trust
from restore import dumps, forward, ladder, match, plan, process
from restore.plan import Facts, Step
from restore.serve import Restored, Serving

if TYPE_CHECKING:  # what only a lower rung needs is imported when one is taken
    from oci.cache import CacheImage
    from oci.inventory import StoredRoot
    from oci.progress import Tally
    from restore.proof import Watched
    from restore.readiness import Ready

_OUTCOMES = {Rung.PROCESS: Outcome.RESTORED, Rung.CACHE: Outcome.CACHE, Rung.COLD: Outcome.COLD}
_LOWER_STATUS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A rung that was taken. With a `status`, its server ended before it was ready."""

    rung: Rung
    serving: Serving
    status: int | None = None


def run(args: argparse.Namespace, command: Sequence[str], required: Rung) -> int:
    """Does what the command line asks for; returns the exit status. `required` is the lowest rung to take."""
    report = Report(verb="restore", asked=args.rung, quiet=args.quiet)
    if args.plan:
        return _plan_only(args, command, report)
    with contextlib.ExitStack() as stack:
        with _options.reporting(report, args):
            stack.enter_context(notify.ready_file(args.ready_file))
            taken = _Restore(args, command, report, stack).climb(required)
        report.write(args.report, to_stdout=args.json)
        if taken.status is not None:
            return taken.status
        notify.ready(args.ready_file)
        status = taken.serving.run()
        notify.systemd("STOPPING=1")
        return status or (0 if taken.rung == args.rung else _LOWER_STATUS)


def _plan_only(args: argparse.Namespace, command: Sequence[str], report: Report) -> int:
    with contextlib.ExitStack() as stack:
        restoring = _Restore(args, command, report, stack, boot=False)
        facts = restoring.decide(with_cache=True)
        made = restoring.plan(facts)
    _plan.show(made, facts, args.image, report.image.get("digest", ""), as_json=args.json)
    first = made.first
    return 0 if first and first.rung == args.rung else _LOWER_STATUS


class _Restore:
    """One run of the command. What has to be undone at its end is on `stack`."""

    def __init__(
        self,
        args: argparse.Namespace,
        given: Sequence[str],
        report: Report,
        stack: contextlib.ExitStack,
        *,
        boot: bool = True,
    ) -> None:
        self._args = args
        self._given = given
        self._report = report
        self._stack = stack
        self._reference: Reference = parse(args.image)
        self._found: Verified[images.Image] | None = None
        self._tally: Tally | None = None
        self._cache: Verified[CacheImage] | None = None
        self._cell: Cell | None = None
        if boot and args.rung is Rung.PROCESS and os.geteuid() == 0:
            self._cell = stack.enter_context(Cell())  # it boots while we decide

    def climb(self, required: Rung) -> Taken:
        """Takes the best rung that can be taken, and fills the report."""
        report, args = self._report, self._args
        with report.phase("decide"):
            try:
                self._facts = self.decide(with_cache=args.rung is not Rung.PROCESS)
            except RekindleError as error:
                if not self._given or not error.descends or required is not Rung.COLD:
                    raise
                self._facts = self._unreached(error)
            self._endpoint = self._published()
            self._bound: socket.socket | None = None
            if self._endpoint is not None:
                self._bound = self._stack.enter_context(forward.bind(self._endpoint))
            made = self.plan(self._facts)
        self._device_map = made.device_map
        taken = ladder.climb(made, self._take, report, self._stack, require=required)
        if taken.status is None:
            report.outcome = _OUTCOMES[taken.rung]
            self._say_ready(taken.rung)
        report.bytes.setdefault("written", 0)
        report.bytes["fetched"] = self._tally.fetched_bytes if self._tally else 0
        report.endpoint = str(self._endpoint) if self._endpoint else None
        report.pid = os.getpid()
        # What killed commands left may be gigabytes: nobody who restores has to wait for its removal.
        if self._found is not None:
            threading.Thread(target=_options.sweep, args=[self._home], daemon=True).start()
        return taken

    def decide(self, *, with_cache: bool) -> Facts:
        """Finds the image, verifies it, reads its record and looks at this node. No layer is touched."""
        self._home = self._open_home()
        source = self._stack.enter_context(_options.source(self._reference, self._home, self._args))
        self._tally = source.tally
        verified = _trust.verified(source, self._reference, self._home, self._args, self._report)
        self._found = found = _facts.trusted(verified)
        self._report.image = {"reference": self._args.image, "digest": found.value.index.digest}
        facts = _facts.gather(found.value, self._reference, self._home, self._given, with_cache=with_cache)
        if (kernels := facts.cache) is not None:
            self._cache = found.map(lambda _: kernels)
        return facts

    def plan(self, facts: Facts) -> plan.Plan:
        made = plan.make(facts, self._args.rung, _trust.strictness(self._args))
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

    def _unreached(self, error: RekindleError) -> Facts:
        """The facts where the image cannot be had: its place is taken by the given command, cold."""
        self._report.image.setdefault("reference", self._args.image)
        self._report.say(
            f"WARNING: cold start: {error.message}" + (f" ({error.cause})" if error.cause else "")
        )
        here = f"{error.message}: {error.cause}" if error.cause else error.message
        reason = Reason(
            rung=Rung.PROCESS,
            code=error.code,
            field="image",
            recorded="",
            here=here,
            hard=True,
            advice=error.hint,
        )
        return dataclasses.replace(_facts.of_nothing(self._given), unreached=reason)

    def _published(self) -> Endpoint | None:
        """The host's address that leads to the server; None if nobody says where it will listen."""
        image = self._facts.image
        engine = self._engine()
        listens = engine.endpoint if engine and self._given else image.record.endpoint if image else None
        if self._args.publish is None:
            return listens
        if image and image.record.process.network is Network.HOST:
            raise UsageError(
                "--publish does not go with a snapshot that has the host's network",
                hint=f"it listens on {image.record.endpoint} itself",
            )
        if listens is None:
            raise UsageError("--publish needs to know where the command listens", hint="say --ready-url URL")
        return _options.parse_endpoint(self._args.publish, listens.host)

    def _engine(self) -> Engine | None:
        """Who talks to the command that a lower rung starts; None if nobody knows how."""
        image = self._facts.image
        if self._given and (self._args.ready_url or not image or image.record.engine == "vllm"):
            try:
                return for_command(self._given, ready_url=self._args.ready_url)
            except UsageError:
                if self._args.ready_url:
                    raise
                return None
        if image is None:
            return None
        record = image.record
        if self._given and not match.same_command(record.command, self._given):
            return None
        return restored(record.engine, record.endpoint, record.engine_options)

    # The rungs.

    def _take(self, step: Step, stack: contextlib.ExitStack, deadline: ladder.Deadline) -> Taken:
        if step.rung is Rung.PROCESS:
            return self._process(step, stack)
        environment = dict(os.environ)
        watch = None
        if step.rung is Rung.CACHE:
            step = self._read_cache(step)
            environment, watch = self._place_cache(step, stack)
        elif self._facts.image is not None and not self._given:
            from restore import surroundings

            environment = surroundings.environment(self._facts.image.record, environment)
        deadline.off()
        return self._start(step.rung, stack, environment, watch)

    def _process(self, step: Step, stack: contextlib.ExitStack) -> Taken:
        report, image, home = self._report, self._image.value, self._home
        record, cell, endpoint, tool = image.record, self._cell, self._endpoint, self._facts.abilities.criu
        assert tool is not None
        assert cell is not None
        assert endpoint is not None
        stack.callback(cell.end)
        work = stack.enter_context(home.work("restore"))
        self._check_weights(record)
        if record.process.network is Network.HOST:
            self._release()  # the server takes the address itself; we only looked if it is free
        if step.roots:
            with report.phase("extract"):
                self._bring_files(step, stack)
        # Nothing of the dump is needed any more once it is restored: others may make room then.
        with contextlib.ExitStack() as using:
            cuda = None
            if record.process.cuda_pids:
                cuda = using.enter_context(process.Cuda(_options.cuda_door(home), self._device_map))
            if self._tally is not None:
                self._tally.expect(sum(layer.size for layer in image.layers))
            with _options.progress(self._tally, report):
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
                cuda=cuda,
            )
        report.bytes["reused"] = image.size_bytes if not report.bytes.get("written") else 0
        serving = stack.enter_context(
            Serving(Restored(cell, record.process), record.endpoint, lambda _: None)
        )
        if self._bound is not None and record.process.network is Network.PRIVATE:
            with report.phase("publish"):
                try:
                    forward.listen(self._bound, endpoint)
                except PortError as error:
                    raise RestoreError(error.message, cause=error.cause, hint=error.hint) from error
                serving.publish(self._bound)
        return Taken(rung=Rung.PROCESS, serving=serving)

    def _check_weights(self, record: Record) -> None:
        """Weights that the server reads again must be those that it had. Raises MismatchError."""
        if not record.reloads:
            return
        from rekindle import weights

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
        left = match.look(record)
        lacking = [file.path for file in record.mapped_files if file.path in left]
        if lacking:
            raise MismatchError(
                "the kernel cache does not bring what the process has mapped",
                cause=", ".join(f"{path}: {left[path]}" for path in lacking[:5]),
            )

    def _read_cache(self, step: Step) -> Step:
        """The cache's step once its inventory has been read, if it was not before."""
        if not self._facts.cache_unread:
            return step
        from oci import cache

        descriptor = self._image.value.cache
        assert descriptor is not None
        with self._report.phase("decide"):
            self._cache = self._image.map(lambda image: cache.load(image.blobs, descriptor, image.limits))
            facts = dataclasses.replace(self._facts, cache=self._cache.value, cache_unread=False)
            step = next(each for each in self.plan(facts).steps if each.rung is Rung.CACHE)
        self._report.reasons += step.reasons
        match.require(step.reasons)
        return step

    def _place_cache(self, step: Step, stack: contextlib.ExitStack) -> "tuple[dict[str, str], Watched]":
        """Puts the kernel cache where the server will look; its environment, and who watches the cache."""
        from restore import surroundings
        from restore.proof import Watched

        record, roots = self._image.value.record, self._roots(step)
        environment = surroundings.environment(record, os.environ)
        command = self._facts.command or ()
        self._report.reasons += surroundings.differences(record, environment, command)
        where, variables = surroundings.places(roots, os.environ, self._args.cache_dir)
        with self._report.phase("extract"):
            try:
                self._extract(where, stack)
            except CapabilityError as error:
                if self._args.cache_dir is not None:
                    raise
                directory = self._home.root / "caches" / self._kernels.value.manifest.digest.hex
                self._report.say(f"{error.message}: the kernel cache goes to {directory}")
                where, variables = surroundings.places(roots, {}, directory)
                self._extract(where, stack)
        watched = stack.enter_context(Watched(roots, where))
        return {**environment, **variables}, watched

    def _extract(self, where: Mapping[str, Path], stack: contextlib.ExitStack) -> None:
        """Writes caches to their places; removed again if the rung fails."""
        from oci import extraction

        with _options.progress(self._tally, self._report):
            try:
                done = extraction.extract(self._kernels, where, limits=self._image.value.limits)
            except UsageError as error:
                raise CapabilityError(error.message, cause=error.cause, hint="--cache-dir DIR") from None

        def undo(kind: object, *_: object) -> None:
            if kind is not None:
                done.undo()

        stack.push(undo)
        written = self._report.bytes.get("written", 0)
        self._report.bytes["written"] = written + done.written_bytes

    def _start(
        self,
        rung: Rung,
        stack: contextlib.ExitStack,
        environment: Mapping[str, str],
        watched: "Watched | None",
    ) -> Taken:
        """Starts the command, and waits until it answers."""
        from restore import lower

        command, report, image = self._facts.command, self._report, self._facts.image
        assert command
        if self._cell is not None:
            self._cell.end()
        engine = self._engine()
        forwarded = engine is not None and self._endpoint != engine.endpoint
        if not forwarded:
            self._release()  # the server takes it itself
        oracle = image.record.oracle if image and engine and image.record.engine == engine.name else None
        recorded = Path(image.record.directory) if image else Path.cwd()
        here = Path.cwd() if self._given or not recorded.is_dir() else recorded
        with report.phase("server"):
            up = lower.bring_up(
                stack,
                command,
                environment={name: value for name, value in environment.items() if name != "NOTIFY_SOCKET"},
                directory=here,
                output=self._output(),
                engine=engine,
                oracle=oracle,
                asked_to_end=self._write_interrupted,
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
            forward.listen(self._bound, self._endpoint)
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

    def _release(self) -> None:
        if self._bound is not None:
            self._bound.close()

    def _output(self) -> process.Output:
        """With --json, stdout carries the report alone."""
        return process.Output(stdout=2 if self._args.json else 1, stderr=2)

    def _write_interrupted(self, signum: int) -> None:
        """The platform ends us, and may not wait: what is known is written now."""
        if self._report.outcome is not Outcome.FAILED:
            return  # all was written when the server was ready
        self._report.error = {"code": "interrupted", "message": f"ended by signal {signum}"}
        with contextlib.suppress(OSError):
            self._report.write(self._args.report, to_stdout=False)

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
