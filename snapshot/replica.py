# SPDX-License-Identifier: Apache-2.0
"""Save a replica as an image of its own, with what it has written since it was restored.

    from snapshot import RunningReplica, ReplicaOptions, save_replica

    image = save_replica(replica, ReplicaOptions(image="tiny-monday"))

The image shares the memory layers of the image that the replica was restored from, and has small layers of
its own. It has a record of its own, and is signed, verified, copied and restored as any other.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from oci import dump_layers, resolve, store
from oci import image as images
from oci.descriptor import Blobs
from oci.image import Image
from oci.layout import Layout
from oci.overlay import Overlay
from oci.reference import Reference, RegistryReference, parse
from oci.trust import made_here, signer
from rekindle import __version__
from rekindle.cell import Cell, Network, processes
from rekindle.criu import Criu
from rekindle.criu.search import find_for_dump
from rekindle.engine.choose import from_record
from rekindle.errors import (
    CapabilityError,
    DumpError,
    IntegrityError,
    NotDumpableError,
    NotFoundError,
)
from rekindle.home import Home
from rekindle.node.fingerprint import Fingerprint
from rekindle.proc import start_ticks
from rekindle.record import Process, Record, RecordedCriu
from rekindle.report import ImageName, Report
from restore import delta, dumps
from restore.options import Output
from snapshot import secret_search
from snapshot.aftermath import telling_server
from snapshot.describe import listened_endpoints, main_first, mapped_files, opened_files
from snapshot.hooks import around_dump
from snapshot.obstacles import obstacles
from snapshot.options import Progress, ReplicaOptions
from snapshot.outside_connections import Ending, Outside
from snapshot.outside_connections import find as find_outside
from snapshot.packing import described
from snapshot.private_paths import DATABASE, PrivatePaths
from snapshot.private_paths import find as find_private
from snapshot.publish import prove, publish, require_writable

_MANIFEST_LIMIT_BYTES = 4 << 20


class RunningReplica(Struct, frozen=True, kw_only=True):
    """A restored server that runs in a cell of ours.

    It was restored from `image`, found as `reference`, with `output`. `dump` is the ready dump whose memory
    files it maps, locked as long as it runs; None if its memory was copied. `hold`, which may be called
    again, holds its clients back; it is called as late as possible.
    """

    cell: Cell
    image: Image
    reference: Reference
    dump: Path | None
    output: Output
    hold: Callable[[], None] = lambda: None


def save_replica(
    replica: RunningReplica,
    options: ReplicaOptions,
    report: Report | None = None,
    progress: Progress | None = None,
    *,
    home: Home | None = None,
) -> Image:
    """Save a replica as an image, and fill the report. `home` is $REKINDLE_HOME unless given.

    The replica is frozen meanwhile. With `options.runs_on` it runs on once the dump is complete. Otherwise it
    ends when the image is published, and runs on if anything fails or is interrupted before: its state is
    never lost. If CRIU is killed, the replica ends.

    Atomic: the tag is written last, and a failure leaves nothing behind. Raises CapabilityError for a server
    with CUDA state, SecretError, NotDumpableError, DumpError, OracleError, and the errors of registries and
    keys.
    """
    home = home or store.open_home()

    def borrow() -> contextlib.AbstractContextManager[RunningReplica]:
        return contextlib.nullcontext(replica)

    return save_borrowed(replica.image, replica.reference, borrow, options, report, progress, home=home)


def save_borrowed(
    image: Image,
    found_as: Reference,
    borrow: Callable[[], contextlib.AbstractContextManager[RunningReplica]],
    options: ReplicaOptions,
    report: Report | None = None,
    progress: Progress | None = None,
    *,
    home: Home,
    before_end: Callable[[], None] = lambda: None,
) -> Image:
    """Save a replica, as `save_replica` does, that is at hand only within the context of `borrow`.

    The context is entered when everything else is prepared, and left as soon as the replica runs on. If
    `before_end` raises, a replica that was going to end runs on.
    """
    report = report or Report(verb="snapshot")
    base, given = image.record, image
    _require_supported(base)
    reference = parse(options.image)
    access = resolve.access(options.registry, home)
    require_writable(reference, access)
    credentials = secret_search.KnownSecrets.of(os.environ, base.command, options.secrets)
    engine = from_record(base.engine.name, base.endpoint, base.engine.options)
    with contextlib.ExitStack() as stack:
        work = stack.enter_context(home.work("snapshot"))
        stack.enter_context(credentials.kept_out_of_errors())
        with report.phase("find criu"):
            tool = find_for_dump(home)
        shared = stack.enter_context(_shared_blobs(given, found_as, home, options))
        frozen = stack.enter_context(contextlib.ExitStack())
        replica = frozen.enter_context(borrow())
        frozen.enter_context(telling_server(replica.cell, base.process.root_pid, engine, ends=False))
        if base.process.hooked:
            replica.hold()
        hooked = frozen.enter_context(around_dump(replica.cell, base.process.hooked, report))
        with report.phase("dump"):
            dumped = frozen.enter_context(_dumped(replica, work, tool, options))
        with report.phase("describe"):
            changes = _describe(replica, tool, dumped.process)
            report.closed = list(dumped.process.closed)
        if options.runs_on:
            frozen.close()
        with report.phase("compact"):
            # On the host's network, the replica that was dumped has the address that a proof would need.
            proved = options.prove and base.process.network is Network.PRIVATE
            record = dumped.finish(complete=shared is None)
            process = msgspec.structs.replace(record.process, hooked=hooked)
            record = msgspec.structs.replace(record, **changes, process=process, proved=proved)
        with report.phase("search for secrets"):
            secret_search.require_no_secrets(dumped.directory, credentials)
        with report.phase("pack"):
            image = _pack(record, dumped.directory, given, shared, Layout.create(work / "layout"))
        staging = Layout(work / "layout")
        if record.proved:
            image = prove(home, work, staging, image, tool, engine, report)
        with report.phase("sign"):
            attested = signer.predicate(image.record)
            subjects = [image.index, *([image.cache] if image.cache else [])]
            signatures = made_here.sign(staging, subjects, attested, options.sign, home)
        report.image = ImageName(reference=options.image, digest=image.index.digest)
        report.bytes.dump, report.bytes.written = dumped.bytes, sum(_own_sizes(image, given))
        with report.phase("publish"):
            mount_from = _repositories(found_as, reference)
            shown = progress or Progress()
            publish(staging, image, signatures, reference, access, home, report, shown, mount_from=mount_from)
        if not record.proved:
            dumps.adopt(home, image, dumped.directory)
        if not options.runs_on:
            before_end()
            dumped.end()
    return image


def _require_supported(record: Record) -> None:
    if record.process.cuda_pids or record.engine.options.get("asleep"):
        raise CapabilityError(
            "cannot save a replica whose server slept or used CUDA when its snapshot was made",
            hint="take a new snapshot: rekindle snapshot IMAGE -- COMMAND",
        )


@contextlib.contextmanager
def _shared_blobs(
    image: Image, reference: Reference, home: Home, options: ReplicaOptions
) -> Iterator[Blobs | None]:
    """Keep the blobs of the replica's image readable within the context; None if they are gone."""
    with contextlib.ExitStack() as stack:
        blobs: Blobs | None = None
        with contextlib.suppress(NotFoundError, IntegrityError):
            found = stack.enter_context(resolve.source(reference, home, options.registry))
            if cache := image.cache:
                found.blobs.read(cache, limit_bytes=_MANIFEST_LIMIT_BYTES)
            if isinstance(found.blobs, Layout):
                for layer in filter(lambda layer: layer.is_memory, image.layers):
                    found.blobs.open_blob(layer).close()
            blobs = found.blobs
        yield blobs


@contextlib.contextmanager
def _dumped(
    replica: RunningReplica, work: Path, tool: Criu, options: ReplicaOptions
) -> Iterator[delta.Delta]:
    """Dump the replica; if CRIU cannot, name what stands in its way."""
    base = replica.image.record.process
    private = _private(replica)
    closed = {}
    if options.outside == Outside.CLOSE:
        found = find_outside(replica.cell, base.root_pid, Network.PRIVATE, work)
        closed = {inode: each.name for inode, each in found.items() if each.ending is Ending.IN_IMAGE}
    replica.hold()
    with contextlib.ExitStack() as stack:
        try:
            dump = delta.dumped(
                replica.cell,
                replica.image,
                replica.dump,
                work / "dump",
                tool=tool,
                output=replica.output,
                private_paths=private.copied,
                directories=private.directories,
                closed=closed,
            )
            dumped = stack.enter_context(dump)
        except DumpError as error:
            named = obstacles(replica.cell, base.root_pid, base.network, tool, private=private, work=work)
            error.cause = "\n".join([error.cause, *map(str, named)])
            raise
        yield dumped


def _outputs(replica: RunningReplica) -> list[Path]:
    return [Path(f"/proc/self/fd/{fd}").readlink() for fd in (replica.output.stdout, replica.output.stderr)]


def _private(replica: RunningReplica) -> PrivatePaths:
    """Return what further replicas do not share: what the image has of it, and what is new.

    Raises NotDumpableError for files that they would share.
    """
    base = replica.image.record.process
    cell, own = replica.cell, {str(path) for path in _outputs(replica)}
    known = PrivatePaths(copied=base.private)
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks(cell.init_pid) / os.sysconf("SC_CLK_TCK")
    since_ns = time.time_ns() - int(age * 1e9)
    found = find_private(
        cell, processes.tree(cell, base.root_pid), since_ns=since_ns, environment=os.environ, own=own
    )
    refused = {
        path: each for path, each in found.refused.items() if each == DATABASE or not known.holds(path)
    }
    if refused:
        raise NotDumpableError(
            "further replicas would share files of this one",
            cause="\n".join(f"{path}: {what}; {remedy}" for path, (what, remedy) in refused.items()),
        )
    new = [path for path in found.copied if not known.holds(path)]
    directories = {each.path: each for each in (*found.directories, *base.directories)}
    return PrivatePaths(
        copied=(*base.private, *new), directories=tuple(directories[path] for path in sorted(directories))
    )


def _describe(replica: RunningReplica, tool: Criu, process: Process) -> dict[str, Any]:
    """Return the fields of the record that have changed since the replica's image was made."""
    base = replica.image.record
    pids = processes.tree(replica.cell, base.process.root_pid)
    opened = opened_files(replica.cell, pids) - {str(path) for path in _outputs(replica)}
    private = PrivatePaths(copied=process.private)
    opened = {path for path in opened if not private.holds(path)}
    known = {file.path: file for file in base.mapped_files}
    still = [file for path, file in known.items() if path in opened]
    listeners = listened_endpoints(replica.cell, pids)
    return {
        "listeners": main_first(base.endpoint, listeners),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "made_by": f"rekindle {__version__}",
        "node": msgspec.structs.replace(
            Fingerprint.probe(), packages=base.node.packages, credentials=base.node.credentials
        ),
        "criu": RecordedCriu(version=tool.version),
        "mapped_files": sorted([*still, *mapped_files(opened - known.keys())], key=lambda file: file.path),
    }


def _pack(record: Record, tree: Path, base: Image, shared: Blobs | None, staging: Layout) -> Image:
    """Write the image's own layers, and build it from these and the layers that it shares."""
    pack = functools.partial(dump_layers.pack_layers, tree, layout=staging, workers=dump_layers.workers())
    cache = base.cache if shared is not None else None
    if cache is not None:
        assert shared is not None
        staging.put(shared.read(cache, limit_bytes=_MANIFEST_LIMIT_BYTES), cache.media_type)
    neutral = base.neutral if shared is not None else None
    if neutral is not None:
        assert shared is not None
        staging.put(shared.read(neutral, limit_bytes=_MANIFEST_LIMIT_BYTES), neutral.media_type)
    if record.dump.base is None:
        packed = pack(record.dump.files)
        record = described(record, packed)
        image = images.build(staging, record, [each.descriptor for each in packed], cache, neutral)
    else:
        packed = pack([file for file in record.dump.files if file.path.parts[0] != "memory"])
        own = [each.descriptor for each in packed]
        known = [layer for layer in base.layers if layer.is_memory]
        image = images.build(staging, record, [*own, *known], cache, neutral)
    return image.fetched_from(Overlay(staging, shared)) if shared is not None else image


def _own_sizes(image: Image, base: Image) -> Iterator[int]:
    """Yield the sizes of the blobs that an image does not share with its base."""
    known = {layer.digest for layer in base.layers}
    for blob in (image.process, image.config, *image.layers):
        if blob.digest not in known:
            yield blob.size


def _repositories(base: Reference, target: Reference) -> Sequence[str]:
    """Return the repositories of the target's registry that have the base."""
    if isinstance(base, RegistryReference) and isinstance(target, RegistryReference):
        return [base.repository] if base.host == target.host else []
    return []
