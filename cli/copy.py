# SPDX-License-Identifier: Apache-2.0
"""`rekindle copy`: copy an image between any two places."""

import argparse
from collections.abc import Sequence

from cli import _transfer


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle copy",
        description="Copy an image between the local store, OCI layouts and registries, without changing its "
        "digests. Between repositories of one registry, no layer passes through this machine.",
    )
    form = "name[:tag], oci:DIR[:tag] or HOST[:PORT]/repository[:tag]"
    parser.add_argument("source", metavar="SOURCE", help=form)
    parser.add_argument("target", metavar="TARGET", help="likewise")
    _transfer.add_arguments(parser)
    args = parser.parse_args(words)
    return _transfer.run("copy", args.source, args.target, args)
