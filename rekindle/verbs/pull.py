# SPDX-License-Identifier: Apache-2.0
"""`rekindle pull`: an image of a registry to this machine."""

import argparse
from collections.abc import Sequence

from oci.reference import LayoutReference, RegistryReference, parse
from rekindle.errors import UsageError
from rekindle.verbs import _transfer


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="rekindle pull",
        description="Fetch an image from a registry. What is here already is not fetched; a pull that was "
        "interrupted goes on where it stopped.",
    )
    parser.add_argument("source", metavar="IMAGE", help="HOST[:PORT]/repository[:tag][@digest]")
    parser.add_argument(
        "target", metavar="TARGET", nargs="?", help="name[:tag] or oci:DIR[:tag] (default: as it is called)"
    )
    _transfer.add_arguments(parser)
    args = parser.parse_args(words)
    source = parse(args.source)
    if not isinstance(source, RegistryReference):
        raise UsageError("pull goes from a registry to this machine", hint="`rekindle copy` goes anywhere")
    target = parse(args.target or f"{source.repository.rpartition('/')[2]}:{source.tag}")
    if not isinstance(target, LayoutReference):
        raise UsageError("pull goes from a registry to this machine", hint="`rekindle copy` goes anywhere")
    return _transfer.run("pull", source, target, args)
