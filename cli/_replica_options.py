# SPDX-License-Identifier: Apache-2.0
"""The options of a restore that hold also after the replica has hibernated."""

import argparse
from collections.abc import Iterator

_REPEATED = ("publish", "accept_environment", "gpu")
_PLAIN = ("memory", "ready_file", "ready_url", "cache_dir")


def words(args: argparse.Namespace) -> list[str]:
    """Return the words of a command line with which `restore` wakes the replica.

    Not those about trust: what this machine has saved itself, its own key has signed.
    """
    return list(_words(args))


def _words(args: argparse.Namespace) -> Iterator[str]:
    for name in _REPEATED:
        for value in getattr(args, name):
            yield from (f"--{name.replace('_', '-')}", str(value))
    for name in _PLAIN:
        if (value := getattr(args, name)) is not None:
            yield from (f"--{name.replace('_', '-')}", str(value))
    if args.listen_early:
        yield "--listen-early"
