# SPDX-License-Identifier: Apache-2.0
"""The options of a restore that hold also after the replica has hibernated."""

import argparse

from cli import _arguments

_NAMES = (
    "publish",
    "accept_environment",
    "gpu",
    "memory",
    "ready_file",
    "ready_url",
    "cache_dir",
    "listen_early",
    "no_prefetch",
    "shared_port",
    "client_address",
)


def words(args: argparse.Namespace) -> list[str]:
    """Return the words of a command line with which `restore` wakes the replica.

    Not those about trust: what this machine has saved itself, its own key has signed.
    """
    return _arguments.option_words(args, _NAMES)
