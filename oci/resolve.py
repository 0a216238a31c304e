# SPDX-License-Identifier: Apache-2.0
"""Resolve a reference to a verified image: find it, and require a signature by a trusted signer."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from oci.descriptor import Blobs, Descriptor
from oci.options import RegistryOptions, TrustOptions
from oci.reference import LayoutReference, Reference
from oci.store import layout_of
from oci.trust import seen, verifier
from oci.trust.machine import machine_public
from oci.trust.policy import Policy, TrustRule
from oci.trust.verifier import Verified
from rekindle.config import JOBS_LIMIT, Config, Limits
from rekindle.errors import TrustError, UsageError
from rekindle.home import Home

if TYPE_CHECKING:
    from oci.progress import Tally
    from oci.registry.access import Access


class FoundImage(Struct, frozen=True, kw_only=True):
    """An image that was found: the descriptor of its root, where to read its blobs, and their tally."""

    blobs: Blobs
    root: Descriptor
    limits: Limits
    tally: "Tally | None" = None
    tagged: "Callable[[str], Descriptor | None] | None" = None


def access(options: RegistryOptions, home: Home) -> "Access":
    """Return how to reach registries: the options, then config.toml. Raises UsageError."""
    from oci.progress import Limiter, Tally
    from oci.registry.access import Access

    config = Config.read(home.root)
    if options.jobs is not None:
        if not 1 <= options.jobs <= JOBS_LIMIT:
            raise UsageError(f"--jobs must be from 1 to {JOBS_LIMIT}")
        transfer = structs.replace(config.transfer, jobs=options.jobs)
        config = structs.replace(config, transfer=transfer)
    return Access(
        config=config,
        tally=Tally(),
        limiter=Limiter(options.limit_rate),
        mirrors=options.mirrors,
        plain_http=options.plain_http,
    )


@contextlib.contextmanager
def source(reference: Reference, home: Home, options: RegistryOptions) -> Iterator[FoundImage]:
    """Find an image, and keep its blobs readable within the context. Raises NotFoundError."""
    if isinstance(reference, LayoutReference):
        layout = layout_of(reference, home)
        with layout.reading():
            limits = Config.read(home.root).limits
            root = layout.resolve(reference.tag)
            yield FoundImage(blobs=layout, root=root, limits=limits, tagged=layout.tagged)
        return
    # Not imported for a restore from the local store, which needs no HTTP client.
    from oci.registry.repository import Repository

    how = access(options, home)
    with Repository(reference, how) as repository:
        yield FoundImage(
            blobs=repository,
            root=repository.resolve(),
            limits=how.config.limits,
            tally=how.tally,
            tagged=repository.tagged,
        )


def verified(
    found: FoundImage, reference: Reference, home: Home, options: TrustOptions
) -> Verified[FoundImage]:
    """Verify the signature of an image that was found, and return it. Raises TrustError."""
    if options.skip_verification:
        return verifier.dangerously_skip(found)
    rule = _rule(reference, home, options)
    trusted = verifier.verify(found, found.blobs, found.root, rule, found.limits, tagged=found.tagged)
    if not options.allow_rollback:
        seen.refuse_older(reference, home, trusted.trust)
    return trusted


def _rule(reference: Reference, home: Home, options: TrustOptions) -> TrustRule:
    """Return whom to trust for an image. Raises TrustError if no option, policy or machine key says so."""
    name = reference.policy_name
    if options.rule is not None:
        return structs.replace(options.rule, name=name)
    in_store = isinstance(reference, LayoutReference) and reference.in_store
    path = options.policy or (home.policy if home.policy.exists() else None)
    given = Policy.read(path).rule_for(name) if path else None
    if given is None and path and not in_store:
        raise TrustError(f"the policy {path} has no rule for {name}", hint="docs/trust.md shows how")
    # An image that this machine made needs no rule, unless the user gave one; an image that it fetched does.
    machine = machine_public(home) if in_store else None
    if given is None and machine is None:
        raise TrustError(
            f"nothing says whom to trust for {name}",
            hint=f"--verify-key cosign.pub, or a rule in {home.policy}: docs/trust.md shows how",
        )
    rule = given or TrustRule(name=name)
    if machine is not None:
        return structs.replace(rule, keys=(*rule.keys, machine))
    return rule
