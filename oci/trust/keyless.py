# SPDX-License-Identifier: Apache-2.0
"""Keyless signatures: certificates of Fulcio's for whom an issuer vouches, by way of sigstore-python.

Verifying asks nobody: the trusted root is a file, or the public good instance's as sigstore-python packages
it. `ClientTrustConfig.production(offline=True)` would not do: it reads what lies in a cache of the user's.
Importing sigstore takes a quarter of a second, so it is imported where it is needed.
"""

import contextlib
import functools
import json
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cryptography import x509

from oci.trust.bundle import Bundle
from oci.trust.policy import Identity
from oci.trust.statement import PAYLOAD_TYPE, Statement
from rekindle.errors import FormatError, RekindleError, TrustError, UsageError
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
_REASON_LIMIT = 300
_SERVICES_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """What was verified, who signed it, and when by the log's word.

    `signed_at` is None if a timestamping authority alone vouches for the time, as with Rekor's version 2.
    """

    statement: Statement
    identity: Identity
    signed_at: datetime | None


def verify(bundle: Bundle, accepted: Sequence[Identity], *, trusted_root: Path | None) -> Signed | str:
    """What one of the accepted identities signed; a reason if that is not so.

    The certificate must chain to the root, have been logged, and have been valid when the transparency log
    took the signature in. Raises UsageError for a trusted root that cannot be used.
    """
    root = _trusted_root(trusted_root)
    pinned = _Pinned(accepted)
    try:
        found, payload = _verify(bundle, root, pinned)
    except Exception as error:
        # Whatever the parsers below sigstore-python raise for a hostile bundle is a reason to refuse it, and
        # must not keep us from looking at the other signatures.
        return f"a certificate signed it, but {_objection(error)}"
    if pinned.signer is None:
        return "a certificate signed it, but nobody looked at whose it is"
    try:
        statement = Statement.parse(payload)
    except FormatError as error:
        return f"{pinned.signer.identity} signed what is no statement: {error.message}"
    return Signed(statement=statement, identity=pinned.signer, signed_at=_integrated(found))


def signer(*, token: str | None, trust_config: Path | None) -> Callable[[Statement], Bundle]:
    """Signs statements by who we are: as the token says, else the CI that we run in, else a browser.

    `trust_config` describes a Sigstore of one's own. The certificate is asked for at the first statement and
    serves for those after it. Raises UsageError for a token or a configuration that cannot be used; what it
    returns raises that and TrustError.
    """
    config = _config(trust_config)
    given = _token(token) if token else None
    return _Keyless(config, given)


# Verifying.


class _Pinned:
    """A policy of sigstore-python's: the certificate names one of those who are accepted, and its issuer."""

    def __init__(self, accepted: Sequence[Identity]) -> None:
        self._accepted = accepted
        self.signer: Identity | None = None

    def verify(self, cert: x509.Certificate) -> None:
        from sigstore.errors import VerificationError
        from sigstore.verify import policy

        for each in self._accepted:
            # sigstore-python leaves an issuer that is empty unchecked.
            if not each.identity or not each.issuer:
                continue
            with contextlib.suppress(VerificationError):
                policy.Identity(identity=each.identity, issuer=each.issuer).verify(cert)
                self.signer = each
                return
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        name = ", ".join(str(each.value) for each in names)
        raise VerificationError(f"it is {name}'s (issuer {_issuer(cert)}), whom the policy does not accept")


def _issuer(cert: x509.Certificate) -> str:
    extension = cert.extensions.get_extension_for_oid(_ISSUER).value
    return extension.value.decode() if isinstance(extension, x509.UnrecognizedExtension) else "unknown"


class _Anybody:
    """A policy that accepts every certificate, for what we have just signed ourselves."""

    def verify(self, cert: x509.Certificate) -> None:
        pass


def _verify(bundle: Bundle, root: "TrustedRoot", policy: "VerificationPolicy") -> tuple["Found", bytes]:
    """Raises whatever sigstore-python and its parsers raise."""
    from sigstore.errors import VerificationError
    from sigstore.models import Bundle as Found
    from sigstore.verify import Verifier

    found = Found.from_json(bundle.content)
    payload_type, payload = Verifier(trusted_root=root).verify_dsse(found, policy)
    # We and sigstore-python each parsed the bundle; neither may have read another envelope than the other.
    if payload_type != PAYLOAD_TYPE or payload != bundle.envelope.payload:
        raise VerificationError("its payload is not what it seems")
    return found, payload


def _objection(error: Exception) -> str:
    from sigstore.errors import CertValidationError

    if isinstance(error, CertValidationError):
        return f"the trusted root does not bear the certificate out, at that time: {_reason(error)}"
    return _reason(error)


def _integrated(found: "Found") -> datetime | None:
    """When the log took it in, if the log signed that."""
    (entry,) = json.loads(found.to_json())["verificationMaterial"]["tlogEntries"]
    if not entry.get("inclusionPromise") or not entry.get("integratedTime"):
        return None
    return datetime.fromtimestamp(int(entry["integratedTime"]), UTC)


def _reason(error: BaseException) -> str:
    """One line about a failure; what it quotes may come from whoever made the bundle."""
    text = str(error) or str(error.__cause__ or "") or type(error).__name__
    line = printable(" ".join(text.split()))
    return line if len(line) <= _REASON_LIMIT else f"{line[:_REASON_LIMIT]}…"


# Whom Sigstore consists of.


def _trusted_root(path: Path | None) -> "TrustedRoot":
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
        _ = config.trusted_root, config.signing_config  # which are checked no sooner than they are asked for
    except Exception as error:
        named = path or "that sigstore-python packages"
        raise UsageError(
            f"the trust configuration {named} cannot be used",
            cause=_reason(error),
            hint="it holds a trusted root and a signing configuration: docs/trust.md says more",
        ) from None
    return config


def _packaged() -> str:
    """The configuration of the public good instance."""
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
    # Its warnings about a stranger's bundle would go to stderr, past our report.
    logging.getLogger("sigstore").addHandler(logging.NullHandler())


# Signing.


class _Keyless:
    """Signs with a certificate that it asks for when it needs one."""

    def __init__(self, config: "ClientTrustConfig", given: "IdentityToken | None") -> None:
        self._config = config
        self._given = given
        self._signer: Signer | None = None

    def __call__(self, statement: Statement) -> Bundle:
        from sigstore.dsse import Statement as Signable
        from sigstore.sign import Signer, SigningContext

        signable = Signable(statement.to_bytes())
        if self._signer is None:
            token = self._given or _who_we_are(self._config)
            context = SigningContext.from_trust_config(self._config)
            self._signer = _in_time(lambda: Signer(token, context))
        by = self._signer
        content = _in_time(lambda: by.sign_dsse(signable)).to_json().encode()
        made = Bundle.parse(content)
        try:
            _verify(made, self._config.trusted_root, _Anybody())
        except Exception as error:
            raise TrustError(
                "the trusted root does not bear out the signature that was made",
                cause=_reason(error),
                hint="nobody would accept it: are the services those that the trust configuration describes?",
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


def _who_we_are(config: "ClientTrustConfig") -> "IdentityToken":
    """By what the CI says, else by what a person does in a browser."""
    from sigstore.oidc import Issuer, detect_credential

    try:
        ambient = _in_time(detect_credential)
        if ambient:
            return _token(ambient)
        if not sys.stdin.isatty():
            raise UsageError(
                "nothing says who signs",
                hint="set $SIGSTORE_ID_TOKEN, give the CI job an identity (`id-token: write`),"
                " or run this in a terminal to log in with a browser",
            )
        issuer = Issuer(config.signing_config.get_oidc_url())
        # It prints and prompts; our stdout is for what was asked of us.
        with contextlib.redirect_stdout(sys.stderr):
            return issuer.identity_token()
    except RekindleError:
        raise
    except Exception as error:
        raise TrustError("logging in did not work", cause=_reason(error)) from None


def _in_time(work: Callable[[], T]) -> T:
    """What work with Sigstore's services comes to: sigstore-python waits for them without end.

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
        "Sigstore did not sign",
        cause=f"{type(error).__name__}: {_reason(error)}",
        hint="can its services be reached from here, and is the identity token still valid?",
    )
