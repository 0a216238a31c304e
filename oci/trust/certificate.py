# SPDX-License-Identifier: Apache-2.0
"""Certificates of an authority of one's own, without a transparency log.

cert-manager issues them, and KServe's `artifactSecurity.mode: cert` signs and verifies with them.

A signature in the form of cosign before 2.6 brings the certificate of its key and the certificates above it.
There is no proof of when it was made, so all of them must be valid now.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from oci.trust.keys import PublicKey
from rekindle.errors import FormatError, UsageError
from rekindle.text import printable

if TYPE_CHECKING:
    from cryptography import x509

LIMIT_BYTES = 64 << 10
_CHAIN_LIMIT = 8
_NAME_LIMIT = 2000


class Authority(Struct, frozen=True, kw_only=True):
    """A certificate authority of one's own, and the name that it must have certified.

    `roots` are its certificates in PEM. The name is compared in full, or all of it with a pattern.
    """

    roots: bytes
    identity: str = ""
    identity_regexp: str = ""


class Chain(Struct, frozen=True, kw_only=True):
    """A certificate and those above it in PEM, not verified."""

    certificate: bytes
    above: bytes = b""


class Certified(Struct, frozen=True, kw_only=True):
    """A key that an accepted authority has certified, and the name that it has certified for it."""

    key: PublicKey
    name: str


def verify(chain: Chain, accepted: Sequence[Authority]) -> Certified | str:
    """Return the key of a certificate that an accepted authority issued, or the reason to refuse it.

    It must be for code signing, valid now, and for a name that is accepted from this authority.
    """
    try:
        (leaf,) = _parse(chain.certificate)
        above = _parse(chain.above) if chain.above else []
        names = _names(leaf)
    except (FormatError, ValueError) as error:
        return f"its certificate cannot be read: {printable(str(error))[:200]}"
    problem = "no authority is accepted"
    for authority in accepted:
        try:
            _require_issued(leaf, above, authority)
            key = PublicKey.checked(leaf.public_key())
        except (FormatError, ValueError) as error:
            problem = f"the authority does not confirm it: {printable(str(error))[:200]}"
            continue
        for name in names:
            if _is_accepted(name, authority):
                return Certified(key=key, name=name)
        shown = printable(", ".join(names))[:200]
        problem = f"the policy does not accept {shown or 'a certificate without names'}"
    return f"it was signed with a certificate, but {problem}"


def read(key: PublicKey, certificate: Path, above: Path | None) -> Chain:
    """Read the certificate of a key to sign with, and those above it. Raises UsageError.

    Those after the first in the file of the certificate are above it, as cert-manager writes them.
    """
    try:
        own = _parse(certificate.read_bytes()[: LIMIT_BYTES + 1])
        others = _parse(above.read_bytes()[: LIMIT_BYTES + 1]) if above is not None else []
        public = PublicKey.checked(own[0].public_key())
        _names(own[0])
    except OSError as error:
        raise UsageError("a certificate cannot be read", cause=str(error)) from None
    except (FormatError, ValueError) as error:
        raise UsageError(f"{certificate} cannot be used", cause=str(error)) from None
    if public.hint != key.hint:
        raise UsageError(f"the certificate {certificate} is not that of the key")
    from cryptography.hazmat.primitives.serialization import Encoding

    pem = [each.public_bytes(Encoding.PEM) for each in (*own, *others)]
    return Chain(certificate=pem[0], above=b"".join(pem[1:]))


def roots(path: Path) -> bytes:
    """Return the certificates of authorities in a file, in PEM. Raises UsageError."""
    try:
        content = path.read_bytes()[: LIMIT_BYTES + 1]
        _parse(content)
    except OSError as error:
        raise UsageError(f"{path} cannot be read", cause=str(error)) from None
    except (FormatError, ValueError) as error:
        raise UsageError(f"{path} does not hold certificates of authorities", cause=str(error)) from None
    return content


def _parse(pem: bytes) -> "list[x509.Certificate]":
    from cryptography import x509

    if len(pem) > LIMIT_BYTES:
        raise FormatError(f"more than {LIMIT_BYTES} bytes of certificates")
    found = x509.load_pem_x509_certificates(pem)
    if len(found) > _CHAIN_LIMIT:
        raise FormatError(f"more than {_CHAIN_LIMIT} certificates")
    return found


def _require_issued(leaf: "x509.Certificate", above: "list[x509.Certificate]", authority: Authority) -> None:
    """Raise ValueError unless the certificate chains to the authority, now, and is for code signing."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID
    from cryptography.x509.verification import (
        Criticality,
        ExtensionPolicy,
        PolicyBuilder,
        Store,
        VerificationError,
    )

    def require_code_signing(_: object, __: object, usage: x509.ExtendedKeyUsage) -> None:
        if ExtendedKeyUsageOID.CODE_SIGNING not in usage:
            raise ValueError("it is not for code signing")

    def require_signing_of_certificates(_: object, __: object, usage: x509.KeyUsage | None) -> None:
        if usage is not None and not usage.key_cert_sign:
            raise ValueError("an authority's key is not for signing certificates")

    either = Criticality.AGNOSTIC
    issuers = (
        ExtensionPolicy.webpki_defaults_ca()
        .may_be_present(x509.ExtendedKeyUsage, either, None)
        # `openssl req -x509` leaves it out. RFC 5280 looks at it only if it is there (section 6.1.4).
        .may_be_present(x509.KeyUsage, either, require_signing_of_certificates)
    )
    leaves = (
        ExtensionPolicy.webpki_defaults_ee()
        .may_be_present(x509.AuthorityKeyIdentifier, either, None)
        .require_present(x509.SubjectAlternativeName, either, None)
        .require_present(x509.ExtendedKeyUsage, either, require_code_signing)
    )
    verifier = (
        PolicyBuilder()
        .store(Store(_parse(authority.roots)))
        .time(datetime.now(UTC))
        .max_chain_depth(_CHAIN_LIMIT)
        .extension_policies(ca_policy=issuers, ee_policy=leaves)
        .build_client_verifier()
    )
    try:
        verifier.verify(leaf, above)
    except (VerificationError, x509.UnsupportedGeneralNameType) as error:
        raise ValueError(str(error)) from None


def _names(leaf: "x509.Certificate") -> list[str]:
    """Return the URIs, mail addresses and host names that a certificate is for. Raises FormatError."""
    from cryptography import x509

    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise FormatError("it has no names (SAN)", cause=str(error)) from None
    kinds = (x509.UniformResourceIdentifier, x509.RFC822Name, x509.DNSName)
    return [each.value for each in names if isinstance(each, kinds)]


def _is_accepted(name: str, authority: Authority) -> bool:
    if not 0 < len(name) <= _NAME_LIMIT:
        return False
    if authority.identity:
        return name == authority.identity
    return bool(authority.identity_regexp and re.fullmatch(authority.identity_regexp, name))
