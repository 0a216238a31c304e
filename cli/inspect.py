# SPDX-License-Identifier: Apache-2.0
"""`rekindle inspect`: show what an image contains, and whether it fits this node. Runs nothing."""

import argparse
import json
from collections.abc import Mapping, Sequence

from msgspec import structs

from cli import _arguments, _plan, _report, _trust
from oci import image as images
from oci import media_types, resolve
from oci.cache import image as cache_image
from oci.cache.image import CacheImage
from oci.image import Image
from oci.reference import Reference, parse
from oci.resolve import FoundImage
from rekindle import documents
from rekindle.errors import FormatError, RekindleError
from rekindle.fields import JSON
from rekindle.home import Home
from rekindle.report import Rung
from rekindle.run import replay
from rekindle.text import listed, printable
from restore.decide import facts as gathering
from restore.decide import plan
from restore.decide.plan import Plan

SCHEMA = "rekindle.inspect/1"


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle inspect", description="Show what an image contains, and whether it fits this node."
    )
    parser.add_argument("image", metavar="IMAGE", help=_arguments.IMAGE)
    _arguments.add_trust(parser)
    _arguments.add_registry(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(words)
    reference, home = parse(args.image), Home.from_environment()
    with resolve.source(reference, home, _arguments.registry(args)) as source:
        signed = _signed(source, reference, home, args)
        kernels = _cache_image(source)
        if kernels is None:
            image = images.load(source.blobs, source.root, source.limits)
            if image.cache is not None:
                kernels = cache_image.load(source.blobs, image.cache, source.limits)
            made = plan.make(gathering.of_image(image, home, kernels), strictness=gathering.strictness())
            _show_snapshot(image, kernels, made, signed, args)
        else:
            _show_cache(kernels, signed, args)
    return 0


def _signed(
    source: FoundImage, reference: Reference, home: Home, args: argparse.Namespace
) -> Mapping[str, JSON]:
    """Return who signed by the options, the policy or this machine's key, or why nobody is accepted."""
    options = structs.replace(_trust.options(args), allow_rollback=True)
    try:
        trust = resolve.verified(source, reference, home, options).trust
    except RekindleError as error:
        return {"verified": False, "by": None, "created": None, "problem": error.message}
    created = trust.created.isoformat() if trust.created else None
    return {"verified": trust.by is not None, "by": trust.by, "created": created, "problem": None}


def _signed_row(signed: Mapping[str, JSON]) -> str:
    return str(signed["by"] or f"not verified: {signed['problem'] or 'skipped'}")


def _cache_image(source: FoundImage) -> CacheImage | None:
    """Return the image as a kernel cache, or None if it is a snapshot."""
    if source.root.media_type not in media_types.IMAGE_MANIFESTS:
        return None
    try:
        return cache_image.load(source.blobs, source.root, source.limits)
    except FormatError:
        return None


def _show_snapshot(
    image: Image,
    kernels: CacheImage | None,
    made: Plan,
    signed: Mapping[str, JSON],
    args: argparse.Namespace,
) -> None:
    first = made.first
    if args.json:
        _report.print_document(
            {
                "schema": SCHEMA,
                "image": {"reference": args.image, "digest": image.index.digest},
                "signed": signed,
                "process_image": {
                    "digest": image.process.digest,
                    "bytes": image.size_bytes,
                    "layers": [layer.to_json() for layer in image.layers],
                },
                "cache": _cache_json(kernels) if kernels is not None else None,
                "record": json.loads(image.record.to_bytes()),
                "reasons": [reason.to_json() for reason in made.reasons],
                "plan": made.to_json(),
            }
        )
        return
    record = image.record
    rows = {
        "image": f"{args.image} {image.index.digest}",
        "signed by": _signed_row(signed),
        "made": f"{record.created} by {record.made_by}, CRIU {record.criu.version}",
        "engine": record.engine.name,
        "command": replay(record.command),
        "directory": record.directory,
        "listens on": ", ".join(map(str, record.listeners or [record.endpoint])),
        "made on": f"{record.node.cpu_model}, {record.node.architecture}, Linux {record.node.kernel}",
        "runs": f"{record.process.tasks} threads, {record.process.network} network",
        "memory": f"{record.dump.dump_bytes:,} bytes dumped, {record.dump.stored_bytes:,} without zero pages",
        "stored": f"{image.size_bytes:,} bytes in {len(image.layers)} layers",
        "cache": _summary(kernels) if kernels is not None else "none",
        "needs": f"{len(record.mapped_files)} files of the node's file system",
        "fits here": first.rung if first and first.rung is not Rung.COLD else "no",
    }
    if record.process.private:
        rows["own files"] = f"a copy for each replica of {listed(record.process.private)}"
    if record.process.closed:
        rows["closed"] = listed(record.process.closed)
    if record.dump.base is not None:
        rows["shares"] = f"the memory of {record.dump.base}"
    for name, value in rows.items():
        print(printable(f"{name:<12}{value}"))
    for line in _plan.lines(made):
        print(printable(line))


def _show_cache(kernels: CacheImage, signed: Mapping[str, JSON], args: argparse.Namespace) -> None:
    if args.json:
        image = {"reference": args.image, "digest": kernels.manifest.digest}
        _report.print_document(
            {"schema": SCHEMA, "image": image, "signed": signed, "cache": _cache_json(kernels)}
        )
        return
    inventory = kernels.inventory
    targets = ", ".join(f"{target.backend} {target.arch}" for target in inventory.targets)
    rows = {
        "image": f"{args.image} {kernels.manifest.digest}",
        "signed by": _signed_row(signed),
        "made": f"{kernels.created} by {inventory.made_by}",
        "holds": _summary(kernels),
        "made for": f"{targets or 'unknown targets'}, {kernels.architecture}",
        "stored": f"{kernels.size_bytes:,} bytes in {len(kernels.layers)} layers",
    }
    for name, value in rows.items():
        print(printable(f"{name:<12}{value}"))
    for root in inventory.roots:
        files = f"{root.files:,} files, " if kernels.counted else ""
        print(printable(f"{root.kind:<12}{files}{root.bytes:,} bytes of {root.recorded}"))


def _summary(kernels: CacheImage) -> str:
    roots = kernels.inventory.roots
    kinds = ", ".join(sorted({root.kind for root in roots})) or "nothing"
    return f"kernels: {kinds}; {sum(root.bytes for root in roots):,} bytes"


def _cache_json(kernels: CacheImage) -> JSON:
    inventory = kernels.inventory
    return {
        "digest": kernels.manifest.digest,
        "bytes": kernels.size_bytes,
        "created": kernels.created,
        "made_by": inventory.made_by,
        "architecture": kernels.architecture,
        "targets": [documents.to_json(target) for target in inventory.targets],
        "roots": [
            {"kind": root.kind, "recorded": root.recorded, "files": root.files, "bytes": root.bytes}
            for root in inventory.roots
        ],
    }
