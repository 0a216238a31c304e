# SPDX-License-Identifier: Apache-2.0
"""The entry in a transparency log of a signature by a key, where a policy requires one.

sigstore-python verifies that the entry is in the log; it has no public function for a bundle without a
certificate. If its inner parts change, no entry is accepted.
"""

import base64
import json
from pathlib import Path

from oci.trust import keyless
from oci.trust.bundle import LIMIT_BYTES, Bundle
from oci.trust.keys import PublicKey
from oci.trust.statement import from_base64
from rekindle.digest import Digest
from rekindle.errors import FormatError
from rekindle.fields import JSON, Fields
from rekindle.text import printable

_KIND = ("dsse", "0.0.1")
_REASON_LIMIT = 200


def problem_of(bundle: Bundle, key: PublicKey, trusted_root: Path | None) -> str:
    """Return why a bundle that this key has signed is not in the log that the trusted root names, or "".

    Raises UsageError for a trusted root that cannot be used.
    """
    root = keyless.read_trusted_root(trusted_root)
    material = Fields.parse(bundle.content, "the bundle", limit_bytes=LIMIT_BYTES).inner(
        "verificationMaterial"
    )
    entries = material.json("tlogEntries") if material.has("tlogEntries") else []
    if not isinstance(entries, list) or len(entries) != 1:
        return "the policy requires an entry in a transparency log, and it has none"
    try:
        from sigstore._internal.trust import KeyringPurpose
        from sigstore.models import TransparencyLogEntry
        from sigstore_models.rekor.v1 import TransparencyLogEntry as Model

        entry = TransparencyLogEntry(Model.from_json(json.dumps(entries[0])))
        entry._verify(root.rekor_keyring(KeyringPurpose.VERIFY))
        # What the proof covers is read from what it was verified with.
        _require_about(entry._inner.canonicalized_body, bundle, key)
    except Exception as error:  # parsers may raise anything for a hostile entry
        reason = str(error) or type(error).__name__
        return f"its entry in the transparency log is not accepted: {printable(reason)[:_REASON_LIMIT]}"
    return ""


def _require_about(body: bytes, bundle: Bundle, key: PublicKey) -> None:
    """Raise FormatError unless an entry is about the payload, the signature and the key of a bundle."""
    fields = Fields.parse(body, "it", limit_bytes=LIMIT_BYTES)
    kind = fields.text("kind"), fields.text("apiVersion")
    if kind != _KIND:
        raise FormatError(f"it is of the kind {' '.join(kind)}, which is not supported")
    spec = fields.inner("spec")
    hashed = spec.inner("payloadHash")
    if (hashed.text("algorithm"), hashed.text("value")) != (
        "sha256",
        Digest.of_bytes(bundle.envelope.payload).hex,
    ):
        raise FormatError("it is about another payload")
    (signature,) = bundle.envelope.signatures
    expected = base64.b64encode(signature).decode()
    signatures = spec.list_of("signatures", _signature, at_most=10)
    if not any(given == expected and hint == key.hint for given, hint in signatures):
        raise FormatError("it is about another signature")


def _signature(value: JSON, where: str) -> tuple[str, str]:
    """Return a signature and the hint of the key that verifies it."""
    fields = Fields(value, where)
    verifier = from_base64(fields.text("verifier"), where)
    return fields.text("signature"), PublicKey.parse(verifier).hint
