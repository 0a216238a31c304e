# SPDX-License-Identifier: Apache-2.0
"""A server of which only a URL and a request are known."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from rekindle.digest import Digest
from rekindle.engine import Endpoint, Request, http
from rekindle.engine.choose import for_command, from_record
from rekindle.engine.client import Response
from rekindle.engine.http import HttpEngine
from rekindle.errors import FormatError, OracleError, UsageError


def engine(*select: str) -> HttpEngine:
    options = {"ready_path": "/health", "oracle": None, "select": list(select)}
    return HttpEngine(endpoint=Endpoint(host="127.0.0.1", port=1), options=options)


def response(body: object, status: int = 200) -> Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Response(status=status, body=content, first_byte=0.0)


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("http://127.0.0.1:8000/health", "127.0.0.1", 8000, "/health"),
        ("http://localhost", "localhost", 80, "/"),
        ("http://localhost:8000", "localhost", 8000, "/"),
        ("http://[::1]:8000/a/b?c=d&e", "::1", 8000, "/a/b?c=d&e"),
        ("HTTP://LocalHost:1/#part", "localhost", 1, "/"),
    ],
)
def test_a_url_says_where_the_server_is(url: str, host: str, port: int, path: str) -> None:
    made = for_command(["anything"], ready_url=url)
    assert made.endpoint == Endpoint(host=host, port=port)
    assert made.options() == {"ready_path": path, "oracle": None, "select": []}


@pytest.mark.parametrize(
    "url",
    [
        *("", "localhost:8000", "https://localhost/", "ftp://localhost/", "http://", "http:///health"),
        *("http://localhost:x/", "http://localhost:99999/", "http://[::1/", "http://:8000/", "/health"),
        *("http://localhost:0/", "http://localhost/a b", "http://localhost/é"),
    ],
)
def test_a_bad_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="--ready-url"):
        HttpEngine.from_options(url, None)


def from_file(path: Path, content: object) -> HttpEngine:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return HttpEngine.from_options("http://localhost:1/health", path)


def test_the_oracle_comes_from_a_file(tmp_path: Path) -> None:
    body = {"prompt": "p", "n": [1]}
    made = from_file(tmp_path / "oracle.json", {"path": "/ask", "body": body, "select": ["/a", "/b/0"]})
    wanted = {"method": "POST", "path": "/ask", "headers": {}, "body": body}
    assert made.options() == {"ready_path": "/health", "oracle": wanted, "select": ["/a", "/b/0"]}
    again = from_record("http", made.endpoint, json.loads(json.dumps(made.options())))
    assert again.options() == made.options()


BAD_FILES: dict[str, object] = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": [],
    "null": None,
    "text": "/ask",
    "no path": {"body": {}},
    "a path that is a number": {"path": 5},
    "a relative path": {"path": "ask"},
    "a path with a space": {"path": "/a b"},
    "a path with another header": {"path": "/a\r\nX-Evil: 1"},
    "a method that is a number": {"path": "/", "method": 5},
    "an empty method": {"path": "/", "method": ""},
    "a method of two words": {"path": "/", "method": "GET /"},
    "headers that are a list": {"path": "/", "headers": []},
    "headers that are null": {"path": "/", "headers": None},
    "a header that is a number": {"path": "/", "headers": {"X": 5}},
    "select that is text": {"path": "/", "select": "/a"},
    "select of numbers": {"path": "/", "select": [1]},
    "select that is null": {"path": "/", "select": None},
    "no UTF-8": b'{"path": "/\xff"}',
    "nested too deep": b"[" * 100_000,
    "a header with another": {"path": "/", "headers": {"X": "1\r\nY: 2"}},
    "a header's name with another": {"path": "/", "headers": {"X: 1\r\nY": "2"}},
    "a header beyond latin-1": {"path": "/", "headers": {"X": "☃"}},
    "a path beyond ASCII": {"path": "/é"},
    "a path with a control character": {"path": "/\0"},
    "a method beyond ASCII": {"path": "/", "method": "É"},
    "a pointer without a slash": {"path": "/", "select": ["a/b"]},
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_without_a_request_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(UsageError) as caught:
        from_file(tmp_path / "oracle.json", content)
    assert "oracle.json" in caught.value.message


@pytest.mark.parametrize("name", ["Authorization", "X-Api-Key", "cookie"])
def test_a_secret_in_a_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        from_file(tmp_path / "oracle.json", {"path": "/", "headers": {name: "Bearer sk-1"}})
    assert "$VARIABLE" in caught.value.hint
    assert "sk-1" not in str(vars(caught.value))


def test_a_secret_comes_from_a_variable(tmp_path: Path) -> None:
    headers = {"Authorization": "$TOKEN", "X-Kind": "plain"}
    made = from_file(tmp_path / "oracle.json", {"path": "/", "headers": headers})
    request = Request.from_json(made.options()["oracle"])
    assert request.headers == headers
    assert made.authorize(request, {"TOKEN": "Bearer sk-1"}).headers == {
        **headers,
        "Authorization": "Bearer sk-1",
    }
    assert request.headers == headers


@pytest.mark.parametrize("environment", [{}, {"TOKEN": "a\r\nX-Evil: 1"}, {"TOKEN": "☃"}])
def test_a_variable_that_cannot_be_sent_is_refused(tmp_path: Path, environment: dict[str, str]) -> None:
    made = from_file(tmp_path / "oracle.json", {"path": "/", "headers": {"Authorization": "$TOKEN"}})
    with pytest.raises(UsageError):
        made.authorize(Request.from_json(made.options()["oracle"]), environment)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="oracle"):
        HttpEngine.from_options("http://localhost/", tmp_path / "oracle.json")


def test_a_method_follows_from_the_body() -> None:
    assert Request.from_json({"path": "/"}).method == "GET"
    assert Request.from_json({"path": "/", "body": None}).method == "POST"
    assert Request.from_json({"path": "/", "body": 5, "method": "PUT"}).method == "PUT"


@given(
    st.sampled_from(["GET", "POST", "PATCH"]),
    st.text(alphabet="/aZ0?=&%", max_size=9),
    st.dictionaries(st.text(alphabet="aZ-", min_size=1), st.text(alphabet="aZ -"), max_size=3),
    st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=4),
)
def test_a_request_comes_back_as_it_was(method: str, path: str, headers: dict[str, str], body: Any) -> None:
    request = Request(method=method, path=f"/{path}", headers=headers, body=body)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_what_is_no_request_is_malformed(value: Any) -> None:
    with pytest.raises(FormatError):
        Request.from_json(value)


def test_the_whole_body_counts() -> None:
    body = b"any\xff bytes"
    assert engine().answer(response(body)) == {"status": 200, "body": Digest.of_bytes(body)}


DOCUMENT = {
    "choices": [{"text": "hi", "id": 7}, {"text": "ho"}],
    "a/b": {"m~n": None},
    "": "empty",
    "0": "zero",
    "usage": {"total": 5},
}


@pytest.mark.parametrize(
    ("pointer", "value"),
    [
        ("", DOCUMENT),
        ("/choices/0/text", "hi"),
        ("/choices/1/text", "ho"),
        ("/usage", {"total": 5}),
        ("/", "empty"),
        ("/0", "zero"),
        ("/a~1b/m~0n", None),
    ],
)
def test_a_pointer_names_a_part(pointer: str, value: object) -> None:
    assert engine(pointer).answer(response(DOCUMENT)) == {"status": 200, "values": [value]}


def test_what_is_not_selected_does_not_count() -> None:
    chosen = engine("/choices/0/text", "/usage/total")
    other = {**DOCUMENT, "choices": [{"text": "hi", "id": 8}]}
    assert chosen.agree(chosen.answer(response(DOCUMENT)), chosen.answer(response(other)))


@pytest.mark.parametrize(
    "pointer",
    ["/none", "/choices/2", "/choices/x", "/choices/0/text/0", "/usage/total/x", "/choices/0/text/x", "/a/b"],
)
def test_a_pointer_to_nothing_is_an_oracle_error(pointer: str) -> None:
    with pytest.raises(OracleError):
        engine(pointer).answer(response(DOCUMENT))


@pytest.mark.parametrize("pointer", ["/choices/-1/text", "/choices/+1/text", "/choices/01/text"])
def test_an_index_is_digits(pointer: str) -> None:
    with pytest.raises(OracleError):
        engine(pointer).answer(response(DOCUMENT))


@pytest.mark.parametrize("body", [b"", b"no", b"null", b"5", b"[]", b'"text"', b"\xff", b'{"a"'])
def test_an_answer_of_another_form_is_an_oracle_error(body: bytes) -> None:
    with pytest.raises(OracleError):
        engine("/choices").answer(response(body))


def test_a_deep_answer_is_an_oracle_error() -> None:
    with pytest.raises(OracleError):
        engine("/a").answer(response(b"[" * 100_000))


@pytest.mark.parametrize("status", [199, 301, 404, 500])
def test_a_failure_is_an_oracle_error(status: int) -> None:
    with pytest.raises(OracleError, match=str(status)) as caught:
        engine().answer(response(b"why", status))
    assert caught.value.cause == "why"


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (response(b"a"), response(b"a"), True),
        (response(b"a"), response(b"b"), False),
        (response(b"a"), response(b"a", 201), False),
    ],
)
def test_answers_agree_when_they_are_equal(first: Response, second: Response, same: bool) -> None:
    assert engine().agree(engine().answer(first), engine().answer(second)) is same


@pytest.mark.parametrize(
    "options", [{}, {"ready_path": 5}, {"ready_path": "/", "oracle": 5, "select": []}, {"select": 5}]
)
def test_malformed_recorded_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        from_record("http", Endpoint(host="::1", port=5), options).answer(response(b""))


def test_a_compressed_answer_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"answer": 42, "when": 1}).encode()
    packed = Response(status=200, body=gzip.compress(body), first_byte=0.0)
    assert engine("/answer").answer(packed) == {"status": 200, "values": [42]}
    with pytest.raises(OracleError):
        engine("/answer").answer(structs.replace(packed, body=b"\x1f\x8bnonsense"))
    monkeypatch.setattr(http, "_UNZIPPED_LIMIT_BYTES", 10)
    with pytest.raises(OracleError):
        engine("/answer").answer(packed)
