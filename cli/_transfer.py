# SPDX-License-Identifier: Apache-2.0
"""What `push`, `pull` and `copy` have in common: an image from one place to another."""

import argparse
import contextlib
import time
from collections.abc import Iterator

from cli import _arguments, _report
from cli._progress import shown
from oci import resolve, store, transfer
from oci.descriptor import Blobs
from oci.progress import Tally
from oci.reference import LayoutReference, Reference, RegistryReference
from oci.registry.repository import Access, Repository
from rekindle.home import Home
from rekindle.report import Outcome, Report


def run(verb: str, source: Reference, target: Reference, args: argparse.Namespace) -> int:
    """Copies the image and reports. Everything is checked against its digest on the way."""
    report = Report(verb=verb, quiet=args.quiet)
    with _report.reporting(report, args):
        home = store.open_home()
        access = resolve.access(args, home)
        began = time.monotonic()
        _copy(source, target, home, access, report)
        seconds = time.monotonic() - began
    report.outcome = Outcome.SAVED
    report.say(f"{target} {report.image['digest']}: {_told(access.tally, seconds)}")
    report.write(args.report, to_stdout=args.json)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all three."""
    _arguments.add_registry(parser)
    _arguments.add_report(parser)


def _copy(source: Reference, target: Reference, home: Home, access: Access, report: Report) -> None:
    with contextlib.ExitStack() as stack:
        with report.phase("resolve"):
            blobs: Blobs
            if isinstance(source, LayoutReference):
                layout = store.layout_of(source, home)
                stack.enter_context(layout.reading())
                blobs, root = layout, layout.resolve(source.tag)
            else:
                blobs = stack.enter_context(Repository(source, access))
                root = blobs.resolve()
            tree = transfer.explore(blobs, root, access.config.limits)
        report.image = {"reference": str(target), "digest": root.digest}
        stack.enter_context(_counted(report, access.tally))
        with report.phase("transfer"), shown(access.tally, quiet=report.quiet):
            if isinstance(target, RegistryReference):
                mount_from = _repositories(source, target)
                transfer.into_registry(blobs, tree, target, access, mount_from=mount_from)
            else:
                layout = store.layout_of(target, home, create=True)
                before = layout.tags().get(target.tag)
                with store.collecting(layout, target):
                    transfer.into_layout(blobs, tree, layout, target.tag, access)
                if before is not None and before.digest != root.digest:
                    report.say(f"{target} replaces {before.digest}")


def _repositories(source: Reference, target: RegistryReference) -> list[str]:
    """From where the target's registry can take what it needs by itself."""
    same = isinstance(source, RegistryReference) and source.host == target.host
    return [source.repository] if isinstance(source, RegistryReference) and same else []


@contextlib.contextmanager
def _counted(report: Report, tally: Tally) -> Iterator[None]:
    """Puts into the report what was moved, also when the command fails."""
    try:
        yield
    finally:
        moved = {"fetched": tally.fetched_bytes, "sent": tally.sent_bytes}
        report.bytes = {**moved, "reused": tally.reused_bytes}


def _told(tally: Tally, seconds: float) -> str:
    moved = max(tally.fetched_bytes, tally.sent_bytes)
    rate = moved / seconds / 1e6 if seconds else 0.0
    there = f", {tally.reused_blobs} of {tally.blobs} blobs were there" if tally.reused_blobs else ""
    return f"{moved:,} bytes in {seconds:.2f} s, {rate:.0f} MB/s{there}"
