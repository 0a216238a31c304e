# SPDX-License-Identifier: Apache-2.0
"""With which key a command signs."""

import argparse
import getpass
import os
import sys
from collections.abc import Mapping, Sequence

from oci import media_types
from oci.descriptor import Descriptor
from oci.image import Image
from oci.layout import Layout
from oci.reference import Reference
from oci.resolve import in_store
from oci.trust import signer, verifier
from oci.trust.keys import PrivateKey
from oci.trust.machine import machine_key
from oci.trust.policy import Rule
from oci.trust.verifier import Verified
from rekindle.errors import UsageError
from rekindle.fields import JSON
from rekindle.home import Home
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


def sign(
    staging: Layout,
    subjects: Sequence[Descriptor],
    attested: Mapping[str, JSON],
    reference: Reference,
    by: signer.Sign | None,
    home: Home,
    report: Report,
) -> tuple[list[Descriptor], list[Descriptor]]:
    """Signs images that were made here, in the layout that they are in, and attaches the signatures to them.
    Returns those by this machine's key, which are for the local store alone, and those by the user's."""
    own = signer.sign(
        staging,
        subjects,
        signer.by_key(machine_key(home)),
        attested=attested,
        annotations={media_types.SIGNER: media_types.MACHINE},
    )
    given = signer.sign(staging, subjects, by, attested=attested) if by is not None else []
    if not given and not in_store(reference):
        report.say(f"nobody will trust it before `rekindle sign {reference}`")
    staging.attach(staging, [*own, *given])
    return own, given


def made_here(image: Image, staging: Layout, home: Home) -> Verified[Image]:
    """An image that was just made, verified as every other is."""
    rule = Rule(name="", keys=(machine_key(home).public,))
    return verifier.verify(image, staging, image.index, rule, image.limits)
