# SPDX-License-Identifier: Apache-2.0
"""What registries say, in any form: it is understood, or an error of those that are documented."""

import http.client
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci.descriptor import Descriptor
from oci.registry import blobs, referrers, retry, tokens
from oci.registry.tokens import Challenge, covers
from oci.registry.url import Url, is_loopback
from rekindle.errors import FormatError, RegistryError

# What headers are made of, and what breaks them.
PIECES = st.sampled_from(
    [
        *' ,;="\\/:@[]%?#<>\t\r\n\0-._~é€0179',
        *("Bearer", "Basic", "realm", "scope", "service", "error", "bytes ", "next", "rel="),
        *("http://", "https://", "127.0.0.1", "[::1]", "a.example", "..", "xn--", "\ud800"),
    ]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner)),
    max_leaves=8,
)


@given(st.lists(TEXTS, max_size=4))
def test_any_challenge_is_one_that_we_can_answer_or_none(headers: list[str]) -> None:
    challenge = Challenge.parse(headers)
    assert challenge is None or challenge.scheme in {"bearer", "basic"}


@given(st.text(st.characters(codec="latin-1", exclude_characters='"\\\r\n'), max_size=30))
def test_what_a_challenge_quotes_comes_out(value: str) -> None:
    challenge = Challenge.parse([f'Bearer realm="{value}",scope="a:b:c"'])
    assert challenge == Challenge(scheme="bearer", realm=value, scope="a:b:c")


@pytest.mark.parametrize("piece", ["a", " ", '"', "=", 'a="', '\\"', 'a="\\', "a=", "a ="])
def test_no_challenge_takes_long(piece: str) -> None:
    began = time.monotonic()
    Challenge.parse([("Bearer " + piece * 65_000)[:65_000]] * 100)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("headers", "scheme", "realm"),
    [
        (['Bearer realm="https://a/t",service="b"', "Basic realm=c"], "bearer", "https://a/t"),
        (["basic realm=c", "BEARER realm=https://a/t"], "bearer", "https://a/t"),
        (["Negotiate", 'Basic realm="c"'], "basic", "c"),
        (['Bearer realm = "a\\"b"'], "bearer", 'a"b'),
        (["Bearer"], "bearer", ""),
    ],
)
def test_challenges(headers: list[str], scheme: str, realm: str) -> None:
    challenge = Challenge.parse(headers)
    assert challenge is not None
    assert (challenge.scheme, challenge.realm) == (scheme, realm)


@given(TEXTS, TEXTS)
def test_scopes_cover_themselves(scope: str, other: str) -> None:
    assert covers(scope, scope)
    assert covers(f"{scope} {other}", scope)
    assert covers(scope, "")


def test_scopes_that_cover_others() -> None:
    assert covers("repository:a/b:pull,push", "repository:a/b:pull")
    assert not covers("repository:a/b:pull", "repository:a/b:pull,push")
    assert not covers("repository:a/b:pull", "repository:c:pull")


TOKENS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("token", "access_token", "expires_in", "refresh_token"), JSON)
)


@given(st.one_of(st.binary(max_size=100), TOKENS.map(lambda t: json.dumps(t).encode())))
def test_any_token_may_stand_in_a_header_or_is_an_error(content: bytes) -> None:
    try:
        token = tokens._parse_token(content, "there")
    except RegistryError:
        return
    assert token.text
    assert token.text.isascii()
    assert token.text.isprintable()
    assert " " not in token.text


@pytest.mark.parametrize(("seconds", "good_for"), [(0, 0), (1, 0.5), (60, 50), (3600, 3590)])
def test_tokens_are_renewed_while_they_are_good(seconds: int, good_for: float) -> None:
    token = tokens._parse_token(json.dumps({"token": "a", "expires_in": seconds}).encode(), "there")
    assert token.until - time.monotonic() == pytest.approx(good_for, abs=0.2)


@given(TEXTS)
def test_any_url_is_one_that_can_be_asked_or_none(text: str) -> None:
    try:
        url = Url.parse(text)
    except ValueError:
        return
    assert url.scheme in {"http", "https"}
    assert 0 < url.port < 65536
    assert url.target.startswith("/")
    assert url.target.isascii()
    assert url.target.isprintable()
    assert " " not in url.target
    assert url.host.encode("idna" if ":" not in url.host else "ascii")
    again = Url.parse(f"{url.scheme}://{url.authority}{url.target}")
    assert again == url
    assert "@" not in str(url).partition("://")[2].partition("/")[0]


@pytest.mark.parametrize(
    ("text", "origin", "target"),
    [
        ("http://a", ("http", "a", 80), "/"),
        ("https://A.b:5000/c?d=e#f", ("https", "a.b", 5000), "/c?d=e"),
        ("https://[::1]/ä b?ü=%20", ("https", "::1", 443), "/%C3%A4%20b?%C3%BC=%20"),
        ("http://a/b\r\nX: y", ("http", "a", 80), "/bX:%20y"),
    ],
)
def test_urls(text: str, origin: tuple[str, str, int], target: str) -> None:
    url = Url.parse(text)
    assert (url.origin, url.target) == (origin, target)


@pytest.mark.parametrize(
    "text", ["", "a", "ftp://a", "//a", "http:///a", "http://u@a", "http://a:0x", "http://a:0/"]
)
def test_what_is_no_url(text: str) -> None:
    with pytest.raises(ValueError):
        Url.parse(text)


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["127.0.0.1.example", "127.", "127.example", "notlocalhost", "::11", "10.0.0.1"]
)
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


def headers(**values: str) -> http.client.HTTPMessage:
    message = http.client.HTTPMessage()
    for name, value in values.items():
        message[name.replace("_", "-")] = value
    return message


@given(
    st.one_of(TEXTS, st.from_regex(r"bytes [0-9]{1,3}-[0-9]{1,3}/([0-9]{1,3}|\*)", fullmatch=True)),
    st.integers(0, 50),
    st.integers(1, 50),
    st.integers(0, 50),
)
def test_only_the_range_that_was_asked_for_is_taken(text: str, begin: int, length: int, more: int) -> None:
    end, size = begin + length, begin + length + more
    text = text.encode("latin-1", "ignore").decode("latin-1")  # as http.client reads them
    said = headers()
    said._headers = [("Content-Range", text)]  # type: ignore[attr-defined]
    if not blobs.problem_of(206, said, length, begin, end, size):
        assert text.strip().lower().split()[-1] in {f"{begin}-{end - 1}/{size}", f"{begin}-{end - 1}/*"}
    right = headers(Content_Range=f"bytes {begin}-{end - 1}/{size}")
    assert not blobs.problem_of(206, right, length, begin, end, size)
    assert not blobs.problem_of(206, right, None, begin, end, size)
    assert blobs.problem_of(206, right, length + 1, begin, end, size)
    assert blobs.problem_of(206, right, length, begin, end, size + 1)
    assert blobs.problem_of(206, right, length, begin + 1, end, size)
    assert blobs.problem_of(200, headers(), size + 1, begin, end, size)
    assert not blobs.problem_of(200, headers(), size, begin, end, size)
    assert blobs.problem_of(200, headers(Content_Encoding="gzip"), size, begin, end, size)


LISTS = st.fixed_dictionaries(
    {},
    optional={
        "manifests": st.one_of(
            JSON,
            st.lists(
                st.fixed_dictionaries(
                    {"digest": st.one_of(JSON, st.just(f"sha256:{0:064}"))},
                    optional={
                        "mediaType": st.one_of(JSON, st.just("a/b")),
                        "size": st.one_of(JSON, st.just(1)),
                        "annotations": JSON,
                        "artifactType": JSON,
                        "platform": JSON,
                    },
                ),
                max_size=3,
            ),
        )
    },
)


@given(st.one_of(st.binary(max_size=100), LISTS.map(lambda each: json.dumps(each).encode())))
def test_any_list_of_referrers_is_one_or_a_format_error(content: bytes) -> None:
    try:
        listed = referrers.listed(content)
    except FormatError:
        return
    assert all(isinstance(each, Descriptor) and each.digest.startswith("sha256:") for each in listed)


@given(st.one_of(TEXTS, st.integers(0, 10**30).map(str), st.text("0123456789 ,:GMTJanMon+-", max_size=40)))
def test_any_retry_after_is_a_time_or_none(text: str) -> None:
    seconds = retry.retry_after(text)
    assert seconds is None or seconds >= 0


def test_retry_after() -> None:
    assert retry.retry_after(None) is None
    assert retry.retry_after(" 7 ") == 7
    assert retry.retry_after("Mon, 01 Jan 1990 00:00:00 GMT") == 0
    assert retry.retry_after("Fri, 01 Jan 2999 00:00:00 GMT") > 1e9  # type: ignore[operator]
