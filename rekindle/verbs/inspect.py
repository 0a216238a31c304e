# SPDX-License-Identifier: Apache-2.0
"""`rekindle inspect`: what is in an image and for whom. Runs nothing."""

import argparse
import json
from collections.abc import Sequence

from oci import image as images
from oci.reference import parse
from rekindle.fingerprint import Fingerprint
from rekindle.home import Home
from rekindle.run import replay
from rekindle.text import printable
from rekindle.verbs import _options
from restore import match

SCHEMA = "rekindle.inspect/1"


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="rekindle inspect", description="Show what is in an image, and whether it fits this node."
    )
    parser.add_argument("image", metavar="IMAGE", help=_options.IMAGE)
    _options.add_registry(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(words)
    reference = parse(args.image)
    with _options.source(reference, Home.from_environment(), args) as source:
        image = images.load(source.blobs, source.root, source.limits)
    reasons = match.match(image.record, Fingerprint.probe(), match.size_here)
    if args.json:
        print(
            json.dumps(
                {
                    "schema": SCHEMA,
                    "image": {"reference": args.image, "digest": image.index.digest},
                    "process_image": {
                        "digest": image.process.digest,
                        "bytes": image.size_bytes,
                        "layers": [layer.to_json() for layer in image.layers],
                    },
                    "record": json.loads(image.record.to_bytes()),
                    "reasons": [reason.to_json() for reason in reasons],
                },
                indent=2,
            )
        )
        return 0
    record = image.record
    fits = "yes" if not any(reason.hard for reason in reasons) else "no"
    rows = {
        "image": f"{args.image} {image.index.digest}",
        "made": f"{record.created} by {record.made_by}, CRIU {record.criu_version}",
        "engine": record.engine,
        "command": replay(record.command),
        "in": record.directory,
        "listens on": str(record.endpoint),
        "made on": f"{record.node.cpu_model}, {record.node.architecture}, Linux {record.node.kernel}",
        "processes": f"{record.process.tasks} threads, network {record.process.network}",
        "memory": f"{record.dump_bytes:,} bytes dumped, {record.stored_bytes:,} without zero pages",
        "stored": f"{image.size_bytes:,} bytes in {len(image.layers)} layers",
        "needs": f"{len(record.mapped_files)} files of the node's file system",
        "fits here": fits,
    }
    for name, value in rows.items():
        print(printable(f"{name:<12}{value}"))
    for reason in reasons:
        print(printable(f"{'':<12}{'' if reason.hard else '(harmless) '}{reason}"))
    return 0
