# SPDX-License-Identifier: Apache-2.0
"""`rekindle restore`: bring a saved server back, and serve."""

import argparse
import contextlib
import os
import socket
import threading
from collections.abc import Sequence

from oci import image as images
from oci.reference import parse
from oci.trust.verifier import Verified
from rekindle import criu
from rekindle.cell import Cell, Network
from rekindle.engine import Endpoint
from rekindle.errors import UsageError
from rekindle.fingerprint import Fingerprint
from rekindle.home import Home
from rekindle.report import Outcome, Report
from rekindle.verbs import _options, _trust
from restore import dumps, forward, match, process, serve


def main(words: Sequence[str]) -> int:
    words, command = _options.split_command(words)
    parser = argparse.ArgumentParser(
        prog="rekindle restore",
        usage="rekindle restore IMAGE [options]",
        description="Bring a saved server back, prove it by its oracle, open its port, and serve until it "
        "ends. Signals reach the server; its exit status is ours.",
    )
    parser.add_argument("image", metavar="IMAGE", help=_options.IMAGE)
    parser.add_argument(
        "--publish",
        metavar="[HOST:]PORT",
        help="the host's address that leads to the server (default: where it listened)",
    )
    parser.add_argument(
        "--paranoid", action="store_true", help="unpack the dump anew, and so check every byte of it again"
    )
    _trust.add_arguments(parser)
    _options.add_registry(parser)
    _options.add_report(parser)
    args = parser.parse_args(words)
    if command:
        raise UsageError(
            "this version of rekindle restores the saved process only and takes no command",
            hint="leave out what follows the `--`",
        )
    report = Report(verb="restore", quiet=args.quiet)
    with contextlib.ExitStack() as stack:
        with _options.reporting(report, args):
            cell, image, published = _restore(args, report, stack)
        report.outcome = Outcome.RESTORED
        report.say(f"ready on {report.endpoint} after {report.first_token_seconds:.2f} s to the first token")
        report.write(args.report, to_stdout=args.json)
        return serve.serve(cell, image.record, published)


def _restore(
    args: argparse.Namespace, report: Report, stack: contextlib.ExitStack
) -> tuple[Cell, images.Image, socket.socket | None]:
    reference = parse(args.image)
    _options.require_root()
    cell = stack.enter_context(Cell())  # it boots while we decide
    reading = stack.enter_context(contextlib.ExitStack())
    with report.phase("decide"):
        home = Home.from_environment()
        source = reading.enter_context(_options.source(reference, home, args))
        verified = _trust.verified(source, reference, home, args, report)
        found, tool = _decide(verified, home, report, args.image)
        image = found.value
        record = image.record
        work = stack.enter_context(home.work("restore"))
        endpoint = _published(args.publish, record.endpoint, record.process.network)
        published = stack.enter_context(forward.bind(endpoint))
        if record.process.network is Network.HOST:
            published.close()  # the server takes the address itself; we only looked if it is free
    # Nothing of the dump is needed any more once it is restored: others may make room then.
    with contextlib.ExitStack() as using:
        if source.tally is not None:
            source.tally.expect(sum(layer.size for layer in image.layers))
        with _options.progress(source.tally, report):
            dump = using.enter_context(dumps.ready(home, work, found, report, paranoid=args.paranoid))
        reading.close()
        process.restore(
            cell,
            record,
            dump,
            tool=tool,
            home=home,
            work=work,
            # With --json, stdout carries the report alone.
            output=process.Output(stdout=2 if args.json else 1, stderr=2),
            report=report,
        )
    if record.process.network is not Network.HOST:
        forward.listen(published, endpoint)
    # What killed commands left may be gigabytes: nobody who restores has to wait for its removal.
    threading.Thread(target=_options.sweep, args=[home], daemon=True).start()
    report.bytes.setdefault("written", 0)
    report.bytes["fetched"] = source.tally.fetched_bytes if source.tally else 0
    report.bytes["reused"] = image.size_bytes if not report.bytes["written"] else 0
    report.endpoint = str(endpoint)
    report.pid = os.getpid()
    return cell, image, None if record.process.network is Network.HOST else published


def _decide(
    verified: Verified[_options.Source], home: Home, report: Report, text: str
) -> tuple[Verified[images.Image], criu.Criu]:
    """Reads the record, and says whether this node can. No layer is touched."""
    found = verified.map(lambda source: images.load(source.blobs, source.root, source.limits))
    image = found.value
    report.image = {"reference": text, "digest": image.index.digest}
    report.reasons = match.match(image.record, Fingerprint.probe(), match.size_here)
    match.require(image.record, report.reasons)
    return found, criu.find(home)


def _published(text: str | None, recorded: Endpoint, network: Network) -> Endpoint:
    if text is None:
        return recorded
    if network is Network.HOST:
        raise UsageError(
            "--publish does not go with a snapshot that has the host's network",
            hint=f"it listens on {recorded} itself",
        )
    return _options.parse_endpoint(text, recorded.host)
