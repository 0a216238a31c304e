# SPDX-License-Identifier: Apache-2.0
"""Turn the trust options of a command line into typed options."""

import argparse

from oci.options import TrustOptions
from oci.trust.keys import PublicKey
from oci.trust.policy import Identity, TrustRule, authority, identity
from rekindle import log
from rekindle.errors import FormatError, UsageError


def options(args: argparse.Namespace) -> TrustOptions:
    """Return the trust options of a command line. Raises UsageError if they contradict each other."""
    if args.dangerously_skip_verification:
        # Also with --quiet, so that it is noticed in scripts.
        log.write("WARNING: signatures are not verified")
    return TrustOptions(
        rule=_rule(args),
        policy=args.policy,
        allow_rollback=args.allow_rollback,
        skip_verification=args.dangerously_skip_verification,
    )


def _rule(args: argparse.Namespace) -> TrustRule | None:
    who, issuer = args.certificate_identity, args.certificate_oidc_issuer
    who_like, issuer_like = args.certificate_identity_regexp, args.certificate_oidc_issuer_regexp
    named = who is not None or who_like is not None
    if args.ca_roots is not None:
        return _by_authority(args)
    if named != (issuer is not None or issuer_like is not None):
        raise UsageError(
            "--certificate-identity and --certificate-oidc-issuer are required together",
            hint="for either of them, its -regexp will do",
        )
    if not args.verify_key and not named:
        return None
    if args.policy:
        raise UsageError("--policy cannot be combined with --verify-key or --certificate-identity")
    try:
        identities: tuple[Identity, ...] = ()
        if named:
            identities = (identity(who or "", issuer or "", who_like or "", issuer_like or ""),)
    except FormatError as error:
        raise UsageError(error.message, cause=error.cause) from None
    keys = tuple(PublicKey.read(path) for path in args.verify_key)
    return TrustRule(name="", keys=keys, identities=identities, trusted_root=args.trusted_root)


def _by_authority(args: argparse.Namespace) -> TrustRule:
    from oci.trust import certificate

    if args.policy or args.certificate_oidc_issuer or args.certificate_oidc_issuer_regexp:
        raise UsageError("--ca-roots cannot be combined with --policy or an OIDC issuer")
    name, pattern = args.certificate_identity or "", args.certificate_identity_regexp or ""
    try:
        accepted = authority(certificate.roots(args.ca_roots), name, pattern)
    except FormatError as error:
        hint = "add --certificate-identity NAME or --certificate-identity-regexp PATTERN"
        raise UsageError(error.message, cause=error.cause, hint=hint) from None
    keys = tuple(PublicKey.read(path) for path in args.verify_key)
    return TrustRule(name="", keys=keys, authorities=(accepted,))
