# SPDX-License-Identifier: Apache-2.0
"""A vLLM that sleeps through its snapshot: how it is started, sent to sleep, woken, and found in a record."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from rekindle.engine import Endpoint, Request, no_phase
from rekindle.engine.choose import Weights, for_sleep, from_record, with_recorded_sleep_mode
from rekindle.engine.client import Client, Response
from rekindle.engine.vllm import VllmEngine
from rekindle.engine.vllm_asleep import AtBoundary, Sleeping, require_sleepable
from rekindle.engine.vllm_command import read
from rekindle.errors import FormatError, NotReadyError, OracleError, UsageError, WorkloadError
from rekindle.record import Record, RecordedEngine
from tests.samples.record import RECORD

ENDPOINT = Endpoint(host="0.0.0.0", port=8000)
PLAIN = VllmEngine(endpoint=ENDPOINT)
ASKED = Request(method="POST", path="/v1/completions", headers={}, body={"prompt": "?"})
ANSWER = {"tokens": [" Paris"], "logprobs": [-0.25]}
READY = {"token_ids": [7], "text": " Paris", "sampled_token_logprob": -0.25}


class FakeClient(Client):
    """Answers as it is told to, 200 if not, and writes down what it was asked."""

    def __init__(self, root: Path, answer: Callable[[str], Response | OSError] | None = None) -> None:
        self.asked: list[Request] = []
        self.keys: list[str | None] = []
        self._root = root
        self._answer = answer or (lambda path: reply(stream() if path == ASKED.path else b"{}"))

    def ask(self, request: Request, *, timeout: float) -> Response:
        self.asked.append(request)
        key = self._root / "dev/shm/tmp/rekindle/key"
        self.keys.append(key.read_text() if key.exists() else None)
        answer = self._answer(request.path)
        if isinstance(answer, OSError):
            raise answer
        return answer

    @property
    def paths(self) -> list[str]:
        return [request.path for request in self.asked]


def reply(body: bytes, status: int = 200) -> Response:
    return Response(status=status, body=body, first_byte=0.0)


def stream(logprob: float = -0.25) -> bytes:
    event = {"choices": [{"logprobs": {"tokens": [" Paris"], "token_logprobs": [logprob]}}]}
    return f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cell's file system."""
    (tmp_path / "dev/shm/tmp").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def vllm(tmp_path: Path) -> str:
    """A launcher, as pip makes it."""
    path = tmp_path / "bin/vllm"
    path.parent.mkdir()
    path.write_text(f"#!{sys.executable}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("weights", "version", "options"),
    [
        (Weights.IMAGE, "0.32.0", {"asleep": 1}),
        (Weights.IMAGE, "0.9.2", {"asleep": 1}),
        (Weights.RELOAD, "0.31.0", {"asleep": "boundary"}),
        (Weights.RELOAD, "0.32.0+cu129", {"asleep": "boundary"}),
        (Weights.RELOAD, "0.33.0", {"asleep": "boundary"}),
        (Weights.RELOAD, "1.0", {"asleep": "boundary"}),
        (Weights.RELOAD, "0.30.4", {"asleep": 2}),
        (Weights.RELOAD, "0.9", {"asleep": 2}),
        (Weights.RELOAD, "", {"asleep": 2}),
        (Weights.RELOAD, "unknown", {"asleep": 2}),
    ],
)
def test_how_it_sleeps_follows_from_where_the_weights_go_and_from_the_version(
    weights: Weights, version: str, options: dict[str, Any]
) -> None:
    engine = for_sleep(PLAIN, weights, version)
    assert engine.options() == options
    assert engine.endpoint == PLAIN.endpoint
    again = from_record("vllm", ENDPOINT, options)
    assert again.options() == options
    assert type(again) is type(engine)


def test_one_that_is_warmed_by_the_user_is_not_taken_to_where_it_takes_no_requests() -> None:
    engine = for_sleep(PLAIN, Weights.RELOAD, "0.32.0", warmed=True)
    assert engine.options() == {"asleep": 2}


def recorded(options: dict[str, Any]) -> Record:
    return structs.replace(RECORD, engine=RecordedEngine(name="vllm", options=options))


@pytest.mark.parametrize(
    "asleep", [0, 3, -1, 1.5, "1", "", "Boundary", True, False, [], [1], {}, {"level": 1}]
)
def test_a_record_that_sleeps_otherwise_is_refused(asleep: object) -> None:
    with pytest.raises(FormatError, match="unknown sleep mode"):
        from_record("vllm", ENDPOINT, {"asleep": asleep})
    assert not recorded({"asleep": asleep}).reloads


@pytest.mark.parametrize(("options", "reloads"), [({}, False), ({"asleep": 1}, False), ({"asleep": 2}, True)])
def test_a_record_says_whether_weights_are_read_again(options: dict[str, Any], reloads: bool) -> None:
    assert recorded(options).reloads is reloads


@pytest.mark.parametrize(
    ("options", "command", "added"),
    [
        ({}, "vllm serve m", []),
        ({"asleep": 1}, "vllm serve m", ["--enable-sleep-mode"]),
        ({"asleep": 2}, "python -m vllm.entrypoints.openai.api_server --model m", ["--enable-sleep-mode"]),
        ({"asleep": "boundary"}, "vllm serve m", ["--enable-sleep-mode"]),
        ({"asleep": 1}, "sglang serve m", []),
    ],
)
def test_its_kernels_are_found_by_who_is_started_alike(
    options: dict[str, Any], command: str, added: list[str]
) -> None:
    assert with_recorded_sleep_mode(command.split(), options) == [*command.split(), *added]


def test_one_that_does_not_sleep_needs_nothing() -> None:
    engine = from_record("vllm", ENDPOINT, {})
    assert engine.options() == {}
    assert engine.launch(["vllm", "serve", "m"], {"A": "b"}) == (["vllm", "serve", "m"], {"A": "b"})


@pytest.mark.parametrize("path", [None, "/theirs", "/theirs:/more"])
def test_it_is_started_with_sleep_mode_development_mode_and_the_gate(path: str | None) -> None:
    argv, environment = ["vllm", "serve", "m", "--port", "1"], {"A": "b"}
    if path:
        environment["PYTHONPATH"] = path
    given = list(argv), dict(environment)
    words, started = Sleeping(endpoint=ENDPOINT, level=1).launch(argv, environment)
    assert words == [*argv, "--enable-sleep-mode", "--middleware", "rekindle_gate.Gate"]
    ours = "/dev/shm/tmp/rekindle"
    assert started == {
        "A": "b",
        "VLLM_SERVER_DEV_MODE": "1",
        "PYTHONPATH": f"{ours}:{path}" if path else ours,
    }
    assert (argv, environment) == given, "what is recorded was changed"


def test_the_gate_is_there_before_it_starts_and_the_key_is_not(root: Path) -> None:
    Sleeping(endpoint=ENDPOINT, level=1).enter(root)
    assert [path.name for path in (root / "dev/shm/tmp/rekindle").iterdir()] == ["rekindle_gate.py"]
    Sleeping(endpoint=ENDPOINT, level=1).enter(root)


@pytest.mark.parametrize(
    ("level", "woken"),
    [
        (1, ["/wake_up"]),
        (2, ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache"]),
    ],
)
def test_sleep_is_rehearsed(root: Path, level: int, woken: list[str]) -> None:
    engine, client = Sleeping(endpoint=ENDPOINT, level=level), FakeClient(root)
    engine.enter(root)
    engine.quiesce(client, ANSWER, ASKED)
    assert client.paths == [f"/sleep?level={level}", *woken, ASKED.path, f"/sleep?level={level}"]
    orders = [request for request in client.asked if request.path != ASKED.path]
    assert {request.method for request in orders} == {"POST"}
    assert [r.body for r in orders if r.body] == [{"method": "reload_weights"}] * (level == 2)
    (key,) = {request.headers["x-rekindle-key"] for request in orders}
    assert set(client.keys) == {key}
    assert len(key) == 64
    assert "x-rekindle-key" not in client.asked[-2].headers
    assert not (root / "dev/shm/tmp/rekindle/key").exists(), "the snapshot would hold it"


def test_every_key_is_a_new_one(root: Path) -> None:
    engine = Sleeping(endpoint=ENDPOINT, level=1)
    engine.enter(root)
    clients = [FakeClient(root), FakeClient(root)]
    for client in clients:
        engine.wake(client, no_phase)
    assert len({client.keys[0] for client in clients}) == 2


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda path: reply(b'{"detail":"Not Found"}', 404), WorkloadError, "404"),
        (lambda path: ConnectionRefusedError("refused"), WorkloadError, "did not answer"),
        (lambda path: reply(stream(-0.5) if path == ASKED.path else b"{}"), OracleError, "differently"),
        (lambda path: reply(b"no stream", 500 if path == ASKED.path else 200), OracleError, "500"),
        (
            lambda path: ConnectionResetError("reset") if path == ASKED.path else reply(b"{}"),
            WorkloadError,
            "did not answer",
        ),
    ],
)
def test_a_rehearsal_that_fails_is_told_and_leaves_no_key(
    root: Path, answer: Callable[[str], Response | OSError], error: type[Exception], words: str
) -> None:
    engine = Sleeping(endpoint=ENDPOINT, level=1)
    engine.enter(root)
    with pytest.raises(error, match=words):
        engine.quiesce(FakeClient(root, answer), ANSWER, ASKED)
    assert not (root / "dev/shm/tmp/rekindle/key").exists()


def test_orders_bring_the_servers_own_key_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, client = Sleeping(endpoint=ENDPOINT, level=1, api_keys=["theirs"]), FakeClient(root)
    engine.enter(root)
    engine.wake(client, no_phase)
    assert client.asked[0].headers["Authorization"] == "Bearer theirs"
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    again = from_record("vllm", ENDPOINT, engine.options())
    again.enter(root)
    again.wake(client, no_phase)
    assert client.asked[1].headers["Authorization"] == "Bearer of the environment"


@pytest.mark.parametrize(
    ("level", "phases"), [(1, ["wake"]), (2, ["wake", "reload weights", "wake kv cache"])]
)
def test_every_step_of_waking_is_a_phase(root: Path, level: int, phases: list[str]) -> None:
    engine, client = Sleeping(endpoint=ENDPOINT, level=level), FakeClient(root)
    engine.enter(root)
    seen: list[str] = []

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        seen.append(name)
        asked = len(client.asked)
        yield
        assert len(client.asked) == asked + 1

    engine.wake(client, phase)
    assert seen == phases


def boundary(root: Path, ready: object) -> AtBoundary:
    """An engine whose server has said this when it got ready."""
    engine = AtBoundary(endpoint=ENDPOINT, model="m")
    engine.enter(root)
    content = ready if isinstance(ready, str) else json.dumps(ready)
    (root / "dev/shm/tmp/rekindle/ready.json").write_text(content)
    return engine


def test_vllms_own_snapshot_server_is_started_with_what_the_command_serves(vllm: str) -> None:
    argv = [vllm, "serve", "some/model", "--served-model-name", "m", "--port", "1"]
    words, environment = AtBoundary(endpoint=ENDPOINT).launch(argv, {"A": "b"})
    place = "/dev/shm/tmp/rekindle"
    assert words[:3] == [sys.executable, "-m", "vllm.snapshot.server"]
    assert words[3:7] == ["--ready-file", f"{place}/ready.json", "--release-file", f"{place}/release.json"]
    assert words[7] == "--release-timeout-s"
    assert float(words[8]) > 86400 * 365
    assert words[9:] == ["--", "some/model", "--served-model-name", "m", "--port", "1"]
    assert environment == {"A": "b"}


def test_the_older_form_of_the_command_is_understood() -> None:
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", "m", "--port", "1"]
    words, _ = AtBoundary(endpoint=ENDPOINT).launch(argv, {})
    assert words[0] == sys.executable
    assert words[words.index("--") :] == ["--", "--model", "m", "--port", "1"]


def test_a_launcher_of_which_nobody_knows_the_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which Python"):
        AtBoundary(endpoint=ENDPOINT).launch([str(tmp_path / "vllm"), "serve", "m"], {})


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("some/model", "some/model"),
        ("some/model --served-model-name a", "a"),
        ("--model some/model --served-model-name=a", "a"),
        ("--port 1", ""),
    ],
)
def test_it_is_asked_what_it_asked_itself(vllm: str, root: Path, words: str, name: str) -> None:
    engine = boundary(root, READY)
    engine.launch([vllm, "serve", *words.split()], {})
    request, answer = engine.known_oracle()
    assert request.path == "/v1/completions"
    assert request.body["model"] == name
    assert request.body["prompt"] == "The capital of France is"
    asked = {key: request.body[key] for key in ("max_tokens", "min_tokens", "temperature", "stream")}
    assert asked == {"max_tokens": 1, "min_tokens": 1, "temperature": 0, "stream": True}
    assert request.body["return_tokens_as_token_ids"] is True
    assert answer == {"tokens": ["token_id:7"], "logprobs": [-0.25]}
    assert engine.agree(answer, answer)


@pytest.mark.parametrize(
    "ready",
    [
        *("", "{", "[]", "null", "7", '"text"'),
        {},
        {"token_ids": [7], "text": ""},
        {**READY, "token_ids": []},
        {**READY, "token_ids": [1, 2]},
        {**READY, "token_ids": ["7"]},
        {**READY, "token_ids": 7},
        {**READY, "sampled_token_logprob": None},
        {**READY, "sampled_token_logprob": "nan"},
        {**READY, "sampled_token_logprob": float("inf")},
        {**READY, "sampled_token_logprob": []},
    ],
)
def test_an_answer_of_its_own_that_is_none_is_refused(root: Path, ready: object) -> None:
    with pytest.raises(OracleError, match="cannot read the answer"):
        boundary(root, ready).known_oracle()


def test_without_an_answer_of_its_own_it_is_refused(root: Path) -> None:
    engine = AtBoundary(endpoint=ENDPOINT)
    engine.enter(root)
    with pytest.raises(OracleError, match="cannot read the answer"):
        engine.known_oracle()


def test_it_is_ready_when_it_says_so_and_once_released_when_it_answers(root: Path) -> None:
    engine = AtBoundary(endpoint=ENDPOINT)
    engine.enter(root)
    client = FakeClient(root, lambda path: ConnectionRefusedError("closed"))
    assert not engine.ready(client, 1)
    boundary(root, READY)
    assert engine.ready(client, 1)
    assert not client.asked, "its port is closed"
    (root / "dev/shm/tmp/rekindle/release.json").write_text("{}")
    with pytest.raises(ConnectionRefusedError):
        engine.ready(client, 1)
    assert engine.ready(FakeClient(root), 1)


def test_on_a_lower_rung_it_is_a_server_like_any_other(root: Path) -> None:
    engine, client = from_record("vllm", ENDPOINT, {"asleep": "boundary"}), FakeClient(root)
    assert engine.ready(client, 1)
    assert client.paths == ["/health"]


def test_nothing_warms_it() -> None:
    assert AtBoundary(endpoint=ENDPOINT).warm_requests(FakeClient(Path("/"))) == []


def test_it_wakes_when_it_is_released(root: Path) -> None:
    engine = boundary(root, READY)
    release = root / "dev/shm/tmp/rekindle/release.json"
    said: list[Response | Exception] = [
        *(ConnectionRefusedError("closed"), NotReadyError("slow")),
        *(reply(b"", 503), reply(b"")),
    ]
    answers = iter(said)

    def answer(path: str) -> Response:
        assert json.loads(release.read_text()) == {"release": True, "host": "0.0.0.0", "port": 8000}
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    client = FakeClient(root, answer)
    seen: list[str] = []

    def phase(name: str) -> contextlib.AbstractContextManager[None]:
        seen.append(name)
        return contextlib.nullcontext()

    engine.wake(client, phase)
    assert client.paths == ["/health"] * 4
    assert seen == ["wake"]


def test_one_that_never_opens_its_port_is_given_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rekindle.engine.vllm_asleep._TIMEOUT_SECONDS", 0.1)
    with pytest.raises(NotReadyError, match="did not open its port"):
        boundary(root, READY).wake(FakeClient(root, lambda path: ConnectionRefusedError("closed")), no_phase)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--api-server-count", "4"], "--api-server-count 4"),
        (["-asc=2"], "--api-server-count 2"),
        (["--tensor-parallel-size=2"], "--tensor-parallel-size 2"),
        (["-tp", "8", "-pp", "2"], "--tensor-parallel-size 8 and --pipeline-parallel-size 2"),
        (["--data_parallel_size", "2"], "--data-parallel-size 2"),
    ],
)
def test_a_server_of_several_parts_does_not_sleep(words: list[str], named: str) -> None:
    command = read(["vllm", "serve", "model", *words], {})
    assert command
    with pytest.raises(UsageError, match=f"a server with {named} cannot be put to sleep") as caught:
        require_sleepable(command)
    assert "--weights as-is" in caught.value.hint


@pytest.mark.parametrize("words", [[], ["-tp", "1"], ["--api-server-count=1"], ["-tp", "many"]])
def test_a_server_of_one_part_sleeps(words: list[str]) -> None:
    command = read(["vllm", "serve", "model", *words], {})
    assert command
    require_sleepable(command)


def test_a_server_on_several_gpus_shares_no_memory_over_nvlink() -> None:
    """And a restore knows that: these variables are compared."""
    engine = VllmEngine.recognize(["vllm", "serve", "model", "-tp", "2"], {})
    assert engine
    wanted = {"NCCL_NVLS_ENABLE": "0", "NCCL_IB_DISABLE": "1"}
    assert wanted.items() <= engine.environment().items()
    assert engine.options() == {"gpus": 2}
    assert from_record("vllm", ENDPOINT, engine.options()).environment() == engine.environment()
    assert not wanted.keys() & PLAIN.environment().keys()
    assert PLAIN.options() == {}
