# SPDX-License-Identifier: Apache-2.0
"""Key pairs: ECDSA on P-256 with SHA-256, in PEM, and encrypted as `cosign generate-key-pair` does.

A cosign key file is PEM around JSON: the key in PKCS #8, encrypted by NaCl's secretbox with a key that scrypt
derives from the password.

Every restore verifies with a public key. `cryptography` takes some 25 ms to import, of which its curves take
8, so what needs more than those imports it itself.
"""

import base64
import binascii
import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Self

from msgspec import Struct

from rekindle.errors import FormatError, UsageError
from rekindle.fields import Fields
from rekindle.files import write_atomically

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_KEY_FILE_LIMIT_BYTES = 64 << 10
_LABELS = (b"ENCRYPTED SIGSTORE PRIVATE KEY", b"ENCRYPTED COSIGN PRIVATE KEY")
_SCRYPT = {"N": 65536, "r": 8, "p": 1}
_SCRYPT_LIMIT_BYTES = 256 << 20
# What precedes the coordinates of a point on P-256 in a SubjectPublicKeyInfo: RFC 5480, uncompressed.
_P256_HEAD = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
_POINT_BYTES = 65
_PEM_HEAD, _PEM_END = b"-----BEGIN PUBLIC KEY-----", b"-----END PUBLIC KEY-----"


class PublicKey(Struct, frozen=True, kw_only=True):
    """A key to verify signatures with. `hint` identifies it in bundles, as cosign does."""

    key: "ec.EllipticCurvePublicKey"
    hint: str

    @classmethod
    def of(cls, key: "ec.EllipticCurvePublicKey") -> Self:
        """Wrap a key of `cryptography`."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return cls(key=key, hint=_hint(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)))

    @classmethod
    def parse(cls, pem: bytes) -> Self:
        """Parse a key. Raises FormatError unless it is a public key on P-256 in PEM."""
        from cryptography.hazmat.primitives.asymmetric import ec

        if der := _usual_der(pem):
            # Otherwise, not a point on the curve: cryptography says so below.
            with contextlib.suppress(ValueError):
                point = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), der[-_POINT_BYTES:])
                return cls(key=point, hint=_hint(der))
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization

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
        """Tell whether a signature in DER is by this key, over the content."""
        from cryptography.exceptions import InvalidSignature

        try:
            self.key.verify(signature, content, _for_verification())
        except InvalidSignature:
            return False
        return True

    def to_pem(self) -> bytes:
        """Return the key in PEM."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return self.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class PrivateKey(Struct, frozen=True, kw_only=True):
    """A key to sign with."""

    key: "ec.EllipticCurvePrivateKey"

    def __repr__(self) -> str:
        return "PrivateKey()"

    @classmethod
    def generate(cls) -> Self:
        """Generate a new key."""
        from cryptography.hazmat.primitives.asymmetric import ec

        return cls(key=ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def read(cls, path: Path, password: bytes) -> Self:
        """Read a key in PEM: plain, encrypted by PKCS #8, or encrypted by cosign. Raises UsageError."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

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
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        return self.key.sign(content, ec.ECDSA(hashes.SHA256()))

    def to_pem(self) -> bytes:
        """Return the key in PKCS #8, unencrypted."""
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def write(self, path: Path, password: bytes) -> None:
        """Write the key as cosign does, encrypted, and readable by its owner only."""
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        der = self.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        write_atomically(path, _seal(der, password), mode=0o600)


@functools.cache
def _for_verification() -> "ec.ECDSA":
    """Return ECDSA with SHA-256, to verify with.

    The initializer of ECDSA imports the rest of cryptography, only to know about deterministic signatures.
    """
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    class Ecdsa(ec.ECDSA):
        algorithm = hashes.SHA256()
        deterministic_signing = False

        def __init__(self) -> None:
            pass

    return Ecdsa()


def _hint(der: bytes) -> str:
    return base64.b64encode(hashlib.sha256(der).digest()).decode()


def _usual_der(pem: bytes) -> bytes | None:
    """Return the DER of a public key as everyone writes those on P-256; None if it looks any different."""
    lines = pem[:_KEY_FILE_LIMIT_BYTES].strip().splitlines()
    if [*lines[:1], *lines[-1:]] != [_PEM_HEAD, _PEM_END]:
        return None
    try:
        der = base64.b64decode(b"".join(lines[1:-1]), validate=True)
    except binascii.Error:
        return None
    uncompressed = der.startswith(_P256_HEAD + b"\x04") and len(der) == len(_P256_HEAD) + _POINT_BYTES
    return der if uncompressed else None


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
