# SPDX-License-Identifier: Apache-2.0
"""`rekindle pull`: fetch an image from a registry to this machine."""

import argparse
from collections.abc import Sequence

from cli import _arguments, _report, _transfer, _trust
from cli._progress import shown
from oci import image as images
from oci import resolve, store
from oci.reference import LayoutReference, RegistryReference, parse
from rekindle.errors import UsageError
from rekindle.report import ImageName, Outcome
from restore import dumps


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle pull",
        description="Fetch an image from a registry. Existing blobs are not fetched again; an interrupted "
        "pull continues where it stopped. With --unpack, the dump is unpacked for `restore` instead, and no "
        "copy of the image is kept.",
    )
    parser.add_argument("source", metavar="IMAGE", help="HOST[:PORT]/repository[:tag][@digest]")
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help="name[:tag] or oci:DIR[:tag] (default: the name and tag in the registry)",
    )
    parser.add_argument("--unpack", action="store_true", help="unpack the dump for `restore` (needs root)")
    _arguments.add_trust(parser)
    _transfer.add_arguments(parser)
    args = parser.parse_intermixed_args(words)  # TARGET may come after options
    source = parse(args.source)
    if not isinstance(source, RegistryReference):
        raise UsageError(
            f"{args.source} is not in a registry",
            cause="the name of a registry has a dot or a port, such as localhost:5000",
            hint=_transfer.COPY_HINT,
        )
    if args.unpack:
        if args.target:
            raise UsageError("--unpack stores no image", hint="omit TARGET")
        return _unpack(source, args)
    if not args.target and source.digest is not None and not _names_tag(args.source):
        raise UsageError(
            f"no local name for {source}: it has no tag", hint="choose one: rekindle pull IMAGE TARGET"
        )
    target = parse(args.target or f"{source.repository.rpartition('/')[2]}:{source.tag}")
    if not isinstance(target, LayoutReference):
        raise UsageError(f"{args.target} is not on this machine", hint=_transfer.COPY_HINT)
    return _transfer.run("pull", str(source), str(target), args)


def _names_tag(text: str) -> bool:
    """Return whether a reference to a registry contains a tag, rather than relying on the default one."""
    return ":" in text.partition("/")[2].partition("@")[0]


def _unpack(reference: RegistryReference, args: argparse.Namespace) -> int:
    """Receive, hash, decompress and write the layers in parallel, straight into the kept dump."""
    report = _report.begin("pull", args)
    with _report.reporting(report, args):
        trust = _trust.options(args)
        _arguments.require_root()
        home = store.open_home()
        with home.work("pull") as work, resolve.source(reference, home, _arguments.registry(args)) as source:
            with report.phase("resolve"):
                verified = resolve.verified(source, reference, home, trust)
                report.trusted_by = verified.trust.by
                found = verified.map(lambda s: images.load(s.blobs, s.root, s.limits))
                image = found.value
            report.image = ImageName(reference=str(reference), digest=image.index.digest)
            assert source.tally is not None
            source.tally.expect(sum(layer.size for layer in image.layers))
            with shown(source.tally, quiet=args.quiet), dumps.ready(home, work, found, report):
                report.bytes.fetched = source.tally.fetched_bytes
    _report.finish(report, args, Outcome.SAVED, f"{reference} {image.index.digest} is ready to restore")
    return 0
