# SPDX-License-Identifier: Apache-2.0
"""Prove a packed image by restoring it once, and publish it."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from oci import image as images
from oci import store, transfer
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.reference import Reference, RegistryReference
from oci.registry.access import Access
from oci.registry.repository import Repository
from oci.trust import made_here, signer
from rekindle import criu
from rekindle.cell import Cell, working_set
from rekindle.cell.page_tables import joined
from rekindle.cell.touch_recorder import Touch
from rekindle.cuda import search
from rekindle.engine import Engine
from rekindle.engine.client import Client
from rekindle.errors import RekindleError, RestoreError, UsageError
from rekindle.home import Home
from rekindle.record import Record
from rekindle.report import Report
from restore import dumps
from restore.decide import match_loaded, match_process, plan
from restore.decide.abilities import Abilities
from restore.decide.remembered import Findings
from restore.decide.rules import reason_for
from restore.options import Output
from restore.rungs import cuda_state, process
from restore.rungs.memory import Shown
from snapshot import packing
from snapshot.options import Progress

_MORE_ANSWERS = 3
_ANSWER_SECONDS = 60.0

Signatures = tuple[list[Descriptor], list[Descriptor]]
"""The signatures by this machine's key, and those by the user's."""


def require_writable(reference: Reference, access: Access) -> None:
    """Raise now, before the work, if an image cannot be pushed to this reference."""
    if isinstance(reference, RegistryReference):
        if reference.digest is not None:
            raise UsageError(f"cannot save to {reference}: it names a digest", hint="use a tag")
        with Repository(reference, access) as repository:
            repository.tagged(reference.tag)


def publish(
    staging: Layout,
    image: images.Image,
    signatures: Signatures,
    reference: Reference,
    access: Access,
    home: Home,
    report: Report,
    progress: Progress,
    *,
    mount_from: Sequence[str] = (),
) -> None:
    """Publish an image whose manifests are in `staging`, and its signatures; the tag comes last.

    Blobs that the target has already are not copied. `mount_from` are repositories of the target's registry
    that may have some.
    """
    own, given = signatures
    if isinstance(reference, RegistryReference):
        try:
            tree = transfer.explore(image.blobs, image.index, access.config.limits)
            with progress.sending(access.tally):
                transfer.into_registry(image.blobs, tree, reference, access, mount_from=mount_from)
            report.bytes.sent = access.tally.sent_bytes
        except RekindleError as error:
            # The image took minutes to make: keep it in the store.
            name = f"{reference.repository}:{reference.tag}"
            kept = Layout.create(home.store)
            _stage_missing(staging, image, kept)
            kept.publish(staging, image.index, name, [*own, *given])
            error.hint = f"the image is in the local store: rekindle push {name} {reference}"
            raise
        return
    layout = store.layout_of(reference, home, create=True)
    if warning := store.others_can_read(reference):
        report.say(warning)
    with store.collecting(layout, reference):
        attached = [*given, *(own if reference.directory is None else [])]
        with layout.reading():  # keeps what is there already
            _stage_missing(staging, image, layout)
            layout.publish(staging, image.index, reference.tag, attached)


def _end(cell: Cell, record: Record, home: Home, report: Report, error: BaseException | None) -> None:
    """End the cell of a proof. If a process of it is stuck, that says nothing against the image."""
    try:
        cuda_state.end(cell, record, record.node.devices.driver, home, report, error)
    except RestoreError as stuck:
        if error is not None:
            raise
        report.say(f"WARNING: {stuck.message}: {stuck.cause} ({stuck.hint})")


def _stage_missing(staging: Layout, image: images.Image, target: Layout) -> None:
    """Fetch the blobs that an image shares with an older one, if the target does not have them."""
    for blob in transfer.explore(image.blobs, image.index, image.limits).blobs:
        if not staging.contains(blob) and not target.contains(blob):
            staging.upload(blob, image.blobs)


def prove(
    home: Home,
    work: Path,
    staging: Layout,
    image: images.Image,
    tool: criu.Criu,
    engine: Engine,
    report: Report,
) -> images.Image:
    """Restore the image that will be published, ask the oracle, and record which memory that touched.

    Returns the image with that record; its dump is kept, unpacked, for `restore`.
    """
    made_here.sign(staging, [image.index], signer.predicate(image.record), None, home)
    proved = made_here.verify(image, staging, home)
    record = image.record
    findings = Findings(home.compared)
    different = match_loaded.mapped(record, findings)
    loaded = match_loaded.compare(record, (), os.environ, findings)
    found = match_process.compare(record, record.node, Abilities(criu=tool), different, loaded=loaded)
    plan.require_possible([reason_for(each) for each in found])
    log = os.open(work / "proof.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        proof = Report(verb="restore")
        with (
            report.phase("prove"),
            search.begin_search(record, home) as cuda,
            dumps.ready(home, work, proved, proof) as dump,
            packing.recording(record, dump) as recorder,
            Cell() as cell,
            contextlib.ExitStack() as ending,
        ):
            ending.push(lambda _, error, __: _end(cell, record, home, report, error))
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
                cuda=cuda_state.CudaRestore(search=cuda) if cuda else None,
                shown=Shown(recorder.mount, lambda dump: dump) if recorder else None,
            )
            if recorder:
                _ask_again(cell, record, engine)
            touches = list(recorder.touches) if recorder else []
            working_sets = _working_sets(cell, touches)
        report.oracle, report.memory = proof.oracle, proof.memory
    except RekindleError as error:
        error.log = error.log or work / "proof.log"
        raise
    finally:
        os.close(log)
    if not working_sets:
        return image
    with dumps.ready(home, work, proved, Report(verb="restore")) as dump, report.phase("order"):
        record, layers = packing.packed_again(image, image.record, dump, staging, touches)
    known = _described(record, working_sets, proof)
    ordered = images.build(staging, known, layers, image.cache, image.neutral).fetched_from(image.blobs)
    dumps.relabel(home, image, ordered)
    return ordered


def _ask_again(cell: Cell, record: Record, engine: Engine) -> None:
    """Ask the oracle a few times more: of the pages that one answer takes, some hundred differ each time."""
    client, request = (
        Client(record.endpoint, cell.connect),
        engine.authorize(record.oracle.request, os.environ),
    )
    with contextlib.suppress(OSError):
        for _ in range(_MORE_ANSWERS):
            client.ask(request, timeout=_ANSWER_SECONDS)


def _working_sets(cell: Cell, touches: Sequence[Touch]) -> dict[str, list[tuple[int, int]]]:
    """Return what was touched of each memory file; from page tables if no touches were recorded."""
    if not touches:
        return working_set.touched(cell)
    found: dict[str, list[tuple[int, int]]] = {}
    for name, offset, length in touches:
        found.setdefault(name, []).append((offset, length))
    return {name: joined(each, working_set.JOINED_BYTES) for name, each in found.items()}


def _described(
    record: Record, working_sets: Mapping[str, Sequence[tuple[int, int]]], proof: Report
) -> Record:
    """Return the record with what the proof has found out about the memory."""
    memory = [
        msgspec.structs.replace(each, working_set=tuple(working_sets.get(each.path.name, ())))
        for each in record.dump.memory
    ]
    own_bytes = proof.memory.own_bytes if proof.memory else 0
    dumped = msgspec.structs.replace(record.dump, memory=memory, own_bytes=own_bytes)
    return msgspec.structs.replace(record, dump=dumped)
