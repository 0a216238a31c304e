# SPDX-License-Identifier: Apache-2.0
"""A Sigstore on loopback, with keys of its own: Fulcio, its CT log, and Rekor's first version.

POST /api/v2/signingCert      a certificate for whoever the token says it is; nobody checks the token
POST /api/v1/signingCert      likewise, as cosign 2 asks for it
POST /api/v1/log/entries      into the transparency log: dsse and hashedrekord, version 0.0.1

What is signed is what clients demand: the certificate's SCT over the certificate without it, so that the
extension comes last (RFC 6962); the inclusion proof against a checkpoint; and the entry with its time.
"""

import base64
import hashlib
import json
import struct
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

IDENTITY = "builder@example.com"
ISSUER = "https://issuer.example.com"
_LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
_SHA256 = ec.ECDSA(hashes.SHA256())
_ISSUER_1 = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_ISSUER_2 = ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
_SCTS = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")


def token(identity: str = IDENTITY, issuer: str = ISSUER, *, lifetime: float = 600) -> str:
    """An identity token, signed by nobody."""
    now = int(datetime.now(UTC).timestamp())
    claims: dict[str, object] = {
        "iss": issuer,
        "sub": identity,
        "aud": "sigstore",
        "iat": now - 600,
        "exp": now + int(lifetime),
    }
    if "://" not in identity:
        claims |= {"email": identity, "email_verified": True}
    parts = ({"alg": "RS256", "typ": "JWT"}, claims)
    return ".".join([*(_url64(json.dumps(part).encode()) for part in parts), _url64(b"nobody")])


@dataclass(frozen=True, slots=True)
class Key:
    """A log's key, and how it is named."""

    private: ec.EllipticCurvePrivateKey
    der: bytes
    id: bytes

    @classmethod
    def make(cls) -> Self:
        private = ec.generate_private_key(ec.SECP256R1())
        der = _der(private.public_key())
        return cls(private, der, hashlib.sha256(der).digest())

    def sign(self, content: bytes) -> bytes:
        return self.private.sign(content, _SHA256)


class Sigstore:
    """Fulcio, a CT log and Rekor; a server while it is entered, and without one a forger of bundles."""

    def __init__(self) -> None:
        self.ca, self.ct, self.rekor = Key.make(), Key.make(), Key.make()
        self.authority = self._authority()
        self.leaves: list[bytes] = []
        self.status = 0  # to answer with instead, if it is not 0
        self._lock = threading.Lock()
        self.url = "http://127.0.0.1:9"

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # Certificates.

    def _authority(self) -> x509.Certificate:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fulcio.example.com")])
        public = self.ca.private.public_key()
        return (
            x509.CertificateBuilder(name, name, public, x509.random_serial_number())
            .not_valid_before(_LONG_AGO)
            .not_valid_after(datetime.now(UTC) + timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(_usage(certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self.ca.private, hashes.SHA256())
        )

    def certify(
        self,
        key: ec.EllipticCurvePublicKey,
        identity: str,
        issuer: str,
        *,
        since: datetime | None = None,
        logged_by: Key | None = None,
    ) -> x509.Certificate:
        """A certificate for ten minutes, with the promise of the CT log within."""
        since = since or datetime.now(UTC) - timedelta(seconds=5)
        named: x509.GeneralName = (
            x509.UniformResourceIdentifier(identity) if "://" in identity else x509.RFC822Name(identity)
        )
        authority_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.ca.private.public_key())
        issuer_der = b"\x0c" + _length(issuer.encode()) + issuer.encode()
        builder = (
            x509.CertificateBuilder(self.authority.subject, x509.Name([]), key, x509.random_serial_number())
            .not_valid_before(since)
            .not_valid_after(since + timedelta(minutes=10))
            .add_extension(_usage(certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(authority_key, critical=False)
            .add_extension(x509.SubjectAlternativeName([named]), critical=True)
            .add_extension(x509.UnrecognizedExtension(_ISSUER_1, issuer.encode()), critical=False)
            .add_extension(x509.UnrecognizedExtension(_ISSUER_2, issuer_der), critical=False)
        )
        without = builder.sign(self.ca.private, hashes.SHA256()).tbs_certificate_bytes
        scts = self._promise(without, int(since.timestamp() * 1000), logged_by or self.ct)
        return builder.add_extension(x509.UnrecognizedExtension(_SCTS, scts), critical=False).sign(
            self.ca.private, hashes.SHA256()
        )

    def _promise(self, without: bytes, at_ms: int, log: Key) -> bytes:
        """The value of the extension: a list of one SCT, as in RFC 6962, section 3."""
        entry = self.ca.id + len(without).to_bytes(3) + without
        signature = log.sign(struct.pack("!BBQH", 0, 0, at_ms, 1) + entry + struct.pack("!H", 0))
        sct = struct.pack("!B32sQHBBH", 0, log.id, at_ms, 0, 4, 3, len(signature)) + signature
        scts = struct.pack("!HH", len(sct) + 2, len(sct)) + sct
        return b"\x04" + _length(scts) + scts

    # The transparency log.

    def enter(self, body: bytes, *, at: datetime | None = None) -> dict[str, Any]:
        """Takes an entry in; returns it as Rekor answers."""
        with self._lock:
            self.leaves.append(hashlib.sha256(b"\0" + body).digest())
            index, leaves = len(self.leaves) - 1, list(self.leaves)
        signed: dict[str, object] = {
            "body": _64(body),
            "integratedTime": int((at or datetime.now(UTC)).timestamp()),
            "logID": self.rekor.id.hex(),
            "logIndex": index,
        }
        proof = {
            "checkpoint": self._checkpoint(leaves),
            "hashes": [each.hex() for each in _path(index, leaves)],
            "logIndex": index,
            "rootHash": _root(leaves).hex(),
            "treeSize": len(leaves),
        }
        promise = _64(self.rekor.sign(_canonical(signed)))
        return {**signed, "verification": {"inclusionProof": proof, "signedEntryTimestamp": promise}}

    def _checkpoint(self, leaves: list[bytes]) -> str:
        name = "rekor.example.com"
        # Without the number of a tree, cosign would check the proof as of Rekor's version 2.
        note = f"{name} - 1\n{len(leaves)}\n{_64(_root(leaves))}\n"
        signature = _64(self.rekor.id[:4] + self.rekor.sign(note.encode()))
        return f"{note}\n— {name} {signature}\n"

    # What describes it, and forgeries.

    @property
    def trusted_root(self) -> dict[str, Any]:
        since = {"start": _LONG_AGO.isoformat().replace("+00:00", "Z")}

        def log(key: Key) -> dict[str, object]:
            details = {"rawBytes": _64(key.der), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": since}
            log_id = {"keyId": _64(key.id)}
            return {"baseUrl": self.url, "hashAlgorithm": "SHA2_256", "publicKey": details, "logId": log_id}

        authority = {
            "subject": {"organization": "example.com", "commonName": "fulcio.example.com"},
            "uri": self.url,
            "certChain": {
                "certificates": [{"rawBytes": _64(self.authority.public_bytes(serialization.Encoding.DER))}]
            },
            "validFor": since,
        }
        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self.rekor)],
            "certificateAuthorities": [authority],
            "ctlogs": [log(self.ct)],
        }

    @property
    def signing_config(self) -> dict[str, Any]:
        service = {
            "url": self.url,
            "majorApiVersion": 1,
            "validFor": {"start": _LONG_AGO.isoformat().replace("+00:00", "Z")},
            "operator": "example.com",
        }
        return {
            "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
            "caUrls": [service],
            "oidcUrls": [service],
            "rekorTlogUrls": [service],
            "tsaUrls": [],
            "rekorTlogConfig": {"selector": "ANY"},
            "tsaConfig": {"selector": "ANY"},
        }

    def write(self, directory: Path) -> tuple[Path, Path, Path]:
        """The trusted root, the signing configuration, and both in one, as files."""
        both = {
            "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
            "trustedRoot": self.trusted_root,
            "signingConfig": self.signing_config,
        }
        paths = (directory / "trusted_root.json", directory / "signing.json", directory / "config.json")
        for path, document in zip(paths, (self.trusted_root, self.signing_config, both), strict=True):
            path.write_text(json.dumps(document))
        return paths

    def forge(
        self,
        payload: bytes,
        *,
        identity: str = IDENTITY,
        issuer: str = ISSUER,
        payload_type: str = "application/vnd.in-toto+json",
        since: datetime | None = None,
        at: datetime | None = None,
        logged_by: Key | None = None,
    ) -> dict[str, Any]:
        """A bundle that is sound, but for what is asked for: made without a client that would object."""
        key = Key.make()
        public = key.private.public_key()
        certificate = self.certify(public, identity, issuer, since=since, logged_by=logged_by)
        kind = payload_type.encode()
        signature = key.sign(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
        envelope = {
            "payload": _64(payload),
            "payloadType": payload_type,
            "signatures": [{"sig": _64(signature)}],
        }
        verifier = _64(certificate.public_bytes(serialization.Encoding.PEM))
        entry = self.enter(dsse_entry(json.dumps(envelope), [verifier]), at=at)
        proof = entry["verification"]["inclusionProof"]
        logged = {
            "logIndex": str(entry["logIndex"]),
            "logId": {"keyId": _64(self.rekor.id)},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"},
            "integratedTime": str(entry["integratedTime"]),
            "inclusionPromise": {"signedEntryTimestamp": entry["verification"]["signedEntryTimestamp"]},
            "inclusionProof": {
                "logIndex": str(proof["logIndex"]),
                "rootHash": _64(bytes.fromhex(proof["rootHash"])),
                "treeSize": str(proof["treeSize"]),
                "hashes": [_64(bytes.fromhex(each)) for each in proof["hashes"]],
                "checkpoint": {"envelope": proof["checkpoint"]},
            },
            "canonicalizedBody": entry["body"],
        }
        der = certificate.public_bytes(serialization.Encoding.DER)
        return {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"certificate": {"rawBytes": _64(der)}, "tlogEntries": [logged]},
            "dsseEnvelope": envelope,
        }


def _handler(sigstore: Sigstore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if sigstore.status:
                return self.answer(sigstore.status, {"code": sigstore.status, "message": "out of order"})
            if self.path == "/api/v2/signingCert":
                return self.answer(200, self.certificate(asked))
            if self.path == "/api/v1/signingCert":
                return self.answer_pem("\n".join(self.chain(asked)))
            if self.path == "/api/v1/log/entries":
                entry = sigstore.enter(_entry(asked))
                name = f"{1:016x}{sigstore.leaves[-1].hex()}"
                return self.answer(201, {name: entry}, ETag=name, Location=f"{self.path}/{name}")
            return self.answer(404, {"code": 404, "message": "there is no such thing"})

        def certificate(self, asked: dict[str, Any]) -> dict[str, Any]:
            return {"signedCertificateEmbeddedSct": {"chain": {"certificates": self.chain(asked)}}}

        def chain(self, asked: dict[str, Any]) -> list[str]:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            given = given or asked["credentials"]["oidcIdentityToken"]
            body = given.split(".")[1]
            claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            if asked.get("certificateSigningRequest"):
                pem = base64.b64decode(asked["certificateSigningRequest"])
                key: object = x509.load_pem_x509_csr(pem).public_key()
            elif "publicKey" in asked:
                key = serialization.load_pem_public_key(base64.b64decode(asked["publicKey"]["content"]))
            else:
                pem = asked["publicKeyRequest"]["publicKey"]["content"].encode()
                key = serialization.load_pem_public_key(pem)
            assert isinstance(key, ec.EllipticCurvePublicKey)
            made = sigstore.certify(key, claims.get("email") or claims["sub"], claims["iss"])
            return [
                each.public_bytes(serialization.Encoding.PEM).decode() for each in (made, sigstore.authority)
            ]

        def answer_pem(self, text: str) -> None:
            self.send_response(201)
            self.send_header("Content-Type", "application/pem-certificate-chain")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def answer(self, status: int, document: object, **headers: str) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


def _entry(proposed: dict[str, Any]) -> bytes:
    """What goes into the log of what a client proposes, in canonical form."""
    if proposed["kind"] == "dsse":
        content = proposed["spec"]["proposedContent"]
        return dsse_entry(content["envelope"], content["verifiers"])
    assert proposed["kind"] == "hashedrekord", proposed
    return _canonical(proposed)


def dsse_entry(envelope: str, verifiers: list[str]) -> bytes:
    parsed = json.loads(envelope)
    signatures = [each["sig"] for each in parsed["signatures"]]
    spec = {
        "envelopeHash": _hash(envelope.encode()),
        "payloadHash": _hash(base64.b64decode(parsed["payload"])),
        "signatures": [
            {"signature": signature, "verifier": verifier}
            for signature, verifier in zip(signatures, verifiers, strict=True)
        ],
    }
    return _canonical({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})


def _root(leaves: list[bytes]) -> bytes:
    """The root of a Merkle tree, as in RFC 6962, section 2.1."""
    if len(leaves) == 1:
        return leaves[0]
    half = _half(leaves)
    return hashlib.sha256(b"\1" + _root(leaves[:half]) + _root(leaves[half:])).digest()


def _path(index: int, leaves: list[bytes]) -> list[bytes]:
    if len(leaves) == 1:
        return []
    half = _half(leaves)
    if index < half:
        return [*_path(index, leaves[:half]), _root(leaves[half:])]
    return [*_path(index - half, leaves[half:]), _root(leaves[:half])]


def _half(leaves: list[bytes]) -> int:
    return 1 << (len(leaves) - 1).bit_length() - 1


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _hash(content: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(content).hexdigest()}


def _canonical(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _der(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _length(content: bytes) -> bytes:
    """The length of a DER value."""
    size = len(content)
    if size < 128:
        return bytes([size])
    count = (size.bit_length() + 7) // 8
    return bytes([0x80 | count]) + size.to_bytes(count)


def _64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _url64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")
