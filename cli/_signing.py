# SPDX-License-Identifier: Apache-2.0
"""With which key a command signs."""

import argparse
import getpass
import os
import sys
from collections.abc import Sequence

from oci.descriptor import Descriptor
from oci.reference import LayoutReference, Reference
from oci.trust import signer
from oci.trust.keys import PrivateKey
from rekindle.errors import UsageError
from rekindle.report import Report

VARIABLES = frozenset({"COSIGN_PASSWORD", "SIGSTORE_ID_TOKEN"})
"""The environment variables that open keys."""


def chosen_key(args: argparse.Namespace) -> PrivateKey | None:
    """The key to sign with, if the command line names one; asks for its password."""
    if args.sign_key and args.sign_keyless:
        raise UsageError("--sign-key and --sign-keyless do not go together")
    return PrivateKey.read(args.sign_key, password()) if args.sign_key else None


def chosen(args: argparse.Namespace, key: PrivateKey | None = None) -> signer.Sign | None:
    """How to sign, if the command line says so; asks for a password before work begins, unless its `key` is
    given, which was read already."""
    key = key or chosen_key(args)
    if key is not None:
        return signer.by_key(key)
    if args.sign_keyless:
        from oci.trust import keyless

        token = args.identity_token or os.environ.get("SIGSTORE_ID_TOKEN")
        return keyless.signer(token=token, trust_config=args.trust_config)
    return None


def password(*, twice: bool = False) -> bytes:
    """That of a key: $COSIGN_PASSWORD, or what the user types."""
    given = os.environ.get("COSIGN_PASSWORD")
    if given is not None:
        return given.encode()
    if not sys.stdin.isatty():
        raise UsageError("the key has a password", hint="set $COSIGN_PASSWORD; it may be empty")
    typed = getpass.getpass("password of the key: ")
    if twice and getpass.getpass("once more: ") != typed:
        raise UsageError("that was something else")
    return typed.encode()


def advise(report: Report, reference: Reference, given: Sequence[Descriptor]) -> None:
    """Say what is missing if an image leaves this machine's store unsigned."""
    in_store = isinstance(reference, LayoutReference) and reference.in_store
    if not given and not in_store:
        report.say(f"nobody will trust it before `rekindle sign {reference}`")
