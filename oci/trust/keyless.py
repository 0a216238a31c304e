# SPDX-License-Identifier: Apache-2.0
"""Keyless signatures, with certificates issued by Fulcio, by way of sigstore-python.

Verification is offline: the trusted root is a file, or that of the public good instance, which
sigstore-python ships. `ClientTrustConfig.production(offline=True)` is not used, since it reads a cache in the
user's home. Importing sigstore takes a quarter of a second, so it is imported where it is needed.
"""

import base64
import contextlib
import functools
import hashlib
import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec import Struct

from oci.trust.bundle import LIMIT_BYTES, Bundle, SimpleSignature
from oci.trust.policy import Identity
from oci.trust.statement import PAYLOAD_TYPE, Statement, from_base64
from rekindle.errors import FormatError, RekindleError, TrustError, UsageError
from rekindle.fields import Fields
from rekindle.text import printable

if TYPE_CHECKING:
    from sigstore.models import Bundle as Found
    from sigstore.models import ClientTrustConfig, TrustedRoot
    from sigstore.oidc import IdentityToken
    from sigstore.sign import Signer
    from sigstore.verify.policy import VerificationPolicy

T = TypeVar("T")

_PUBLIC_GOOD = "https%3A%2F%2Ftuf-repo-cdn.sigstore.dev"
_ISSUER = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_ISSUER_V2 = x509.ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
_NAME_LIMIT = 2000
_REASON_LIMIT = 300
_SERVICES_TIMEOUT = 60.0


class Signed(Struct, frozen=True, kw_only=True):
    """A verified statement, its signer, and the time that the log attests.

    `signed_at` is None if only a timestamping authority attests the time, as with Rekor v2.
    """

    statement: Statement
    identity: Identity
    signed_at: datetime | None


def verify(bundle: Bundle, accepted: Sequence[Identity], *, trusted_root: Path | None) -> Signed | str:
    """Return what one of the accepted identities signed, or the reason to refuse the bundle.

    The certificate must chain to the root and be logged, and must have been valid when the transparency log
    recorded the signature. Raises UsageError for a trusted root that cannot be used.
    """
    root = read_trusted_root(trusted_root)
    pinned = _AcceptedIdentities(accepted)
    try:
        found, payload = _verify(bundle, root, pinned)
    except Exception as error:
        # Parsers that sigstore-python uses may raise anything for a hostile bundle, and the other signatures
        # must be read nevertheless.
        return f"it was signed with a certificate, but {_objection(error)}"
    if pinned.signer is None:
        return "it was signed with a certificate whose identity was not checked"
    try:
        statement = Statement.parse(payload)
    except FormatError as error:
        return f"{pinned.signer.identity} signed something else than a statement: {error.message}"
    return Signed(statement=statement, identity=pinned.signer, signed_at=_integrated(found))


def verify_simple(
    signature: SimpleSignature, accepted: Sequence[Identity], *, trusted_root: Path | None
) -> Signed | str:
    """Do the same for a signature in the form of cosign before 2.6, with its entry in the log."""
    root = read_trusted_root(trusted_root)
    pinned = _AcceptedIdentities(accepted)
    try:
        from sigstore.verify import Verifier

        found = _bundle_of(signature)
        Verifier(trusted_root=root).verify_artifact(signature.payload, found, pinned)
    except Exception as error:
        return f"an older signature was made with a certificate, but {_objection(error)}"
    if pinned.signer is None:
        return "an older signature was made with a certificate whose identity was not checked"
    try:
        statement = signature.content()
    except FormatError as error:
        return f"{pinned.signer.identity} signed something else than an image: {error.message}"
    return Signed(statement=statement, identity=pinned.signer, signed_at=_integrated(found))


def signer(*, token: str | None, trust_config: Path | None) -> Callable[[Statement], Bundle]:
    """Return a function that signs with our identity: that of the token, the CI job, or a browser login.

    `trust_config` describes a private Sigstore instance. The certificate is requested for the first statement
    and used for the rest. Raises UsageError for an unusable token or configuration; the function returned
    raises that and TrustError.
    """
    config = _config(trust_config)
    given = _token(token) if token else None
    return _Keyless(config, given)


# Verifying.


class _AcceptedIdentities:
    """A policy for sigstore-python: the certificate has one of the accepted subjects, from its issuer."""

    def __init__(self, accepted: Sequence[Identity]) -> None:
        self._accepted = accepted
        self.signer: Identity | None = None

    def verify(self, cert: x509.Certificate) -> None:
        from sigstore.errors import VerificationError
        from sigstore.verify import policy

        names, issuers = _names(cert), _issuers(cert)
        for each in self._accepted:
            for name in _fitting(names, each.identity, each.identity_regexp):
                for issuer in _fitting(issuers, each.issuer, each.issuer_regexp):
                    with contextlib.suppress(VerificationError):
                        policy.Identity(identity=name, issuer=issuer).verify(cert)
                        self.signer = Identity(identity=name, issuer=issuer)
                        return
        raise VerificationError(
            f"the policy does not accept {', '.join(names)} (issuer {', '.join(issuers) or 'unknown'})"
        )


def _fitting(found: Sequence[str], text: str, pattern: str) -> list[str]:
    """Return the texts of a certificate that are accepted: the same, or matched from end to end.

    What is fitting is compared by sigstore-python once more, which does not check an empty issuer.
    """
    if text:
        return [text]
    sane = [each for each in found if 0 < len(each) <= _NAME_LIMIT]
    return [each for each in sane if pattern and re.fullmatch(pattern, each)]


def _names(cert: x509.Certificate) -> list[str]:
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(each.value) for each in names]


def _issuers(cert: x509.Certificate) -> list[str]:
    """Return the OIDC issuer of a certificate, in either of its extensions."""
    found = []
    for oid, prefix in ((_ISSUER, 0), (_ISSUER_V2, 2)):  # the newer one is a UTF8String in DER
        with contextlib.suppress(x509.ExtensionNotFound, UnicodeDecodeError):
            value = cert.extensions.get_extension_for_oid(oid).value
            if isinstance(value, x509.UnrecognizedExtension):
                found.append(value.value[prefix:].decode())
    return list(dict.fromkeys(found))


class _AnyIdentity:
    """A policy that accepts every certificate, for what we have just signed ourselves."""

    def verify(self, cert: x509.Certificate) -> None:
        pass


def _verify(bundle: Bundle, root: "TrustedRoot", policy: "VerificationPolicy") -> tuple["Found", bytes]:
    """Verify a bundle with sigstore-python. Raises whatever that and its parsers raise."""
    from sigstore.errors import VerificationError
    from sigstore.models import Bundle as Found
    from sigstore.verify import Verifier

    found = Found.from_json(bundle.content)
    payload_type, payload = Verifier(trusted_root=root).verify_dsse(found, policy)
    # Both we and sigstore-python parsed the bundle, and must have read the same envelope.
    if payload_type != PAYLOAD_TYPE or payload != bundle.envelope.payload:
        raise VerificationError("its payload is ambiguous")
    return found, payload


def _bundle_of(signature: SimpleSignature) -> "Found":
    """Return an older signature and its log entry as a bundle v0.1, which has nearly the same parts.

    cosign stored the log's signed promise to include the entry, but no proof that it did, and verified that
    promise alone, offline. sigstore-python demands a proof, so it gets an empty one, and an entry whose
    promise is verified. If its inner parts change, no such signature verifies. Raises what parsers raise.
    """
    from sigstore.models import Bundle as Found
    from sigstore.models import TransparencyLogEntry

    class PromisedEntry(TransparencyLogEntry):
        def _verify(self, keyring: Any) -> None:
            self._verify_set(keyring)

    def base64_of(content: bytes) -> str:
        return base64.b64encode(content).decode()

    entry = Fields.parse(signature.entry, "the log entry", limit_bytes=LIMIT_BYTES)
    logged = entry.inner("Payload")
    body = Fields.parse(from_base64(logged.text("body"), "its body"), "its body", limit_bytes=LIMIT_BYTES)
    certificate = x509.load_pem_x509_certificate(signature.certificate)
    document = {
        "mediaType": "application/vnd.dev.sigstore.bundle+json;version=0.1",
        "verificationMaterial": {
            "x509CertificateChain": {
                "certificates": [{"rawBytes": base64_of(certificate.public_bytes(Encoding.DER))}]
            },
            "tlogEntries": [
                {
                    "logIndex": str(logged.integer("logIndex")),
                    "logId": {"keyId": base64_of(bytes.fromhex(logged.text("logID")))},
                    "kindVersion": {"kind": body.text("kind"), "version": body.text("apiVersion")},
                    "integratedTime": str(logged.integer("integratedTime")),
                    "inclusionPromise": {"signedEntryTimestamp": entry.text("SignedEntryTimestamp")},
                    "inclusionProof": {
                        "logIndex": "0",
                        "treeSize": "1",
                        "rootHash": "",
                        "hashes": [],
                        "checkpoint": {"envelope": "none"},
                    },
                    "canonicalizedBody": logged.text("body"),
                }
            ],
        },
        "messageSignature": {
            "messageDigest": {
                "algorithm": "SHA2_256",
                "digest": base64_of(hashlib.sha256(signature.payload).digest()),
            },
            "signature": base64_of(signature.signature),
        },
    }
    found = Found.from_json(json.dumps(document).encode())
    found._log_entry = PromisedEntry(found.log_entry._inner)
    return found


def _objection(error: Exception) -> str:
    from sigstore.errors import CertValidationError

    if isinstance(error, CertValidationError):
        return f"the trusted root does not confirm the certificate at that time: {_reason(error)}"
    return _reason(error)


def _integrated(found: "Found") -> datetime | None:
    """Return when the log recorded the signature, if the log signed that time."""
    (entry,) = json.loads(found.to_json())["verificationMaterial"]["tlogEntries"]
    if not entry.get("inclusionPromise") or not entry.get("integratedTime"):
        return None
    return datetime.fromtimestamp(int(entry["integratedTime"]), UTC)


def _reason(error: BaseException) -> str:
    """Describe a failure in one line. It may quote text from an untrusted bundle."""
    text = str(error) or str(error.__cause__ or "") or type(error).__name__
    line = printable(" ".join(text.split()))
    return line if len(line) <= _REASON_LIMIT else f"{line[:_REASON_LIMIT]}…"


# Trusted roots and configurations.


def read_trusted_root(path: Path | None) -> "TrustedRoot":
    """Return a trusted root, by default that of the public good instance. Raises UsageError."""
    _silence()
    if path is None:
        return _config(None).trusted_root
    from sigstore.models import TrustedRoot

    try:
        return TrustedRoot.from_file(str(path))
    except Exception as error:
        raise UsageError(f"the trusted root {path} cannot be used", cause=_reason(error)) from None


def _config(path: Path | None) -> "ClientTrustConfig":
    _silence()
    from sigstore.models import ClientTrustConfig

    try:
        text = path.read_text() if path is not None else _packaged()
        config = ClientTrustConfig.from_json(text)
        _ = config.trusted_root, config.signing_config  # both are checked on first use
    except Exception as error:
        named = path or "that sigstore-python packages"
        raise UsageError(
            f"the trust configuration {named} cannot be used",
            cause=_reason(error),
            hint="it must hold a trusted root and a signing configuration: docs/trust.md",
        ) from None
    return config


def _packaged() -> str:
    """Return the configuration of the public good instance."""
    from importlib import resources

    store = resources.files("sigstore._store").joinpath(_PUBLIC_GOOD)
    document = {
        "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
        "trustedRoot": json.loads(store.joinpath("trusted_root.json").read_bytes()),
        "signingConfig": json.loads(store.joinpath("signing_config.v0.2.json").read_bytes()),
    }
    return json.dumps(document)


@functools.cache
def _silence() -> None:
    # Its warnings about an untrusted bundle would go to stderr.
    logging.getLogger("sigstore").addHandler(logging.NullHandler())


# Signing.


class _Keyless:
    """Sign with a certificate that is requested for the first statement."""

    def __init__(self, config: "ClientTrustConfig", given: "IdentityToken | None") -> None:
        self._config = config
        self._given = given
        self._signer: Signer | None = None

    def __call__(self, statement: Statement) -> Bundle:
        from sigstore.dsse import Statement as Signable
        from sigstore.sign import Signer, SigningContext

        signable = Signable(statement.to_bytes())
        if self._signer is None:
            token = self._given or _detect_identity(self._config)
            context = SigningContext.from_trust_config(self._config)
            self._signer = _with_timeout(lambda: Signer(token, context))
        by = self._signer
        content = _with_timeout(lambda: by.sign_dsse(signable)).to_json().encode()
        made = Bundle.parse(content)
        try:
            _verify(made, self._config.trusted_root, _AnyIdentity())
        except Exception as error:
            raise TrustError(
                "the new signature does not verify with the trusted root",
                cause=_reason(error),
                hint="check that the services are those that the trust configuration describes",
            ) from None
        return made


def _token(text: str) -> "IdentityToken":
    from sigstore.oidc import IdentityError, IdentityToken

    try:
        return IdentityToken(text)
    except IdentityError as error:
        raise UsageError(
            "the identity token cannot be used",
            cause=_reason(error),
            hint="it must be valid now, and its audience must be sigstore",
        ) from None


def _detect_identity(config: "ClientTrustConfig") -> "IdentityToken":
    """Return the identity of the CI job, else of the person who logs in with a browser."""
    from sigstore.oidc import Issuer, detect_credential

    try:
        ambient = _with_timeout(detect_credential)
        if ambient:
            return _token(ambient)
        if not sys.stdin.isatty():
            raise UsageError(
                "there is no identity to sign with",
                hint="set $SIGSTORE_ID_TOKEN, give the CI job an identity (`id-token: write`),"
                " or run this in a terminal to log in with a browser",
            )
        issuer = Issuer(config.signing_config.get_oidc_url())
        # It prints and prompts; our stdout carries data only.
        with contextlib.redirect_stdout(sys.stderr):
            return issuer.identity_token()
    except RekindleError:
        raise
    except Exception as error:
        raise TrustError("the login failed", cause=_reason(error)) from None


def _with_timeout(work: Callable[[], T]) -> T:
    """Return the result of work that uses Sigstore's services, for which sigstore-python has no timeout.

    Raises TrustError.
    """
    done: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_SERVICES_TIMEOUT)
    if done:
        return done[0]
    error = failed[0] if failed else TimeoutError(f"no answer within {_SERVICES_TIMEOUT:.0f} s")
    raise TrustError(
        "signing with Sigstore failed",
        cause=f"{type(error).__name__}: {_reason(error)}",
        hint="check that its services can be reached from here and that the identity token is still valid",
    )
