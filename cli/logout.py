# SPDX-License-Identifier: Apache-2.0
"""`rekindle logout`: remove the credentials for a registry."""

import argparse
from collections.abc import Sequence

from oci.registry import login


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle logout",
        description="Remove the credentials for a registry from the files and credential helpers of docker "
        "and podman.",
    )
    parser.add_argument(
        "registry", metavar="HOST[:PORT][/PATH]", help="a registry, or repositories of it below a path"
    )
    args = parser.parse_args(words)
    gone = login.erase(args.registry)
    for place in gone:
        print(f"removed from {place}")
    if not gone:
        print(f"not logged in to {args.registry}")
    return 0
