# SPDX-License-Identifier: Apache-2.0
"""A certificate authority such as cert-manager has, and certificates for signing."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NAME = "spiffe://kserve/kernelcache-signer"


@dataclass(frozen=True)
class OwnAuthority:
    """An authority, or one below it."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(
        cls,
        name: str = "root",
        above: "OwnAuthority | None" = None,
        *,
        is_ca: bool = True,
        signs: bool | None = True,
    ) -> Self:
        """`signs` is what the usage of the key says of certificates; None: nothing is said of the usage."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = dict.fromkeys(
            (
                *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
                *("key_agreement", "encipher_only", "decipher_only"),
            ),
            False,
        )
        issuer = above or cls(key, None)  # type: ignore[arg-type]
        builder = _builder(name, key.public_key(), issuer, timedelta(days=-1), timedelta(days=9))
        builder = builder.add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        if signs is not None:
            signs = signs and is_ca
            builder = builder.add_extension(
                x509.KeyUsage(**usage, key_cert_sign=signs, crl_sign=signs), critical=True
            )
        return cls(key, builder.sign(issuer.key, hashes.SHA256()))

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(
        self,
        key: Any,
        *names: str,
        usages: tuple[x509.ObjectIdentifier, ...] = (ExtendedKeyUsageOID.CODE_SIGNING,),
        begin: timedelta = timedelta(hours=-1),
        end: timedelta = timedelta(days=1),
    ) -> bytes:
        """A certificate for a public key; names are URIs, or hosts."""
        builder = _builder("signer", key, self, begin, end)
        found = [x509.UniformResourceIdentifier(n) if ":" in n else x509.DNSName(n) for n in names]
        if found:
            builder = builder.add_extension(x509.SubjectAlternativeName(found), critical=False)
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _builder(
    name: str, key: Any, above: OwnAuthority, begin: timedelta, end: timedelta
) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer = above.certificate.subject if above.certificate is not None else subject
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begin)
        .not_valid_after(now + end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(above.key.public_key()), critical=False
        )
    )
