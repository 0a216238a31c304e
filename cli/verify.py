# SPDX-License-Identifier: Apache-2.0
"""`rekindle verify`: check whether an image has a signature that the policy accepts. Runs nothing."""

import argparse
from collections.abc import Sequence

from cli import _arguments, _report, _trust
from oci.flow import verify
from rekindle.text import printable

SCHEMA = "rekindle.verify/1"


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle verify",
        description="Verify the signature of an image, as `restore` does before it reads anything else.",
    )
    parser.add_argument("image", metavar="IMAGE", help=_arguments.IMAGE)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    _arguments.add_trust(parser)
    _arguments.add_registry(parser)
    args = parser.parse_args(words)
    digest, trust = verify(args.image, trust=_trust.options(args), registry=_arguments.registry(args))
    created = trust.created.isoformat() if trust.created else None
    image = {"reference": args.image, "digest": digest}
    if args.json:
        document = {"schema": SCHEMA, "image": image, "by": trust.by, "created": created}
        _report.print_document(document)
    else:
        print(printable(f"{args.image} {digest}"))
        print(printable(f"signed by {trust.by}" if trust.by else "not verified"))
        print(printable(f"made {created}" if created else "made at an unknown time"))
    return 0
