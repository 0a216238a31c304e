# SPDX-License-Identifier: Apache-2.0
"""Keyless signatures, with a Sigstore on loopback: ours, cosign's, and all that must be refused."""

import base64
import copy
import dataclasses
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from msgspec import structs

from oci import media_types, transfer
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.progress import Limiter, Tally
from oci.reference import RegistryReference, parse
from oci.registry.access import Access
from oci.registry.repository import Repository
from oci.trust import attachments, keyless, log, verifier
from oci.trust.bundle import Bundle, SimpleSignature
from oci.trust.keyless import Signed
from oci.trust.keys import PrivateKey
from oci.trust.policy import Identity, TrustRule
from oci.trust.statement import COSIGN_SIGN, Statement
from rekindle.config import Config, Limits
from rekindle.digest import Digest
from rekindle.errors import FormatError, TrustError, UsageError
from tests.conftest import COSIGN, COSIGN_2, ROOT
from tests.servers.registry.docker_registry import DockerRegistry
from tests.servers.sigstore import IDENTITY, ISSUER, Key, Sigstore, dsse_entry, token

WORKFLOW = "https://ci.example.com/models/.ci/release.yml@refs/heads/main"
US = Identity(identity=IDENTITY, issuer=ISSUER)
STATEMENT = Statement(
    subject=Digest.of_bytes(b"an index"), predicate_type=COSIGN_SIGN, predicate={"of": {"text": "é", "n": 1}}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A Sigstore, and the files that describe it."""

    sigstore: Sigstore
    root: Path
    signing: Path
    config: Path

    def sign(self, **options: Any) -> Callable[[Statement], Bundle]:
        return keyless.signer(token=token(**options), trust_config=self.config)

    def verify(self, bundle: Bundle, *accepted: Identity) -> Signed | str:
        return keyless.verify(bundle, accepted or (US,), trusted_root=self.root)

    def forge(self, payload: bytes = STATEMENT.to_bytes(), **options: Any) -> dict[str, Any]:
        return self.sigstore.forge(payload, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with Sigstore() as sigstore:
        root, signing, config = sigstore.write(tmp_path_factory.mktemp("sigstore"))
        yield Place(sigstore=sigstore, root=root, signing=signing, config=config)


def bundle(document: object) -> Bundle:
    return Bundle.parse(json.dumps(document).encode())


def entry(document: dict[str, Any]) -> dict[str, Any]:
    """The log entry in a bundle."""
    found: dict[str, Any] = document["verificationMaterial"]["tlogEntries"][0]
    return found


def signed(found: Signed | str) -> Signed:
    assert isinstance(found, Signed), found
    return found


def flip(text: str) -> str:
    """Base64 of bytes of which the last is another."""
    content = bytearray(base64.b64decode(text))
    content[-1] ^= 1
    return base64.b64encode(content).decode()


# Signing and verifying.


def test_what_we_sign_we_verify(place: Place) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    found = signed(place.verify(place.sign()(STATEMENT)))
    assert found.statement == STATEMENT
    assert found.identity == US
    assert found.signed_at is not None
    assert before <= found.signed_at <= datetime.now(UTC)


def test_one_certificate_serves_for_several_statements(place: Place) -> None:
    sign = place.sign()
    made = [json.loads(sign(STATEMENT).content)["verificationMaterial"]["certificate"] for _ in range(2)]
    assert made[0] == made[1]


def test_a_workflow_is_an_identity_too(place: Place) -> None:
    who = Identity(identity=WORKFLOW, issuer=ISSUER)
    made = place.sign(identity=WORKFLOW)(STATEMENT)
    assert signed(place.verify(made, US, who)).identity == who
    assert isinstance(place.verify(made), str)


def test_a_statement_about_another_image_says_so(place: Place) -> None:
    # That it is about the image at hand is for `oci.trust.verifier` to see.
    other = Statement(subject=Digest.of_bytes(b"other"), predicate_type=COSIGN_SIGN, predicate={})
    assert signed(place.verify(place.sign()(other))).statement.subject == Digest.of_bytes(b"other")


def test_verifying_asks_nobody(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = bundle(place.forge())

    def refuse(*_: object) -> None:
        raise AssertionError("something was asked")

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert isinstance(place.verify(made), Signed)
    assert isinstance(keyless.verify(made, [US], trusted_root=None), str)  # the public good instance's root
    assert not list(tmp_path.iterdir())


def test_sigstore_is_imported_where_it_is_needed() -> None:
    code = "import sys; from oci.trust import keyless; sys.exit('sigstore' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)


# What must be refused. The forgeries are sound, but for one thing each.


def test_a_forgery_is_sound_but_for_what_is_asked_for(place: Place) -> None:
    assert signed(place.verify(bundle(place.forge()))).statement == STATEMENT


@pytest.mark.parametrize(
    "who",
    [
        Identity(identity="other@example.com", issuer=ISSUER),
        Identity(identity=IDENTITY, issuer="https://other.example.com"),
        Identity(identity=IDENTITY.upper(), issuer=ISSUER),
        Identity(identity=IDENTITY[:-1], issuer=ISSUER),
        Identity(identity=".*", issuer=".*"),
        Identity(identity=IDENTITY, issuer=ISSUER + "/"),
        Identity(identity=IDENTITY, issuer=""),
        Identity(identity="", issuer=ISSUER),
    ],
)
def test_nobody_else_is_taken_for_the_signer(place: Place, who: Identity) -> None:
    reason = place.verify(bundle(place.forge()), who)
    assert isinstance(reason, str)
    assert f"the policy does not accept {IDENTITY} (issuer {ISSUER})" in reason


def test_nobody_accepted_is_nobody(place: Place) -> None:
    assert isinstance(keyless.verify(bundle(place.forge()), [], trusted_root=place.root), str)


@pytest.mark.parametrize(
    ("identity", "issuer", "accepted"),
    [
        (r".*@example\.com", re.escape(ISSUER), True),
        (r".*", r"https://.*", True),
        (re.escape(IDENTITY), re.escape(ISSUER), True),
        (re.escape(IDENTITY[1:]), ".*", False),
        (re.escape(IDENTITY[:-1]), ".*", False),
        (".*", re.escape(ISSUER[:-1]), False),
        (".*", "", False),
        ("", ".*", False),
        (".*@evil\\.com", ".*", False),
    ],
)
def test_patterns_match_from_end_to_end(place: Place, identity: str, issuer: str, accepted: bool) -> None:
    made = place.sign()(STATEMENT)
    found = place.verify(made, Identity(identity_regexp=identity, issuer_regexp=issuer))
    if accepted:
        assert signed(found).identity == US, "the signer that is reported is the one in the certificate"
    else:
        assert isinstance(found, str)
    mixed = place.verify(made, Identity(identity_regexp=identity, issuer=ISSUER))
    assert isinstance(mixed, str) == (re.fullmatch(identity, IDENTITY) is None)


def test_identity_and_issuer_of_two_who_are_accepted_make_no_third(place: Place) -> None:
    made = bundle(place.forge(issuer="https://other.example.com"))
    others = (US, Identity(identity="other@example.com", issuer="https://other.example.com"))
    assert isinstance(place.verify(made, *others), str)


@pytest.mark.parametrize("part", ["certificateAuthorities", "ctlogs", "tlogs"])
def test_another_root_bears_nothing_out(place: Place, tmp_path: Path, part: str) -> None:
    root = json.loads(place.root.read_text())
    root[part] = Sigstore().trusted_root[part]
    (tmp_path / "root.json").write_text(json.dumps(root))
    reason = keyless.verify(bundle(place.forge()), [US], trusted_root=tmp_path / "root.json")
    assert isinstance(reason, str)
    assert ("trusted root does not confirm" in reason) == (part == "certificateAuthorities")


def test_a_certificate_must_have_been_valid_when_it_was_logged(place: Place) -> None:
    now = datetime.now(UTC)
    assert isinstance(place.verify(bundle(place.forge(since=now - timedelta(days=1), at=now))), str)
    assert isinstance(place.verify(bundle(place.forge(at=now + timedelta(hours=1)))), str)
    assert isinstance(place.verify(bundle(place.forge(at=now - timedelta(hours=1)))), str)


def test_a_certificate_that_has_expired_since_is_good(place: Place) -> None:
    then = datetime.now(UTC) - timedelta(days=400)
    made = bundle(place.forge(since=then, at=then + timedelta(minutes=1)))
    assert signed(place.verify(made)).signed_at == (then + timedelta(minutes=1)).replace(microsecond=0)


def test_a_certificate_must_have_been_logged(place: Place) -> None:
    reason = place.verify(bundle(place.forge(logged_by=Key.make())))
    assert isinstance(reason, str)
    assert "SCT" in reason


def _no_entry(document: dict[str, Any]) -> None:
    document["verificationMaterial"]["tlogEntries"] = []


def _two_entries(document: dict[str, Any]) -> None:
    document["verificationMaterial"]["tlogEntries"] *= 2


def _no_entries(document: dict[str, Any]) -> None:
    del document["verificationMaterial"]["tlogEntries"]


def _no_promise(document: dict[str, Any]) -> None:
    del entry(document)["inclusionPromise"]


def _other_promise(document: dict[str, Any]) -> None:
    promise = entry(document)["inclusionPromise"]
    promise["signedEntryTimestamp"] = flip(promise["signedEntryTimestamp"])


def _other_time(document: dict[str, Any]) -> None:
    entry(document)["integratedTime"] = str(int(entry(document)["integratedTime"]) + 1)


def _other_index(document: dict[str, Any]) -> None:
    entry(document)["logIndex"] = str(int(entry(document)["logIndex"]) + 1)


def _no_proof(document: dict[str, Any]) -> None:
    del entry(document)["inclusionProof"]


def _no_checkpoint(document: dict[str, Any]) -> None:
    del entry(document)["inclusionProof"]["checkpoint"]


def _other_proof(document: dict[str, Any]) -> None:
    hashes = entry(document)["inclusionProof"]["hashes"]
    hashes[0] = flip(hashes[0])


def _short_proof(document: dict[str, Any]) -> None:
    entry(document)["inclusionProof"]["hashes"].pop()


def _other_root(document: dict[str, Any]) -> None:
    proof = entry(document)["inclusionProof"]
    proof["rootHash"] = flip(proof["rootHash"])


def _other_checkpoint(document: dict[str, Any]) -> None:
    checkpoint = entry(document)["inclusionProof"]["checkpoint"]
    checkpoint["envelope"] = checkpoint["envelope"].replace(
        "rekor.example.com - 1\n", "rekor.example.com - 2\n"
    )


def _other_body(document: dict[str, Any]) -> None:
    body = json.loads(base64.b64decode(entry(document)["canonicalizedBody"]))
    body["spec"]["payloadHash"]["value"] = "0" * 64
    entry(document)["canonicalizedBody"] = base64.b64encode(json.dumps(body).encode()).decode()


def _other_kind(document: dict[str, Any]) -> None:
    entry(document)["kindVersion"] = {"kind": "hashedrekord", "version": "0.0.1"}


def _other_signature(document: dict[str, Any]) -> None:
    signature = document["dsseEnvelope"]["signatures"][0]
    signature["sig"] = flip(signature["sig"])


def _other_payload(document: dict[str, Any]) -> None:
    other = Statement(subject=Digest.of_bytes(b"other"), predicate_type=COSIGN_SIGN, predicate={})
    document["dsseEnvelope"]["payload"] = base64.b64encode(other.to_bytes()).decode()


def _no_certificate(document: dict[str, Any]) -> None:
    document["verificationMaterial"]["certificate"]["rawBytes"] = base64.b64encode(b"none").decode()


def _older(document: dict[str, Any]) -> None:
    document["mediaType"] = "application/vnd.dev.sigstore.bundle+json;version=0.3"


def _unknown(document: dict[str, Any]) -> None:
    document["verificationMaterial"]["more"] = {}


def _second_signature(document: dict[str, Any]) -> None:
    document["dsseEnvelope"]["signatures"] *= 2


def _no_signature(document: dict[str, Any]) -> None:
    document["dsseEnvelope"]["signatures"] = []


def _other_type(document: dict[str, Any]) -> None:
    document["dsseEnvelope"]["payloadType"] = "application/json"


def _key_too(document: dict[str, Any]) -> None:
    document["verificationMaterial"]["publicKey"] = {"hint": "of a stranger"}


def _message_instead(document: dict[str, Any]) -> None:
    signature = document.pop("dsseEnvelope")["signatures"][0]["sig"]
    document["messageSignature"] = {"signature": signature}


TAMPERINGS = [
    *(_no_entry, _two_entries, _no_entries, _no_promise, _other_promise, _other_time, _other_index),
    *(_no_proof, _no_checkpoint, _other_proof, _short_proof, _other_root, _other_checkpoint, _other_body),
    *(_other_kind, _other_signature, _other_payload, _no_certificate, _older, _unknown),
    *(_second_signature, _no_signature, _other_type, _key_too, _message_instead),
]


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda tamper: tamper.__name__.strip("_"))
def test_a_bundle_that_was_tampered_with_is_refused(place: Place, tamper: Callable[[Any], None]) -> None:
    place.forge()  # so that the next entry's proof holds a hash
    document = place.forge()
    tamper(document)
    try:
        made = bundle(document)
    except FormatError:
        return
    assert isinstance(place.verify(made), str)


def test_what_is_not_a_part_of_the_other_does_not_go_together(place: Place) -> None:
    first, second = place.forge(), place.forge()
    for part in ("certificate", "tlogEntries"):
        mixed = copy.deepcopy(first)
        mixed["verificationMaterial"][part] = second["verificationMaterial"][part]
        assert isinstance(place.verify(bundle(mixed)), str)


def test_the_type_of_the_payload_is_signed_with_it(place: Place) -> None:
    document = place.forge(payload_type="application/json")
    with pytest.raises(FormatError, match="not hold a statement"):
        bundle(document)
    document["dsseEnvelope"]["payloadType"] = "application/vnd.in-toto+json"
    assert isinstance(place.verify(bundle(document)), str)


def test_what_is_verified_is_what_was_parsed(place: Place) -> None:
    made, other = bundle(place.forge()), bundle(place.forge(b"{}"))
    mixed = Bundle(content=made.content, envelope=other.envelope, hint=None)
    reason = place.verify(mixed)
    assert isinstance(reason, str)
    assert "payload is ambiguous" in reason


@pytest.mark.parametrize("payload", [b"", b"no JSON", b"{}", b'{"_type": "https://in-toto.io/Statement/v1"}'])
def test_a_signature_on_what_is_no_statement_is_none(place: Place, payload: bytes) -> None:
    reason = place.verify(bundle(place.forge(payload)))
    assert isinstance(reason, str)
    assert f"{IDENTITY} signed something else than a statement" in reason


def test_a_reason_is_one_short_line(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    document = place.forge()
    document["verificationMaterial"]["tlogEntries"][0]["logIndex"] = "\x1b[2J\n" * 1000
    reason = place.verify(bundle(document))
    assert isinstance(reason, str)
    assert len(reason) < 400
    assert reason.isprintable()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"mediaType": "other"}'])
def test_a_trusted_root_that_cannot_be_used_is_an_error(
    place: Place, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "root.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"root\.json cannot be used"):
        keyless.verify(bundle(place.forge()), [US], trusted_root=path)
    with pytest.raises(UsageError, match=r"root\.json cannot be used"):
        keyless.signer(token=token(), trust_config=path)


# Signing when something is amiss.


@pytest.mark.parametrize("text", ["no token", token(lifetime=-60), token().rpartition(".")[0]])
def test_a_token_that_cannot_be_used_is_an_error_before_work_begins(place: Place, text: str) -> None:
    with pytest.raises(UsageError, match="identity token") as caught:
        keyless.signer(token=text, trust_config=place.config)
    assert text not in f"{caught.value} {caught.value.cause} {caught.value.hint}"


def test_services_that_fail_are_named(place: Place) -> None:
    place.sigstore.status = 500
    try:
        with pytest.raises(TrustError, match="signing with Sigstore failed") as caught:
            place.sign()(STATEMENT)
    finally:
        place.sigstore.status = 0
    assert "500" in caught.value.cause


def test_services_that_do_not_answer_are_not_waited_for(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyless, "_SERVICES_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = json.loads(place.config.read_text())
        config["signingConfig"]["caUrls"][0]["url"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (tmp_path / "config.json").write_text(json.dumps(config))
        sign = keyless.signer(token=token(), trust_config=tmp_path / "config.json")
        with pytest.raises(TrustError, match="signing with Sigstore failed") as caught:
            sign(STATEMENT)
    assert "TimeoutError" in caught.value.cause


def test_a_signature_that_nobody_would_accept_is_not_made(place: Place, tmp_path: Path) -> None:
    config = json.loads(place.config.read_text())
    config["trustedRoot"]["tlogs"] = Sigstore().trusted_root["tlogs"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    sign = keyless.signer(token=token(), trust_config=tmp_path / "config.json")
    with pytest.raises(TrustError, match="does not verify with the trusted root"):
        sign(STATEMENT)


def test_without_a_token_the_ci_is_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigstore.oidc.detect_credential", lambda: token())
    made = keyless.signer(token=None, trust_config=place.config)(STATEMENT)
    assert signed(place.verify(made)).identity == US


def test_nobody_is_asked_who_is_not_there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigstore.oidc.detect_credential", lambda: None)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UsageError, match="no identity to sign with"):
        keyless.signer(token=None, trust_config=place.config)(STATEMENT)


# cosign. It must not look for roots and keys of its own in the network, so its home is empty.


def cosign(
    home: Path, *words: object, program: Path = COSIGN, **env: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(program), *map(str, words)],
        env={"HOME": str(home), "PATH": os.environ["PATH"], **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def pinned(place: Place, *, identity: str = IDENTITY, issuer: str = ISSUER) -> list[object]:
    return [
        *("--certificate-identity", identity, "--certificate-oidc-issuer", issuer),
        *("--trusted-root", place.root),
    ]


def by_cosign(place: Place) -> list[object]:
    return [
        *("--identity-token", token(), "--signing-config", place.signing),
        *("--trusted-root", place.root, "--yes"),
    ]


@pytest.mark.registry
def test_cosign_verifies_what_we_sign(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "bundle.json"
    path.write_bytes(place.sign()(STATEMENT).content)
    words = ("verify-blob-attestation", "--bundle", path, "--type", COSIGN_SIGN, "--digestAlg", "sha256")
    digest = ("--digest", STATEMENT.subject.hex)
    done = cosign(tmp_path, *words, *digest, *pinned(place))
    assert done.returncode == 0, done.stderr
    for refused in (
        [*digest, *pinned(place, identity="other@example.com")],
        [*digest, *pinned(place, issuer="https://other.example.com")],
        ["--digest", Digest.of_bytes(b"other").hex, *pinned(place)],
    ):
        assert cosign(tmp_path, *words, *refused).returncode != 0


@pytest.mark.registry
def test_we_verify_what_cosign_signs(place: Place, tmp_path: Path) -> None:
    blob, predicate, path = tmp_path / "blob", tmp_path / "predicate.json", tmp_path / "bundle.json"
    blob.write_bytes(b"an index")
    predicate.write_text(json.dumps(dict(STATEMENT.predicate)))
    words = ("attest-blob", "--bundle", path, "--predicate", predicate, "--type", COSIGN_SIGN)
    done = cosign(tmp_path, *words, *by_cosign(place), blob)
    assert done.returncode == 0, done.stderr
    made = Bundle.parse(path.read_bytes())
    assert signed(place.verify(made)).statement == STATEMENT
    assert isinstance(place.verify(made, Identity(identity="other@example.com", issuer=ISSUER)), str)
    assert isinstance(place.verify(made, Identity(identity=IDENTITY, issuer="https://b.example.com")), str)
    assert isinstance(keyless.verify(made, [US], trusted_root=None), str)


ACCESS = Access(config=Config(), tally=Tally(), limiter=Limiter(None), find_credentials=lambda _: None)


def serve_image(
    registry: DockerRegistry, directory: Path, *, sign: Callable[[Statement], Bundle] | None = None
) -> tuple[RegistryReference, Descriptor]:
    """An image in a registry, signed or not."""
    reference = parse(f"{registry.host}/models/tiny:1")
    assert isinstance(reference, RegistryReference)
    layout = Layout.create(directory / "layout")
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "config": layout.put(b"{}", media_types.IMAGE_CONFIG).to_json(),
        "layers": [layout.put(b"layer", "application/octet-stream").to_json()],
    }
    image = layout.put(json.dumps(manifest).encode(), media_types.MANIFEST)
    statement = Statement(subject=image.digest, predicate_type=COSIGN_SIGN, predicate={})
    ours = [attachments.store(layout, image, sign(statement), COSIGN_SIGN)] if sign else []
    layout.publish(layout, image, "1", ours)
    transfer.into_registry(layout, transfer.explore(layout, image, Limits()), reference, ACCESS)
    return reference, image


@pytest.mark.registry
def test_an_image_signed_by_us_and_by_cosign_is_verified_by_both(
    place: Place, tmp_path: Path, docker_registry: DockerRegistry
) -> None:
    reference, image = serve_image(docker_registry, tmp_path, sign=place.sign(identity=WORKFLOW))

    name = f"{docker_registry.host}/models/tiny@{image.digest}"
    done = cosign(tmp_path, "verify", *pinned(place, identity=WORKFLOW), name)
    assert done.returncode == 0, done.stderr
    assert cosign(tmp_path, "verify", *pinned(place), name).returncode != 0

    done = cosign(tmp_path, "sign", *by_cosign(place), name)
    assert done.returncode == 0, done.stderr
    with Repository(reference, ACCESS) as repository:
        found = [place.verify(each) for each in attachments.find(repository, image.digest, Limits(), [])]
    (by_them,) = (each for each in found if isinstance(each, Signed))
    assert by_them.statement.subject == image.digest
    assert by_them.statement.predicate_type == COSIGN_SIGN
    assert by_them.identity == US
    assert len(found) == 2


# Older signatures.


def older(place: Place, **options: Any) -> SimpleSignature:
    """What cosign before 2.6 stores: a payload, a certificate, and an entry in the log."""
    key = Key.make()
    payload = SimpleSignature.sign(STATEMENT.subject, "x", PrivateKey(key=key.private)).payload
    signature = key.sign(payload)
    certificate = place.sigstore.certify(
        key.private.public_key(), options.get("identity", IDENTITY), options.get("issuer", ISSUER)
    ).public_bytes(serialization.Encoding.PEM)
    body = {
        "apiVersion": "0.0.1",
        "kind": "hashedrekord",
        "spec": {
            "data": {"hash": {"algorithm": "sha256", "value": hashlib.sha256(payload).hexdigest()}},
            "signature": {
                "content": base64.b64encode(signature).decode(),
                "publicKey": {"content": base64.b64encode(certificate).decode()},
            },
        },
    }
    at = datetime.now(UTC) + options.get("later", timedelta())
    logged = place.sigstore.enter(json.dumps(body, separators=(",", ":")).encode(), at=at)
    promise = logged.pop("verification")["signedEntryTimestamp"]
    document = {"SignedEntryTimestamp": promise, "Payload": logged}
    return SimpleSignature(
        payload=payload, signature=signature, certificate=certificate, entry=json.dumps(document).encode()
    )


def verify_older(place: Place, signature: SimpleSignature, *accepted: Identity) -> Signed | str:
    return keyless.verify_simple(signature, accepted or (US,), trusted_root=place.root)


def test_an_older_keyless_signature_is_verified(place: Place) -> None:
    found = signed(verify_older(place, older(place)))
    assert found.statement.subject == STATEMENT.subject
    assert found.identity == US
    assert found.signed_at is not None


def test_other_older_keyless_signatures_are_refused(place: Place) -> None:
    sound, other = older(place), older(place)
    refused = [
        older(place, identity="other@example.com"),
        older(place, issuer="https://other.example.com"),
        older(place, later=timedelta(hours=1)),
        older(place, later=-timedelta(hours=1)),
        structs.replace(sound, payload=sound.payload + b" "),
        structs.replace(sound, signature=other.signature),
        structs.replace(sound, certificate=other.certificate),
        structs.replace(sound, entry=other.entry),
        structs.replace(sound, entry=b""),
        structs.replace(sound, entry=b"{}"),
        structs.replace(sound, entry=sound.entry.replace(b'"logIndex": ', b'"logIndex": 1')),
        structs.replace(sound, certificate=b"no"),
    ]
    for each in refused:
        assert isinstance(verify_older(place, each), str)
    with Sigstore() as another:
        elsewhere = dataclasses.replace(place, sigstore=another)
        assert isinstance(verify_older(elsewhere, older(elsewhere)), str)


def test_an_older_keyless_signature_is_one_of_an_image(place: Place, tmp_path: Path) -> None:
    made = older(place)
    layout = Layout.create(tmp_path)
    root = Descriptor(media_type=media_types.INDEX, digest=STATEMENT.subject, size=1)
    layer = layout.put(made.payload, media_types.SIMPLE_SIGNATURE).to_json()
    annotations = {
        "dev.cosignproject.cosign/signature": base64.b64encode(made.signature).decode(),
        "dev.sigstore.cosign/certificate": made.certificate.decode(),
        "dev.sigstore.cosign/bundle": made.entry.decode(),
    }
    manifest = {"layers": [{**layer, "annotations": annotations}]}
    image = layout.put(json.dumps(manifest).encode(), media_types.MANIFEST)
    layout.publish(layout, image, "other")

    def verify(**accepts: Any) -> str | None:
        rule = TrustRule(name="*", trusted_root=place.root, **accepts)
        return verifier.verify("", layout, root, rule, Limits(), tagged=lambda _: image).trust.by

    assert verify(identities=(US,)) == f"{IDENTITY} ({ISSUER})"
    assert verify(identities=(US,), transparency_log=True) == f"{IDENTITY} ({ISSUER})"
    with pytest.raises(TrustError, match="no signature that the policy accepts"):
        verify(identities=(Identity(identity="other@example.com", issuer=ISSUER),))
    with pytest.raises(TrustError):
        verify(keys=(PrivateKey.generate().public,))


@pytest.mark.registry
def test_what_cosign_2_signs_is_verified(
    place: Place, tmp_path: Path, docker_registry: DockerRegistry
) -> None:
    reference, image = serve_image(docker_registry, tmp_path)
    pem = serialization.Encoding.PEM
    files = {
        "SIGSTORE_ROOT_FILE": place.sigstore.authority.public_bytes(pem),
        "SIGSTORE_CT_LOG_PUBLIC_KEY_FILE": public_pem(place.sigstore.ct),
        "SIGSTORE_REKOR_PUBLIC_KEY": public_pem(place.sigstore.rekor),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    services = ("--fulcio-url", place.sigstore.url, "--rekor-url", place.sigstore.url)
    name = f"{docker_registry.host}/models/tiny@{image.digest}"
    words = ("sign", *services, "--identity-token", token(), "--yes", name)
    done = cosign(tmp_path, *words, program=COSIGN_2, **{each: str(tmp_path / each) for each in files})
    assert done.returncode == 0, done.stderr
    rule = TrustRule(name="*", identities=(US,), trusted_root=place.root, transparency_log=True)
    with Repository(reference, ACCESS) as repository:
        found = verifier.verify("", repository, image, rule, Limits(), tagged=repository.tagged)
    assert found.trust.by == f"{IDENTITY} ({ISSUER})"


def public_pem(key: Key) -> bytes:
    return key.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


# Signatures by a key with an entry in the log.


def logged(place: Place, key: PrivateKey, **changes: Any) -> Bundle:
    """A bundle by a key, with an entry in the log; some of it changed."""
    made = json.loads(Bundle.sign(STATEMENT, key).content)
    verifier = changes.get("verifier", key.public).to_pem()
    envelope = {**made["dsseEnvelope"], **changes.get("envelope", {})}
    body = dsse_entry(json.dumps(envelope), [base64.b64encode(verifier).decode()])
    entered = place.forge()  # for the form of an entry
    taken = changes.get("log", place.sigstore).enter(body)
    proof = taken["verification"]["inclusionProof"]
    at = entry(entered)
    at |= {
        "logIndex": str(taken["logIndex"]),
        "integratedTime": str(taken["integratedTime"]),
        "inclusionPromise": {"signedEntryTimestamp": taken["verification"]["signedEntryTimestamp"]},
        "canonicalizedBody": taken["body"],
        "inclusionProof": {
            "logIndex": str(proof["logIndex"]),
            "rootHash": base64.b64encode(bytes.fromhex(proof["rootHash"])).decode(),
            "treeSize": str(proof["treeSize"]),
            "hashes": [base64.b64encode(bytes.fromhex(each)).decode() for each in proof["hashes"]],
            "checkpoint": {"envelope": proof["checkpoint"]},
        },
    }
    made["verificationMaterial"]["tlogEntries"] = changes.get("entries", [{**at, **changes.get("entry", {})}])
    return bundle(made)


def test_a_signature_by_a_key_may_have_to_be_in_the_log(place: Place, tmp_path: Path) -> None:
    key, other = PrivateKey.generate(), PrivateKey.generate("rsa-2048")
    sound = logged(place, key)
    assert log.problem_of(sound, key.public, place.root) == ""
    assert log.problem_of(logged(place, other), other.public, place.root) == ""
    assert "it has none" in log.problem_of(Bundle.sign(STATEMENT, key), key.public, place.root)
    refused = {
        "it has none": logged(place, key, entries=[]),
        "another signature": logged(place, key, verifier=other.public),
        "another payload": logged(place, key, envelope={"payload": "e30="}),
        "inclusion proof": logged(place, key, entry={"logIndex": "0", "canonicalizedBody": "e30="}),
        "inclusion promise": logged(place, key, entry={"integratedTime": "5"}),
        "not accepted": logged(place, key, entry={"logId": {"keyId": "AAAA"}}),
        "malformed": logged(place, key, entries=[5]),
    }
    for said, each in refused.items():
        problem = log.problem_of(each, key.public, place.root)
        assert problem, said
    with Sigstore() as another:
        assert log.problem_of(logged(place, key, log=another), key.public, place.root)

    layout = Layout.create(tmp_path)
    root = Descriptor(media_type=media_types.INDEX, digest=STATEMENT.subject, size=1)

    def verify(*bundles: Bundle) -> str | None:
        made = [attachments.store(layout, root, each, COSIGN_SIGN) for each in bundles]
        (tmp_path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": []}))
        layout.attach(layout, made)
        rule = TrustRule(name="*", keys=(key.public,), transparency_log=True, trusted_root=place.root)
        return verifier.verify("", layout, root, rule, Limits()).trust.by

    assert verify(Bundle.sign(STATEMENT, key), sound) == f"key {key.public.hint}"
    with pytest.raises(TrustError) as caught:
        verify(Bundle.sign(STATEMENT, key))
    assert "requires an entry" in caught.value.cause


@pytest.mark.registry
def test_what_cosign_logs_of_a_key_is_accepted(
    place: Place, tmp_path: Path, docker_registry: DockerRegistry
) -> None:
    reference, image = serve_image(docker_registry, tmp_path)
    key = PrivateKey.generate()
    key.write(tmp_path / "cosign.key", b"")
    name = f"{docker_registry.host}/models/tiny@{image.digest}"
    services = ("--signing-config", place.signing, "--trusted-root", place.root)
    words = ("sign", "--key", tmp_path / "cosign.key", *services, "--yes", name)
    done = cosign(tmp_path, *words, COSIGN_PASSWORD="")
    assert done.returncode == 0, done.stderr
    rule = TrustRule(name="*", keys=(key.public,), trusted_root=place.root, transparency_log=True)
    with Repository(reference, ACCESS) as repository:
        found = verifier.verify("", repository, image, rule, Limits())
    assert found.trust.by == f"key {key.public.hint}"
