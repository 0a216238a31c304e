# SPDX-License-Identifier: Apache-2.0
"""`rekindle extract`: extract the kernel cache of an image, for example in an init container."""

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from cli import _arguments, _progress, _report, _trust
from oci import image as images
from oci import media_types, resolve
from oci.cache import extract
from oci.cache import image as cache_image
from oci.cache.staging import Owner
from oci.reference import parse
from oci.resolve import FoundImage
from oci.trust.verifier import Verified
from rekindle.engine.caches import CacheKind
from rekindle.home import Home
from rekindle.node.start_reads import StartRead, decode
from rekindle.report import ByteCounts, ImageName, Outcome, Report, Rung
from restore.read_ahead import ReadAhead

_ID_LIMIT = (1 << 32) - 2


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle extract",
        description="Extract the kernel cache of a snapshot, or of an image by `rekindle pack-cache`, and "
        "print shell commands that set the variables with which a server finds it.",
    )
    parser.add_argument(
        "image", metavar="IMAGE", help="name[:tag], oci:DIR[:tag] or HOST[:PORT]/repository[:tag][@digest]"
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="DIR",
        help="extract to DIR/KIND (default: the recorded path of each cache)",
    )
    parser.add_argument(
        "--kind",
        type=CacheKind,
        choices=list(CacheKind),
        action="append",
        help="extract only this kind; may be repeated",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing entries whose content differs"
    )
    parser.add_argument(
        "--prefetch",
        action="store_true",
        help="also read ahead, into the memory of this node, what the snapshot's server reads at its start",
    )
    parser.add_argument(
        "--owner",
        type=_owner,
        metavar="USER[:GROUP]",
        help="give what is extracted to this user, by name or number (root only): the one that the server "
        "runs as, so that it can add kernels",
    )
    _arguments.add_trust(parser)
    _arguments.add_registry(parser)
    _arguments.add_report(parser)
    args = parser.parse_args(words)
    report = _report.begin("extract", args, asked=Rung.CACHE)
    with _report.reporting(report, args):
        done = _extract(args, report)
    _report.finish(report, args, Outcome.CACHE)
    if not args.json:
        for name, value in done.environment.items():
            print(f"export {name}={shlex.quote(value)}")
    return 0


def _owner(text: str) -> Owner:
    """Parse USER[:GROUP], as chown takes it: without a group, that stays as it is."""
    import grp
    import pwd

    user, colon, group = text.partition(":")
    try:
        uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
        gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid if colon else -1
        if max(uid, gid) > _ID_LIMIT:
            raise KeyError
        return Owner(uid=uid, gid=gid)
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no such user or group here: {text}") from None


def _extract(args: argparse.Namespace, report: Report) -> extract.Extraction:
    reference, home = parse(args.image), Home.from_environment()
    trust = _trust.options(args)
    with resolve.source(reference, home, _arguments.registry(args)) as source, ReadAhead() as read_ahead:
        with report.phase("resolve"):
            verified = resolve.verified(source, reference, home, trust)
            report.trusted_by = verified.trust.by
            image = verified.map(
                lambda s: cache_image.load(s.blobs, cache_image.find(s.blobs, s.root, s.limits), s.limits)
            )
        report.image = ImageName(reference=args.image, digest=source.root.digest)
        if args.prefetch:
            read_ahead.begin(_start_reads(verified))
        with report.phase("extract"), _progress.progress(source.tally, quiet=args.quiet):
            done = extract.extract(
                image,
                args.to,
                limits=source.limits,
                kinds=args.kind,
                overwrite=args.overwrite,
                own=os.environ,
                owner=args.owner,
            )
        if args.prefetch:
            with report.phase("prefetch"):
                read_ahead.wait()
            report.read_ahead = read_ahead.use
        # Nothing is fetched from the store or a layout.
        fetched = source.tally.fetched_bytes if source.tally else 0
    report.bytes = ByteCounts(fetched=fetched, written=done.written_bytes)
    if read := report.read_ahead:
        report.say(f"read {read.files:,} files ahead, {read.bytes:,} bytes")
    elif args.prefetch:
        report.say("nothing is read ahead: the image does not say what its server reads")
    for root in done.roots:
        report.say(f"{root.kind}: {root.files:,} files, {root.bytes:,} bytes to {root.path}")
        if root.kept:
            some = ", ".join(root.kept[:5]) + (" …" if len(root.kept) > 5 else "")
            report.say(f"{root.kind}: kept existing entries that differ (see --overwrite): {some}")
    return done


def _start_reads(found: Verified[FoundImage]) -> Sequence[StartRead]:
    """Return what the server of a snapshot reads at its start; nothing for a kernel cache without one."""
    if found.value.root.media_type != media_types.INDEX:
        return ()
    image = found.map(lambda s: images.load(s.blobs, s.root, s.limits)).value
    return decode(image.record.reads)
