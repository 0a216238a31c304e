# SPDX-License-Identifier: Apache-2.0
"""The words that several commands' command lines share. Imports next to nothing, so that --help is quick."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.errors import CapabilityError

if TYPE_CHECKING:
    from oci.options import RegistryOptions

IMAGE = "name[:tag], oci:DIR[:tag] or HOST[:PORT]/repository[:tag][@digest]"


def split_command(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and the command after it."""
    words = list(words)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report to a file")
    parser.add_argument("--quiet", action="store_true", help="say nothing but errors")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Options of every command that uses what is in an image."""
    group = parser.add_argument_group("trust")
    group.add_argument(
        "--policy", type=Path, metavar="FILE", help="whom to trust ($REKINDLE_HOME/policy.toml)"
    )
    group.add_argument(
        "--verify-key",
        type=Path,
        action="append",
        default=[],
        metavar="PUB",
        help="trust this key; instead of the policy",
    )
    group.add_argument("--certificate-identity", metavar="NAME", help="trust this identity, with its issuer")
    group.add_argument("--certificate-oidc-issuer", metavar="URL", help="who vouches for it")
    group.add_argument("--trusted-root", type=Path, metavar="FILE", help="of a Sigstore of your own")
    group.add_argument(
        "--allow-rollback", action="store_true", help="take an image that is older than one seen before"
    )
    group.add_argument(
        "--dangerously-skip-verification", action="store_true", help="take an image whoever made it"
    )


def add_signing(parser: argparse.ArgumentParser) -> None:
    """Options of every command that makes an image."""
    group = parser.add_argument_group("signing")
    group.add_argument(
        "--sign-key", type=Path, metavar="KEY", help="sign with this key ($COSIGN_PASSWORD opens it)"
    )
    group.add_argument("--sign-keyless", action="store_true", help="sign by who you are, with Sigstore")
    group.add_argument("--identity-token", metavar="TOKEN", help="who you are ($SIGSTORE_ID_TOKEN)")
    group.add_argument("--trust-config", type=Path, metavar="FILE", help="of a Sigstore of your own")


def add_registry(parser: argparse.ArgumentParser) -> None:
    """Options of every command that may talk to a registry."""
    group = parser.add_argument_group("registries")
    group.add_argument("--jobs", type=int, metavar="N", help="connections at once (16)")
    group.add_argument(
        "--limit-rate", type=_rate, metavar="RATE", help="bytes a second, of all together: 500K, 80M, 1G"
    )
    group.add_argument(
        "--mirror", action="append", default=[], metavar="URL", help="ask here first; the digest is the judge"
    )
    group.add_argument("--plain-http", action="store_true", default=None, help="speak no TLS")


def registry(args: argparse.Namespace) -> "RegistryOptions":
    """Return how registries are to be reached."""
    from oci.options import RegistryOptions

    return RegistryOptions(
        jobs=args.jobs,
        limit_rate=args.limit_rate,
        mirrors=tuple(args.mirror),
        plain_http=args.plain_http,
    )


def _rate(text: str) -> float:
    units = {"k": 1e3, "m": 1e6, "g": 1e9}
    unit = units.get(text[-1:].lower(), 1.0)
    try:
        rate = float(text[:-1] if unit != 1.0 else text) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no rate") from None
    if not 1000 <= rate <= 1e12:
        raise argparse.ArgumentTypeError(f"{text} is no rate between 1K and 1000G")
    return rate


def require_root() -> None:
    """Raises CapabilityError for anybody but root: cells and CRIU need it."""
    if os.geteuid() != 0:
        raise CapabilityError(
            "this needs root", cause="namespaces and CRIU do", hint="run it with sudo, or as root"
        )
