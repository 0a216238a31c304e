# SPDX-License-Identifier: Apache-2.0
"""vLLM's command lines, its stream of completions, and when two answers are the same."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from rekindle.engine import Endpoint, Request
from rekindle.engine.choose import for_command, from_record
from rekindle.engine.client import Response
from rekindle.engine.vllm import VllmEngine
from rekindle.errors import FormatError, OracleError, UsageError

MODULE = "vllm.entrypoints.openai.api_server"
ENGINE = VllmEngine(endpoint=Endpoint(host="127.0.0.1", port=8000))

RECOGNISED: dict[str, tuple[str, str, int]] = {
    "plain": ("vllm serve m", "0.0.0.0", 8000),
    "by path": ("/opt/venv/bin/vllm serve m --port 1", "0.0.0.0", 1),
    "by python": ("python /opt/venv/bin/vllm serve m --port=9", "0.0.0.0", 9),
    "as a module": (f"/usr/bin/python3 -m {MODULE} --model m --host ::1", "::1", 8000),
    "host and port": ("vllm serve m --host 127.0.0.1 --port 65535", "127.0.0.1", 65535),
    "the last one counts": ("vllm serve m --port 1 --port=2 --host a --host b", "b", 2),
    "options first": ("vllm serve --port 5 m", "0.0.0.0", 5),
    "an empty host": ("vllm serve m --host=", "0.0.0.0", 8000),
    "an option without its value": ("vllm serve m --port", "0.0.0.0", 8000),
    "another option that begins alike": ("vllm serve m --port-range 7 --hostname x", "0.0.0.0", 8000),
}


@pytest.mark.parametrize(("command", "host", "port"), RECOGNISED.values(), ids=RECOGNISED)
def test_a_command_of_vllm_is_recognised(command: str, host: str, port: int) -> None:
    engine = for_command(command.split())
    assert isinstance(engine, VllmEngine)
    assert engine.endpoint == Endpoint(host=host, port=port)


@pytest.mark.parametrize(
    "command",
    [
        "vllm",
        "vllm bench serve",
        "vllm --version",
        "serve vllm",
        "python server.py --model vllm serve",
        f"python {MODULE}",
        "python -m http.server",
        "nvllm serve m",
        "vllm-serve m",
    ],
)
def test_another_command_is_not(command: str) -> None:
    assert VllmEngine.recognize(command.split()) is None
    with pytest.raises(UsageError, match=command.split()[0]) as caught:
        for_command(command.split())
    assert "--ready-url" in caught.value.hint


def test_no_command_is_not_recognised() -> None:
    assert VllmEngine.recognize([]) is None


@pytest.mark.parametrize(
    "command", [f"python3 -u -m {MODULE} --model m", "python -m vllm.entrypoints.cli.main serve m"]
)
def test_python_with_other_options_is_recognised(command: str) -> None:
    assert VllmEngine.recognize(command.split())


@pytest.mark.parametrize("option", ["--uds /run/vllm.sock", "--uds=/run/vllm.sock"])
def test_a_unix_socket_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match="unix socket"):
        VllmEngine.recognize(f"vllm serve m {option}".split())


@pytest.mark.parametrize("option", ["--ssl-keyfile /k", "--ssl-certfile=/c"])
def test_tls_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match="TLS"):
        VllmEngine.recognize(f"vllm serve m {option}".split())


@pytest.mark.parametrize("port", ["0", "65536", "-1", "80.0", "http", "1_0", " 80", "99999999999999999999"])
def test_a_bad_port_is_refused(port: str) -> None:
    with pytest.raises(UsageError, match="port"):
        VllmEngine.recognize(["vllm", "serve", "m", f"--port={port}"])


@pytest.mark.parametrize(
    ("host", "reachable", "shown"),
    [
        ("0.0.0.0", "127.0.0.1", "0.0.0.0:80"),
        ("", "127.0.0.1", ":80"),
        ("::", "::1", "[::]:80"),
        ("::1", "::1", "[::1]:80"),
        ("10.0.0.1", "10.0.0.1", "10.0.0.1:80"),
    ],
)
def test_an_endpoint_is_reached_and_shown(host: str, reachable: str, shown: str) -> None:
    endpoint = Endpoint(host=host, port=80)
    assert endpoint.reachable_host == reachable
    assert str(endpoint) == shown


QUESTION = Request(method="POST", path="/v1/completions", headers={"X": "y"}, body={"prompt": "p"})


@pytest.mark.parametrize(
    ("command", "environment", "key"),
    [
        ("vllm serve m", {}, None),
        ("vllm serve m", {"VLLM_API_KEY": "from-environment"}, "from-environment"),
        ("vllm serve m --api-key given", {}, "given"),
        ("vllm serve m --api-key=given", {"VLLM_API_KEY": "from-environment"}, "given"),
        ("vllm serve m --api-key=", {"VLLM_API_KEY": ""}, None),
    ],
)
def test_a_key_goes_with_the_request(command: str, environment: dict[str, str], key: str | None) -> None:
    engine = VllmEngine.recognize(command.split(), environment)
    assert engine
    sent = engine.authorize(QUESTION, environment)
    wanted = {"X": "y"} if key is None else {"X": "y", "Authorization": f"Bearer {key}"}
    assert sent.headers == wanted
    assert QUESTION.headers == {"X": "y"}


def test_a_key_is_not_recorded() -> None:
    engine = VllmEngine.recognize(["vllm", "serve", "m", "--api-key", "sk-1"])
    assert engine
    assert "sk-1" not in json.dumps(engine.options())


def test_caches_go_where_they_are_told(tmp_path: Any) -> None:
    variables = ENGINE.cache_environment(tmp_path)
    assert set(variables) == {"VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
    assert all(value.startswith(str(tmp_path)) for value in variables.values())


def test_a_recorded_engine_is_made_again() -> None:
    engine = from_record("vllm", Endpoint(host="::1", port=5), {})
    assert isinstance(engine, VllmEngine)
    assert engine.endpoint == Endpoint(host="::1", port=5)


@pytest.mark.parametrize("name", ["", "VLLM", "sglang"])
def test_an_unknown_engine_is_malformed(name: str) -> None:
    with pytest.raises(FormatError, match="engine"):
        from_record(name, Endpoint(host="::1", port=5), {})


def event(*pairs: tuple[str, Any], **changes: Any) -> str:
    logprobs = {"tokens": [token for token, _ in pairs], "token_logprobs": [value for _, value in pairs]}
    choice = {"index": 0, "text": "".join(token for token, _ in pairs), "logprobs": logprobs}
    return "data: " + json.dumps({"id": "x", "choices": [choice], **changes}, ensure_ascii=False)


def response(*lines: str, status: int = 200, newline: str = "\n\n") -> Response:
    return Response(status=status, body=newline.join([*lines, ""]).encode(), first_byte=0.0)


DONE = "data: [DONE]"
NO_LOGPROBS = "data: " + json.dumps({"choices": [{"index": 0, "text": "", "logprobs": None}]})
NO_CHOICES = "data: " + json.dumps({"choices": [], "usage": {"total_tokens": 5}})

STREAMS: dict[str, tuple[Response, list[str], list[float]]] = {
    "one event": (response(event((" Paris", -0.5)), DONE), [" Paris"], [-0.5]),
    "many events": (
        response(event((" a", -0.1)), event((" b", -0.2), (" c", -0.3)), DONE),
        [" a", " b", " c"],
        [-0.1, -0.2, -0.3],
    ),
    "no end mark": (response(event(("a", -1))), ["a"], [-1]),
    "events without tokens": (
        response(NO_LOGPROBS, event(("a", -1)), NO_LOGPROBS, NO_CHOICES, DONE),
        ["a"],
        [-1],
    ),
    "comments and other fields": (
        response(": ping", "event: x", event(("a", -1)), "id: 3", DONE),
        ["a"],
        [-1],
    ),
    "carriage returns": (response(event(("a", -1)), DONE, newline="\r\n\r\n"), ["a"], [-1]),
    "more digits than count": (response(event(("a", -0.123456789)), DONE), ["a"], [-0.123457]),
    "newlines and unicode in tokens": (
        response(event(("\n", -1), ("é中\N{SNOWMAN}", -2)), DONE),
        ["\n", "é中☃"],
        [-1, -2],
    ),
}


@pytest.mark.parametrize(("got", "tokens", "logprobs"), STREAMS.values(), ids=STREAMS)
def test_tokens_and_logprobs_are_the_answer(got: Response, tokens: list[str], logprobs: list[float]) -> None:
    assert ENGINE.answer(got) == {"tokens": tokens, "logprobs": logprobs}


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
def test_a_token_may_be_a_separator_of_unicode(character: str) -> None:
    answer = ENGINE.answer(response(event(("a" + character, -1)), DONE))
    assert answer["tokens"] == ["a" + character]


def lists(tokens: object, logprobs: object) -> str:
    return "data: " + json.dumps({"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": logprobs}}]})


BAD_STREAMS: dict[str, Response] = {
    "status 500": response(event(("a", -1)), status=500),
    "status 401": response("no", status=401),
    "status 204": response(status=204),
    "nothing": response(),
    "no event": response("hello", "<html>"),
    "only the end": response(DONE),
    "only events without tokens": response(NO_LOGPROBS, DONE),
    "no tokens": response(event(), DONE),
    "not a stream": response('{"choices": []}'),
    "an error after tokens": response(event(("a", -1)), 'data: {"error": {"message": "died"}}'),
    "cut off": response(event(("a", -1)), event(("b", -1))[:-9]),
    "no JSON": response("data: x"),
    "a list": response("data: []"),
    "a number": response("data: 5"),
    "null": response("data: null"),
    "text": response('data: "error"'),
    "no choices": response("data: {}"),
    "choices that are null": response('data: {"choices": null}'),
    "a choice that is null": response('data: {"choices": [null]}'),
    "a choice without logprobs": response('data: {"choices": [{"text": "a"}]}'),
    "logprobs that are a list": response('data: {"choices": [{"logprobs": [1]}]}'),
    "logprobs of another form": response('data: {"choices": [{"logprobs": {"content": []}}]}'),
    "tokens that are null": response(
        'data: {"choices": [{"logprobs": {"tokens": null, "token_logprobs": []}}]}'
    ),
    "no UTF-8": Response(status=200, body=b"data: \xff\n", first_byte=0.0),
    "a logprob that is null": response(event(("a", None)), DONE),
    "a logprob that is text": response(event(("a", "-1")), DONE),
    "a token that is a number": response(lists([1], [-1])),
    "fewer logprobs than tokens": response(lists(["a"], [])),
    "more logprobs than tokens": response(lists(["a"], [-1, -2])),
    "nested too deep": response("data: " + "[" * 100_000),
}


@pytest.mark.parametrize("got", BAD_STREAMS.values(), ids=BAD_STREAMS)
def test_another_answer_is_an_oracle_error(got: Response) -> None:
    with pytest.raises(OracleError):
        ENGINE.answer(got)


@pytest.mark.parametrize("tokens", ["ab", {"a": 1, "b": 2}])
def test_tokens_that_are_no_list_are_an_oracle_error(tokens: object) -> None:
    with pytest.raises(OracleError):
        ENGINE.answer(response(lists(tokens, [-1, -1])))


def test_an_error_answer_shows_what_the_server_said() -> None:
    with pytest.raises(OracleError, match="status 503") as caught:
        ENGINE.answer(response("model overloaded", status=503))
    assert "model overloaded" in caught.value.cause


def answer(tokens: Sequence[str], *logprobs: float) -> dict[str, Any]:
    return {"tokens": list(tokens), "logprobs": list(logprobs)}


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        (answer("ab", -1, -2), answer("ab", -1, -2), True),
        (answer("ab", -1, -2), answer("ab", -1.0005, -1.9995), True),
        (answer("ab", -1, -2), answer("ab", -1, -2.002), False),
        (answer("ab", -1, -2), answer("ac", -1, -2), False),
        (answer("ab", -1, -2), answer("a", -1), False),
        (answer("a", -1), answer("ab", -1, -2), False),
        (answer("ab", -1, -2), answer("ba", -1, -2), False),
        (answer("a", -1), answer("a", float("nan")), False),
    ],
)
def test_answers_agree_but_for_rounding(expected: Any, got: Any, same: bool) -> None:
    assert ENGINE.agree(expected, got) is same


@pytest.mark.parametrize("recorded", [None, 5, [], {}, {"tokens": ["a"]}, {"tokens": ["a"], "logprobs": []}])
def test_a_malformed_recorded_answer_does_not_agree(recorded: Any) -> None:
    assert ENGINE.agree(recorded, answer("a", -1)) is False
