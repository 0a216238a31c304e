# SPDX-License-Identifier: Apache-2.0
"""The signed content: an in-toto Statement v1 about an image's digest, in a DSSE envelope.

The signature covers the pre-authentication encoding of the payload and its type (DSSE 1.0.2), so that it does
not hold for the same bytes with another meaning.
"""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Self

from msgspec import Struct

from oci import media_types
from rekindle.digest import Digest
from rekindle.errors import FormatError
from rekindle.fields import JSON, Fields

PAYLOAD_TYPE = "application/vnd.in-toto+json"
COSIGN_SIGN = media_types.SIGN_PREDICATE
SNAPSHOT = media_types.SNAPSHOT_PREDICATE
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_LIMIT_BYTES = 1 << 20


class Statement(Struct, frozen=True, kw_only=True):
    """A claim about an image: its digest, the kind of claim, and the claim."""

    subject: Digest
    predicate_type: str
    predicate: Mapping[str, JSON]

    def to_bytes(self) -> bytes:
        """Return the statement as JSON, the payload of an envelope."""
        document = {
            "_type": _STATEMENT_TYPE,
            # sigstore-python does not sign a statement whose subject has no name.
            "subject": [{"name": "", "digest": {"sha256": self.subject.hex}}],
            "predicateType": self.predicate_type,
            "predicate": dict(self.predicate),
        }
        return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Parse a statement. Raises FormatError unless it is about exactly one image."""
        fields = Fields.parse(content, "the statement", limit_bytes=_LIMIT_BYTES)
        if fields.text("_type") not in {_STATEMENT_TYPE, "https://in-toto.io/Statement/v0.1"}:
            raise FormatError("not an in-toto statement", cause=f"_type is {fields.text('_type')!r:.80}")
        subjects = fields.list_of("subject", _subject, at_most=1)
        if len(subjects) != 1:
            raise FormatError("the statement has no subject")
        return cls(
            subject=subjects[0],
            predicate_type=fields.text("predicateType"),
            predicate=fields.inner("predicate").as_json() if fields.has("predicate") else {},
        )


def _subject(value: object, where: str) -> Digest:
    digest = Fields(value, where).inner("digest").text("sha256")
    try:
        return Digest.parse(f"sha256:{digest}")
    except ValueError as error:
        raise FormatError(f"{where} has no valid digest", cause=str(error)) from None


class Envelope(Struct, frozen=True, kw_only=True):
    """A signed payload, not yet verified. The signature covers `signed`."""

    payload: bytes
    payload_type: str
    signatures: Sequence[bytes]

    @property
    def signed(self) -> bytes:
        """The bytes that the signature covers."""
        return encode(self.payload_type, self.payload)

    def to_json(self) -> dict[str, JSON]:
        """Return the envelope as bundles contain it."""
        return {
            "payload": base64.b64encode(self.payload).decode(),
            "payloadType": self.payload_type,
            "signatures": [{"sig": base64.b64encode(each).decode()} for each in self.signatures],
        }

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Parse an envelope. Raises FormatError, also unless it has exactly one signature."""
        fields = Fields(value, "the envelope")
        signatures = fields.list_of("signatures", _signature, at_most=1)
        if len(signatures) != 1:
            raise FormatError("the envelope has no signature")
        if fields.text("payloadType") != PAYLOAD_TYPE:
            raise FormatError(
                "the envelope does not hold a statement", cause=f"{fields.text('payloadType')!r:.80}"
            )
        return cls(
            payload=from_base64(fields.text("payload"), "the payload"),
            payload_type=PAYLOAD_TYPE,
            signatures=tuple(signatures),
        )


def _signature(value: object, where: str) -> bytes:
    return from_base64(Fields(value, where).text("sig"), where)


def encode(payload_type: str, payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def from_base64(text: str, where: str) -> bytes:
    """Decode base64, strictly. Raises FormatError."""
    if len(text) > _LIMIT_BYTES * 2:
        raise FormatError(f"{where} is too long")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{where} is not valid base64", cause=str(error)) from None
