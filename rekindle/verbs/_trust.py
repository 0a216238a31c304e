# SPDX-License-Identifier: Apache-2.0
"""Whom a command trusts, and with which key it signs."""

import argparse
import contextlib
import dataclasses
import getpass
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from oci import media_types
from oci.descriptor import Descriptor
from oci.image import Image
from oci.layout import Layout
from oci.reference import LayoutReference, Reference, RegistryReference
from oci.trust import signer, verifier
from oci.trust.keys import PrivateKey, PublicKey
from oci.trust.policy import Policy, Rule, identity
from oci.trust.verifier import Trust, Verified
from rekindle.engine import JSON
from rekindle.errors import FormatError, TrustError, UsageError
from rekindle.files import locked, write_atomically
from rekindle.home import Home
from rekindle.report import Report
from rekindle.verbs._options import Source
from restore.rules import Strictness

VARIABLES = frozenset({"COSIGN_PASSWORD", "SIGSTORE_ID_TOKEN"})
"""The environment variables that open keys."""

_SEEN_LIMIT = 10_000


def verified(
    source: Source, reference: Reference, home: Home, args: argparse.Namespace, report: Report
) -> Verified[Source]:
    """The image that was found, once its signature has been verified. Raises TrustError."""
    if args.dangerously_skip_verification:
        # Also with --quiet: nobody is to leave this in a script and forget it.
        with contextlib.suppress(OSError):
            print("rekindle: WARNING: the image is used without a look at who made it", file=sys.stderr)
        return verifier.dangerously_skip(source)
    found = verifier.verify(
        source,
        source.blobs,
        source.root,
        _rule(reference, home, args),
        source.limits,
        tagged=source.tagged,
    )
    report.trusted_by = found.trust.by
    if not args.allow_rollback:
        _refuse_older(reference, home, found.trust)
    return found


def strictness(path: Path | None = None) -> Strictness:
    """What a policy, or that of $REKINDLE_HOME, says of differences between nodes. Raises UsageError for a
    rule that there is none."""
    if path is None:
        with contextlib.suppress(UsageError):  # where nothing can be written, there is no policy either
            home = Home.from_environment()
            path = home.policy if home.policy.exists() else None
    policy = Policy.read(path) if path else Policy()
    return Strictness(soft=policy.soft, hard=policy.hard)


def name_of(reference: Reference) -> str:
    """What a policy's patterns are compared with."""
    if isinstance(reference, RegistryReference):
        return f"{reference.host.lower()}/{reference.repository}"  # as DNS compares
    if reference.directory is not None:
        return f"oci:{reference.directory}"
    return reference.tag.partition(":")[0]


def _rule(reference: Reference, home: Home, args: argparse.Namespace) -> Rule:
    name = name_of(reference)
    flags = _from_flags(args, name)
    if flags is not None:
        return flags
    path = args.policy or (home.policy if home.policy.exists() else None)
    given = Policy.read(path).rule_for(name) if path else None
    if given is None and path and not _in_store(reference):
        raise TrustError(f"the policy {path} has no rule for {name}", hint="docs/trust.md shows how")
    # What this machine made itself needs no rule, unless the user named whom to trust. What it fetched does.
    machine = machine_public(home) if _in_store(reference) else None
    if given is None and machine is None:
        raise TrustError(
            f"nothing says whom to trust for {name}",
            hint=f"--verify-key cosign.pub, or a rule in {home.policy}: docs/trust.md shows how",
        )
    rule = given or Rule(name=name)
    if machine is not None:
        return dataclasses.replace(rule, keys=(*rule.keys, machine))
    return rule


def _in_store(reference: Reference) -> bool:
    return isinstance(reference, LayoutReference) and reference.directory is None


def _from_flags(args: argparse.Namespace, name: str) -> Rule | None:
    who, issuer = args.certificate_identity, args.certificate_oidc_issuer
    if (who is None) != (issuer is None):
        raise UsageError(
            "an identity counts together with its issuer only",
            hint="give both --certificate-identity and --certificate-oidc-issuer",
        )
    if not args.verify_key and who is None:
        return None
    if args.policy:
        raise UsageError("--policy does not go with keys and identities on the command line")
    try:
        identities = (identity(who, issuer),) if who is not None else ()
    except FormatError as error:
        raise UsageError(error.message) from None
    keys = tuple(PublicKey.read(path) for path in args.verify_key)
    return Rule(name=name, keys=keys, identities=identities, trusted_root=args.trusted_root)


def _refuse_older(reference: Reference, home: Home, trust: Trust) -> None:
    """Remembers the newest creation time that was signed for a tag, and takes none before it."""
    if isinstance(reference, RegistryReference) and reference.digest is not None:
        return
    tag = f"{name_of(reference)}:{reference.tag.rpartition(':')[2]}"
    path = home.root / "seen.json"
    with locked(home.root / "lock"):
        seen = _seen(path)
        newest = seen.get(tag)
        if newest is not None and (trust.created is None or trust.created.isoformat() < newest):
            made = f"{trust.created:%Y-%m-%d %H:%M}" if trust.created else "at an unknown time"
            raise TrustError(
                f"{reference} is older than what was here before",
                cause=f"made {made}, and {newest} was seen already",
                hint="--allow-rollback, if it is meant to be",
            )
        if trust.created is not None and trust.created.isoformat() != newest:
            seen[tag] = trust.created.isoformat()
            kept = dict(list(seen.items())[-_SEEN_LIMIT:])
            write_atomically(path, json.dumps(kept, indent=1).encode(), mode=0o600)


def _seen(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_bytes())
        return {
            str(tag): datetime.fromisoformat(text).astimezone(UTC).isoformat()
            for tag, text in content.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"{path} is not as it should be", cause=str(error), hint="remove it") from None


# Keys to sign with.


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


def machine_public(home: Home) -> PublicKey | None:
    """The key of this machine, if there is one."""
    path = home.root / "machine.pub"
    return PublicKey.read(path) if path.exists() else None


def machine_key(home: Home) -> PrivateKey:
    """The key of this machine, made if there is none yet. It never leaves $REKINDLE_HOME."""
    path = home.root / "machine.key"
    with locked(home.root / "lock"):
        if not path.exists():
            write_atomically(path, PrivateKey.generate().to_pem(), mode=0o600)
        key = PrivateKey.read(path, b"")
        public = home.root / "machine.pub"
        if not public.exists():  # it is written second: whoever made the key may have been killed before
            write_atomically(public, key.public.to_pem())
        return key


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
    if not given and not _in_store(reference):
        report.say(f"nobody will trust it before `rekindle sign {reference}`")
    staging.attach(staging, [*own, *given])
    return own, given


def made_here(image: Image, staging: Layout, home: Home) -> Verified[Image]:
    """An image that was just made, verified as every other is."""
    rule = Rule(name="", keys=(machine_key(home).public,))
    return verifier.verify(image, staging, image.index, rule, image.limits)
