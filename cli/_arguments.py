# SPDX-License-Identifier: Apache-2.0
"""Command-line options that several commands share. Imports little, so that --help is fast."""

import argparse
import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rekindle.errors import CapabilityError

if TYPE_CHECKING:
    from oci.options import RegistryOptions

T = TypeVar("T", bound=StrEnum)

IMAGE = "name[:tag], oci:DIR[:tag] or HOST[:PORT]/repository[:tag][@digest]"
REPLICA = "name of a server; see `rekindle ps`"
READY_URL = "for a COMMAND other than vLLM: URL that answers 2xx when the server is ready"
# The options of `add_trust`, to hand them on.
TRUST = (
    "policy",
    "verify_key",
    "certificate_identity",
    "certificate_identity_regexp",
    "ca_roots",
    "certificate_oidc_issuer",
    "certificate_oidc_issuer_regexp",
    "trusted_root",
    "allow_rollback",
    "dangerously_skip_verification",
)
REGISTRY = ("jobs", "limit_rate", "mirror", "plain_http")  # the options of `add_registry`
ORACLE_REQUEST = "for a COMMAND other than vLLM: request whose answer proves the server"


class Formatter(argparse.HelpFormatter):
    """Formats help for the terminal's width; argparse's own imports shutil for it, 2 ms of each start."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_columns() - 2)


@functools.cache
def _columns() -> int:
    """Return the columns of the terminal, as shutil.get_terminal_size."""
    with contextlib.suppress(OSError):
        named = os.environ.get("COLUMNS", "")
        if named.isdecimal() and int(named):
            return int(named)
        return os.get_terminal_size(1).columns or 80
    return 80


class Parser(argparse.ArgumentParser):
    """A parser for a command after which the server's command may follow. Says where that belongs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Formatter, **options)

    def error(self, message: str) -> NoReturn:
        words = message.partition("unrecognized arguments: ")[2].split()
        if words and not words[0].startswith("-"):
            message += f"\n  hint:  put `--` before the server's command: rekindle … -- {words[0]} …"
        super().error(message)


def one_of(kind: type[T]) -> Callable[[str], T]:
    """Return a function that parses a member of an enumeration, and names all if there is no such one."""

    def parse(text: str) -> T:
        try:
            return kind(text)
        except ValueError:
            names = ", ".join(kind)
            raise argparse.ArgumentTypeError(f"invalid choice '{text}' (choose from {names})") from None

    return parse


def seconds(text: str) -> float:
    """Parse a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"invalid number of seconds '{text}'")
    return value


def split_command(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line at the first `--`: return our own words, and the command after it."""
    words = list(words)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def option_words(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Return the words of a command line that give these options as `args` has them."""
    words: list[str] = []
    for name in names:
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [option] if value else []
        elif value is not None:
            for each in value if isinstance(value, list) else [value]:
                words += [option, str(each)]
    return words


def add_reseed(parser: argparse.ArgumentParser) -> None:
    from rekindle.cell.hook import Reseed

    parser.add_argument(
        "--reseed",
        type=one_of(Reseed),
        choices=list(Reseed),
        default=Reseed.UNSEEDED,
        help="random numbers of Python processes to reseed after a restore: those that the program did not "
        "seed itself (default), all, or none",
    )


def add_ready_timeout(parser: argparse.ArgumentParser, default: float) -> None:
    """Add the option that limits the start of a server."""
    parser.add_argument(
        "--ready-timeout",
        type=seconds,
        default=default,
        metavar="S",
        help=f"fail unless the server is ready within S seconds (default: {default:.0f})",
    )


def add_client_address(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how the server learns its clients' addresses."""
    parser.add_argument(
        "--client-address",
        choices=["proxy-v1", "proxy-v2", "forwarded-for"],
        help="tell the server the addresses of its clients, by the PROXY protocol or by X-Forwarded-For in "
        "each request (default: it sees that all come from 127.0.0.1)",
    )


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the options for the report."""
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report to FILE")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that verify an image."""
    group = parser.add_argument_group("trust")
    group.add_argument(
        "--policy", type=Path, metavar="FILE", help="trust policy (default: $REKINDLE_HOME/policy.toml)"
    )
    group.add_argument(
        "--verify-key",
        type=Path,
        action="append",
        default=[],
        metavar="PUB",
        help="trust this public key instead of the policy; may be repeated",
    )
    group.add_argument(
        "--certificate-identity",
        metavar="NAME",
        help="trust this signer; requires --certificate-oidc-issuer or its -regexp",
    )
    group.add_argument(
        "--certificate-identity-regexp", metavar="PATTERN", help="trust signers whose whole name matches"
    )
    group.add_argument(
        "--ca-roots",
        type=Path,
        metavar="PEM",
        help="certificates of an authority of your own, for --certificate-identity without an issuer",
    )
    group.add_argument("--certificate-oidc-issuer", metavar="URL", help="OIDC issuer of that signer")
    group.add_argument(
        "--certificate-oidc-issuer-regexp", metavar="PATTERN", help="a pattern for the issuer instead"
    )
    group.add_argument(
        "--trusted-root", type=Path, metavar="FILE", help="trusted root of a private Sigstore instance"
    )
    group.add_argument(
        "--allow-rollback", action="store_true", help="accept an image older than one seen before"
    )
    group.add_argument(
        "--dangerously-skip-verification", action="store_true", help="skip signature verification"
    )


def add_accept_environment(parser: argparse.ArgumentParser) -> None:
    """Add the option of commands that compare the environment with a snapshot's."""
    parser.add_argument(
        "--accept-environment",
        action="append",
        default=[],
        metavar="NAME",
        help="restore the process even if this variable differs; may be a pattern, and repeated",
    )


def add_signing(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that sign an image."""
    group = parser.add_argument_group("signing")
    group.add_argument(
        "--sign-key", type=Path, metavar="KEY", help="sign with this private key (password: $COSIGN_PASSWORD)"
    )
    group.add_argument(
        "--sign-command",
        metavar="COMMAND",
        help="sign with this command, which reads what is to be signed and prints the signature, as a client "
        "of a key management service does; requires --sign-public-key",
    )
    group.add_argument(
        "--sign-public-key", type=Path, metavar="PUB", help="public key of the key that COMMAND signs with"
    )
    group.add_argument(
        "--sign-keyless", action="store_true", help="sign with an OIDC identity, through Sigstore"
    )
    group.add_argument(
        "--identity-token", metavar="TOKEN", help="OIDC identity token (default: $SIGSTORE_ID_TOKEN)"
    )
    group.add_argument(
        "--trust-config", type=Path, metavar="FILE", help="configuration of a private Sigstore instance"
    )


def add_registry(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that may talk to a registry."""
    group = parser.add_argument_group("registries")
    group.add_argument("--jobs", type=int, metavar="N", help="parallel connections (default: 16)")
    group.add_argument(
        "--limit-rate",
        type=_rate,
        metavar="RATE",
        help="limit all connections together to RATE bytes per second: 500K, 80M, 1G",
    )
    group.add_argument(
        "--mirror", action="append", default=[], metavar="URL", help="try this mirror first; may be repeated"
    )
    group.add_argument("--plain-http", action="store_true", default=None, help="use HTTP without TLS")


def registry(args: argparse.Namespace) -> "RegistryOptions":
    """Return the options for registries that the command line gives."""
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
        raise argparse.ArgumentTypeError(f"invalid rate '{text}'") from None
    if not 1000 <= rate <= 1e12:
        raise argparse.ArgumentTypeError(f"invalid rate '{text}': not between 1K and 1000G")
    return rate


def require_root() -> None:
    """Raise CapabilityError unless we run as root: cells and CRIU need it."""
    if os.geteuid() != 0:
        raise CapabilityError(
            "this command must run as root", cause="namespaces and CRIU need root", hint="use sudo"
        )
