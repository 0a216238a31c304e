# SPDX-License-Identifier: Apache-2.0
"""Take one snapshot, from its options to the published image: make, pack, sign, prove, publish."""

import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from oci import dump_layers, resolve, store
from oci import image as images
from oci.cache import pack
from oci.cache.inventory import Target
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.reference import parse
from oci.trust import made_here, signer
from rekindle import dump_tree
from rekindle.criu import Criu, kernel_facts
from rekindle.criu.search import find_for_dump
from rekindle.cuda import search
from rekindle.engine import Engine, Request
from rekindle.engine.choose import Weights, for_command, for_sleep
from rekindle.engine.vllm import VllmEngine
from rekindle.engine.vllm_asleep import require_sleepable
from rekindle.engine.vllm_command import read as read_command
from rekindle.errors import UsageError
from rekindle.files import remove_tree
from rekindle.node.gpu import probe
from rekindle.node.packages import versions
from rekindle.record import Record
from rekindle.report import ImageName, Report
from restore.decide import match_limits
from restore.decide.match_gpus import held_gpus
from restore.decide.rules import reason_for
from snapshot import make, neutral, secret_search
from snapshot.describe import Dumped
from snapshot.options import Progress, SnapshotOptions
from snapshot.outside_connections import Outside
from snapshot.packing import described
from snapshot.publish import prove, publish, require_writable
from snapshot.warm import read_requests


def snapshot(
    options: SnapshotOptions,
    report: Report | None = None,
    progress: Progress | None = None,
    *,
    start: make.Start | None = None,
    given: Mapping[str, str] | None = None,
) -> images.Image:
    """Start a server, warm it, save it as an image, prove the image, and fill the report.

    `start` brings the server up in another way, in the environment `given`.

    Needs root. The server has ended when this returns or raises. Atomic: the tag is written last, and a
    failure leaves nothing behind. Raises SecretError, NotDumpableError, DumpError, OracleError, and the
    errors of registries and keys.
    """
    report = report or Report(verb="snapshot")
    progress = progress or Progress()
    reference = parse(options.image)
    command = list(options.command)
    engine = for_command(command, ready_url=options.ready_url, oracle_file=options.oracle_file)
    environment = _environment(engine, given or os.environ, options)
    nvidia = any(gpu.vendor == "nvidia" for gpu in probe().gpus)
    warmed = options.warm_file is not None
    engine = _sleeping_engine(engine, options.weights, command, environment, nvidia=nvidia, warmed=warmed)
    credentials = secret_search.KnownSecrets.of(environment, command, options.secrets)
    home = store.open_home()
    spec = make.ServerSpec(
        argv=command,
        environment=environment,
        network=options.network,
        ready_timeout=options.ready_seconds,
        warm_requests=read_requests(options.warm_file) if options.warm_file else None,
        credentials=credentials,
        reseed=options.reseed,
        check_memory=options.check_memory,
        outside=Outside(options.outside),
        find_backend=functools.partial(search.find, home) if nvidia else None,
        withheld=options.private_variables,
    )
    _require_variables(engine, spec.warm_requests or ())
    access = resolve.access(options.registry, home)
    require_writable(reference, access)
    with home.work("snapshot") as work, credentials.kept_out_of_errors():
        with report.phase("find criu"):
            tool = find_for_dump(home)
            kernel_facts.learn(home, tool.path)
        keep = options.keep_dump
        made = make.make(
            spec,
            engine,
            tool,
            work,
            report,
            scan=dump_tree.scan,
            keep_untouched=(lambda dump: _copy(dump, keep)) if keep else None,
            start=start,
        )
        record = msgspec.structs.replace(made.record, proved=options.prove)
        lost = match_limits.lost_settings(made.record, made.record.node)
        report.reasons += [reason_for(each) for each in lost]
        staging = Layout.create(work / "layout")
        kernels = _pack_cache(made, staging, report) if made.caches and options.with_cache else None
        imported = _pack_neutral(record, spec, tool, work, staging, report, asked=options.neutral)
        with report.phase("pack"):
            record, packed = _pack_dump(work / "dump", record, staging)
            image = images.build(staging, record, packed, kernels, imported)
        if options.prove:
            for log in filter(Path.exists, (work / "stdout.log", work / "stderr.log")):
                log.rename(work / f"before-{log.name}")  # a later restore will not find them either
            image = prove(home, work, staging, image, tool, engine, report)
        with report.phase("sign"):
            subjects = [image.index, *([image.cache] if image.cache else [])]
            attested = signer.predicate(image.record)
            signatures = made_here.sign(staging, subjects, attested, options.sign, home)
        report.image = ImageName(reference=options.image, digest=image.index.digest)
        report.bytes.dump, report.bytes.written = image.record.dump.dump_bytes, image.size_bytes
        with report.phase("publish"):
            publish(staging, image, signatures, reference, access, home, report, progress)
    return image


def _environment(engine: Engine, given: Mapping[str, str], options: SnapshotOptions) -> dict[str, str]:
    """Return the server's environment, without what gives access to our keys."""
    ours = {name: value for name, value in given.items() if name not in options.private_variables}
    return {**engine.environment(), **ours}


def _pack_dump(dump: Path, record: Record, staging: Layout) -> tuple[Record, list[Descriptor]]:
    """Pack a dump, and remove it. Returns the record with what describes the layers, and these."""
    packed = dump_layers.pack_layers(dump, record.dump.files, staging, workers=dump_layers.workers())
    remove_tree(dump)
    return described(record, packed), [each.descriptor for each in packed]


def _pack_neutral(
    record: Record,
    spec: make.ServerSpec,
    tool: Criu,
    work: Path,
    staging: Layout,
    report: Report,
    *,
    asked: bool,
) -> Descriptor | None:
    """Make a neutral process and pack it, if it is asked for; None if there can be none."""
    if not asked:
        return None
    found = neutral.make(
        record, spec.argv, spec.environment, spec.credentials, tool, work / "neutral", report
    )
    if found is None:
        return None
    return images.put_neutral(staging, *_pack_dump(work / "neutral" / "dump", found, staging))


def _pack_cache(made: Dumped, staging: Layout, report: Report) -> Descriptor:
    with report.phase("pack cache"):
        return pack.pack(
            made.caches,
            staging,
            created=made.record.created,
            architecture=made.record.node.architecture,
            targets=_targets(made.record),
            versions=made.record.node.packages,
            workers=dump_layers.workers(),
            say=report.say,
        )


def _targets(record: Record) -> list[Target]:
    """Return the hardware that the caches are for which do not tell: the GPUs that the server used."""
    backends = {"nvidia": "cuda", "amd": "hip"}
    return sorted(
        {
            Target(backend=backends[gpu.vendor], arch=gpu.arch, warp_size=gpu.warp_size)
            for gpu in held_gpus(record)
            if gpu.vendor in backends and gpu.arch
        }
    )


def _sleeping_engine(
    engine: Engine,
    weights: Weights | None,
    command: list[str],
    environment: Mapping[str, str],
    *,
    nvidia: bool,
    warmed: bool,
) -> Engine:
    """Return the engine that puts the server to sleep for the snapshot, or `engine` if it stays awake."""
    if not isinstance(engine, VllmEngine):
        if weights not in {None, Weights.AS_IS}:
            raise UsageError(f"--weights {weights} is for vLLM only")
        return engine
    weights = weights or (Weights.IMAGE if nvidia else Weights.AS_IS)
    if weights is Weights.AS_IS:
        return engine
    if served := read_command(command, environment):
        require_sleepable(served)
    return for_sleep(engine, weights, versions(command, environment).get("vllm", ""), warmed=warmed)


def _copy(dump: Path, target: Path) -> None:
    """Keep an unmodified copy of CRIU's dump, for `rekindle bench`."""
    shutil.copytree(dump, target, symlinks=True)


def _require_variables(engine: Engine, batches: Sequence[Sequence[Request]]) -> None:
    """Raise UsageError if a request that is known already needs a variable that is not set."""
    oracle = engine.options().get("oracle")
    requests = [each for batch in batches for each in batch]
    for request in [*requests, *([Request.from_json(oracle)] if oracle else [])]:
        engine.authorize(request, os.environ)
