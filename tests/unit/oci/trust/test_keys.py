# SPDX-License-Identifier: Apache-2.0
"""Key pairs, and what is signed with them: in our hands, in cosign's, and in hostile ones."""

import base64
import contextlib
import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa, x25519
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from oci.trust import bundle as bundles
from oci.trust.bundle import Bundle, SimpleSignature
from oci.trust.keys import ALGORITHMS, CommandKey, PrivateKey, PublicKey
from oci.trust.statement import COSIGN_SIGN, PAYLOAD_TYPE, Envelope, Statement, encode
from rekindle.digest import Digest
from rekindle.errors import FormatError, TrustError, UsageError
from tests.conftest import COSIGN, COSIGN_2
from tests.servers.sigstore import Sigstore

PASSWORD = b"a pass phrase, with \xc3\xa4"
KEY = PrivateKey.generate()
OTHER = PrivateKey.generate()
STATEMENT = Statement(
    subject=Digest.of_bytes(b"an index"), predicate_type=COSIGN_SIGN, predicate={"of": ["é", 1.5, None]}
)
BUNDLE = Bundle.sign(STATEMENT, KEY)
SIMPLE = SimpleSignature.sign(STATEMENT.subject, "registry.example.com/models/tiny", KEY)


def document() -> dict[str, Any]:
    """The bundle, to be changed."""
    found: dict[str, Any] = json.loads(BUNDLE.content)
    return found


def pem(key: Any, *, password: bytes | None = None, old: bool = False) -> bytes:
    """A private key of any kind in PEM."""
    content: bytes = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL if old else serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption(),
    )
    return content


def public_pem(key: Any) -> bytes:
    content: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return content


# Key files.


@pytest.mark.parametrize("password", [b"", PASSWORD, b"x" * 1000])
def test_a_key_that_was_sealed_opens_with_its_password(tmp_path: Path, password: bytes) -> None:
    path = tmp_path / "cosign.key"
    KEY.write(path, password)
    assert PrivateKey.read(path, password).public == KEY.public
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="cannot be used to sign") as caught:
        PrivateKey.read(path, password + b"!")
    assert "wrong password" in caught.value.cause


def test_the_same_key_is_never_sealed_the_same_way(tmp_path: Path) -> None:
    for name in ("one", "two"):
        KEY.write(tmp_path / name, PASSWORD)
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()
    assert KEY.to_pem().splitlines()[1] not in (tmp_path / "one").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        KEY.to_pem(),
        pem(KEY.key, old=True),
        pem(KEY.key, password=PASSWORD),
        KEY.to_pem().replace(b"\n", b"\r\n"),
    ],
)
def test_keys_of_openssl_are_read_too(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    assert PrivateKey.read(tmp_path / "key", PASSWORD).public == KEY.public


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file as cosign has it. Sealing takes a while, as it should."""
    path = tmp_path_factory.mktemp("sealed") / "cosign.key"
    KEY.write(path, PASSWORD)
    return path.read_bytes()


def reseal(sound: bytes, **changes: Any) -> bytes:
    """The file with other content: names by their way, joined by `__`; None to leave something out."""
    lines = sound.splitlines()
    content = json.loads(base64.b64decode(b"".join(lines[1:-1])))
    for name, value in changes.items():
        *path, last = name.split("__")
        place = content
        for part in path:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return b"\n".join([lines[0], base64.b64encode(json.dumps(content).encode()), lines[-1]])


def test_a_sealed_key_may_stand_on_one_line(tmp_path: Path, sound: bytes) -> None:
    (tmp_path / "key").write_bytes(reseal(sound))
    assert PrivateKey.read(tmp_path / "key", PASSWORD).public == KEY.public


@pytest.mark.parametrize(
    "changes",
    [
        {"kdf": None},
        {"kdf": []},
        {"kdf__name": "argon2"},
        {"kdf__salt": "§"},
        {"kdf__salt": None},
        {"kdf__params": {}},
        {"kdf__params__N": 65535},
        {"kdf__params__N": 0},
        {"kdf__params__N": -65536},
        {"kdf__params__N": 1 << 40},
        {"kdf__params__N": 1 << 20, "kdf__params__r": 32},
        {"kdf__params__N": "65536"},
        {"kdf__params__r": 0},
        {"kdf__params__p": 1 << 30},
        {"cipher": {"name": "aes"}},
        {"cipher__nonce": ""},
        {"cipher__nonce": "AAAA"},
        {"ciphertext": ""},
        {"ciphertext": "AAAA"},
        {"ciphertext": 7},
        {"ciphertext": base64.b64encode(bytes(200)).decode()},
    ],
    ids=str,
)
def test_a_sealed_key_that_is_not_as_it_should_be_is_an_error(
    tmp_path: Path, sound: bytes, changes: dict[str, Any]
) -> None:
    (tmp_path / "key").write_bytes(reseal(sound, **changes))
    with pytest.raises(UsageError, match="cannot be used to sign"):
        PrivateKey.read(tmp_path / "key", PASSWORD)


@pytest.mark.parametrize("length", [0, 1, 30, 60, 100, 150, -100, -80, -60])
def test_a_key_that_was_cut_off_is_an_error(tmp_path: Path, sound: bytes, length: int) -> None:
    for content in (sound, KEY.to_pem(), pem(KEY.key, password=PASSWORD)):
        (tmp_path / "key").write_bytes(content[:length])
        with pytest.raises(UsageError):
            PrivateKey.read(tmp_path / "key", PASSWORD)
    (tmp_path / "key").write_bytes(KEY.public.to_pem()[: min(length, 100)])
    with pytest.raises(UsageError):
        PublicKey.read(tmp_path / "key")


OTHER_KINDS = [
    ec.generate_private_key(ec.SECP256K1()),
    ec.generate_private_key(ec.BrainpoolP256R1()),
    rsa.generate_private_key(65537, 1024),
    x25519.X25519PrivateKey.generate(),
    ed448.Ed448PrivateKey.generate(),
]


@pytest.mark.parametrize("key", OTHER_KINDS, ids=lambda key: type(key).__name__)
def test_keys_of_another_kind_are_refused(tmp_path: Path, key: Any) -> None:
    (tmp_path / "key").write_bytes(pem(key))
    with pytest.raises(UsageError, match="cannot be used to sign") as caught:
        PrivateKey.read(tmp_path / "key", b"")
    assert "P-256" in caught.value.hint
    (tmp_path / "pub").write_bytes(public_pem(key))
    with pytest.raises(UsageError, match="cannot be used to verify") as caught:
        PublicKey.read(tmp_path / "pub")
    assert "another kind" in caught.value.cause
    assert "P-256" in caught.value.cause


MADE = {algorithm: PrivateKey.generate(algorithm) for algorithm in ALGORITHMS if algorithm != "rsa-4096"}


@pytest.mark.parametrize("algorithm", MADE)
def test_every_kind_of_key_signs_and_verifies(algorithm: str, tmp_path: Path) -> None:
    key = MADE[algorithm]
    key.write(tmp_path / "sealed", PASSWORD)
    (tmp_path / "plain").write_bytes(pem(key.key))
    (tmp_path / "pub").write_bytes(key.public.to_pem())
    public = PublicKey.read(tmp_path / "pub")
    for name in ("sealed", "plain"):
        again = PrivateKey.read(tmp_path / name, PASSWORD)
        assert again.public.hint == public.hint
        made = Bundle.sign(STATEMENT, again)
        assert made.statement(public) == STATEMENT
    simple = SimpleSignature.sign(STATEMENT.subject, "x", key)
    assert simple.statement(public) is not None
    signature = key.sign(b"content")
    assert public.verifies(signature, b"content")
    for other in ({**MADE, "other": PrivateKey.generate(algorithm)}).items():
        if other[0] != algorithm:
            assert not other[1].public.verifies(signature, b"content")
    for content, changed in ((b"Content", signature), (b"content", b"\0" + signature[1:])):
        assert not public.verifies(changed, content)
    for wrong in (b"", b"\0", signature[:-1], signature + b"\0", signature * 2, bytes(64), bytes(1000)):
        assert not public.verifies(wrong, b"content")


@pytest.mark.parametrize("algorithm", [hashes.SHA256(), hashes.SHA384(), hashes.SHA512()])
def test_signatures_with_any_of_three_hashes_verify(algorithm: hashes.HashAlgorithm) -> None:
    """cosign 3 signs with the hash that belongs to the curve, cosign 2 with SHA-256."""
    for name in ("p-384", "p-521"):
        key = MADE[name].key
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert MADE[name].public.verifies(key.sign(b"content", ec.ECDSA(algorithm)), b"content")
    key = MADE["rsa-2048"].key
    assert isinstance(key, rsa.RSAPrivateKey)
    signature = key.sign(b"content", padding.PKCS1v15(), algorithm)
    assert MADE["rsa-2048"].public.verifies(signature, b"content")


@pytest.mark.parametrize("algorithm", [hashes.SHA1(), hashes.MD5()])
def test_signatures_with_a_weak_hash_do_not_verify(algorithm: hashes.HashAlgorithm) -> None:
    key = MADE["rsa-2048"].key
    assert isinstance(key, rsa.RSAPrivateKey)
    signature = key.sign(b"content", padding.PKCS1v15(), algorithm)
    assert not MADE["rsa-2048"].public.verifies(signature, b"content")


def test_ed25519_with_a_hash_before_it_verifies() -> None:
    """The vector of RFC 8032, section 7.3."""
    key = bytes.fromhex("ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf")
    signature = bytes.fromhex(
        "98a70222f0b8121aa9d30f813d683f809e462b469c7ff87639499bb94e6dae41"
        "31f85042463c2a355a2003d062adf5aaa10b8c61e636062aaad11c2a26083406"
    )
    public = PublicKey.of(ed25519.Ed25519PublicKey.from_public_bytes(key))
    assert public.verifies(signature, b"abc")
    assert not public.verifies(signature, b"abd")


# Keys in the hands of a command.


def command(tmp_path: Path, script: str, key: PrivateKey = KEY) -> CommandKey:
    """A stand-in for the client of a key management service: a shell script."""
    (tmp_path / "secret.pem").write_bytes(pem(key.key))
    return CommandKey(command=("sh", "-c", script, "sign", str(tmp_path / "secret.pem")), public=key.public)


OPENSSL = 'openssl dgst -sha256 -sign "$1"'


@pytest.mark.parametrize("script", [OPENSSL, f"{OPENSSL} | base64", f"{OPENSSL} | base64 -w 0"])
@pytest.mark.parametrize("algorithm", ["p-256", "p-384", "rsa-2048"])
def test_a_command_signs(tmp_path: Path, script: str, algorithm: str) -> None:
    key = command(tmp_path, script, MADE[algorithm])
    made = Bundle.sign(STATEMENT, key)
    assert made.statement(MADE[algorithm].public) == STATEMENT


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "exits with 3"),
        ("true", "prints 0 bytes"),
        ("cat", "prints"),
        (f"{OPENSSL} | head -c 20", "prints 20 bytes"),
        ("head -c 9999999 /dev/zero", "prints"),
        ('openssl dgst -sha1 -sign "$1"', "prints"),
    ],
)
def test_a_command_that_does_not_sign_is_an_error(tmp_path: Path, script: str, said: str) -> None:
    with pytest.raises(TrustError, match="command to sign with") as caught:
        Bundle.sign(STATEMENT, command(tmp_path, script))
    assert said in caught.value.cause


def test_a_command_that_signs_with_another_key_is_an_error(tmp_path: Path) -> None:
    key = structs.replace(command(tmp_path, OPENSSL), public=OTHER.public)
    with pytest.raises(TrustError, match="does not print a signature by the key"):
        key.sign(b"content")
    with pytest.raises(TrustError, match="cannot be run"):
        CommandKey(command=(str(tmp_path / "nowhere"),), public=OTHER.public).sign(b"content")


def test_one_half_is_not_taken_for_the_other(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY.to_pem())
    (tmp_path / "pub").write_bytes(KEY.public.to_pem())
    with pytest.raises(UsageError):
        PrivateKey.read(tmp_path / "pub", b"")
    with pytest.raises(UsageError):
        PublicKey.read(tmp_path / "key")


def test_a_key_that_is_not_there_or_is_no_file_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            PrivateKey.read(path, b"")
        with pytest.raises(UsageError, match="cannot be read"):
            PublicKey.read(path)


def test_an_encrypted_key_of_openssl_wants_its_password(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(pem(KEY.key, password=PASSWORD))
    for wrong in (b"", b"wrong"):
        with pytest.raises(UsageError, match="cannot be used to sign"):
            PrivateKey.read(tmp_path / "key", wrong)


def test_a_private_key_is_not_shown() -> None:
    secret = KEY.to_pem().splitlines()[1].decode()
    assert secret not in f"{KEY} {KEY!r} {[KEY]}"


# Signatures.


def test_a_signature_holds_for_its_key_and_content_only() -> None:
    signature = KEY.sign(b"content")
    assert KEY.public.verifies(signature, b"content")
    assert not KEY.public.verifies(signature, b"Content")
    assert not OTHER.public.verifies(signature, b"content")


@pytest.mark.parametrize(
    "signature",
    [
        *(b"", b"\0", b"\x30\x00", b"x" * 1000),
        bytes.fromhex("3006020100020100"),  # r and s are zero
        bytes.fromhex("3006020101020101"),
    ],
)
def test_what_is_no_signature_does_not_hold(signature: bytes) -> None:
    assert not KEY.public.verifies(signature, b"content")


def test_the_example_of_dsse() -> None:
    # From the protocol's specification, secure-systems-lab/dsse, protocol.md.
    encoded = encode("http://example.com/HelloWorld", b"hello world")
    assert encoded == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert encode("é", b"") == "DSSEv1 2 é 0 ".encode()  # lengths are those of bytes


@given(st.text(max_size=20), st.binary(max_size=20), st.text(max_size=20), st.binary(max_size=20))
def test_no_two_payloads_are_encoded_the_same_way(
    kind: str, payload: bytes, other_kind: str, other: bytes
) -> None:
    same = (kind, payload) == (other_kind, other)
    assert (encode(kind, payload) == encode(other_kind, other)) == same


def test_a_bundle_says_what_was_signed_to_whoever_has_the_key() -> None:
    parsed = Bundle.parse(BUNDLE.content)
    assert parsed == BUNDLE
    assert parsed.hint == KEY.public.hint
    assert parsed.statement(KEY.public) == STATEMENT
    assert parsed.statement(OTHER.public) is None


def test_a_hint_is_a_hint_only() -> None:
    changed = document()
    changed["verificationMaterial"]["publicKey"]["hint"] = OTHER.public.hint
    parsed = Bundle.parse(json.dumps(changed).encode())
    assert parsed.statement(KEY.public) == STATEMENT
    assert parsed.statement(OTHER.public) is None


def test_a_key_that_is_asked_about_a_certificates_signature_knows_nothing_of_it() -> None:
    changed = document()
    changed["verificationMaterial"] = {"certificate": {"rawBytes": ""}}
    assert Bundle.parse(json.dumps(changed).encode()).statement(KEY.public) is None


def test_an_older_signature_says_the_same() -> None:
    parsed = SimpleSignature.of(SIMPLE.payload, base64.b64encode(SIMPLE.signature).decode())
    found = parsed.statement(KEY.public)
    assert found == Statement(subject=STATEMENT.subject, predicate_type=COSIGN_SIGN, predicate={})
    assert parsed.statement(OTHER.public) is None


def test_neither_kind_of_signature_is_taken_for_the_other() -> None:
    # The same key signs both; what tells them apart is DSSE's encoding.
    (signature,) = BUNDLE.envelope.signatures
    assert SimpleSignature(payload=BUNDLE.envelope.payload, signature=signature).statement(KEY.public) is None
    encoded = SimpleSignature(payload=BUNDLE.envelope.signed, signature=signature)
    with pytest.raises(FormatError):
        encoded.statement(KEY.public)
    envelope = Envelope(payload=SIMPLE.payload, payload_type=PAYLOAD_TYPE, signatures=(SIMPLE.signature,))
    assert Bundle(content=b"", envelope=envelope, hint="").statement(KEY.public) is None


def simple(payload: object) -> SimpleSignature:
    content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return SimpleSignature(payload=content, signature=KEY.sign(content))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"no JSON",
        [],
        {},
        {"critical": None},
        {"critical": {"type": "atomic container signature", "image": {}}},
        {"critical": {"type": "cosign container image signature"}},
        {"critical": {"type": "cosign container image signature", "image": {"docker-manifest-digest": "x"}}},
    ],
    ids=str,
)
def test_an_older_signature_on_something_else_is_an_error(payload: object) -> None:
    with pytest.raises(FormatError):
        simple(payload).statement(KEY.public)


# Bundles and statements that are not as they should be.


def _set(*path: str | int, to: object) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        for part in path[:-1]:
            found = found[part]
        found[path[-1]] = to

    return change


def _drop(*path: str | int) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        for part in path[:-1]:
            found = found[part]
        del found[path[-1]]

    return change


_SIGNATURE = {"sig": base64.b64encode(KEY.sign(b"")).decode()}
_CERTIFICATE = {"rawBytes": "AAAA"}
BROKEN = {
    "no type": _drop("mediaType"),
    "version 0.1": _set("mediaType", to="application/vnd.dev.sigstore.bundle+json;version=0.1"),
    "version 0.4": _set("mediaType", to="application/vnd.dev.sigstore.bundle.v0.4+json"),
    "type is a list": _set("mediaType", to=[bundles.MEDIA_TYPE]),
    "no material": _drop("verificationMaterial"),
    "neither key nor certificate": _set("verificationMaterial", to={}),
    "key and certificate": _set("verificationMaterial", "certificate", to=_CERTIFICATE),
    "key is null": _set("verificationMaterial", "publicKey", to=None),
    "hint is a number": _set("verificationMaterial", "publicKey", "hint", to=1),
    "no envelope": _drop("dsseEnvelope"),
    "envelope is a list": _set("dsseEnvelope", to=[]),
    "no signatures": _drop("dsseEnvelope", "signatures"),
    "signatures are none": _set("dsseEnvelope", "signatures", to=[]),
    "two signatures": _set("dsseEnvelope", "signatures", to=[_SIGNATURE, _SIGNATURE]),
    "many signatures": _set("dsseEnvelope", "signatures", to=[_SIGNATURE] * 100),
    "signature is text": _set("dsseEnvelope", "signatures", to=["AAAA"]),
    "signature is not in base64": _set("dsseEnvelope", "signatures", 0, "sig", to="§"),
    "signature is cut off": _set("dsseEnvelope", "signatures", 0, "sig", to="AAA"),
    "other payload type": _set("dsseEnvelope", "payloadType", to="application/json"),
    "payload type in capitals": _set("dsseEnvelope", "payloadType", to=PAYLOAD_TYPE.upper()),
    "no payload type": _drop("dsseEnvelope", "payloadType"),
    "payload is not in base64": _set("dsseEnvelope", "payload", to="{}"),
    "payload is a surrogate": _set("dsseEnvelope", "payload", to="\ud800"),
    "payload is huge": _set("dsseEnvelope", "payload", to="A" * (3 << 20)),
    "all is huge": _set("more", to="A" * bundles.LIMIT_BYTES),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_a_bundle_that_is_not_as_it_should_be_is_an_error(change: Callable[[Any], None]) -> None:
    changed = document()
    change(changed)
    with pytest.raises(FormatError):
        Bundle.parse(json.dumps(changed).encode())


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, BUNDLE.content[:-1], BUNDLE.content * 2]
)
def test_what_is_no_json_object_is_no_bundle(content: bytes) -> None:
    with pytest.raises(FormatError):
        Bundle.parse(content)


def test_a_payload_of_another_type_is_not_verified_under_the_right_one() -> None:
    payload = STATEMENT.to_bytes()
    signature = KEY.sign(encode("application/json", payload))
    envelope = Envelope(payload=payload, payload_type=PAYLOAD_TYPE, signatures=(signature,))
    assert Bundle(content=b"", envelope=envelope, hint="").statement(KEY.public) is None


def _subject(digest: object) -> dict[str, object]:
    return {"name": "", "digest": digest}


SHA256 = {"sha256": STATEMENT.subject.hex}
BROKEN_STATEMENTS = {
    "no type": _drop("_type"),
    "other type": _set("_type", to="https://in-toto.io/Statement/v2"),
    "no subjects": _drop("subject"),
    "subjects are none": _set("subject", to=[]),
    "two subjects": _set("subject", to=[_subject(SHA256), _subject(SHA256)]),
    "subject is an object": _set("subject", to=_subject(SHA256)),
    "subject is text": _set("subject", to=[STATEMENT.subject]),
    "no digest": _set("subject", to=[{"name": "x"}]),
    "digest is text": _set("subject", to=[_subject(STATEMENT.subject)]),
    "other algorithm": _set("subject", to=[_subject({"sha512": "0" * 128})]),
    "digest is short": _set("subject", to=[_subject({"sha256": "00"})]),
    "digest in capitals": _set("subject", to=[_subject({"sha256": "AB" * 32})]),
    "digest with more": _set("subject", to=[_subject({"sha256": "ab" * 32 + "\n"})]),
    "no predicate type": _drop("predicateType"),
    "predicate type is null": _set("predicateType", to=None),
    "predicate is a list": _set("predicate", to=[]),
    "huge": _set("predicate", to={"more": "A" * (1 << 20)}),
}


@pytest.mark.parametrize("change", BROKEN_STATEMENTS.values(), ids=BROKEN_STATEMENTS.keys())
def test_a_statement_that_is_not_as_it_should_be_is_an_error(change: Callable[[Any], None]) -> None:
    changed = json.loads(STATEMENT.to_bytes())
    change(changed)
    payload = json.dumps(changed).encode()
    with pytest.raises(FormatError):
        Statement.parse(payload)
    envelope = Envelope(
        payload=payload, payload_type=PAYLOAD_TYPE, signatures=(KEY.sign(encode(PAYLOAD_TYPE, payload)),)
    )
    with pytest.raises(FormatError):
        Bundle(content=b"", envelope=envelope, hint="").statement(KEY.public)


def test_a_statement_needs_no_predicate() -> None:
    changed = json.loads(STATEMENT.to_bytes())
    del changed["predicate"]
    assert Statement.parse(json.dumps(changed).encode()).predicate == {}


# Fuzzing: whatever comes, it is understood or refused, and nothing else comes out.

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner)),
    max_leaves=8,
)


def places(value: object) -> list[tuple[str | int, ...]]:
    """Where something may be changed in a document."""
    found: list[tuple[str | int, ...]] = []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        found += [(name,), *((name, *rest) for rest in places(each))]
    return found


def broken(sound: object) -> st.SearchStrategy[bytes]:
    """A document with one or two values that are others."""
    changes = st.lists(st.tuples(st.sampled_from(places(sound)), JSON), min_size=1, max_size=2)

    def apply(wanted: list[tuple[tuple[str | int, ...], object]]) -> bytes:
        changed = json.loads(json.dumps(sound))
        for path, value in sorted(wanted, key=lambda each: -len(each[0])):
            _set(*path, to=value)(changed)
        return json.dumps(changed).encode()

    return changes.map(apply)


def cut(content: bytes) -> st.SearchStrategy[bytes]:
    """Content with a stretch of it replaced."""
    return st.tuples(st.integers(0, len(content)), st.integers(0, 20), st.binary(max_size=20)).map(
        lambda how: content[: how[0]] + how[2] + content[how[0] + how[1] :]
    )


@given(st.one_of(st.binary(max_size=200), broken(document()), cut(BUNDLE.content)))
def test_any_bundle_is_one_or_a_format_error(content: bytes) -> None:
    try:
        statement = Bundle.parse(content).statement(KEY.public)
    except FormatError:
        return
    assert statement in (None, STATEMENT)


@given(
    st.one_of(st.binary(max_size=200), broken(json.loads(STATEMENT.to_bytes())), cut(STATEMENT.to_bytes()))
)
def test_any_statement_is_one_or_a_format_error(content: bytes) -> None:
    try:
        statement = Statement.parse(content)
    except FormatError:
        return
    assert Statement.parse(statement.to_bytes()).subject == statement.subject


@given(JSON)
def test_any_envelope_is_one_or_a_format_error(value: object) -> None:
    with pytest.raises(FormatError):
        Envelope.from_json(value)


@given(st.one_of(st.binary(max_size=200), cut(SIMPLE.payload)), st.text(max_size=40))
def test_any_older_signature_is_one_or_a_format_error(payload: bytes, signature: str) -> None:
    with contextlib.suppress(FormatError):
        SimpleSignature.of(payload, signature)
    with contextlib.suppress(FormatError):
        simple(payload).statement(KEY.public)


@given(st.one_of(st.binary(max_size=200), cut(KEY.public.to_pem())))
def test_any_public_key_is_one_or_a_format_error(content: bytes) -> None:
    with contextlib.suppress(FormatError):
        PublicKey.parse(content)


# cosign, in both directions. Nothing may be looked for in the network, so its home is empty.

BOTH = pytest.mark.parametrize("program", [COSIGN, COSIGN_2], ids=["3.1", "2.5"])
NO_SERVICES = {
    "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
    "rekorTlogConfig": {"selector": "ANY"},
    "tsaConfig": {"selector": "ANY"},
}


def cosign(
    program: Path, home: Path, *words: object, password: bytes = PASSWORD
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(program), *map(str, words)],
        env={"HOME": str(home), "PATH": os.environ["PATH"], "COSIGN_PASSWORD": password.decode()},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.registry
@BOTH
def test_we_read_the_key_pairs_of_cosign(tmp_path: Path, program: Path) -> None:
    assert cosign(program, tmp_path, "generate-key-pair").returncode == 0
    key = PrivateKey.read(tmp_path / "cosign.key", PASSWORD)
    assert key.public == PublicKey.read(tmp_path / "cosign.pub")
    with pytest.raises(UsageError, match="cannot be used to sign"):
        PrivateKey.read(tmp_path / "cosign.key", b"wrong")


@pytest.mark.registry
@BOTH
def test_cosign_reads_our_key_pairs(tmp_path: Path, program: Path) -> None:
    KEY.write(tmp_path / "our.key", PASSWORD)
    done = cosign(program, tmp_path, "public-key", "--key", "our.key")
    assert done.returncode == 0, done.stderr
    assert PublicKey.parse(done.stdout.encode()) == KEY.public
    assert cosign(program, tmp_path, "public-key", "--key", "our.key", password=b"wrong").returncode != 0


@pytest.mark.registry
@BOTH
def test_cosign_verifies_our_bundles(tmp_path: Path, program: Path) -> None:
    (tmp_path / "bundle").write_bytes(BUNDLE.content)
    for name, key in (("our.pub", KEY), ("other.pub", OTHER)):
        (tmp_path / name).write_bytes(key.public.to_pem())

    # 2.5 wants a trusted root, whether it needs one or not, and would fetch it.
    (tmp_path / "root").write_text(json.dumps(Sigstore().trusted_root))
    (tmp_path / "blob").write_bytes(b"an index")
    (tmp_path / "other").write_bytes(b"another index")

    def verify(key: str, blob: str) -> "subprocess.CompletedProcess[str]":
        return cosign(
            program,
            tmp_path,
            *("verify-blob-attestation", "--bundle", "bundle", "--key", key, "--insecure-ignore-tlog"),
            *(["--new-bundle-format", "--trusted-root", "root"] if program == COSIGN_2 else []),
            *("--type", COSIGN_SIGN, blob),
        )

    done = verify("our.pub", "blob")
    assert done.returncode == 0, done.stderr
    assert verify("other.pub", "blob").returncode != 0
    assert verify("our.pub", "other").returncode != 0


@pytest.mark.registry
def test_we_verify_what_cosign_signs_with_our_key(tmp_path: Path) -> None:
    KEY.write(tmp_path / "our.key", PASSWORD)
    (tmp_path / "blob").write_bytes(b"an index")
    (tmp_path / "predicate").write_text(json.dumps(dict(STATEMENT.predicate)))
    (tmp_path / "signing").write_text(json.dumps(NO_SERVICES))
    done = cosign(
        COSIGN,
        tmp_path,
        *("attest-blob", "--key", "our.key", "--bundle", "bundle", "--signing-config", "signing"),
        *("--predicate", "predicate", "--type", COSIGN_SIGN, "blob"),
    )
    assert done.returncode == 0, done.stderr
    made = Bundle.parse((tmp_path / "bundle").read_bytes())
    assert made.hint == KEY.public.hint
    assert made.statement(KEY.public) == STATEMENT
    assert made.statement(OTHER.public) is None


@pytest.mark.registry
def test_we_verify_what_older_cosign_signs_with_our_key(tmp_path: Path) -> None:
    KEY.write(tmp_path / "our.key", PASSWORD)
    (tmp_path / "payload").write_bytes(SIMPLE.payload)
    words = ("sign-blob", "--key", "our.key", "--tlog-upload=false", "--yes", "payload")
    done = cosign(COSIGN_2, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    made = SimpleSignature.of(SIMPLE.payload, done.stdout.strip())
    assert made.statement(KEY.public) == SIMPLE.statement(KEY.public)
    assert made.statement(OTHER.public) is None


@given(st.binary(min_size=32, max_size=32))
def test_a_key_is_read_by_its_usual_form_as_by_cryptography(seed: bytes) -> None:
    number = int.from_bytes(seed) % (1 << 255) + 1
    content = public_pem(ec.derive_private_key(number, ec.SECP256R1()))
    usual, general = PublicKey.parse(content), PublicKey.parse(b"a comment\n" + content)
    assert usual == general
    assert usual.to_pem() == content


def test_a_usual_form_without_a_point_on_the_curve_is_refused() -> None:
    der = base64.b64decode(b"".join(KEY.public.to_pem().splitlines()[1:-1]))
    for spoiled in (
        der[:-1] + bytes([der[-1] ^ 1]),
        der[:26] + b"\4" + bytes(64),
        der[:26] + b"\4" + b"\xff" * 64,
    ):
        body = base64.encodebytes(spoiled)
        with pytest.raises(FormatError, match="not a public key in PEM"):
            PublicKey.parse(b"-----BEGIN PUBLIC KEY-----\n" + body + b"-----END PUBLIC KEY-----\n")
