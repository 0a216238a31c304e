# SPDX-License-Identifier: Apache-2.0
"""Verify images. Only this module makes a `Verified`."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from types import FunctionType
from typing import Generic, Protocol, Self, TypeVar

from msgspec import Struct

from oci import cosign_tags
from oci.descriptor import Blobs, Descriptor
from oci.trust import attachments
from oci.trust.bundle import Bundle, SimpleSignature
from oci.trust.policy import TrustRule
from oci.trust.statement import COSIGN_SIGN, SNAPSHOT, Statement
from rekindle.config import Limits
from rekindle.errors import (
    CredentialsError,
    FormatError,
    IntegrityError,
    RegistryError,
    RekindleError,
    TrustError,
)
from rekindle.text import printable

T = TypeVar("T")
U = TypeVar("U")


class Fetchable(Protocol):
    """A value that holds the digests of its content and fetches that from `blobs`."""

    def fetched_from(self, blobs: Blobs) -> Self:
        """Return the same value, with its content fetched from elsewhere."""


F = TypeVar("F", bound=Fetchable)

_SEAL = object()
_COPY_HINT = (
    "if it was copied: `rekindle copy` and `oras cp -r` bring signatures along, "
    "skopeo, crane and `oras cp` do not"
)
_SHOWN = 6
_SHOWN_LETTERS = 80
_CLOCKS_APART = timedelta(minutes=10)


class Trust(Struct, frozen=True, kw_only=True):
    """The signer of an image, and the creation time that it attests. `by` is None if it was not verified."""

    by: str | None
    created: datetime | None = None


class Verified(Generic[T]):
    """A value that belongs to an image whose signature was verified. Only this module makes one."""

    __slots__ = ("_trust", "_value")

    def __init__(self, value: T, trust: Trust, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("only the verifier makes a Verified")
        self._value = value
        self._trust = trust

    @property
    def value(self) -> T:
        """The value that was verified."""
        return self._value

    @property
    def trust(self) -> Trust:
        """The signer of the image that the value belongs to."""
        return self._trust

    def map(self, read: Callable[[T], U]) -> "Verified[U]":
        """Return what a plain function reads from the verified value, as verified, too.

        The function must see that value only, and read by digest. A closure, a default, a bound method or a
        partial could pass off other values as verified: raises TypeError for those.
        """
        if not isinstance(read, FunctionType) or read.__closure__ or read.__defaults__ or read.__kwdefaults__:
            raise TypeError(f"{read!r} may bring in a value that was not verified")
        return Verified(read(self._value), self._trust, _SEAL)

    def fetched_from(self: "Verified[F]", blobs: Blobs) -> "Verified[F]":
        """Return the same value, with its content fetched from elsewhere and checked by digest."""
        return Verified(self._value.fetched_from(blobs), self._trust, _SEAL)


def verify(
    value: T,
    blobs: Blobs,
    root: Descriptor,
    rule: TrustRule,
    limits: Limits,
    *,
    tagged: Callable[[str], Descriptor | None] | None = None,
) -> Verified[T]:
    """Return `value` as verified if a key or identity that the rule accepts has signed its root.

    1. Read the bundles attached to the root; only without a good signature, cosign's older ones by their tag
       (`tagged`), and if one is good, the attestation in the same form.
    2. Keep the statements whose signature verifies with an accepted key or identity.
    3. Require a signature among them that is about this digest.
    4. Compare the attested creation time with the clock and the rule.

    Only manifests and signatures are read. Raises TrustError, with the reasons why signatures were refused,
    or, if there is no good one, the error by which some could not be read.
    """
    refused: list[str] = []
    failures: list[RekindleError] = []
    statements: list[tuple[str, Statement]] = []

    def signers() -> list[str]:
        return [by for by, statement in statements if statement.predicate_type == COSIGN_SIGN]

    for by, statement in _accepted(
        blobs, root, rule, limits, tagged, refused, failures, lambda: bool(signers())
    ):
        if statement.subject != root.digest:
            refused.append(f"{by} signed another image: {statement.subject}")
        elif statement.predicate_type in {COSIGN_SIGN, SNAPSHOT}:
            statements.append((by, statement))
            if statement.predicate_type == SNAPSHOT:
                refused.append(f"{by} made an attestation, but no signature")
        else:
            refused.append(f"{by} signed an unknown kind of statement: {_shown(statement.predicate_type)}")
    accepted = signers()
    if not accepted and failures:
        raise failures[0]
    if not accepted:
        cause = "\n".join(list(dict.fromkeys(refused))[:_SHOWN])
        raise TrustError(
            f"{root.digest} has no signature that the policy accepts",
            cause=cause or "it has no signature",
            hint="docs/trust.md says how to accept a key or an identity" if cause else _COPY_HINT,
        )
    made = [_created(statement) for _, statement in statements if statement.predicate_type == SNAPSHOT]
    trust = Trust(by=accepted[0], created=max((each for each in made if each), default=None))
    _require_age(root, rule, trust)
    return Verified(value, trust, _SEAL)


def dangerously_skip(value: T) -> Verified[T]:
    """Return `value` as verified without verifying it. The report says so."""
    return Verified(value, Trust(by=None), _SEAL)


def _accepted(
    blobs: Blobs,
    root: Descriptor,
    rule: TrustRule,
    limits: Limits,
    tagged: Callable[[str], Descriptor | None] | None,
    refused: list[str],
    failures: list[RekindleError],
    is_signed: Callable[[], bool],
) -> Iterator[tuple[str, Statement]]:
    """Yield the statements of accepted signers.

    Adds the reasons for refusing others to `refused`, and what could not be read to `failures`. `is_signed`
    tells whether a good signature was among those yielded.
    """
    for bundle in attachments.find(blobs, root.digest, limits, failures, is_enough=is_signed):
        if bundle.hint is None:
            yield from _keyless(bundle, rule, refused)
        else:
            yield from _by_key(bundle, rule, refused, bundle.hint)
    if tagged is None or is_signed():
        return

    def image(kind: str) -> Descriptor | None:
        try:
            return tagged(cosign_tags.tag_of(root.digest, kind))
        except (FormatError, IntegrityError, CredentialsError):
            return None  # anyone may put anything there, and some refuse what they do not know
        except RegistryError as error:
            failures.append(error)
            return None

    if there := image(cosign_tags.SIGNATURES):
        for signature in attachments.find_simple(blobs, there, limits, failures):
            yield from _by_certificate_or_key(signature, rule, refused)
            if is_signed():
                break
    if is_signed() and (there := image(cosign_tags.ATTESTATIONS)):
        for attestation in attachments.find_older_attestations(blobs, there, limits, failures):
            yield from _by_certificate_or_key(attestation, rule, refused)


def _by_certificate_or_key(
    signature: SimpleSignature, rule: TrustRule, refused: list[str]
) -> Iterator[tuple[str, Statement]]:
    if signature.certificate:
        yield from _certified(signature, rule, refused)
    else:
        yield from _by_key(signature, rule, refused, "of an older signature")


def _by_key(
    signed: Bundle | SimpleSignature, rule: TrustRule, refused: list[str], hint: str
) -> Iterator[tuple[str, Statement]]:
    if rule.transparency_log and not isinstance(signed, Bundle):
        refused.append("a key signed it without an entry in a transparency log, which the policy requires")
        return
    for key in rule.keys:
        try:
            statement = signed.statement(key)
        except FormatError as error:
            refused.append(f"the key {key.hint} signed something else than a statement: {error.message}")
            continue
        if statement is None:
            continue
        if rule.transparency_log and isinstance(signed, Bundle):
            from oci.trust import log

            if problem := log.problem_of(signed, key, rule.trusted_root):
                refused.append(f"the key {key.hint} signed it, but {problem}")
                return
        yield f"key {key.hint}", statement
        return
    refused.append(f"the key {_shown(hint)} is not accepted, or its signature is wrong")


def _certified(
    signature: SimpleSignature, rule: TrustRule, refused: list[str]
) -> Iterator[tuple[str, Statement]]:
    """Yield the statement of an older signature with a certificate.

    The certificate is of an accepted authority, or of an accepted identity; or the key is accepted.
    """
    if rule.authorities and not rule.transparency_log:
        from oci.trust import certificate

        chain = certificate.Chain(certificate=signature.certificate, above=signature.above)
        found = certificate.verify(chain, rule.authorities)
        if isinstance(found, str):
            refused.append(found)
        else:
            by_this = TrustRule(name="", keys=(found.key,))
            for _, statement in _by_key(signature, by_this, refused, found.key.hint):
                yield f"{found.name} (own authority)", statement
                return
    if rule.identities and signature.entry:
        from oci.trust import keyless

        logged = keyless.verify_simple(signature, rule.identities, trusted_root=rule.trusted_root)
        if not isinstance(logged, str):
            yield f"{logged.identity.identity} ({logged.identity.issuer})", logged.statement
            return
        refused.append(logged)
    if rule.keys:
        yield from _by_key(signature, rule, refused, "of an older signature")
    elif not rule.authorities and not (rule.identities and signature.entry):
        refused.append("an older signature was made with a certificate that the policy does not accept")


def _keyless(bundle: Bundle, rule: TrustRule, refused: list[str]) -> Iterator[tuple[str, Statement]]:
    if not rule.identities:
        refused.append("it was signed with a certificate, and the policy accepts only keys")
        return
    from oci.trust import keyless

    found = keyless.verify(bundle, rule.identities, trusted_root=rule.trusted_root)
    if isinstance(found, str):
        refused.append(found)
    else:
        yield f"{found.identity.identity} ({found.identity.issuer})", found.statement


def _created(statement: Statement) -> datetime | None:
    text = statement.predicate.get("created")
    try:
        return datetime.fromisoformat(text).astimezone(UTC) if isinstance(text, str) else None
    except (ValueError, OverflowError):  # the first and the last day of the calendar have no time in UTC
        return None


def _shown(text: str) -> str:
    """Return untrusted text in a form fit to show: one line, cut off."""
    return printable(text[:_SHOWN_LETTERS])


def _require_age(root: Descriptor, rule: TrustRule, trust: Trust) -> None:
    now = datetime.now(UTC)
    if trust.created is not None and trust.created > now + _CLOCKS_APART:
        raise TrustError(
            f"the creation time of {root.digest} is in the future",
            cause=f"{trust.created:%Y-%m-%d %H:%M} UTC",
        )
    if rule.max_age_days is None:
        return
    if trust.created is None:
        raise TrustError(f"{root.digest} has no attested creation time", cause="the policy limits its age")
    if now - trust.created > timedelta(days=rule.max_age_days):
        raise TrustError(
            f"{root.digest} is older than the policy allows",
            cause=f"made {trust.created:%Y-%m-%d}; max_age_days is {rule.max_age_days}",
            hint="make a new snapshot",
        )
