# SPDX-License-Identifier: Apache-2.0
"""`rekindle login`: check credentials with a registry, and keep them where docker does."""

import argparse
import getpass
import sys
from collections.abc import Sequence

from cli import _arguments
from oci import resolve
from oci.registry import login
from oci.registry.credentials import Credentials
from rekindle.errors import UsageError
from rekindle.home import Home


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle login",
        description="Check a name and password with a registry, and keep them for rekindle, docker and "
        "others: in the credential helper that docker's configuration names, else in "
        "$DOCKER_CONFIG/config.json, or in $REGISTRY_AUTH_FILE if only that is set.",
    )
    parser.add_argument(
        "registry", metavar="HOST[:PORT][/PATH]", help="a registry, or repositories of it below a path"
    )
    parser.add_argument("-u", "--username", metavar="NAME", help="name of the account; asked for if missing")
    parser.add_argument("--password-stdin", action="store_true", help="read the password from standard input")
    _arguments.add_registry(parser)
    args = parser.parse_args(words)
    given = _given(args)
    access = resolve.access(_arguments.registry(args), Home.from_environment())
    login.check(args.registry, given, access)
    print(f"logged in to {args.registry}; the password is in {login.store(args.registry, given)}")
    return 0


def _given(args: argparse.Namespace) -> Credentials:
    """Return what the user gives: by options and standard input, or else typed."""
    if args.password_stdin:
        if not args.username:
            raise UsageError("--password-stdin requires --username")
        password = sys.stdin.read().rstrip("\r\n")
    elif sys.stdin.isatty():
        if not args.username:
            print("name of the account: ", end="", file=sys.stderr, flush=True)
            args.username = sys.stdin.readline().strip()
        password = getpass.getpass("password: ")
    else:
        raise UsageError("no password", hint="--username NAME --password-stdin reads it from standard input")
    if not args.username or not password:
        raise UsageError("the name or the password is empty")
    if ":" in args.username:
        raise UsageError(f"invalid name {args.username!r}", cause="it has a colon")
    return Credentials(name=args.username, password=password)
