# SPDX-License-Identifier: Apache-2.0
"""`rekindle snapshot`: start a server, warm it, and save it as an image."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cli import _arguments, _progress, _report, _signing
from oci import image as images
from oci import layers, resolve, store, transfer
from oci.cache import pack
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.reference import Reference, RegistryReference, parse
from oci.registry.repository import Access, Repository
from oci.trust import signer
from oci.trust.verifier import Verified
from rekindle import criu, dump_tree
from rekindle.cell import Cell, Network
from rekindle.cuda import search
from rekindle.engine import Engine
from rekindle.engine.choose import Weights, asleep, for_command
from rekindle.engine.vllm import VllmEngine
from rekindle.errors import RekindleError, UsageError
from rekindle.files import remove_tree
from rekindle.home import Home
from rekindle.node.gpu import probe
from rekindle.node.packages import versions
from rekindle.report import Outcome, Report
from restore import dumps, options
from restore.decide import match_process, plan
from restore.decide.abilities import Abilities
from restore.rungs import process
from snapshot import make, secret_search
from snapshot.warm import read_requests


def main(words: Sequence[str]) -> int:
    words, command = _arguments.split_command(words)
    parser = argparse.ArgumentParser(
        prog="rekindle snapshot",
        usage="rekindle snapshot IMAGE [options] -- COMMAND…",
        description="Start a server, warm it, prove it, and save it as an image. The server ends with it.",
    )
    parser.add_argument("image", metavar="IMAGE", help=_arguments.IMAGE)
    parser.add_argument(
        "--network",
        type=Network,
        choices=list(Network),
        default=Network.PRIVATE,
        help="the server's network: its own (default), so that replicas do not collide, or the host's",
    )
    parser.add_argument(
        "--ready-timeout", type=float, default=1800.0, metavar="S", help="seconds to get ready (1800)"
    )
    parser.add_argument(
        "--ready-url", metavar="URL", help="of a server that is not vLLM: answers 2xx when it is ready"
    )
    parser.add_argument(
        "--oracle-request", type=Path, metavar="FILE", help="the request whose answer proves that server"
    )
    parser.add_argument(
        "--warm-requests", type=Path, metavar="FILE", help="requests to warm it with, a JSON object a line"
    )
    parser.add_argument(
        "--weights",
        type=Weights,
        choices=list(Weights),
        help="of vLLM on a GPU: in the image (default there), read again from the model's files after a "
        "restore, or as they are, with all that the GPU holds",
    )
    parser.add_argument("--no-prove", action="store_true", help="do not restore it once before publishing")
    parser.add_argument("--no-cache", action="store_true", help="leave the kernel cache out of the image")
    parser.add_argument(
        "--allow-secret",
        action="append",
        default=[],
        metavar="NAME",
        help="a variable, option or kind of token that the image may hold; whoever reads it can read that",
    )
    parser.add_argument("--keep-dump", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    _arguments.add_signing(parser)
    _arguments.add_registry(parser)
    _arguments.add_report(parser)
    args = parser.parse_args(words)
    if not command:
        raise UsageError("there is no command", hint="rekindle snapshot IMAGE -- vllm serve MODEL")
    if args.oracle_request and not args.ready_url:
        raise UsageError("--oracle-request goes with --ready-url")
    report = Report(verb="snapshot", quiet=args.quiet, allowed_secrets=sorted(set(args.allow_secret)))
    with _report.reporting(report, args):
        _snapshot(args, command, report)
    report.outcome = Outcome.SAVED
    report.say(f"saved {args.image} {report.image['digest']}, {report.bytes['written']:,} bytes")
    report.write(args.report, to_stdout=args.json)
    return 0


def _snapshot(args: argparse.Namespace, command: list[str], report: Report) -> None:
    reference = parse(args.image)
    engine = for_command(command, ready_url=args.ready_url, oracle_file=args.oracle_request)
    # With what opens our keys, the server has nothing to do.
    ours = {name: value for name, value in os.environ.items() if name not in _signing.VARIABLES}
    environment = {**engine.environment(), **ours}
    nvidia = any(gpu.vendor == "nvidia" for gpu in probe().gpus)
    warmed = args.warm_requests is not None
    engine = _sleeping(engine, args.weights, command, environment, nvidia=nvidia, warmed=warmed)
    credentials = secret_search.Credentials.of(environment, command, args.allow_secret)
    _arguments.require_root()
    home = store.open_home()
    options = make.Options(
        argv=command,
        environment=environment,
        network=args.network,
        ready_timeout=args.ready_timeout,
        warm_requests=read_requests(args.warm_requests) if args.warm_requests else None,
        credentials=credentials,
        find_door=search.cuda_door(home) if nvidia else None,
    )
    access = resolve.access(args, home)
    by = _signing.chosen(args)
    _require_target(reference, access)
    with home.work("snapshot") as work, credentials.kept_out_of_errors():
        with report.phase("find criu"):
            tool = criu.find(home)
        keep = args.keep_dump
        made = make.make(
            options,
            engine,
            tool,
            work,
            report,
            scan=dump_tree.scan,
            keep_untouched=(lambda dump: _copy(dump, keep)) if keep else None,
        )
        record = made.record
        staging = Layout.create(work / "layout")
        packed_cache = None
        if made.caches and not args.no_cache:
            with report.phase("pack cache"):
                packed_cache = pack.pack(
                    made.caches,
                    staging,
                    created=record.created,
                    architecture=record.node.architecture,
                    versions=record.node.packages,
                    workers=layers.workers(),
                    say=report.say,
                )
        with report.phase("pack"):
            packed = layers.pack(work / "dump", record.files, staging, workers=layers.workers())
            remove_tree(work / "dump")
            image = images.build(staging, record, packed, packed_cache)
        with report.phase("sign"):
            subjects = [image.index, *([image.cache] if image.cache else [])]
            attested = signer.predicate(record)
            signatures = _signing.sign(staging, subjects, attested, reference, by, home, report)
            proved = _signing.made_here(image, staging, home)
        report.image = {"reference": args.image, "digest": image.index.digest}
        report.bytes = {"dump": record.dump_bytes, "written": image.size_bytes}
        if not args.no_prove:
            _prove(home, work, proved, tool, engine, report)
        with report.phase("publish"):
            _publish(staging, image, signatures, reference, access, home, report)


def _sleeping(
    engine: Engine,
    weights: Weights | None,
    command: list[str],
    environment: Mapping[str, str],
    *,
    nvidia: bool,
    warmed: bool,
) -> Engine:
    """The engine of a server that sleeps through the snapshot, if it can and shall."""
    if not isinstance(engine, VllmEngine):
        if weights not in {None, Weights.AS_IS}:
            raise UsageError(f"--weights {weights} is for vLLM; other servers are taken as they are")
        return engine
    weights = weights or (Weights.IMAGE if nvidia else Weights.AS_IS)
    if weights is Weights.AS_IS:
        return engine
    return asleep(engine, command, weights, versions(command, environment).get("vllm", ""), warmed=warmed)


def _require_target(reference: Reference, access: Access) -> None:
    """Raises what a registry that cannot be pushed to would raise at the end, after all the work."""
    if isinstance(reference, RegistryReference):
        if reference.digest is not None:
            raise UsageError(f"{reference} names a digest, which nobody knows before", hint="give it a tag")
        with Repository(reference, access) as repository:
            repository.tagged(reference.tag)


def _publish(
    staging: Layout,
    image: images.Image,
    signatures: tuple[list[Descriptor], list[Descriptor]],
    reference: Reference,
    access: Access,
    home: Home,
    report: Report,
) -> None:
    own, given = signatures
    if isinstance(reference, RegistryReference):
        try:
            tree = transfer.explore(staging, image.index, access.config.limits)
            with _progress.progress(access.tally, report):
                transfer.into_registry(staging, tree, reference, access)
            report.bytes["sent"] = access.tally.sent_bytes
        except RekindleError as error:
            # It took minutes to make.
            name = f"{reference.repository}:{reference.tag}"
            kept = Layout.create(home.store)
            kept.publish(staging, image.index, name, [*own, *given])
            error.hint = f"it is kept here: rekindle push {name} {reference}"
            raise
        return
    layout = store.layout_of(reference, home, create=True)
    with store.collecting(layout, reference):
        attached = [*given, *(own if reference.directory is None else [])]
        layout.publish(staging, image.index, reference.tag, attached)


def _prove(
    home: Home,
    work: Path,
    proved: Verified[images.Image],
    tool: criu.Criu,
    engine: Engine,
    report: Report,
) -> None:
    """Restores what will be published, and asks the oracle. The unpacked dump is kept for `restore`.

    As on another day: the files that the server logged to are gone.
    """
    image = proved.value
    for name in ("stdout.log", "stderr.log"):
        (work / name).rename(work / f"before-{name}")
    record = image.record
    different = match_process.look(record)
    plan.require_possible(match_process.process(record, record.node, Abilities(criu=tool), different))
    log = os.open(work / "proof.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        proof = Report(verb="restore", quiet=True)
        with (
            report.phase("prove"),
            search.starting_cuda(record, home) as cuda,
            Cell() as cell,
            dumps.ready(home, work, proved, proof) as dump,
        ):
            process.restore(
                cell,
                image.record,
                dump,
                tool=tool,
                home=home,
                work=work,
                output=options.Output(stdout=log, stderr=log),
                report=proof,
                engine=engine,
                cuda=process.Cuda(search=cuda) if cuda else None,
            )
        report.oracle = proof.oracle
    finally:
        os.close(log)


def _copy(dump: Path, target: Path) -> None:
    """Keeps CRIU's dump as it is, for `rekindle bench` to compare with."""
    import shutil

    shutil.copytree(dump, target, symlinks=True)
