# SPDX-License-Identifier: Apache-2.0
"""`rekindle rm`: remove images from the local store or a layout directory."""

import argparse
from collections.abc import Sequence

from cli import _arguments
from oci import store
from oci.reference import LayoutReference, parse
from rekindle.errors import UsageError
from restore import housekeeping


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle rm",
        formatter_class=_arguments.Formatter,
        description="Remove images from the local store or a layout directory, with all that no other image "
        "needs: blobs, signatures, the unpacked dump. An image that a server uses is not removed.",
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="name[:tag] or oci:DIR[:tag]")
    parser.add_argument(
        "-f", "--force", action="store_true", help="remove images that servers use; these run on"
    )
    args = parser.parse_args(words)
    references = [_local(each) for each in args.images]
    home = store.open_home()
    for reference in references:
        descriptor = housekeeping.remove(reference, home, force=args.force)
        print(f"{reference} {descriptor.digest}")
    return 0


def _local(name: str) -> LayoutReference:
    reference = parse(name)
    if not isinstance(reference, LayoutReference):
        raise UsageError(f"{name} is in a registry", hint="remove it with the tools of the registry")
    return reference
