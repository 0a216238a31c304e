# SPDX-License-Identifier: Apache-2.0
"""From a reference to a verified image: find it, and see whether somebody who is trusted signed it."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oci.descriptor import Blobs, Descriptor
from oci.reference import LayoutReference, Reference
from oci.store import layout_of
from oci.trust import verifier
from oci.trust.keys import PublicKey
from oci.trust.machine import machine_public
from oci.trust.policy import Policy, Rule, identity
from oci.trust.seen import refuse_older
from oci.trust.verifier import Verified
from rekindle.config import JOBS_LIMIT, Config, Limits
from rekindle.errors import FormatError, TrustError, UsageError
from rekindle.home import Home
from rekindle.report import Report

if TYPE_CHECKING:
    from oci.progress import Tally
    from oci.registry.repository import Access


def access(args: argparse.Namespace, home: Home) -> "Access":
    """How this command reaches registries."""
    from oci.progress import Limiter, Tally
    from oci.registry.repository import Access

    config = Config.read(home.root)
    if args.jobs is not None:
        if not 1 <= args.jobs <= JOBS_LIMIT:
            raise UsageError(f"--jobs must be from 1 to {JOBS_LIMIT}")
        patience = dataclasses.replace(config.patience, jobs=args.jobs)
        config = dataclasses.replace(config, patience=patience)
    return Access(
        config=config,
        tally=Tally(),
        limiter=Limiter(args.limit_rate),
        mirrors=tuple(args.mirror),
        plain_http=args.plain_http,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An image that was found: its root's descriptor, where its blobs are, and what counts them."""

    blobs: Blobs
    root: Descriptor
    limits: Limits
    tally: "Tally | None" = None
    tagged: "Callable[[str], Descriptor | None] | None" = None


@contextlib.contextmanager
def source(reference: Reference, home: Home, args: argparse.Namespace) -> Iterator[Source]:
    """Finds an image; within the context its blobs stay where they are. Raises NotFoundError."""
    if isinstance(reference, LayoutReference):
        layout = layout_of(reference, home)
        with layout.reading():
            limits = Config.read(home.root).limits
            yield Source(blobs=layout, root=layout.resolve(reference.tag), limits=limits)
        return
    # A restore from the local store needs no HTTP client, which takes time to import.
    from oci.registry.repository import Repository

    how = access(args, home)
    with Repository(reference, how) as repository:
        yield Source(
            blobs=repository,
            root=repository.resolve(),
            limits=how.config.limits,
            tally=how.tally,
            tagged=repository.tagged,
        )


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
        refuse_older(reference, home, found.trust)
    return found


def _rule(reference: Reference, home: Home, args: argparse.Namespace) -> Rule:
    name = reference.policy_name
    flags = _from_flags(args, name)
    if flags is not None:
        return flags
    path = args.policy or (home.policy if home.policy.exists() else None)
    given = Policy.read(path).rule_for(name) if path else None
    if given is None and path and not in_store(reference):
        raise TrustError(f"the policy {path} has no rule for {name}", hint="docs/trust.md shows how")
    # What this machine made itself needs no rule, unless the user named whom to trust. What it fetched does.
    machine = machine_public(home) if in_store(reference) else None
    if given is None and machine is None:
        raise TrustError(
            f"nothing says whom to trust for {name}",
            hint=f"--verify-key cosign.pub, or a rule in {home.policy}: docs/trust.md shows how",
        )
    rule = given or Rule(name=name)
    if machine is not None:
        return dataclasses.replace(rule, keys=(*rule.keys, machine))
    return rule


def in_store(reference: Reference) -> bool:
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
