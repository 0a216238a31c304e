# SPDX-License-Identifier: Apache-2.0
"""`rekindle push`: send an image from this machine to a registry."""

import argparse
from collections.abc import Sequence

from cli import _transfer
from oci.reference import LayoutReference, RegistryReference, parse
from rekindle.errors import UsageError


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle push",
        description="Send an image to a registry. Blobs that the registry has are not sent again. The tag is "
        "written last.",
    )
    parser.add_argument("source", metavar="IMAGE", help="name[:tag] or oci:DIR[:tag]")
    parser.add_argument("target", metavar="TARGET", help="HOST[:PORT]/repository[:tag]")
    _transfer.add_arguments(parser)
    args = parser.parse_args(words)
    source, target = parse(args.source), parse(args.target)
    if not isinstance(source, LayoutReference):
        raise UsageError(f"{args.source} is not on this machine", hint=_transfer.COPY_HINT)
    if not isinstance(target, RegistryReference):
        raise UsageError(
            f"{args.target} is not in a registry",
            cause="the name of a registry has a dot or a port, such as localhost:5000",
            hint=_transfer.COPY_HINT,
        )
    return _transfer.run("push", str(source), str(target), args)
