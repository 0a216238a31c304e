# SPDX-License-Identifier: Apache-2.0
"""Copy an image from one place to another, for `push`, `pull` and `copy`."""

import argparse
import time
from collections import Counter
from collections.abc import Sequence

from cli import _arguments, _report
from cli._progress import shown
from oci.flow import copy
from oci.progress import Tally
from rekindle.report import AttachmentResult, Outcome

_SHOWN = 5
COPY_HINT = "`rekindle copy` copies between any two places"


def run(verb: str, source: str, target: str, args: argparse.Namespace) -> int:
    """Copy the image and write the report; return the exit status."""
    report = _report.begin(verb, args)
    with _report.reporting(report, args):
        began = time.monotonic()
        copied = copy(
            source,
            target,
            registry=_arguments.registry(args),
            report=report,
            show=lambda tally: shown(tally, quiet=args.quiet),
            attachments=not args.no_attachments,
        )
        seconds = time.monotonic() - began
    if copied.replaced is not None:
        report.say(f"{target} replaces {copied.replaced}")
    for line in _results(copied.attachments):
        report.say(line)
    text = f"{target} {copied.digest}: {_summary(copied.tally, seconds)}"
    _report.finish(report, args, Outcome.SAVED, text)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that the three commands share."""
    parser.add_argument(
        "--no-attachments", action="store_true", help="copy the image without its signatures and attachments"
    )
    _arguments.add_registry(parser)
    _arguments.add_report(parser)


def _results(attachments: Sequence[AttachmentResult]) -> list[str]:
    """Return lines about the attachments: those that were copied by type, the others one by one."""
    copied = Counter(each.artifact_type or "unknown" for each in attachments if not each.problem)
    lines = [f"attachments copied: {count} of type {kind}" for kind, count in sorted(copied.items())]
    others = [each for each in attachments if each.problem]
    for each in others[:_SHOWN]:
        what = f"attachment {each.digest}" if each.digest else "attachments"
        kind = f" ({each.artifact_type})" if each.artifact_type else ""
        lines.append(f"not copied: {what} of {each.subject}{kind}: {each.problem}")
    if len(others) > _SHOWN:
        lines.append(f"not copied: {len(others) - _SHOWN} more; --json lists all")
    return lines


def _summary(tally: Tally, seconds: float) -> str:
    moved = max(tally.fetched_bytes, tally.sent_bytes)
    rate = moved / seconds / 1e6 if seconds else 0.0
    reused = f", {tally.reused_blobs} of {tally.blobs} blobs reused" if tally.reused_blobs else ""
    return f"{moved:,} bytes in {seconds:.2f} s, {rate:.0f} MB/s{reused}"
