# SPDX-License-Identifier: Apache-2.0
"""`rekindle pack-cache`: pack a kernel cache as an image of its own, without a process."""

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cli import _arguments, _report, _signing
from oci import store
from oci.cache import image as cache_image
from oci.cache import pack
from oci.cache.image import CacheImage
from oci.layout import Layout
from oci.reference import LayoutReference, parse
from oci.trust import made_here
from rekindle.config import Config
from rekindle.engine import find_caches
from rekindle.engine.caches import CacheKind
from rekindle.errors import UsageError
from rekindle.report import ByteCounts, ImageName, Outcome, Report, Rung


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle pack-cache",
        description="Pack a kernel cache as an image, in the format that MCV and KServe read. The kind of "
        "the cache is detected from its content. DIR may also hold several caches, one in each subdirectory.",
    )
    parser.add_argument("image", metavar="IMAGE", help="name[:tag] or oci:DIR[:tag]")
    parser.add_argument(
        "--dir", type=Path, required=True, metavar="DIR", help="the cache, or a directory of caches"
    )
    parser.add_argument(
        "--kind", type=CacheKind, choices=list(CacheKind), help="kind of the cache, if it is not detected"
    )
    _arguments.add_signing(parser)
    _arguments.add_report(parser)
    args = parser.parse_args(words)
    reference = parse(args.image)
    if not isinstance(reference, LayoutReference):
        raise UsageError(
            f"{args.image} is in a registry",
            hint="pack it under a local name, and push it with `rekindle push`",
        )
    report = _report.begin("pack-cache", args, asked=Rung.CACHE)
    with _report.reporting(report, args):
        image = _pack(reference, args, report)
    saved = f"saved {args.image} {image.manifest.digest}, {image.size_bytes:,} bytes"
    _report.finish(report, args, Outcome.SAVED, saved)
    return 0


def _pack(reference: LayoutReference, args: argparse.Namespace, report: Report) -> CacheImage:
    if not args.dir.is_dir():
        raise UsageError(f"{args.dir} is not a directory")
    with report.phase("look"):
        roots = find_caches.find_below(args.dir, args.kind)
    if not roots:
        raise UsageError(
            f"no known kernel cache in {args.dir}",
            hint=f"name its kind with --kind: {', '.join(CacheKind)}",
        )
    for root in roots:
        report.say(f"{root.kind} in {root.path}")
    home = store.open_home()
    by = _signing.chosen(args)
    with home.work("pack-cache") as work:
        staging = Layout.create(work / "layout")
        with report.phase("pack"):
            created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            descriptor = pack.pack(roots, staging, created=created, say=report.say)
            image = cache_image.load(staging, descriptor, Config.read(home.root).limits)
        report.image = ImageName(reference=args.image, digest=descriptor.digest)
        report.bytes = ByteCounts(
            packed=sum(root.bytes for root in image.inventory.roots), written=image.size_bytes
        )
        with report.phase("sign"):
            attested = {"created": created, "made_by": image.inventory.made_by}
            own, given = made_here.sign(staging, [descriptor], attested, by, home)
            _signing.advise(report, reference, given)
        with report.phase("publish"):
            layout = store.layout_of(reference, home, create=True)
            with store.collecting(layout, reference):
                layout.publish(
                    staging,
                    descriptor,
                    reference.tag,
                    [*given, *(own if reference.directory is None else [])],
                )
    return image
