# SPDX-License-Identifier: Apache-2.0
"""Choose how a command signs: with a key, with an OIDC identity, or not at all."""

import argparse
import getpass
import os
import sys
from collections.abc import Sequence

from oci.descriptor import Descriptor
from oci.reference import LayoutReference, Reference, RegistryReference
from oci.trust import signer
from oci.trust.keys import CommandKey, PrivateKey, PublicKey, SigningKey
from rekindle.errors import UsageError
from rekindle.report import Report


def chosen_key(args: argparse.Namespace) -> SigningKey | None:
    """Return the key that the command line names, or None. Asks for its password."""
    ways = [name for name in ("sign_key", "sign_keyless", "sign_command") if getattr(args, name)]
    if len(ways) > 1:
        first, second = (f"--{name.replace('_', '-')}" for name in ways[:2])
        raise UsageError(f"{first} and {second} cannot be combined")
    if (args.sign_command is None) != (args.sign_public_key is None):
        raise UsageError("--sign-command and --sign-public-key are required together")
    if args.sign_command is not None:
        command = _split(args.sign_command)
        return CommandKey(command=command, public=PublicKey.read(args.sign_public_key))
    return PrivateKey.read(args.sign_key, password()) if args.sign_key else None


def _split(command: str) -> tuple[str, ...]:
    """Split a command as a shell does."""
    import shlex

    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UsageError(f"invalid --sign-command {command!r}", cause=str(error)) from None
    if not words:
        raise UsageError("--sign-command is empty")
    return words


def chosen(args: argparse.Namespace, key: SigningKey | None = None) -> signer.Sign | None:
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
        name = str(reference)
        if isinstance(reference, RegistryReference) and report.image is not None and report.image.digest:
            name = f"{reference.policy_name}@{report.image.digest}"
        report.say(f"not signed: sign it with `rekindle sign {name}` before others can trust it")
