# SPDX-License-Identifier: Apache-2.0
"""The whole job on real vLLM: start, warm, snapshot, kill, restore, compare tokens."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rekindle.engine import Endpoint
from rekindle.engine.client import Client
from rekindle.engine.vllm_asleep import AtBoundary
from tests.conftest import VLLM_BIN, Rekindle, Replica, free_port, wait_for
from tests.integration.conftest import VLLM_PORT as PORT
from tests.traces import Traces, adopting_orphans

pytestmark = [
    pytest.mark.criu,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
]
PROMPT = {
    "model": "tiny",
    "prompt": "Once upon a time",
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture
def start(vllm: tuple[Rekindle, dict[str, object]], tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    replicas: list[Replica] = []

    def begin(port: int = PORT, *words: str, env: dict[str, str] | None = None) -> Replica:
        report, log = tmp_path / f"{len(replicas)}.json", tmp_path / f"{len(replicas)}.log"
        options = ["--publish", str(port), "--report", str(report), *words]
        process = vllm[0].spawn("restore", "tiny", *options, log=log, env=env)
        replica = Replica(process, port, log, {})
        replicas.append(replica)
        wait_for(lambda: report.exists() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        replica.report = json.loads(report.read_text())
        return replica

    yield begin
    for replica in replicas:
        replica.kill()


def complete(replica: Replica, **changes: object) -> str:
    deadline = time.monotonic() + 10
    while True:
        try:
            answer = json.loads(replica.ask("/v1/completions", {**PROMPT, **changes}, timeout=60))
        except ConnectionError:
            assert time.monotonic() < deadline
            continue
        return str(answer["choices"][0]["text"])


def test_the_snapshot_is_proved_small_and_made_in_little_memory(
    vllm: tuple[Rekindle, dict[str, object]],
) -> None:
    report = vllm[1]
    assert report["outcome"] == "saved"
    oracle, sizes = report["oracle"], report["bytes"]
    assert isinstance(oracle, dict)
    assert isinstance(sizes, dict)
    assert oracle["match"] is True
    assert len(oracle["expected"]["tokens"]) == 16
    assert sizes["written"] <= 0.13 * sizes["dump"], sizes
    assert isinstance(report["peak_rss_bytes"], int)
    assert report["peak_rss_bytes"] <= 300e6
    shown = vllm[0]("inspect", "tiny")
    assert "engine      vllm" in shown.stdout
    assert "fits here   process" in shown.stdout


def _reasons(rekindle: Rekindle) -> list[dict[str, Any]]:
    return list(rekindle("match", "tiny", "--json").json["steps"][0]["reasons"])


PATCHED = {
    "a module of vLLM": ("lib/python3.11/site-packages/vllm/envs.py", "code-file"),
    "a module that a worker has imported": (
        "lib/python3.11/site-packages/vllm/model_executor/models/llama.py",
        "code-file",
    ),
}


@pytest.mark.parametrize("name", PATCHED)
def test_a_patched_module_is_seen(
    vllm: tuple[Rekindle, dict[str, object]], tmp_path: Path, name: str
) -> None:
    """It is laid over the installed one, in the mount namespace of the tests."""
    path, code = PATCHED[name]
    installed = VLLM_BIN.parent / path
    assert not [each for each in _reasons(vllm[0]) if each["hard"]]
    shutil.copy2(installed, tmp_path / "patched.py")
    with open(tmp_path / "patched.py", "r+b") as file:
        file.write(b"\n")
    subprocess.run(["mount", "--bind", str(tmp_path / "patched.py"), str(installed)], check=True)
    try:
        (reason,) = [each for each in _reasons(vllm[0]) if each["hard"]]
        assert reason["code"] == code
        assert Path(reason["field"]).resolve() == installed.resolve()
    finally:
        subprocess.run(["umount", str(installed)], check=True)


def test_ten_restores_in_a_row_give_ten_right_answers_and_leave_nothing(
    vllm: tuple[Rekindle, dict[str, object]], start: Callable[..., Replica]
) -> None:
    answers = set()
    with adopting_orphans():
        before = Traces.now()
        for _ in range(10):
            replica = start()
            assert replica.report["oracle"]["match"] is True
            answers.add(complete(replica))
            replica.kill()
            time.sleep(0.1)
        assert len(answers) == 1
        assert vllm[0]("doctor", "--check", "root").status == 0
        before.wait_until_nothing_is_left()
    assert not list((vllm[0].home / "run").iterdir())


def test_two_replicas_answer_side_by_side_and_stream(start: Callable[..., Replica]) -> None:
    replicas = [start(), start(free_port())]
    with ThreadPoolExecutor(8) as pool:
        texts = set(pool.map(complete, replicas * 4))
    assert len(texts) == 1

    def stream(replica: Replica) -> int:
        request = urllib.request.Request(
            f"http://127.0.0.1:{replica.port}/v1/completions",
            json.dumps({**PROMPT, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return sum(line.startswith(b"data: {") for line in response)

    with ThreadPoolExecutor(2) as pool:
        assert all(count > 5 for count in pool.map(stream, replicas))


def test_the_gate_closes_every_development_endpoint_and_no_other(
    vllm: tuple[Rekindle, dict[str, object]], start: Callable[..., Replica]
) -> None:
    replica = start()
    key, place = "0123456789abcdef" * 4, vllm[0].home.parent / "gate/key"

    def ask(path: str, method: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        url = f"http://127.0.0.1:{replica.port}{path}"
        request = urllib.request.Request(url, method=method, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return int(response.status), response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    none = (404, b'{"detail":"Not Found"}')
    assert ask("/no/such/path", "GET") == none
    paths = json.loads(replica.ask("/openapi.json"))["paths"]
    closed = {
        path
        for path, methods in paths.items()
        if all(ask(path, each.upper(), {"X-Forwarded-For": "127.0.0.1"}) == none for each in methods)
    }
    assert {"/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/server_info", "/pause"} <= closed
    assert not {path for path in closed if path.startswith(("/v1/", "/health", "/metrics", "/version"))}
    # Those that vLLM has without development mode, too.
    public = {
        "/tokenize",
        "/detokenize",
        "/load",
        "/ping",
        "/invocations",
        "/scale_elastic_ep",
    } & paths.keys()
    assert public, sorted(closed)
    assert not public & closed
    place.write_text(key)
    for path, method in (("/is_sleeping", "GET"), ("/reset_prefix_cache", "POST")):
        assert ask(path, method, {"X-Rekindle-Key": key})[0] == 200
        assert ask(path, method) == none
    place.unlink()
    assert complete(replica)


def test_the_question_of_vllms_own_snapshot_server_is_answered_by_the_tokens_number(
    start: Callable[..., Replica], tmp_path: Path
) -> None:
    """It could not be asked here otherwise: it needs sleep mode, and that a GPU."""
    replica = start()
    engine = AtBoundary(endpoint=Endpoint(host="127.0.0.1", port=replica.port), model="tiny")
    (tmp_path / "dev/shm/tmp").mkdir(parents=True)
    engine.enter(tmp_path)
    plain = {"prompt": "The capital of France is", "max_tokens": 1, "temperature": 0, "min_tokens": 1}
    asked = {"model": "tiny", **plain, "logprobs": 0, "seed": 0, "return_token_ids": True}
    choice = json.loads(replica.ask("/v1/completions", asked))["choices"][0]
    ready = {
        "token_ids": choice["token_ids"],
        "text": choice["text"],
        "sampled_token_logprob": choice["logprobs"]["token_logprobs"][0],
    }
    (tmp_path / "dev/shm/tmp/rekindle/ready.json").write_text(json.dumps(ready))
    request, expected = engine.known_oracle()
    client = Client(
        engine.endpoint, lambda host, port, timeout: socket.create_connection((host, port), timeout)
    )
    answer = engine.answer(client.ask(request, timeout=60))
    assert answer["tokens"] == [f"token_id:{choice['token_ids'][0]}"]
    assert engine.agree(expected, answer)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1", "environment"),  # would open an endpoint
        ("VLLM_MAX_N_SEQUENCES", "1", "environment"),  # would refuse requests
        ("HF_HUB_OFFLINE", "0", "environment"),
        ("HF_TOKEN", "not-the-form-of-1", "environment-secret"),
    ],
)
def test_a_variable_of_today_that_vllm_reads_forbids_the_process(
    vllm: tuple[Rekindle, dict[str, object]], tmp_path: Path, name: str, value: str, code: str
) -> None:
    report = tmp_path / "report.json"
    words = ["restore", "tiny", "--require", "process", "--report", str(report)]
    done = vllm[0](*words, env={name: value})
    assert done.status == 11, done.stderr
    for document in (
        json.loads(report.read_text()),
        vllm[0]("match", "tiny", "--json", env={name: value}).json,
    ):
        reasons = document.get("reasons") or document["steps"][0]["reasons"]
        hard = [(reason["code"], reason["field"]) for reason in reasons if reason["hard"]]
        assert hard == [(code, name)]


def test_what_vllm_does_not_read_is_only_told(start: Callable[..., Replica]) -> None:
    replica = start(
        PORT, env={"TZ": "Europe/Kyiv", "VLLM_HOST_IP": "10.9.9.9", "VLLM_PORT_80_TCP": "tcp://x"}
    )
    assert replica.report["outcome"] == "restored"
    told = {reason["field"] for reason in replica.report["reasons"] if reason["code"] == "environment-other"}
    assert told == {"TZ", "VLLM_HOST_IP"}


def test_a_signal_ends_the_server_gracefully(start: Callable[..., Replica]) -> None:
    replica = start()
    complete(replica)
    replica.process.terminate()
    status = replica.process.wait(60)
    assert status in {0, 143}, replica.log.read_text()
    assert "Shutting down" in replica.log.read_text() or "shutdown" in replica.log.read_text().lower()


def test_a_node_without_kernels_gets_those_that_the_process_has_mapped(
    vllm: tuple[Rekindle, dict[str, object]], start: Callable[..., Replica]
) -> None:
    """Inductor's kernels are shared objects, and CRIU maps them again."""
    shutil.rmtree(vllm[0].home.parent / "caches")
    replica = start()
    assert replica.report["outcome"] == "restored"
    assert "extract" in [phase["name"] for phase in replica.report["phases"]]
    assert replica.report["oracle"]["match"] is True


def test_the_kernel_cache_alone_is_hit(
    vllm: tuple[Rekindle, dict[str, object]], start: Callable[..., Replica]
) -> None:
    shutil.rmtree(vllm[0].home.parent / "caches")
    replica = start(PORT, "--rung", "cache")
    report = replica.report
    assert report["outcome"] == report["asked"] == "cache"
    assert report["oracle"]["match"] is True
    proof = report["cache"]
    assert proof["verdict"] == "hit", proof
    assert proof["complete"]
    assert proof["used"] == proof["entries"] > 2, proof
    assert proof["made"] == 0, proof
    assert complete(replica)
    replica.process.terminate()
    assert replica.process.wait(60) in {0, 143}
    assert "Application startup complete" in replica.log.read_text()


def test_a_snapshot_of_a_server_with_a_wrong_model_tells_why(
    vllm: tuple[Rekindle, dict[str, object]],
) -> None:
    done = vllm[0]("snapshot", "other", "--", "vllm", "serve", "/no/such/model", timeout=200)
    assert done.status == 30
    assert "/no/such/model" in done.stderr
