# SPDX-License-Identifier: Apache-2.0
"""Sigstore bundles v0.3 with a signature by a key, and cosign's older simple signing.

Bundles with a certificate are only recognised here; `oci.trust.keyless` verifies them.
"""

import json
from typing import Self

from msgspec import Struct

from oci import media_types
from oci.trust.keys import PublicKey, SigningKey
from oci.trust.statement import COSIGN_SIGN, Envelope, Statement, from_base64
from rekindle.digest import Digest
from rekindle.errors import FormatError
from rekindle.fields import Fields

MEDIA_TYPE = media_types.BUNDLE
LIMIT_BYTES = 4 << 20
SIMPLE_MEDIA_TYPE = media_types.SIMPLE_SIGNATURE
_SIMPLE_TYPE = "cosign container image signature"


class Bundle(Struct, frozen=True, kw_only=True):
    """A well-formed bundle, not yet verified. `content` has the bytes as they were received.

    `hint` identifies the key; it is None if the bundle has a certificate instead.
    """

    content: bytes
    envelope: Envelope
    hint: str | None

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Parse a bundle. Raises FormatError."""
        fields = Fields.parse(content, "the bundle", limit_bytes=LIMIT_BYTES)
        if fields.text("mediaType") != MEDIA_TYPE:
            raise FormatError("the bundle has an unknown version", cause=f"{fields.text('mediaType')!r:.80}")
        material = fields.inner("verificationMaterial")
        hint = material.inner("publicKey").text("hint", "") if material.has("publicKey") else None
        if (hint is None) == (not material.has("certificate")):
            raise FormatError("the bundle must have either a key or a certificate")
        return cls(content=content, envelope=Envelope.from_json(fields.json("dsseEnvelope")), hint=hint)

    @classmethod
    def sign(cls, statement: Statement, key: SigningKey) -> Self:
        """Sign a statement with a key."""
        payload = statement.to_bytes()
        envelope = Envelope(payload=payload, payload_type="application/vnd.in-toto+json", signatures=())
        signed = Envelope(
            payload=payload,
            payload_type=envelope.payload_type,
            signatures=(key.sign(envelope.signed),),
        )
        hint = key.public.hint
        document = {
            "mediaType": MEDIA_TYPE,
            "verificationMaterial": {"publicKey": {"hint": hint}},
            "dsseEnvelope": signed.to_json(),
        }
        return cls(content=json.dumps(document).encode(), envelope=signed, hint=hint)

    def statement(self, key: PublicKey) -> Statement | None:
        """Return the statement if this key signed it, else None.

        Raises FormatError if the key signed something that is not a statement.
        """
        (signature,) = self.envelope.signatures
        if self.hint is None or not key.verifies(signature, self.envelope.signed):
            return None
        return Statement.parse(self.envelope.payload)


class SimpleSignature(Struct, frozen=True, kw_only=True):
    """A signature in the form of cosign before 2.6: over a JSON document that holds the digest.

    `certificate` and those `above` it are in PEM; `entry` is that in a transparency log, in cosign's JSON.
    None is verified, and they are empty for a signature by a key.
    """

    payload: bytes
    signature: bytes
    certificate: bytes = b""
    above: bytes = b""
    entry: bytes = b""

    @classmethod
    def sign(cls, digest: Digest, repository: str, key: SigningKey) -> Self:
        """Sign the digest of an image with a key. `repository` is its name without tag."""
        document = {
            "critical": {
                "identity": {"docker-reference": repository},
                "image": {"docker-manifest-digest": str(digest)},
                "type": _SIMPLE_TYPE,
            },
            "optional": None,
        }
        payload = json.dumps(document, separators=(",", ":")).encode()
        return cls(payload=payload, signature=key.sign(payload))

    @classmethod
    def of(
        cls, payload: bytes, signature: str, certificate: str = "", above: str = "", entry: str = ""
    ) -> Self:
        """Decode a signature. Raises FormatError."""
        return cls(
            payload=payload,
            signature=from_base64(signature, "the signature"),
            certificate=certificate.encode(errors="replace"),
            above=above.encode(errors="replace"),
            entry=entry.encode(errors="replace"),
        )

    def statement(self, key: PublicKey) -> Statement | None:
        """See `Bundle.statement`."""
        return self.content() if key.verifies(self.signature, self.payload) else None

    def content(self) -> Statement:
        """Return the statement, of which the caller has verified the signature. Raises FormatError."""
        critical = Fields.parse(self.payload, "the payload", limit_bytes=LIMIT_BYTES).inner("critical")
        if critical.text("type") != _SIMPLE_TYPE:
            raise FormatError("the payload is not about an image")
        try:
            digest = Digest.parse(critical.inner("image").text("docker-manifest-digest"))
        except ValueError as error:
            raise FormatError("the payload has no valid digest", cause=str(error)) from None
        return Statement(subject=digest, predicate_type=COSIGN_SIGN, predicate={})


class OlderAttestation(SimpleSignature, frozen=True, kw_only=True):
    """An attestation in the form of cosign before 2.6: an envelope, beside which its certificate is stored.

    `payload` is what the signature covers.
    """

    envelope: Envelope

    @classmethod
    def parse(cls, content: bytes, certificate: str = "", above: str = "") -> Self:
        """Parse an envelope. Raises FormatError."""
        fields = Fields.parse(content, "the envelope", limit_bytes=LIMIT_BYTES)
        envelope = Envelope.from_json(fields.as_json())
        return cls(
            payload=envelope.signed,
            signature=envelope.signatures[0],
            certificate=certificate.encode(errors="replace"),
            above=above.encode(errors="replace"),
            envelope=envelope,
        )

    def content(self) -> Statement:
        """See `SimpleSignature.content`."""
        return Statement.parse(self.envelope.payload)
