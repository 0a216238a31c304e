# SPDX-License-Identifier: Apache-2.0
"""Choose how a command signs: with a key, with an OIDC identity, or not at all."""

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
"""The environment variables that give access to signing keys."""


def chosen_key(args: argparse.Namespace) -> PrivateKey | None:
    """Return the private key that the command line names, or None. Asks for its password."""
    if args.sign_key and args.sign_keyless:
        raise UsageError("--sign-key and --sign-keyless cannot be combined")
    return PrivateKey.read(args.sign_key, password()) if args.sign_key else None


def chosen(args: argparse.Namespace, key: PrivateKey | None = None) -> signer.Sign | None:
    """Return how to sign, or None if the command line does not ask for it.

    Pass `key` if it was read already; else its password is asked for now, before any work begins.
    """
    key = key or chosen_key(args)
    if key is not None:
        return signer.by_key(key)
    if args.sign_keyless:
        from oci.trust import keyless

        token = args.identity_token or os.environ.get("SIGSTORE_ID_TOKEN")
        return keyless.signer(token=token, trust_config=args.trust_config)
    return None


def password(*, twice: bool = False) -> bytes:
    """Return the password of a key: $COSIGN_PASSWORD, or what the user types. Raises UsageError."""
    given = os.environ.get("COSIGN_PASSWORD")
    if given is not None:
        return given.encode()
    if not sys.stdin.isatty():
        raise UsageError("no password for the key", hint="set COSIGN_PASSWORD; it may be empty")
    typed = getpass.getpass("password of the key: ")
    if twice and getpass.getpass("repeat the password: ") != typed:
        raise UsageError("the passwords differ")
    return typed.encode()


def advise(report: Report, reference: Reference, given: Sequence[Descriptor]) -> None:
    """Tell the user how to sign an image that was saved unsigned outside the local store."""
    in_store = isinstance(reference, LayoutReference) and reference.in_store
    if not given and not in_store:
        report.say(f"not signed: sign it with `rekindle sign {reference}` before others can trust it")
