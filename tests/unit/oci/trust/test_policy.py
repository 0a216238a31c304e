# SPDX-License-Identifier: Apache-2.0
"""Whom we trust is said in full, or not at all: the policy, and the words of the command line."""

import argparse
import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci.reference import parse
from oci.trust.keys import PrivateKey
from oci.trust.policy import Identity, Policy, TrustRule, identity
from rekindle.errors import FormatError, UsageError
from restore.decide.facts import strictness
from restore.decide.rules import Strictness

KEY, OTHER = PrivateKey.generate(), PrivateKey.generate()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with keys, where a policy lies."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "prod.pub").write_bytes(KEY.public.to_pem())
    (tmp_path / "keys/dev.pub").write_bytes(OTHER.public.to_pem())
    return tmp_path


def hints(rule: TrustRule | None) -> list[str]:
    assert rule is not None
    return [key.hint for key in rule.keys]


def test_all_that_a_rule_may_say(place: Path) -> None:
    text = f"""
        [[image]]
        name = "registry.example.com/models/*"
        keys = ["prod.pub", "keys/dev.pub", "{place}/prod.pub"]
        identities = [{{ identity = "https://a/b@c", issuer = "https://d" }}]
        max_age_days = 30
        trusted_root = "root.json"
    """
    (place / "policy.toml").write_text(text)
    (rule,) = Policy.read(place / "policy.toml").rules
    assert hints(rule) == [KEY.public.hint, OTHER.public.hint, KEY.public.hint]
    assert rule.identities == (Identity(identity="https://a/b@c", issuer="https://d"),)
    assert (rule.max_age_days, rule.trusted_root) == (30, place / "root.json")


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("registry.example.com/models/tiny", "registry.example.com/models/*"),
        ("registry.example.com/models/a/b", "registry.example.com/models/*"),
        ("registry.example.com/models/tiny", "registry.example.com/models/tiny"),
        ("127.0.0.1:5000/a", "127.0.0.1:*/a"),
        ("horse", "horse"),
        ("horse", "hors?"),
        ("oci:/data/horse", "oci:/data/*"),
        ("anything", "*"),
    ],
)
def test_patterns_that_fit(name: str, pattern: str) -> None:
    assert Policy(rules=[TrustRule(name=pattern)]).rule_for(name)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("registry.example.com/models", "registry.example.com/models/*"),
        ("registry.example.com/models-evil/x", "registry.example.com/models/*"),
        ("evil.com/registry.example.com/models/x", "registry.example.com/models/*"),
        ("registry.example.com.evil.com/models/x", "registry.example.com/models/*"),
        ("registryXexample.com/models/x", "registry.example.com/models/*"),
        ("Horse", "horse"),
        ("horses", "horse"),
        ("horse", ""),
    ],
)
def test_patterns_that_do_not_fit(name: str, pattern: str) -> None:
    assert Policy(rules=[TrustRule(name=pattern)]).rule_for(name) is None


def test_the_first_rule_that_fits_counts_and_no_other() -> None:
    first, second = TrustRule(name="a/*"), TrustRule(name="*")
    policy = Policy(rules=[first, second])
    assert policy.rule_for("a/b") is first
    assert policy.rule_for("b") is second


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("horse", "horse"),
        ("horse:2", "horse"),
        ("team/horse:2", "team/horse"),
        ("oci:/data/horse:2", "oci:/data/horse"),
        ("registry.example.com/a/b:1", "registry.example.com/a/b"),
        ("REGISTRY.Example.com/a/b:1", "registry.example.com/a/b"),
        (f"localhost:5000/a/b:1@sha256:{'0' * 64}", "localhost:5000/a/b"),
    ],
)
def test_the_name_that_patterns_are_compared_with(text: str, name: str) -> None:
    """Without tag and digest, and a host as DNS takes it: else its letters would choose the rule."""
    assert parse(text).policy_name == name


# A ladder of what is no policy.

RULE = '[[image]]\nname = "*"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[image]]", "neither keys nor identities"),
        (RULE, "neither keys nor identities"),
        (RULE + "keys = []\nidentities = []", "neither keys nor identities"),
        ('[[image]]\nkeys = ["prod.pub"]', "name is not text"),
        ('[[image]]\nname = 1\nkeys = ["prod.pub"]', "name is not text"),
        ("image = 5", "image is not a list"),
        ('[image]\nname = "*"', "image is not a list"),
        ("image = [5]", "not a JSON object"),
        ('[[images]]\nname = "*"', "has no 'images'"),
        (RULE + 'key = "prod.pub"', "has no 'key'"),
        (RULE + 'keys = ["prod.pub"]\nmax_age = 5', "has no 'max_age'"),
        (RULE + 'keys = "prod.pub"', "keys is not a list"),
        (RULE + "keys = [5]", "is not text"),
        (RULE + 'keys = [""]', "not a file name"),
        (RULE + 'keys = ["a\\u0000b"]', "not a file name"),
        (RULE + 'keys = ["nowhere.pub"]', "nowhere.pub cannot be read"),
        (RULE + 'keys = ["keys"]', "keys cannot be read"),
        (RULE + 'keys = ["policy.toml"]', "policy.toml cannot be used to verify"),
        (RULE + "keys = [" + '"prod.pub", ' * 101 + "]", "a list of at most 100"),
        (RULE + 'identities = [{ identity = "a" }]', "both in full"),
        (RULE + 'identities = [{ issuer = "a" }]', "both in full"),
        (RULE + "identities = [{ issuer = 5 }]", "issuer is not text"),
        (RULE + 'identities = [{ identity = "a", identity_regexp = "a", issuer = "b" }]', "both in full"),
        (RULE + 'identities = [{ identity_regexp = "(", issuer = "b" }]', "not a regular expression"),
        (RULE + 'identities = [{ identity_regexp = "a", issuer_regexp = "" }]', "both in full"),
        (RULE + 'identities = [{ identity = "", issuer = "a" }]', "both in full"),
        (RULE + 'identities = [{ identity = "a", issuer = "" }]', "both in full"),
        (RULE + 'identities = [{ identity = "*", issuer = "a" }]', "both in full"),
        (RULE + 'identities = [{ identity = "a", issuer = "https://*" }]', "both in full"),
        (RULE + 'identities = [{ identity = "a", issuer = "b", regexp = "c" }]', "has no 'regexp'"),
        (RULE + 'identities = ["a"]', "not a JSON object"),
        (RULE + 'keys = ["prod.pub"]\nmax_age_days = 0', "an integer from 1"),
        (RULE + 'keys = ["prod.pub"]\nmax_age_days = -1', "an integer from 1"),
        (RULE + 'keys = ["prod.pub"]\nmax_age_days = 1.5', "an integer from 1"),
        (RULE + 'keys = ["prod.pub"]\nmax_age_days = true', "an integer from 1"),
        (RULE + 'keys = ["prod.pub"]\nmax_age_days = 1000000000', "an integer from 1"),
        (RULE + 'keys = ["prod.pub"]\ntrusted_root = 5', "is not text"),
        (RULE + 'keys = ["prod.pub"]\ntrusted_root = ""', "not a file name"),
        ("image = [", "is not TOML"),
        ("\0", "is not TOML"),
        ("a = " + "[" * 10_000, "is not TOML"),
        ("#" * ((1 << 20) + 1), "is longer than"),
        ('[[image]]\nname = "*"\nkeys = ["prod.pub"]\n' * 1001, "a list of at most 1000"),
    ],
)
def test_what_is_no_policy_is_said(place: Path, text: str, said: str) -> None:
    path = place / "policy.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        Policy.read(path)
    assert said in f"{caught.value.message} {caught.value.cause}"


def test_what_is_no_text_and_what_is_not_there(place: Path) -> None:
    (place / "policy.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="invalid policy"):
        Policy.read(place / "policy.toml")
    for path in (place / "nowhere", place):
        with pytest.raises(UsageError, match="cannot be read"):
            Policy.read(path)


def test_an_empty_policy_has_a_rule_for_nobody(place: Path) -> None:
    assert Policy.parse(b"", place).rule_for("x") is None
    assert Policy.parse(b"image = []", place).rule_for("x") is None


@pytest.mark.parametrize(("name", "issuer"), [("", "b"), ("a", ""), ("*", "b"), ("a", "*"), ("a*", "b")])
def test_an_identity_is_never_one_part_alone_and_never_a_pattern(name: str, issuer: str) -> None:
    with pytest.raises(FormatError):
        identity(name, issuer)


@pytest.mark.parametrize(
    "given_flags",
    [
        {"certificate_identity": "a"},
        {"certificate_oidc_issuer": "b"},
        {"certificate_identity": "", "certificate_oidc_issuer": "b"},
        {"certificate_identity": "", "certificate_oidc_issuer": ""},
        {"certificate_identity": "*", "certificate_oidc_issuer": "b"},
        {"certificate_identity_regexp": "a"},
        {"certificate_identity_regexp": "a", "certificate_oidc_issuer_regexp": ""},
        {"certificate_identity_regexp": "(", "certificate_oidc_issuer": "b"},
        {"certificate_identity": "a", "certificate_identity_regexp": "a", "certificate_oidc_issuer": "b"},
        {"certificate_identity": "a", "certificate_oidc_issuer": "b", "policy": Path("policy.toml")},
        {"verify_key": [Path("/nowhere")]},
        {"ca_roots": Path("/nowhere")},
        {"ca_roots": Path("/nowhere"), "certificate_identity": "a"},
        {"ca_roots": Path("/nowhere"), "certificate_identity": "a", "certificate_oidc_issuer": "b"},
    ],
)
def test_the_command_line_is_as_strict(given_flags: dict[str, Any]) -> None:
    from cli import _trust

    flags: dict[str, object] = {
        **dict.fromkeys(("certificate_identity", "certificate_oidc_issuer", "policy", "trusted_root")),
        **dict.fromkeys(("certificate_identity_regexp", "certificate_oidc_issuer_regexp", "ca_roots")),
        "verify_key": [],
        "allow_rollback": False,
        "dangerously_skip_verification": False,
        **given_flags,
    }
    args = argparse.Namespace(**flags)
    with pytest.raises(UsageError):
        _trust.options(args)


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_break_the_reader(content: bytes, tmp_path: Path) -> None:
    with contextlib.suppress(FormatError, UsageError):
        Policy.parse(content, tmp_path)


VALUES = st.recursive(
    st.sampled_from(['""', '"*"', '"prod.pub"', "0", "1", "1e9", "true", "2026-01-01", "inf", '"a\\u0000"']),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | inner.map(lambda item: f"{{ identity = {item}, issuer = {item} }}")
    ),
    max_leaves=4,
)


@given(
    rules=st.lists(
        st.dictionaries(
            st.sampled_from(["name", "keys", "identities", "max_age_days", "trusted_root", "other"]), VALUES
        ),
        max_size=3,
    )
)
def test_no_values_break_the_reader_and_whom_it_accepts_was_said(
    rules: list[dict[str, str]], place: Path
) -> None:
    text = "".join("[[image]]\n" + "".join(f"{k} = {v}\n" for k, v in rule.items()) for rule in rules)
    try:
        policy = Policy.parse(text.encode(), place)
    except (FormatError, UsageError):
        return
    for rule in policy.rules:
        assert rule.keys or rule.identities or rule.authorities
        for each in rule.identities:
            assert bool(each.identity) != bool(each.identity_regexp)
            assert bool(each.issuer) != bool(each.issuer_regexp)
            assert "*" not in each.identity


def test_keys_and_identities_may_have_to_be_in_a_log(tmp_path: Path) -> None:
    (tmp_path / "a.pub").write_bytes(PrivateKey.generate().public.to_pem())
    for signer in ('keys = ["a.pub"]', 'identities = [{identity = "a", issuer = "b"}]'):
        text = f'[[image]]\nname = "x"\n{signer}\ntransparency_log = true\n'
        (rule,) = Policy.parse(text.encode(), tmp_path).rules
        assert rule.transparency_log


# What is no question of trust: which differences between nodes forbid a rung.


def test_what_a_policy_softens_and_hardens(place: Path) -> None:
    policy = Policy.parse(b'[match]\nsoft = ["driver", "cpu-feature"]\nhard = ["kernel"]\n', place)
    assert policy == Policy(soft=frozenset({"driver", "cpu-feature"}), hard=frozenset({"kernel"}))
    assert policy.rule_for("x") is None, "it says nothing about trust"


@pytest.mark.parametrize("text", ["", "[match]", "[match]\nsoft = []", "image = []\n[match]\nhard = []"])
def test_a_policy_that_says_nothing_of_nodes(place: Path, text: str) -> None:
    policy = Policy.parse(text.encode(), place)
    assert (policy.soft, policy.hard) == (frozenset(), frozenset())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("match = 5", "not a JSON object"),
        ('match = ["driver"]', "not a JSON object"),
        ("[[match]]", "not a JSON object"),
        ('[match]\nsoft = "driver"', "match.soft is not a list"),
        ("[match]\nhard = [5]", "is not text"),
        ('[match]\nsofter = ["driver"]', "has no 'softer'"),
        ('[match]\nsoft = ["driver"]\nimage = []', "has no 'image'"),
        ("[match]\nsoft = [" + '"driver", ' * 1001 + "]", "a list of at most 1000"),
    ],
)
def test_what_is_no_rule_for_nodes_is_said(place: Path, text: str, said: str) -> None:
    path = place / "policy.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match="invalid policy") as caught:
        Policy.read(path)
    assert said in caught.value.cause


@pytest.mark.parametrize("named", [True, False])
def test_the_policy_that_is_named_counts_or_that_of_the_home(
    place: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REKINDLE_HOME", str(place / "home"))
    assert strictness() == Strictness()
    (place / "home/policy.toml").write_text('[match]\nsoft = ["driver"]')
    (place / "named.toml").write_text('[match]\nhard = ["kernel"]')
    found = strictness(place / "named.toml" if named else None)
    wanted = Strictness(hard=frozenset({"kernel"})) if named else Strictness(soft=frozenset({"driver"}))
    assert found == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('soft = ["colour"]', "unknown rule 'colour'"),
        ('soft = ["architecture"]', "cannot change the rule architecture"),
        ('soft = ["no-command"]', "cannot change the rule no-command"),
        ('soft = ["kernel"]\nhard = ["kernel"]', "both soft and hard"),
    ],
)
def test_rules_that_there_are_not_are_refused_before_anything_is_done(
    place: Path, text: str, said: str
) -> None:
    path = place / "policy.toml"
    path.write_text(f"[match]\n{text}")
    with pytest.raises(UsageError, match=said):
        strictness(path)


def test_where_there_is_no_home_there_is_no_policy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "file").write_bytes(b"")
    monkeypatch.setenv("REKINDLE_HOME", str(place / "file/home"))
    assert strictness() == Strictness()
