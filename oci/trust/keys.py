# SPDX-License-Identifier: Apache-2.0
"""Key pairs, in PEM, and encrypted as `cosign generate-key-pair` does.

    P-256, P-384, P-521     ECDSA. We sign with SHA-256 on any curve, which is what `cosign verify` takes;
                            cosign 3 signs with SHA-384 and SHA-512 on the longer ones, which verify there
    RSA                     of 2048 to 4096 bits, PKCS #1 v1.5 with SHA-256, as cosign has it from every
                            KMS; SHA-384 and SHA-512 verify, too
    Ed25519                 also with a hash before it (RFC 8032, Ed25519ph), as cosign 3 signs

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

from rekindle.errors import FormatError, TrustError, UsageError
from rekindle.fields import Fields
from rekindle.files import write_atomically

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    PublicKeys = ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey
    PrivateKeys = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

_KEY_FILE_LIMIT_BYTES = 64 << 10
_LABELS = (b"ENCRYPTED SIGSTORE PRIVATE KEY", b"ENCRYPTED COSIGN PRIVATE KEY")
_SCRYPT = {"N": 65536, "r": 8, "p": 1}
_SCRYPT_LIMIT_BYTES = 256 << 20
# What precedes the coordinates of a point on P-256 in a SubjectPublicKeyInfo: RFC 5480, uncompressed.
_P256_HEAD = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
_POINT_BYTES = 65
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_RSA_BITS = range(2048, 4097)
_KINDS = "it must be ECDSA on P-256, P-384 or P-521, RSA of 2048 to 4096 bits, or Ed25519"
_COMMAND_SECONDS = 120.0  # somebody may have to touch a token
ALGORITHMS = ("p-256", "p-384", "p-521", "rsa-2048", "rsa-3072", "rsa-4096", "ed25519")
_PEM_HEAD, _PEM_END = b"-----BEGIN PUBLIC KEY-----", b"-----END PUBLIC KEY-----"


class PublicKey(Struct, frozen=True, kw_only=True):
    """A key to verify signatures with. `hint` identifies it in bundles, as cosign does."""

    key: "PublicKeys"
    hint: str

    @classmethod
    def of(cls, key: "PublicKeys") -> Self:
        """Wrap a key of `cryptography`."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return cls(key=key, hint=_hint(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)))

    @classmethod
    def parse(cls, pem: bytes) -> Self:
        """Parse a key in PEM. Raises FormatError for anything but a public key of a known kind."""
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
        return cls.checked(key)

    @classmethod
    def checked(cls, key: object) -> Self:
        """Wrap a key that may be of any kind. Raises FormatError for an unknown one."""
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

        match key:
            case ec.EllipticCurvePublicKey() if key.curve.name in _CURVES:
                return cls.of(key)
            case rsa.RSAPublicKey() if key.key_size in _RSA_BITS:
                return cls.of(key)
            case ed25519.Ed25519PublicKey():
                return cls.of(key)
        raise FormatError(f"a public key of another kind: {_kind_of(key)}", cause=_KINDS)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a key file. Raises UsageError if it cannot be used."""
        try:
            return cls.parse(_read(path))
        except FormatError as error:
            raise UsageError(
                f"{path} cannot be used to verify",
                cause=error.summary,
            ) from None

    def verifies(self, signature: bytes, content: bytes) -> bool:
        """Tell whether a signature, ECDSA's in DER, is by this key, over the content."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec

        if not (isinstance(self.key, ec.EllipticCurvePublicKey) and self.key.curve.name == _CURVES[0]):
            return self._verifies_otherwise(signature, content)
        try:
            self.key.verify(signature, content, _for_verification())
        except InvalidSignature:
            return False
        return True

    def _verifies_otherwise(self, signature: bytes, content: bytes) -> bool:
        """Tell the same of a key that is not on P-256, with what most restores need not import."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding

        key = self.key
        if isinstance(key, ed25519.Ed25519PublicKey):
            with contextlib.suppress(InvalidSignature):
                key.verify(signature, content)
                return True
            return _verifies_prehashed(key.public_bytes_raw(), signature, content)
        for algorithm in (hashes.SHA256(), hashes.SHA384(), hashes.SHA512()):
            with contextlib.suppress(InvalidSignature):
                if isinstance(key, ec.EllipticCurvePublicKey):
                    key.verify(signature, content, ec.ECDSA(algorithm))
                else:
                    key.verify(signature, content, padding.PKCS1v15(), algorithm)
                return True
        return False

    def to_pem(self) -> bytes:
        """Return the key in PEM."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return self.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


class PrivateKey(Struct, frozen=True, kw_only=True):
    """A key to sign with."""

    key: "PrivateKeys"

    def __repr__(self) -> str:
        return "PrivateKey()"

    @classmethod
    def generate(cls, algorithm: str = "p-256") -> Self:
        """Generate a new key, of one of the `ALGORITHMS`."""
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

        curves: dict[str, type[ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1]]
        curves = {"p-256": ec.SECP256R1, "p-384": ec.SECP384R1, "p-521": ec.SECP521R1}
        if curve := curves.get(algorithm):
            return cls(key=ec.generate_private_key(curve()))
        if algorithm == "ed25519":
            return cls(key=ed25519.Ed25519PrivateKey.generate())
        return cls(key=rsa.generate_private_key(65537, int(algorithm.removeprefix("rsa-"))))

    @classmethod
    def read(cls, path: Path, password: bytes) -> Self:
        """Read a key in PEM: plain, encrypted by PKCS #8, or encrypted by cosign. Raises UsageError."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization

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
        try:
            PublicKey.checked(key.public_key())
        except FormatError:
            problem = f"it is a key of another kind: {_kind_of(key.public_key())}"
            raise UsageError(f"{path} cannot be used to sign", cause=problem, hint=_KINDS) from None
        return cls(key=key)  # type: ignore[arg-type]

    @property
    def public(self) -> PublicKey:
        """The public key of the pair."""
        return PublicKey.of(self.key.public_key())

    def sign(self, content: bytes) -> bytes:
        """Return the signature, of ECDSA in DER."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding

        match self.key:
            case ed25519.Ed25519PrivateKey():
                return self.key.sign(content)
            case ec.EllipticCurvePrivateKey():
                return self.key.sign(content, ec.ECDSA(hashes.SHA256()))
            case _:
                return self.key.sign(content, padding.PKCS1v15(), hashes.SHA256())

    def to_pem(self) -> bytes:
        """Return the key in PKCS #8, unencrypted."""
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def write(self, path: Path, password: bytes) -> None:
        """Write the key as cosign does, encrypted, and readable by its owner only."""
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

        der = self.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        write_atomically(path, _seal(der, password), mode=0o600)


class CommandKey(Struct, frozen=True, kw_only=True):
    """A key in the hands of a command, as of a key management service. `public` is its other half.

    The command reads what is to be signed, and prints the signature, as it is or in base64.
    """

    command: tuple[str, ...]
    public: PublicKey

    def sign(self, content: bytes) -> bytes:
        """Return the signature, verified. Raises TrustError."""
        from rekindle import run

        name = run.replay(self.command)
        try:
            status, answer = run.ask(self.command, content, timeout=_COMMAND_SECONDS)
        except OSError as error:
            raise TrustError("the command to sign with cannot be run", cause=f"{name}: {error}") from None
        if status != 0:
            raise TrustError("the command to sign with fails", cause=f"{name} exits with {status}")
        found = [answer]
        with contextlib.suppress(binascii.Error):
            found.append(base64.b64decode(b"".join(answer.split()), validate=True))
        for signature in found:
            if signature and self.public.verifies(signature, content):
                return signature
        raise TrustError(
            "the command to sign with does not print a signature by the key",
            cause=f"{name} prints {len(answer)} bytes; the key is {self.public.hint}",
            hint="docs/trust.md says what it has to print",
        )


SigningKey = PrivateKey | CommandKey


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


def _verifies_prehashed(key: bytes, signature: bytes, content: bytes) -> bool:
    """Verify Ed25519ph, which cryptography does not have."""
    from nacl import bindings
    from nacl.exceptions import BadSignatureError

    if len(signature) != bindings.crypto_sign_BYTES:
        return False
    state = bindings.crypto_sign_ed25519ph_state()
    bindings.crypto_sign_ed25519ph_update(state, content)
    try:
        return bool(bindings.crypto_sign_ed25519ph_final_verify(state, signature, key))
    except BadSignatureError:
        return False


def _kind_of(key: object) -> str:
    """Describe a key that cannot be used."""
    size = getattr(key, "key_size", None)
    curve = getattr(getattr(key, "curve", None), "name", None)
    name = type(key).__name__.lstrip("_").removesuffix("PublicKey")
    return f"{name} on {curve}" if curve else f"{name} of {size} bits" if size else name


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
