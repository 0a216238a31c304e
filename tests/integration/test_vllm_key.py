# SPDX-License-Identifier: Apache-2.0
"""A restored vLLM with a key of today guards what a cold start with that key guards, route by route."""

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import TINY_MODEL, Rekindle, free_port, listening, wait_for
from tests.integration.conftest import VLLM_PORT
from tests.samples.http_requests import KEY, REQUESTS, STRICTER, statuses, talk

pytestmark = [
    pytest.mark.criu,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
]
# What would change the server for the other requests, or takes too long to refuse.
LEFT_OUT = {"/scale_elastic_ep", "/pause", "/resume", "/sleep", "/wake_up", "/abort_requests"}


@pytest.fixture(scope="module")
def servers(
    vllm: tuple[Rekindle, dict[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[int, int]]:
    """The ports of a cold start with the key, and of a process that was saved without and got it today."""
    place = tmp_path_factory.mktemp("vllm-key")
    rekindle = vllm[0]
    ports = free_port(), VLLM_PORT

    def command(port: int) -> list[str]:
        return [
            *("vllm", "serve", str(TINY_MODEL), "--served-model-name", "tiny", "--host", "127.0.0.1"),
            *("--port", str(port), "--max-model-len", "512", "--gpu-memory-utilization", "0.3"),
            *("--middleware", "rekindle_gate.Gate"),
        ]

    report, log = place / "report.json", place / "restore.log"
    words = ["restore", "tiny", "--report", str(report), "--require", "process"]
    restored = rekindle.spawn(*words, "--", *command(ports[1]), "--api-key", KEY, log=log)
    with open(place / "cold.log", "wb") as output:
        cold = subprocess.Popen(
            [shutil.which("vllm", path=rekindle.env["PATH"]) or "vllm", *command(ports[0])[1:]],
            env=rekindle.environment({"VLLM_API_KEY": KEY}),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for(lambda: report.exists() or restored.poll() is not None, 120)
        assert restored.poll() is None, log.read_text()
        assert json.loads(report.read_text())["outcome"] == "restored"
        wait_for(lambda: listening(ports[1]), 10)
        wait_for(lambda: listening(ports[0]) or cold.poll() is not None, 300)
        wait_for(lambda: status(ports[0], "GET", "/health") == 200, 60)
        yield ports
    finally:
        os.killpg(cold.pid, signal.SIGKILL)
        restored.kill()
        cold.wait(30)
        restored.wait(30)


def status(port: int, method: str, path: str, key: str | None = None) -> int:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    body = b"{}" if method in {"POST", "PUT", "PATCH"} else None
    url = f"http://127.0.0.1:{port}{path}"
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_every_route_answers_with_the_status_of_a_cold_start(servers: tuple[int, int]) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{servers[1]}/openapi.json", timeout=60) as response:
        paths = json.loads(response.read())["paths"]
    asked = [
        (method.upper(), path.replace("{", "").replace("}", ""), key)
        for path, methods in paths.items()
        if path not in LEFT_OUT
        for method in [*methods, "options", "head"]
        for key in (None, "wrong", KEY)
    ]
    assert len(asked) > 100
    with ThreadPoolExecutor(8) as pool:
        cold, restored = (
            dict(zip(asked, pool.map(lambda each, port=port: status(port, *each), asked), strict=True))
            for port in servers
        )
    assert restored == cold
    assert 401 in cold.values()
    assert {each for each in asked if cold[each] == 401 and each[2] == KEY} == set()
    print(f"{len(asked)} requests, {sum(value == 401 for value in cold.values())} refused")


def test_odd_requests_are_refused_as_by_a_cold_start(servers: tuple[int, int]) -> None:
    """Where one is read in another way, it is refused."""
    with ThreadPoolExecutor(16) as pool:
        cold, restored = (
            list(pool.map(lambda content, port=port: statuses(talk(port, content)), REQUESTS.values()))
            for port in servers
        )
    for name, expected, got in zip(REQUESTS, cold, restored, strict=True):
        assert got == STRICTER.get(name, expected), name


def test_a_stream_comes_in_pieces(servers: tuple[int, int]) -> None:
    # So many that they take a second: what comes within a few milliseconds is read as one piece.
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    content = json.dumps({**body, "stream": True}).encode()
    head = [
        "POST /v1/completions HTTP/1.1",
        *("Host: x", f"Authorization: Bearer {KEY}", "Content-Type: application/json"),
        *(f"Content-Length: {len(content)}", "Connection: close", "", ""),
    ]
    texts = []
    for port in servers:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall("\r\n".join(head).encode() + content)
            pieces = []
            while piece := sock.recv(1 << 16):
                pieces.append(piece)
        assert b"data: [DONE]" not in pieces[0]
        whole = b"".join(pieces)
        assert b"data: [DONE]" in whole
        events = [line[6:] for line in whole.split(b"\n") if line.startswith(b"data: {")]
        texts.append("".join(json.loads(event)["choices"][0]["text"] for event in events))
    assert texts[0] == texts[1] != ""


def test_the_log_and_the_home_hold_no_key(
    servers: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = next(Path(tmp_path_factory.getbasetemp()).glob("vllm-key*"))
    assert KEY not in (place / "restore.log").read_text()
    assert KEY not in (place / "report.json").read_text()
