# SPDX-License-Identifier: Apache-2.0
"""Take one snapshot, from its options to the published image: make, pack, sign, prove, publish."""

import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec

from oci import dump_layers, resolve, store, transfer
from oci import image as images
from oci.cache import pack
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.reference import Reference, RegistryReference, parse
from oci.registry.access import Access
from oci.registry.repository import Repository
from oci.trust import made_here, signer
from rekindle import criu, dump_tree
from rekindle.cell import Cell, working_set
from rekindle.cuda import search
from rekindle.engine import Engine
from rekindle.engine.choose import Weights, for_command, for_sleep
from rekindle.engine.vllm import VllmEngine
from rekindle.errors import RekindleError, UsageError
from rekindle.files import remove_tree
from rekindle.home import Home
from rekindle.node.gpu import probe
from rekindle.node.packages import versions
from rekindle.report import ImageName, Report
from restore import dumps
from restore.decide import match_process, plan
from restore.decide.abilities import Abilities
from restore.decide.rules import reason_for
from restore.options import Output
from restore.rungs import process
from snapshot import make, secret_search
from snapshot.describe import Dumped
from snapshot.options import Progress, SnapshotOptions
from snapshot.warm import read_requests

Signatures = tuple[list[Descriptor], list[Descriptor]]
"""The signatures by this machine's key, and those by the user's."""


def snapshot(
    options: SnapshotOptions, report: Report | None = None, progress: Progress | None = None
) -> images.Image:
    """Start a server, warm it, save it as an image, prove the image, and fill the report.

    Needs root. The server has ended when this returns or raises. Atomic: the tag is written last, and a
    failure leaves nothing behind. Raises SecretError, NotDumpableError, DumpError, OracleError, and the
    errors of registries and keys.
    """
    report = report or Report(verb="snapshot")
    progress = progress or Progress()
    reference = parse(options.image)
    command = list(options.command)
    engine = for_command(command, ready_url=options.ready_url, oracle_file=options.oracle_file)
    ours = {name: value for name, value in os.environ.items() if name not in options.private_variables}
    environment = {**engine.environment(), **ours}
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
        find_backend=functools.partial(search.find, home) if nvidia else None,
    )
    access = resolve.access(options.registry, home)
    _require_writable(reference, access)
    with home.work("snapshot") as work, credentials.kept_out_of_errors():
        with report.phase("find criu"):
            tool = criu.find(home)
        keep = options.keep_dump
        made = make.make(
            spec,
            engine,
            tool,
            work,
            report,
            scan=dump_tree.scan,
            keep_untouched=(lambda dump: _copy(dump, keep)) if keep else None,
        )
        staging = Layout.create(work / "layout")
        kernels = _pack_cache(made, staging, report) if made.caches and options.with_cache else None
        with report.phase("pack"):
            packed = dump_layers.pack(
                work / "dump", made.record.dump.files, staging, workers=dump_layers.workers()
            )
            remove_tree(work / "dump")
            image = images.build(staging, made.record, packed, kernels)
        if options.prove:
            image = _prove(home, work, staging, image, tool, engine, report)
        with report.phase("sign"):
            subjects = [image.index, *([image.cache] if image.cache else [])]
            attested = signer.predicate(image.record)
            signatures = made_here.sign(staging, subjects, attested, options.sign, home)
        report.image = ImageName(reference=options.image, digest=image.index.digest)
        report.bytes.dump, report.bytes.written = image.record.dump.dump_bytes, image.size_bytes
        with report.phase("publish"):
            _publish(staging, image, signatures, reference, access, home, report, progress)
    return image


def _pack_cache(made: Dumped, staging: Layout, report: Report) -> Descriptor:
    with report.phase("pack cache"):
        return pack.pack(
            made.caches,
            staging,
            created=made.record.created,
            architecture=made.record.node.architecture,
            versions=made.record.node.packages,
            workers=dump_layers.workers(),
            say=report.say,
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
    return for_sleep(engine, command, weights, versions(command, environment).get("vllm", ""), warmed=warmed)


def _require_writable(reference: Reference, access: Access) -> None:
    """Raise now, before the work, if an image cannot be pushed to this reference."""
    if isinstance(reference, RegistryReference):
        if reference.digest is not None:
            raise UsageError(f"cannot save to {reference}: it names a digest", hint="use a tag")
        with Repository(reference, access) as repository:
            repository.tagged(reference.tag)


def _publish(
    staging: Layout,
    image: images.Image,
    signatures: Signatures,
    reference: Reference,
    access: Access,
    home: Home,
    report: Report,
    progress: Progress,
) -> None:
    own, given = signatures
    if isinstance(reference, RegistryReference):
        try:
            tree = transfer.explore(staging, image.index, access.config.limits)
            with progress.sending(access.tally):
                transfer.into_registry(staging, tree, reference, access)
            report.bytes.sent = access.tally.sent_bytes
        except RekindleError as error:
            # The image took minutes to make: keep it in the store.
            name = f"{reference.repository}:{reference.tag}"
            kept = Layout.create(home.store)
            kept.publish(staging, image.index, name, [*own, *given])
            error.hint = f"the image is in the local store: rekindle push {name} {reference}"
            raise
        return
    layout = store.layout_of(reference, home, create=True)
    with store.collecting(layout, reference):
        attached = [*given, *(own if reference.directory is None else [])]
        layout.publish(staging, image.index, reference.tag, attached)


def _prove(
    home: Home,
    work: Path,
    staging: Layout,
    image: images.Image,
    tool: criu.Criu,
    engine: Engine,
    report: Report,
) -> images.Image:
    """Restore the image that will be published, ask the oracle, and record which memory that touched.

    The server's log files are moved away first, since a later restore will not find them either. Returns the
    image with that record; its dump is kept, unpacked, for `restore`.
    """
    made_here.sign(staging, [image.index], signer.predicate(image.record), None, home)
    proved = made_here.verify(image, staging, home)
    for name in ("stdout.log", "stderr.log"):
        (work / name).rename(work / f"before-{name}")
    record = image.record
    different = match_process.differing_files(record)
    found = match_process.compare(record, record.node, Abilities(criu=tool), different)
    plan.require_possible([reason_for(each) for each in found])
    log = os.open(work / "proof.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        proof = Report(verb="restore")
        with (
            report.phase("prove"),
            search.begin_search(record, home) as cuda,
            dumps.ready(home, work, proved, proof) as dump,
            Cell() as cell,
        ):
            process.restore(
                cell,
                image.record,
                dump,
                tool=tool,
                home=home,
                work=work,
                output=Output(stdout=log, stderr=log),
                report=proof,
                engine=engine,
                cuda=process.CudaRestore(search=cuda) if cuda else None,
            )
            working_sets = working_set.touched(cell)
        report.oracle, report.memory = proof.oracle, proof.memory
    finally:
        os.close(log)
    if not working_sets:
        return image
    memory = [
        msgspec.structs.replace(each, working_set=tuple(working_sets.get(each.path.name, ())))
        for each in record.dump.memory
    ]
    own_bytes = proof.memory.own_bytes if proof.memory else 0
    dumped = msgspec.structs.replace(record.dump, memory=memory, own_bytes=own_bytes)
    changed = msgspec.structs.replace(record, dump=dumped)
    known = images.build(staging, changed, image.layers, image.cache)
    dumps.relabel(home, image, known)
    return known


def _copy(dump: Path, target: Path) -> None:
    """Keep an unmodified copy of CRIU's dump, for `rekindle bench`."""
    shutil.copytree(dump, target, symlinks=True)
