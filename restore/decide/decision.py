# SPDX-License-Identifier: Apache-2.0
"""Decide what a restore will do: find and verify the image, probe the node, plan, choose the address."""

import contextlib
import os
from collections.abc import Iterator

from msgspec import Struct, structs

from oci import resolve
from oci.image import Image
from oci.reference import parse
from oci.trust.verifier import Verified
from rekindle import os_errors
from rekindle.cell import Network
from rekindle.cuda.search import begin_search
from rekindle.engine import Engine
from rekindle.engine.choose import for_command, from_record
from rekindle.errors import CapabilityError, RekindleError, UsageError
from rekindle.home import Home
from rekindle.node import start_reads
from rekindle.record import Record
from rekindle.report import ImageName, Report, Rung
from restore import dumps
from restore.decide import facts as gathering
from restore.decide import plan as planning
from restore.decide.match_gpus import choice_problem
from restore.decide.match_process import starts_recorded
from restore.decide.plan import Facts, Plan
from restore.decide.publications import Publication, moved, publications
from restore.decide.rules import Strictness, failure_reason
from restore.decide.source import Source
from restore.options import Memory, Options
from restore.prefetch import Prefetch
from restore.read_ahead import ReadAhead
from restore.signals import DeadlinePassed, Signals

_ALL_BYTES = 1 << 62  # of a file: more than it has
_DECIDE_SECONDS = 30.0  # limit where a cold start can replace the image: registries may retry for longer


class Decision(Struct, frozen=True, kw_only=True):
    """The plan, what it was made from, and how to reach its server.

    `source` and `home` are None if the image could not be read and a cold start replaces it. `engine` talks
    to the command that a lower rung starts; None if no engine knows it. `publications` are the addresses on
    this host where the server will be reached; none if they are unknown.
    """

    facts: Facts
    plan: Plan
    source: Source | None
    home: Home | None
    engine: Engine | None
    publications: tuple[Publication, ...]

    @property
    def image(self) -> Verified[Image]:
        """The image. Every rung above the cold start has one."""
        assert self.source is not None
        return self.source.image


def decide(
    options: Options,
    report: Report,
    signals: Signals,
    connections: contextlib.ExitStack,
    *,
    prepares: bool,
    with_cache: bool,
    read_ahead: ReadAhead | None = None,
) -> Decision:
    """Gather the facts and make the plan. Fetches no layer.

    If the image cannot be read, the plan is a cold start of the given command, if that is allowed.
    `connections` gets the connections to the image. With `prepares`, what restores a process begins
    meanwhile: the driver starts if the record needs it, and the working set is read. `read_ahead` begins once
    it is known that a lower rung comes first. Raises TrustError, FormatError and IntegrityError, after which
    no rung may be taken.
    """
    replaceable = bool(options.command) and options.require is Rung.COLD
    limit = options.process_deadline or _DECIDE_SECONDS
    home: Home | None = None
    source: Source | None = None
    try:
        with signals.raising(limit if replaceable else None), os_errors_as_capability():
            home = _open_home()
            facts, source = _gather(
                options, home, report, connections, read_ahead, prepares=prepares, with_cache=with_cache
            )
    except (Exception, DeadlinePassed) as error:
        if not replaceable or (isinstance(error, RekindleError) and not error.descends):
            raise
        connections.close()
        with signals.raising():
            reason = failure_reason(Rung.PROCESS, "image", error)
            if reason.code == "bug":
                report.say_bug(error)
            report.image = report.image or ImageName(reference=options.image)
            report.say(f"WARNING: cold start: {reason.here}")
            facts = structs.replace(gathering.without_image(options.command), unreached=reason)
            source = None
    if facts.image and (problem := choice_problem(facts.image.record, facts.node, options.gpus)):
        raise UsageError(f"--gpu: {problem}")
    plan = make_plan(facts, options)
    if read_ahead and facts.image and plan.first and plan.first.rung is not Rung.PROCESS:
        begin_reading(read_ahead, facts.image.record, options)
    if source is not None and source.prefetch is not None and not plan.steps[0].possible:
        source.prefetch.close()
    engine = _engine(facts, options)
    return Decision(
        facts=facts,
        plan=plan,
        source=source,
        home=home,
        engine=engine,
        publications=_publications(plan, facts, engine, options),
    )


def make_plan(facts: Facts, options: Options) -> Plan:
    """Return the plan with the deadlines and the policy of the options."""
    choice = structs.replace(facts.gpu_choice, wanted=options.gpus, replica=options.replica_index)
    return planning.make(
        structs.replace(facts, gpu_choice=choice),
        options.rung,
        strictness(options),
        deadlines={
            Rung.PROCESS: options.process_deadline,
            Rung.NEUTRAL: options.process_deadline,
            Rung.CACHE: options.cache_deadline,
        },
        require=options.require,
    )


def strictness(options: Options) -> Strictness:
    """Return how strict the policy and the options are about differences between nodes."""
    return gathering.strictness(options.trust.policy, options.accept_environment)


@contextlib.contextmanager
def os_errors_as_capability() -> Iterator[None]:
    """Turn OSErrors raised within the context into errors after which the ladder may go down."""
    try:
        yield
    except OSError as error:
        failure = os_errors.from_os_error(error)
        if failure is None:
            raise
        if isinstance(failure, UsageError):
            failure = CapabilityError(failure.message, cause=failure.cause, hint=failure.hint)
        raise failure from error


def _gather(
    options: Options,
    home: Home,
    report: Report,
    connections: contextlib.ExitStack,
    read_ahead: ReadAhead | None,
    *,
    prepares: bool,
    with_cache: bool,
) -> tuple[Facts, Source]:
    """Find the image, verify it, read its record, and probe this node."""
    reference = parse(options.image)
    found = connections.enter_context(resolve.source(reference, home, options.registry))
    verified = resolve.verified(found, reference, home, options.trust)
    report.trusted_by = verified.trust.by
    image = gathering.load(verified)
    report.image = ImageName(reference=options.image, digest=image.value.index.digest)
    if read_ahead and options.rung is not Rung.PROCESS:
        begin_reading(read_ahead, image.value.record, options)
    cuda = connections.enter_context(begin_search(image.value.record, home)) if prepares else None
    prefetch = None
    if prepares:
        prefetch = connections.enter_context(contextlib.ExitStack())
        if options.memory is Memory.MAP:
            dump = dumps.place(home, image.value)
            prefetch.enter_context(Prefetch(dump, image.value.record.dump.memory))
        if image.value.record.reloads and options.prefetch:
            prefetch.enter_context(ReadAhead()).begin(weights_to_reload(image.value.record))
    facts, kernels = gathering.gather(
        image,
        reference,
        home,
        options.command,
        with_cache=with_cache,
        with_abilities=options.rung in {Rung.PROCESS, Rung.NEUTRAL},
        starting=cuda,
    )
    source = Source(
        image,
        kernels,
        reference=reference,
        home=home,
        registry=options.registry,
        tally=found.tally,
        cuda=cuda,
        prefetch=prefetch,
        connections=connections,
    )
    return facts, source


def weights_to_reload(record: Record) -> list[start_reads.StartRead]:
    """Return the model's files that a restored server reads again, whole and in order."""
    from rekindle.engine import weights

    paths = weights.recorded_paths(record.weights, os.environ)
    return [start_reads.StartRead(str(path), ((0, _ALL_BYTES),)) for path in paths]


def begin_reading(read_ahead: ReadAhead, record: Record, options: Options) -> None:
    """Begin to read what the record's server reads at its start, if that is wanted and will be started."""
    if options.prefetch:
        read_ahead.begin(start_reads.decode(record.reads))


def _open_home() -> Home:
    try:
        return Home.from_environment()
    except UsageError as error:  # for example in a container with a read-only file system
        raise CapabilityError(error.message, cause=error.cause, hint=error.hint) from None


def _engine(facts: Facts, options: Options) -> Engine | None:
    """Return the engine for the command that a lower rung starts; None if no engine knows it."""
    record = facts.image.record if facts.image else None
    if not options.command:
        return from_record(record.engine.name, record.endpoint, record.engine.options) if record else None
    known = (
        record
        if record and starts_recorded(record, options.command, facts.environment, facts.enforced)
        else None
    )
    if not options.ready_url and known is not None and known.engine.name == "http":
        return from_record(known.engine.name, known.endpoint, known.engine.options)
    try:
        engine = for_command(options.command, ready_url=options.ready_url)
    except UsageError:
        if options.ready_url:
            raise
        return None
    return _with_recorded_answer(engine, known)


def _with_recorded_answer(engine: Engine, known: Record | None) -> Engine:
    """Return the engine with the recorded rules for its answer, if it is the recorded server."""
    if known is None or not known.engine.name == engine.name == "http":
        return engine
    options = {**known.engine.options, "ready_path": engine.options()["ready_path"]}
    return from_record(known.engine.name, engine.endpoint, options)


def _publications(
    plan: Plan, facts: Facts, engine: Engine | None, options: Options
) -> tuple[Publication, ...]:
    """Return what to publish; nothing if it is unknown where the server will listen."""
    record = facts.image.record if facts.image else None
    if (options.published or options.replica_index) and record and record.process.network is Network.HOST:
        raise UsageError(
            "--publish and --replicas cannot be combined with a snapshot on the host's network",
            hint=f"omit them: the server listens on {record.endpoint} itself",
        )
    restored = record if plan.steps[0].rung is Rung.PROCESS and plan.steps[0].possible else None
    main = engine.endpoint if engine else restored.endpoint if restored else None
    found = publications(options.published, main, restored)
    return moved(found, 0 if options.shared_port else options.replica_index)
