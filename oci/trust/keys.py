# SPDX-License-Identifier: Apache-2.0
"""Key pairs: ECDSA on P-256 with SHA-256, in PEM, and encrypted as `cosign generate-key-pair` does.

A cosign key file is PEM around JSON: the key in PKCS #8, encrypted by NaCl's secretbox with a key that scrypt
derives from the password.
"""

import base64
import binascii
import hashlib
import json
import os
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Struct

from rekindle.errors import FormatError, UsageError
from rekindle.fields import Fields
from rekindle.files import write_atomically

_KEY_FILE_LIMIT_BYTES = 64 << 10
_LABELS = (b"ENCRYPTED SIGSTORE PRIVATE KEY", b"ENCRYPTED COSIGN PRIVATE KEY")
_SCRYPT = {"N": 65536, "r": 8, "p": 1}
_SCRYPT_LIMIT_BYTES = 256 << 20
_ALGORITHM = ec.ECDSA(hashes.SHA256())


class PublicKey(Struct, frozen=True, kw_only=True):
    """A key to verify signatures with. `hint` identifies it in bundles, as cosign does."""

    key: ec.EllipticCurvePublicKey
    hint: str

    @classmethod
    def of(cls, key: ec.EllipticCurvePublicKey) -> Self:
        """Wrap a key of `cryptography`."""
        der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return cls(key=key, hint=base64.b64encode(hashlib.sha256(der).digest()).decode())

    @classmethod
    def parse(cls, pem: bytes) -> Self:
        """Parse a key. Raises FormatError unless it is a public key on P-256 in PEM."""
        try:
            key = serialization.load_pem_public_key(pem[:_KEY_FILE_LIMIT_BYTES])
        except (ValueError, UnsupportedAlgorithm) as error:
            raise FormatError("not a public key in PEM", cause=str(error)) from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise FormatError("not a public key on the curve P-256")
        return cls.of(key)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a key file. Raises UsageError if it cannot be used."""
        try:
            return cls.parse(_read(path))
        except FormatError as error:
            raise UsageError(
                f"{path} does not hold a public key", cause=error.cause or error.message
            ) from None

    def verifies(self, signature: bytes, content: bytes) -> bool:
        """Whether a signature in DER is by this key, over the content."""
        try:
            self.key.verify(signature, content, _ALGORITHM)
        except InvalidSignature:
            return False
        return True

    def to_pem(self) -> bytes:
        """Return the key in PEM."""
        return self.key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


class PrivateKey(Struct, frozen=True, kw_only=True):
    """A key to sign with."""

    key: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return "PrivateKey()"

    @classmethod
    def generate(cls) -> Self:
        """Generate a new key."""
        return cls(key=ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def read(cls, path: Path, password: bytes) -> Self:
        """Read a key in PEM: plain, encrypted by PKCS #8, or encrypted by cosign. Raises UsageError."""
        pem = _read(path)
        try:
            if any(b"-----BEGIN " + label in pem for label in _LABELS):
                key = serialization.load_der_private_key(_open_sealed(pem, password), None)
            else:
                encrypted = b"ENCRYPTED" in pem.split(b"\n", 1)[0]
                key = serialization.load_pem_private_key(pem, password if encrypted else None)
        except (ValueError, TypeError, UnsupportedAlgorithm, FormatError) as error:
            raise UsageError(
                f"{path} cannot be used to sign",
                cause=str(error),
                hint="is $COSIGN_PASSWORD right? `rekindle generate-key-pair` makes a new pair",
            ) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise UsageError(f"{path} does not hold a private key on the curve P-256")
        return cls(key=key)

    @property
    def public(self) -> PublicKey:
        """The public key of the pair."""
        return PublicKey.of(self.key.public_key())

    def sign(self, content: bytes) -> bytes:
        """Return the signature, in DER."""
        return self.key.sign(content, _ALGORITHM)

    def to_pem(self) -> bytes:
        """Return the key in PKCS #8, unencrypted."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def write(self, path: Path, password: bytes) -> None:
        """Write the key as cosign does, encrypted, and readable by its owner only."""
        der = self.key.private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_atomically(path, _seal(der, password), mode=0o600)


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(_KEY_FILE_LIMIT_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read", cause=str(error)) from None


def _derive(password: bytes, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password, salt=salt, n=n, r=r, p=p, maxmem=_SCRYPT_LIMIT_BYTES, dklen=32)


def _seal(der: bytes, password: bytes) -> bytes:
    from nacl.secret import SecretBox

    salt, nonce = os.urandom(32), os.urandom(24)
    sealed = SecretBox(_derive(password, salt, *_SCRYPT.values())).encrypt(der, nonce)
    document = {
        "kdf": {"name": "scrypt", "params": _SCRYPT, "salt": base64.b64encode(salt).decode()},
        "cipher": {"name": "nacl/secretbox", "nonce": base64.b64encode(nonce).decode()},
        "ciphertext": base64.b64encode(sealed.ciphertext).decode(),
    }
    body = base64.encodebytes(json.dumps(document).encode()).replace(b"\n", b"")
    lines = b"\n".join(body[at : at + 64] for at in range(0, len(body), 64))
    return b"-----BEGIN " + _LABELS[0] + b"-----\n" + lines + b"\n-----END " + _LABELS[0] + b"-----\n"


def _open_sealed(pem: bytes, password: bytes) -> bytes:
    """Decrypt the key of a cosign key file; return its DER. Raises ValueError, FormatError."""
    from nacl.exceptions import CryptoError
    from nacl.secret import SecretBox

    try:
        body = b"".join(line for line in pem.splitlines() if not line.startswith(b"-----"))
        fields = Fields.parse(
            base64.b64decode(body, validate=True), "the key file", limit_bytes=_KEY_FILE_LIMIT_BYTES
        )
        kdf, cipher = fields.inner("kdf"), fields.inner("cipher")
        if (kdf.text("name"), cipher.text("name")) != ("scrypt", "nacl/secretbox"):
            raise FormatError("the key is encrypted in an unknown way")
        parameters = kdf.inner("params")
        key = _derive(
            password,
            base64.b64decode(kdf.text("salt")),
            parameters.integer("N", at_least=2, at_most=1 << 20),
            parameters.integer("r", at_least=1, at_most=32),
            parameters.integer("p", at_least=1, at_most=16),
        )
        nonce = base64.b64decode(cipher.text("nonce"))
        return SecretBox(key).decrypt(base64.b64decode(fields.text("ciphertext")), nonce)
    except binascii.Error as error:
        raise FormatError("the key file is malformed", cause=str(error)) from None
    except CryptoError:
        raise FormatError("wrong password") from None
