# SPDX-License-Identifier: Apache-2.0
"""Certificates of an authority of one's own: which are accepted, and that nothing else is."""

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from oci import cosign_tags
from oci.layout import Layout
from oci.trust import attachments, certificate, verifier
from oci.trust.bundle import Bundle, SimpleSignature
from oci.trust.certificate import Authority, Certified, Chain
from oci.trust.keys import PrivateKey
from oci.trust.policy import Policy, TrustRule, authority
from oci.trust.statement import SNAPSHOT, Statement
from rekindle.config import Limits
from rekindle.errors import FormatError, TrustError, UsageError
from tests.samples.certificates import NAME, OwnAuthority

KEY, OTHER = PrivateKey.generate(), PrivateKey.generate()
PUBLIC = KEY.public.key
ROOT, STRANGER = OwnAuthority.make(), OwnAuthority.make()
MIDDLE = OwnAuthority.make("middle", ROOT)
NO_AUTHORITY = OwnAuthority.make("none", ROOT, is_ca=False)
ACCEPTED = Authority(roots=ROOT.pem, identity=NAME)


def verify(leaf: bytes, above: bytes = b"", *accepted: Authority) -> Certified | str:
    return certificate.verify(Chain(certificate=leaf, above=above), accepted or (ACCEPTED,))


def test_a_certificate_of_the_authority_is_accepted() -> None:
    found = verify(ROOT.issue(PUBLIC, NAME))
    assert isinstance(found, Certified)
    assert (found.name, found.key.hint) == (NAME, KEY.public.hint)


@pytest.mark.parametrize("above", [MIDDLE.pem, MIDDLE.pem + ROOT.pem, ROOT.pem + MIDDLE.pem + STRANGER.pem])
def test_authorities_between_may_come_along(above: bytes) -> None:
    assert isinstance(verify(MIDDLE.issue(PUBLIC, NAME), above), Certified)


@pytest.mark.parametrize("algorithm", ["p-384", "p-521", "rsa-2048"])
def test_certificates_for_other_kinds_of_keys(algorithm: str) -> None:
    key = PrivateKey.generate(algorithm)
    assert isinstance(verify(ROOT.issue(key.public.key, NAME)), Certified)


def test_an_authority_made_by_openssl_req_says_nothing_of_the_use_of_its_key() -> None:
    root = OwnAuthority.make(signs=None)
    middle = OwnAuthority.make("middle", root, signs=None)
    accepted = Authority(roots=root.pem, identity=NAME)
    assert isinstance(verify(root.issue(PUBLIC, NAME), b"", accepted), Certified)
    assert isinstance(verify(middle.issue(PUBLIC, NAME), middle.pem, accepted), Certified)
    # One that says what it is for is taken by its word, and one that is no authority is none.
    signs_nothing = OwnAuthority.make("middle", root, signs=False)
    none = OwnAuthority.make("middle", root, is_ca=False, signs=None)
    for each in (signs_nothing, none):
        assert isinstance(verify(each.issue(PUBLIC, NAME), each.pem, accepted), str)


REFUSED = {
    "another authority": (STRANGER.issue(PUBLIC, NAME), b""),
    "another authority that comes along": (STRANGER.issue(PUBLIC, NAME), STRANGER.pem),
    "no way to the root": (MIDDLE.issue(PUBLIC, NAME), b""),
    "issued by what is no authority": (NO_AUTHORITY.issue(PUBLIC, NAME), NO_AUTHORITY.pem),
    "expired": (ROOT.issue(PUBLIC, NAME, end=timedelta(seconds=-60)), b""),
    "not valid yet": (ROOT.issue(PUBLIC, NAME, begin=timedelta(hours=1)), b""),
    "for servers": (ROOT.issue(PUBLIC, NAME, usages=(ExtendedKeyUsageOID.SERVER_AUTH,)), b""),
    "for anything": (ROOT.issue(PUBLIC, NAME, usages=(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)), b""),
    "for nothing said": (ROOT.issue(PUBLIC, NAME, usages=()), b""),
    "another name": (ROOT.issue(PUBLIC, NAME + "x"), b""),
    "a part of the name": (ROOT.issue(PUBLIC, NAME[:-1]), b""),
    "no name": (ROOT.issue(PUBLIC), b""),
    "the authority itself": (ROOT.pem, b""),
    "two certificates": (ROOT.issue(PUBLIC, NAME) * 2, b""),
    "none": (b"", b""),
    "no PEM": (b"\0" * 100, b""),
    "more above than is sane": (ROOT.issue(PUBLIC, NAME), MIDDLE.pem * 9),
    "more bytes than is sane": (ROOT.issue(PUBLIC, NAME), b"#" * (65 << 10)),
    "above that is none": (ROOT.issue(PUBLIC, NAME), ROOT.pem[:50] + ROOT.pem[80:]),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_other_certificates_are_refused_with_a_reason(case: tuple[bytes, bytes]) -> None:
    found = verify(*case)
    assert isinstance(found, str)
    assert "certificate" in found


@pytest.mark.parametrize(
    ("pattern", "accepted"),
    [
        ("spiffe://kserve/.*", True),
        (".*", True),
        ("spiffe://kserve", False),
        ("kernelcache-signer", False),
        ("", False),
    ],
)
def test_a_pattern_matches_from_end_to_end(pattern: str, accepted: bool) -> None:
    rule = Authority(roots=ROOT.pem, identity_regexp=pattern)
    assert isinstance(verify(ROOT.issue(PUBLIC, NAME), b"", rule), Certified) is accepted


def test_a_name_counts_with_its_authority_only() -> None:
    rules = (Authority(roots=ROOT.pem, identity="a.example"), Authority(roots=STRANGER.pem, identity=NAME))
    assert isinstance(verify(ROOT.issue(PUBLIC, NAME), b"", *rules), str)
    assert isinstance(verify(STRANGER.issue(PUBLIC, NAME), b"", *rules), Certified)
    assert isinstance(verify(ROOT.issue(PUBLIC, "b.example", "a.example"), b"", *rules), Certified)


@given(content=st.binary(max_size=200))
def test_no_bytes_break_it(content: bytes) -> None:
    assert isinstance(verify(content, content), str)
    leaf = ROOT.issue(PUBLIC, NAME)
    assert isinstance(verify(leaf[:100] + content + leaf[100:]), (str, Certified))


# Images.


def test_an_image_is_verified_by_a_certificate(tmp_path: Path) -> None:
    layout = Layout.create(tmp_path)
    root = layout.put(b'{"manifests": []}', "application/vnd.oci.image.index.v1+json")
    rule = TrustRule(name="*", authorities=(ACCEPTED,))

    def by(leaf: bytes, key: PrivateKey = KEY, above: bytes = b"", rule: TrustRule = rule) -> str | None:
        signed = SimpleSignature.sign(root.digest, "x", key)
        signed = SimpleSignature(
            payload=signed.payload, signature=signed.signature, certificate=leaf, above=above
        )
        image = attachments.store_simple(layout, [signed])
        return verifier.verify("value", layout, root, rule, Limits(), tagged=lambda _: image).trust.by

    assert by(MIDDLE.issue(PUBLIC, NAME), above=MIDDLE.pem) == f"{NAME} (own authority)"
    for leaf, key, accepts, said in (
        (ROOT.issue(PUBLIC, NAME), OTHER, rule, "its signature is wrong"),
        (STRANGER.issue(PUBLIC, NAME), KEY, rule, "does not confirm"),
        (ROOT.issue(PUBLIC, "evil.example"), KEY, rule, "does not accept evil.example"),
        (ROOT.issue(PUBLIC, NAME), KEY, TrustRule(name="*", keys=(OTHER.public,)), "not accepted"),
        (ROOT.issue(PUBLIC, NAME), KEY, TrustRule(name="*"), "the policy does not accept"),
    ):
        with pytest.raises(TrustError) as caught:
            by(leaf, key, rule=accepts)
        assert said in caught.value.cause
    signed = SimpleSignature.sign(root.digest, "x", KEY)
    signed = structs.replace(signed, certificate=ROOT.issue(PUBLIC, NAME))
    statement = Statement(
        subject=root.digest, predicate_type=SNAPSHOT, predicate={"created": "2026-01-02T03:04:05Z"}
    )
    for key, year in ((KEY, 2026), (OTHER, None)):
        tagged = {
            cosign_tags.tag_of(root.digest, "sig"): attachments.store_simple(layout, [signed]),
            cosign_tags.tag_of(root.digest, "att"): attachments.store_envelope(
                layout, Bundle.sign(statement, key), SNAPSHOT, signed
            ),
        }
        trust = verifier.verify("value", layout, root, rule, Limits(), tagged=tagged.get).trust
        assert (trust.created.year if trust.created else None) == year
    known = TrustRule(name="*", keys=(KEY.public,))
    assert by(ROOT.issue(PUBLIC, NAME), rule=known) == f"key {KEY.public.hint}"


# Files.


def test_certificates_to_sign_with(tmp_path: Path) -> None:
    (tmp_path / "tls.crt").write_bytes(MIDDLE.issue(PUBLIC, NAME) + MIDDLE.pem)
    (tmp_path / "ca.crt").write_bytes(ROOT.pem)
    chain = certificate.read(KEY.public, tmp_path / "tls.crt", tmp_path / "ca.crt")
    assert isinstance(certificate.verify(chain, (ACCEPTED,)), Certified)
    with pytest.raises(UsageError, match="not that of the key"):
        certificate.read(OTHER.public, tmp_path / "tls.crt", None)
    for content in (b"", b"\0", KEY.public.to_pem(), ROOT.issue(PUBLIC)):
        (tmp_path / "tls.crt").write_bytes(content)
        with pytest.raises(UsageError):
            certificate.read(KEY.public, tmp_path / "tls.crt", None)
    with pytest.raises(UsageError, match="cannot be read"):
        certificate.read(KEY.public, tmp_path / "nowhere", None)


def test_a_policy_names_authorities(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(ROOT.pem)
    text = '[[image]]\nname = "*"\nauthorities = [{ ca = "ca.pem", identity_regexp = "spiffe://.*" }]\n'
    policy = Policy.parse(text.encode(), tmp_path)
    [rule] = policy.rules
    assert rule.authorities == (Authority(roots=ROOT.pem, identity_regexp="spiffe://.*"),)
    for wrong in (
        text.replace("identity_regexp", "issuer"),
        text.replace('identity_regexp = "spiffe://.*"', 'identity = ""'),
        text.replace("spiffe://.*", "("),
        text + "transparency_log = true\n",
    ):
        with pytest.raises(FormatError):
            Policy.parse(wrong.encode(), tmp_path)
    (tmp_path / "ca.pem").write_bytes(b"no")
    with pytest.raises(UsageError, match="authorities"):
        Policy.parse(text.encode(), tmp_path)
    with pytest.raises(FormatError):
        authority(ROOT.pem, "*")
