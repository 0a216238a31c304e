# SPDX-License-Identifier: Apache-2.0
"""Turn the trust options of a command line into typed options."""

import argparse
import contextlib
import sys

from oci.options import TrustOptions
from oci.trust.keys import PublicKey
from oci.trust.policy import TrustRule, identity
from rekindle.errors import FormatError, UsageError


def options(args: argparse.Namespace) -> TrustOptions:
    """Return the trust options of a command line. Raises UsageError if they contradict each other."""
    if args.dangerously_skip_verification:
        # Also with --quiet, so that it is noticed in scripts.
        with contextlib.suppress(OSError):
            print("rekindle: WARNING: signatures are not verified", file=sys.stderr)
    return TrustOptions(
        rule=_rule(args),
        policy=args.policy,
        allow_rollback=args.allow_rollback,
        skip_verification=args.dangerously_skip_verification,
    )


def _rule(args: argparse.Namespace) -> TrustRule | None:
    who, issuer = args.certificate_identity, args.certificate_oidc_issuer
    if (who is None) != (issuer is None):
        raise UsageError(
            "--certificate-identity and --certificate-oidc-issuer are required together",
        )
    if not args.verify_key and who is None:
        return None
    if args.policy:
        raise UsageError("--policy cannot be combined with --verify-key or --certificate-identity")
    try:
        identities = (identity(who, issuer),) if who is not None else ()
    except FormatError as error:
        raise UsageError(error.message) from None
    keys = tuple(PublicKey.read(path) for path in args.verify_key)
    return TrustRule(name="", keys=keys, identities=identities, trusted_root=args.trusted_root)
