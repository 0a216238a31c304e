# SPDX-License-Identifier: Apache-2.0
"""Only the verifier makes what is verified, from statements of those whom a rule accepts."""

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from oci import media_types
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.trust import attachments, keyless, signer, verifier
from oci.trust.bundle import Bundle, SimpleSignature
from oci.trust.keys import PrivateKey
from oci.trust.policy import Identity, TrustRule
from oci.trust.statement import COSIGN_SIGN, SNAPSHOT, Statement
from oci.trust.verifier import Trust, Verified
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError, RegistryError, TrustError

KEY, OTHER, STRANGER = (PrivateKey.generate() for _ in range(3))
RULE = TrustRule(name="*", keys=(KEY.public,))
LIMITS = Limits()
NOW = datetime.now(UTC)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.create(tmp_path / "layout")


@pytest.fixture
def root(layout: Layout) -> Descriptor:
    return put_index(layout, "an image")


def put_index(layout: Layout, name: str) -> Descriptor:
    document = {"schemaVersion": 2, "manifests": [], "annotations": {"name": name}}
    return layout.put(json.dumps(document).encode(), media_types.INDEX)


def attach(layout: Layout, subject: Descriptor, *bundles: Bundle) -> None:
    layout.attach(layout, [attachments.store(layout, subject, each, kind_of(each)) for each in bundles])


def kind_of(bundle: Bundle) -> str:
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return str(json.loads(bundle.envelope.payload)["predicateType"])
    return COSIGN_SIGN


def bundle(about: Descriptor, by: PrivateKey = KEY, kind: str = COSIGN_SIGN, **predicate: Any) -> Bundle:
    return Bundle.sign(Statement(subject=about.digest, predicate_type=kind, predicate=predicate), by)


def dated(about: Descriptor, created: Any, by: PrivateKey = KEY) -> Bundle:
    return bundle(about, by, SNAPSHOT, created=created)


def verify(layout: Layout, root: Descriptor, rule: TrustRule = RULE, **more: Any) -> Verified[str]:
    return verifier.verify("it", layout, root, rule, LIMITS, **more)


def refusal(layout: Layout, root: Descriptor, rule: TrustRule = RULE, **more: Any) -> str:
    """Why it is not accepted."""
    with pytest.raises(TrustError) as caught:
        verify(layout, root, rule, **more)
    assert caught.value.hint or "future" in caught.value.message or caught.value.cause
    return f"{caught.value.message}\n{caught.value.cause}"


# What is verified.


def test_nobody_else_makes_what_is_verified() -> None:
    for seal in (None, object(), verifier, True):
        with pytest.raises(TypeError, match="only the verifier"):
            Verified("it", Trust(by="me"), seal)


def test_what_is_verified_stays_as_it_is(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, bundle(root))
    found = verify(layout, root)
    for name in ("value", "trust", "anything"):
        with pytest.raises(AttributeError):
            setattr(found, name, "evil")
    with pytest.raises(AttributeError, match="immutable"):
        found.trust.by = "me"  # type: ignore[misc]


def test_what_is_read_of_it_is_verified_by_the_same(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, bundle(root), dated(root, "2026-01-02T03:04:05Z"))
    found = verify(layout, root)
    mapped = found.map(lambda text: len(text))
    assert (mapped.value, mapped.trust) == (2, found.trust)
    assert found.trust.by == f"key {KEY.public.hint}"
    with pytest.raises(ZeroDivisionError):
        found.map(lambda _: 1 // 0)


class Reader:
    def read(self, _: object) -> str:
        return "evil"


@pytest.mark.parametrize(
    "read",
    [
        (lambda other: lambda _: other)("evil"),
        lambda _, other="evil": other,
        lambda _, *, other="evil": other,
        functools.partial(str.replace, "evil"),
        Reader().read,
        ["evil"].__getitem__,
        len,
    ],
    ids=["closure", "default", "keyword", "partial", "method", "built-in method", "built-in"],
)
def test_what_brings_anything_of_its_own_blesses_nothing(
    layout: Layout, root: Descriptor, read: Callable[[object], object]
) -> None:
    attach(layout, root, bundle(root))
    with pytest.raises(TypeError):
        verify(layout, root).map(read)


def test_what_was_not_looked_at_says_so() -> None:
    found = verifier.dangerously_skip("it")
    assert (found.value, found.trust) == ("it", Trust(by=None, created=None))


# Who has signed.


def test_any_one_of_those_who_are_accepted_will_do(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, bundle(root, STRANGER), bundle(root, OTHER))
    rule = TrustRule(name="*", keys=(KEY.public, OTHER.public))
    assert verify(layout, root, rule).trust.by == f"key {OTHER.public.hint}"


def test_where_a_log_is_wanted_a_key_is_not_enough(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, bundle(root))
    with pytest.raises(TrustError) as caught:
        verifier.verify(None, layout, root, structs.replace(RULE, transparency_log=True), LIMITS)
    assert "transparency log" in caught.value.cause


def test_a_rule_without_anybody_accepts_nobody(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, bundle(root))
    assert "is not accepted" in refusal(layout, root, TrustRule(name="*"))


def test_no_signature_at_all(layout: Layout, root: Descriptor) -> None:
    assert "it has no signature" in refusal(layout, root)


def test_a_stranger_s_key_is_named_by_its_hint(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, bundle(root, STRANGER))
    assert f"the key {STRANGER.public.hint} is not accepted" in refusal(layout, root)


def test_a_hint_is_shown_on_one_line_and_not_for_long(layout: Layout, root: Descriptor) -> None:
    document = json.loads(bundle(root, STRANGER).content)
    document["verificationMaterial"]["publicKey"]["hint"] = "\x1b]0;x\a\nsigned by you\n" + "x" * 10_000
    attach(layout, root, Bundle.parse(json.dumps(document).encode()))
    said = refusal(layout, root)
    assert "\x1b" not in said
    assert len(said) < 400
    assert len(said.splitlines()) == 2


def test_a_hint_decides_nothing(layout: Layout, root: Descriptor) -> None:
    document = json.loads(bundle(root).content)
    document["verificationMaterial"]["publicKey"]["hint"] = "anything"
    attach(layout, root, Bundle.parse(json.dumps(document).encode()))
    assert verify(layout, root).trust.by == f"key {KEY.public.hint}"


def test_a_signature_of_another_image_says_which(layout: Layout, root: Descriptor) -> None:
    other = put_index(layout, "another image")
    attach(layout, root, bundle(other))
    assert f"signed another image: {other.digest}" in refusal(layout, root)


def test_another_statement_is_no_signature(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, bundle(root, kind="https://slsa.dev/\x1b" + "x" * 1000))
    said = refusal(layout, root)
    assert "signed an unknown kind of statement: https://slsa.dev/\\x1b" in said
    assert len(said) < 400


def test_an_attestation_is_no_signature(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, dated(root, "2026-01-02T03:04:05Z"))
    assert "made an attestation, but no signature" in refusal(layout, root)


def test_what_was_refused_is_told_once_and_not_for_ever(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, *(bundle(root, STRANGER) for _ in range(3)))
    attach(layout, root, *(bundle(root, PrivateKey.generate()) for _ in range(20)))
    said = refusal(layout, root)
    assert said.count(STRANGER.public.hint) == 1
    assert len(said.splitlines()) == 7


def test_a_key_that_signed_no_statement(layout: Layout, root: Descriptor) -> None:
    made = bundle(root)
    payload = b"{}"
    envelope = structs.replace(made.envelope, payload=payload)
    envelope = structs.replace(envelope, signatures=(KEY.sign(envelope.signed),))
    document = {**json.loads(made.content), "dsseEnvelope": envelope.to_json()}
    attach(layout, root, Bundle.parse(json.dumps(document).encode()))
    assert "signed something else than a statement" in refusal(layout, root)
    attach(layout, root, made)
    assert verify(layout, root)


def test_a_certificate_where_keys_alone_are_accepted_is_not_looked_at(
    layout: Layout, root: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(layout, root, with_certificate(bundle(root)))
    monkeypatch.setattr(keyless, "verify", None)
    assert "the policy accepts only keys" in refusal(layout, root)


def with_certificate(made: Bundle) -> Bundle:
    document = {**json.loads(made.content), "verificationMaterial": {"certificate": {"rawBytes": ""}}}
    return Bundle.parse(json.dumps(document).encode())


def test_a_certificate_is_left_to_those_who_know(
    layout: Layout, root: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = Identity(identity="a@b.c", issuer="https://b.c")
    rule = TrustRule(name="*", identities=(who,), trusted_root=Path("/root.json"))
    attach(layout, root, with_certificate(bundle(root)))
    asked: list[Any] = []

    def say(answer: Any) -> Callable[..., Any]:
        def found(bundle: Bundle, accepted: Sequence[Identity], *, trusted_root: Path | None) -> Any:
            asked.append((accepted, trusted_root))
            return answer

        return found

    monkeypatch.setattr(keyless, "verify", say("it is somebody's"))
    assert "it is somebody's" in refusal(layout, root, rule)
    for about, accepted in ((put_index(layout, "another"), False), (root, True)):
        statement = Statement(subject=about.digest, predicate_type=COSIGN_SIGN, predicate={})
        monkeypatch.setattr(keyless, "verify", say(SimpleNamespace(identity=who, statement=statement)))
        if accepted:
            assert verify(layout, root, rule).trust.by == "a@b.c (https://b.c)"
        else:
            assert "signed another image" in refusal(layout, root, rule)
    assert asked == [((who,), Path("/root.json"))] * 3


def test_a_key_s_signature_where_identities_alone_are_accepted(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, bundle(root))
    rule = TrustRule(name="*", identities=(Identity(identity="a", issuer="b"),))
    assert "is not accepted" in refusal(layout, root, rule)


# Older signatures.


def under_tag(layout: Layout, *signatures: SimpleSignature) -> Callable[[str], Descriptor | None]:
    stored = attachments.store_simple(layout, signatures)
    return lambda _: stored


def test_an_older_signature_counts_as_much(layout: Layout, root: Descriptor) -> None:
    asked: list[str] = []
    stored = under_tag(layout, SimpleSignature.sign(root.digest, "x", KEY))

    def tagged(tag: str) -> Descriptor | None:
        asked.append(tag)
        return stored(tag)

    assert verify(layout, root, tagged=tagged).trust == Trust(by=f"key {KEY.public.hint}", created=None)
    assert asked == [f"sha256-{root.digest.hex}.{kind}" for kind in ("sig", "att")]


def older(
    layout: Layout, signature: SimpleSignature, *statements: tuple[Bundle, str]
) -> Callable[[str], Descriptor | None]:
    """What cosign's tags lead to: an image of signatures, and one of attestations."""
    there = {"sig": attachments.store_simple(layout, [signature])}
    for bundle, kind in statements:
        there["att"] = attachments.store_envelope(layout, bundle, kind, signature)
    return lambda tag: there.get(tag.rpartition(".")[2])


def test_an_older_attestation_tells_the_time(layout: Layout, root: Descriptor) -> None:
    signature = SimpleSignature.sign(root.digest, "x", KEY)
    made = dated(root, "2026-01-02T03:04:05Z")
    rule = structs.replace(RULE, max_age_days=100_000)

    def created(*statements: tuple[Bundle, str]) -> datetime | None:
        tagged = older(layout, signature, *statements)
        return verify(layout, root, tagged=tagged).trust.created

    assert created((made, SNAPSHOT)) == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert verify(layout, root, rule, tagged=older(layout, signature, (made, SNAPSHOT)))
    for other in (
        (dated(root, "2026-01-02T03:04:05Z", STRANGER), SNAPSHOT),
        (dated(put_index(layout, "another"), "2026-01-02T03:04:05Z"), SNAPSHOT),
        (made, "https://slsa.dev/provenance/v1"),
    ):
        assert created(other) is None
        with pytest.raises(TrustError, match="no attested creation time"):
            verify(layout, root, rule, tagged=older(layout, signature, other))
    only = older(layout, SimpleSignature.sign(root.digest, "x", STRANGER), (made, SNAPSHOT))
    assert "is not accepted" in refusal(layout, root, tagged=only), "an attestation is no signature"


def failing(_: str) -> Descriptor | None:
    raise RegistryError("500")


def test_an_older_signature_that_cannot_be_read_hides_no_other(layout: Layout, root: Descriptor) -> None:
    with pytest.raises(RegistryError):  # it may be a good one
        verify(layout, root, tagged=failing)
    attach(layout, root, bundle(root))
    assert verify(layout, root, tagged=failing).trust.by == f"key {KEY.public.hint}"


def test_a_signature_is_found_beside_attachments_that_cannot_be_read(
    layout: Layout, root: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(layout, root, bundle(root, STRANGER), bundle(root))
    broken, good = layout.referrers(root.digest)
    read = layout.read

    def read_all_but(unread: Descriptor) -> None:
        def fails(descriptor: Descriptor, *, limit_bytes: int) -> bytes:
            if descriptor.digest == unread.digest:
                raise RegistryError("500")
            return read(descriptor, limit_bytes=limit_bytes)

        monkeypatch.setattr(layout, "read", fails)

    monkeypatch.setattr(layout, "referrers", lambda *_, **__: [broken, good])
    read_all_but(broken)
    assert verify(layout, root).trust.by == f"key {KEY.public.hint}"
    read_all_but(good)
    with pytest.raises(RegistryError):
        verify(layout, root)


def test_an_image_that_was_copied_without_its_signatures(layout: Layout, root: Descriptor) -> None:
    with pytest.raises(TrustError) as caught:
        verify(layout, root)
    assert "rekindle copy" in caught.value.hint


def test_an_older_signature_of_another_image_or_by_another(layout: Layout, root: Descriptor) -> None:
    other = put_index(layout, "another")
    for made in (
        SimpleSignature.sign(other.digest, "x", KEY),
        SimpleSignature.sign(root.digest, "x", STRANGER),
        SimpleSignature(payload=b"{}", signature=KEY.sign(b"{}")),
        SimpleSignature(payload=root.digest.encode(), signature=KEY.sign(root.digest.encode())),
    ):
        assert refusal(layout, root, tagged=under_tag(layout, made))


@pytest.mark.parametrize("error", [FormatError("x"), IntegrityError("x")])
def test_nonsense_under_the_older_tag_hides_no_good_signature(
    layout: Layout, root: Descriptor, error: Exception
) -> None:
    def tagged(_: str) -> Descriptor | None:
        raise error

    assert "no signature" in refusal(layout, root, tagged=tagged)
    attach(layout, root, bundle(root))
    assert verify(layout, root, tagged=tagged)
    nonsense = layout.put(b"no JSON", media_types.MANIFEST)
    assert verify(layout, root, tagged=lambda _: nonsense)
    assert verify(layout, root, tagged=lambda _: None)


# When it was made.


@pytest.mark.parametrize(
    ("created", "expected"),
    [
        ("2026-01-02T03:04:05Z", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2026-01-02T03:04:05+01:00", datetime(2026, 1, 2, 2, 4, 5, tzinfo=UTC)),
        (None, None),
        (5, None),
        ("", None),
        ("yesterday", None),
        ("0001-01-01T00:00:00+23:59", None),
        ("9999-12-31T23:59:59-23:59", None),
        (["2026-01-02T03:04:05Z"], None),
    ],
)
def test_the_time_is_the_attestation_s(
    layout: Layout, root: Descriptor, created: Any, expected: datetime | None
) -> None:
    attach(layout, root, bundle(root), dated(root, created))
    assert verify(layout, root).trust.created == expected


def test_the_newest_time_by_somebody_accepted_counts(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, bundle(root))
    attach(layout, root, dated(root, "2026-01-02T00:00:00Z"), dated(root, "2026-01-03T00:00:00Z"))
    attach(layout, root, dated(root, "2026-01-04T00:00:00Z", STRANGER))
    other = put_index(layout, "another")
    attach(layout, root, dated(other, "2026-01-05T00:00:00Z"))
    assert verify(layout, root).trust.created == datetime(2026, 1, 3, tzinfo=UTC)


@pytest.mark.parametrize(
    ("days", "accepted"), [(-0.001, True), (0, True), (29.9, True), (30.1, False), (10_000, False)]
)
def test_an_image_older_than_the_rule_allows_is_refused(
    layout: Layout, root: Descriptor, days: float, accepted: bool
) -> None:
    created = (NOW - timedelta(days=days)).astimezone(timezone(timedelta(hours=5))).isoformat()
    attach(layout, root, bundle(root), dated(root, created))
    rule = structs.replace(RULE, max_age_days=30)
    assert verify(layout, root)
    if accepted:
        assert verify(layout, root, rule)
    else:
        assert "older than the policy allows" in refusal(layout, root, rule)


def test_an_image_of_unknown_age_is_refused_where_age_counts(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, bundle(root))
    assert verify(layout, root)
    rule = structs.replace(RULE, max_age_days=100_000)
    assert "no attested creation time" in refusal(layout, root, rule)
    attach(layout, root, dated(root, NOW.isoformat(), STRANGER))
    assert "no attested creation time" in refusal(layout, root, rule)


def test_clocks_may_be_some_minutes_apart_and_no_more(layout: Layout, root: Descriptor) -> None:
    attach(layout, root, bundle(root), dated(root, (NOW + timedelta(minutes=5)).isoformat()))
    assert verify(layout, root)
    attach(layout, root, dated(root, (NOW + timedelta(hours=3)).isoformat()))  # NOW is that of the import
    assert "is in the future" in refusal(layout, root)


# The signer.


def test_what_is_signed_here_is_verified_here(layout: Layout, root: Descriptor) -> None:
    cache = put_index(layout, "its cache")
    made = signer.sign(
        layout,
        [root, cache],
        signer.by_key(KEY),
        attested={"created": "2026-01-02T03:04:05Z"},
        annotations={"a": "b"},
    )
    assert layout.referrers(root.digest) == [], "nothing names them yet"
    assert [each.annotations["a"] for each in made] == ["b"] * 3
    layout.attach(layout, made)
    assert verify(layout, root).trust.created == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert verify(layout, cache).trust == Trust(by=f"key {KEY.public.hint}", created=None)


# Anything at all.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
GOOD = json.loads(bundle(Descriptor(media_type="", digest=Digest.of_bytes(b""), size=0)).content)


@given(
    path=st.sampled_from(
        [
            ("mediaType",),
            ("verificationMaterial",),
            ("verificationMaterial", "publicKey"),
            ("verificationMaterial", "publicKey", "hint"),
            ("dsseEnvelope",),
            ("dsseEnvelope", "payload"),
            ("dsseEnvelope", "payloadType"),
            ("dsseEnvelope", "signatures"),
            ("dsseEnvelope", "signatures", 0),
            ("dsseEnvelope", "signatures", 0, "sig"),
        ]
    ),
    value=JSON,
)
def test_no_bundle_breaks_the_verifier(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    document = copy.deepcopy(GOOD)
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    layout = Layout.create(tmp_path / Digest.of_bytes(json.dumps(document).encode()).hex)
    root = put_index(layout, "an image")
    raw = structs.replace(bundle(root), content=json.dumps(document).encode())
    attach(layout, root, raw)
    with pytest.raises(TrustError):
        verify(layout, root, TrustRule(name="*", keys=(STRANGER.public,)))
    attach(layout, root, bundle(root))
    assert verify(layout, root)
