# SPDX-License-Identifier: Apache-2.0
"""Servers as they are in the field: saved, restored twice at once, and restored on another machine."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_MODEL, VLLM_BIN, Rekindle, Replica, free_port, need, wait_for
from tests.field.conftest import FIELD

pytestmark = [pytest.mark.criu, pytest.mark.timeout(600)]
HERE = Path(__file__).parent
ANSWER: Mapping[str, Any] = {
    "method": "GET",
    "path": "/answer",
    "headers": {},
    "body": None,
    "select": ["/answer"],
}
JSON_HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server: its command, and how it is asked. `further` are ports beside its main one, None if any.

    Without the variables of `remedy` it is refused, and the error says `obstacle`.
    """

    name: str
    command: Callable[[int, Path], list[str]]
    ready: str = "/health"
    oracle: Mapping[str, Any] = field(default_factory=lambda: ANSWER)
    env: Mapping[str, str] = field(default_factory=dict)
    further: int | None = 0
    obstacle: str = ""
    remedy: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[int, Path], None] = lambda *_: None


def asgi(*words: str) -> Callable[[int, Path], list[str]]:
    """A server of the environment `asgi`; `{port}` is replaced."""

    def command(port: int, _: Path) -> list[str]:
        program = FIELD / "asgi/bin" / words[0]
        return [str(FIELD / "asgi/bin/python"), str(program), *(w.format(port=port) for w in words[1:])]

    return command


def node(kind: str) -> Callable[[int, Path], list[str]]:
    return lambda port, _: [str(FIELD / "bin/node"), str(HERE / "server.js"), str(port), kind]


def java(port: int, place: Path) -> list[str]:
    return [str(FIELD / "bin/java"), "-Xmx256m", "-cp", str(place), "Server", str(port)]


def compile_java(_: int, place: Path) -> None:
    subprocess.run(
        [FIELD / "bin/javac", "-d", str(place), str(HERE / "Server.java")], check=True, timeout=120
    )


def mlserver(_: int, place: Path) -> list[str]:
    return [str(FIELD / "mlserver/bin/python"), str(FIELD / "mlserver/bin/mlserver"), "start", str(place)]


def configure_mlserver(port: int, place: Path) -> None:
    settings = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "parallel_workers": 0,
    }
    (place / "settings.json").write_text(json.dumps(settings))
    (place / "model-settings.json").write_text(
        json.dumps({"name": "tiny", "implementation": "runtime.Answers"})
    )
    shutil.copyfile(HERE / "runtime.py", place / "runtime.py")


def ray(port: int, _: Path) -> list[str]:
    python = str(FIELD / "ray/bin/python")
    return [python, "-c", RAY, str(port)]


# `serve run` without its reloader. Everything of Ray is on loopback and in the server's TMPDIR.
RAY = """
import os, sys, threading
import ray
from ray import serve
from app import deployed
place = os.environ["TMPDIR"] + "/ray"
ray.init(num_cpus=2, include_dashboard=False, _temp_dir=place, _node_ip_address="127.0.0.1",
         object_store_memory=100 << 20)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(deployed(), route_prefix="/")
threading.Event().wait()
"""


def transformers(port: int, _: Path) -> list[str]:
    need((VLLM_BIN / "transformers").exists(), "the command of transformers")
    return [
        *(str(VLLM_BIN / "python"), str(VLLM_BIN / "transformers"), "serve", str(TINY_MODEL)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


COMPLETION = {
    "method": "POST",
    "path": "/v1/completions",
    "headers": JSON_HEADERS,
    "body": {"model": str(TINY_MODEL), "prompt": "The", "max_tokens": 4, "temperature": 0},
    "select": ["/choices/0/text"],
}
INFERENCE = {
    "method": "POST",
    "path": "/v2/models/tiny/infer",
    "headers": JSON_HEADERS,
    "body": {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["?"]}]},
    "select": ["/outputs/0/data"],
}

SERVERS = [
    Server(name="uvicorn", command=asgi("uvicorn", "app:asgi", "--host", "127.0.0.1", "--port", "{port}")),
    Server(
        name="uvicorn with two workers",
        command=asgi("uvicorn", "app:asgi", "--host", "127.0.0.1", "--port", "{port}", "--workers", "2"),
    ),
    Server(
        name="gunicorn",
        command=asgi("gunicorn", "app:wsgi", "--bind", "127.0.0.1:{port}", "--workers", "2"),
    ),
    Server(
        name="gunicorn with threads",
        command=asgi("gunicorn", "app:wsgi", "--bind", "127.0.0.1:{port}", "--threads", "4"),
    ),
    Server(name="hypercorn", command=asgi("hypercorn", "app:asgi", "--bind", "127.0.0.1:{port}")),
    Server(
        name="granian",
        command=asgi(
            *("granian", "--interface", "asgi", "--host", "127.0.0.1", "--port", "{port}"),
            *("--workers", "2", "app:asgi"),
        ),
    ),
    Server(name="Node.js", command=node("alone")),
    Server(name="Node.js, cluster", command=node("cluster")),
    Server(name="Java", command=java, prepare=compile_java),
    Server(
        name="Go, MPTCP",
        command=lambda port, _: [str(FIELD / "bin/mptcp"), str(port)],
        obstacle="GODEBUG=multipathtcp=0",
        remedy={"GODEBUG": "multipathtcp=0"},
    ),
    Server(
        name="MLServer",
        command=mlserver,
        ready="/v2/health/ready",
        oracle=INFERENCE,
        further=2,
        prepare=configure_mlserver,
    ),
    Server(name="Ray Serve", command=ray, ready="/-/healthz", further=None),
    Server(
        name="transformers serve",
        command=transformers,
        oracle=COMPLETION,
        env={"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(FIELD / "accelerate")},
    ),
]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    """Starts replicas, waits until they are ready, and ends them with the test."""
    replicas: list[Replica] = []

    def begin(of: Rekindle, image: str, *words: str, port: int) -> Replica:
        report, log = tmp_path / f"{len(replicas)}.json", tmp_path / f"{len(replicas)}.log"
        options = ["--require", "process", "--publish", f"127.0.0.1:{port}", "--report", str(report)]
        process = of.spawn("restore", image, *options, *words, log=log, cwd=tmp_path)
        replica = Replica(process, port, log, {})
        replicas.append(replica)
        wait_for(lambda: report.exists() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text(errors="replace")
        replica.report = json.loads(report.read_text())
        assert replica.report["outcome"] == "restored"
        return replica

    yield begin
    for replica in replicas:
        replica.kill()


def answered(server: Server, replica: Replica) -> str:
    """The part of the answer that the oracle compares."""
    found = json.loads(replica.ask(server.oracle["path"], server.oracle["body"], timeout=60))
    for key in server.oracle["select"][0].strip("/").split("/"):
        found = found[int(key) if isinstance(found, list) else key]
    return json.dumps(found)


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name.replace(" ", "-"))
def test_a_server_of_the_field(server: Server, start: Callable[..., Replica], tmp_path: Path) -> None:
    place = tmp_path / "server"
    place.mkdir()
    port = free_port()
    shutil.copyfile(HERE / "app.py", place / "app.py")
    server.prepare(port, place)
    (tmp_path / "oracle.json").write_text(json.dumps(server.oracle))
    env = {"COSIGN_PASSWORD": "", "PYTHONPATH": str(place), "PATH": f"{FIELD / 'bin'}:{os.environ['PATH']}"}
    rekindle = Rekindle(tmp_path / "home", {**env, **server.env})
    key = tmp_path / "key"
    assert rekindle("generate-key-pair", "--output-key-prefix", str(key)).status == 0
    before = set(os.listdir(tempfile.gettempdir()))
    words = [
        *("snapshot", f"oci:{tmp_path / 'image'}:1", "--sign-key", f"{key}.key"),
        *("--ready-url", f"http://127.0.0.1:{port}{server.ready}", "--ready-timeout", "120"),
        *("--oracle-request", str(tmp_path / "oracle.json"), "--json"),
        *("--", *server.command(port, place)),
    ]
    with contextlib.chdir(place):
        if server.obstacle:
            refused = rekindle(*words, timeout=400)
            assert refused.status == 32, refused.stderr
            assert server.obstacle in refused.stderr
            rekindle.env.update(server.remedy)
        done = rekindle(*words, timeout=400)
    assert done.status == 0, done.stderr
    assert done.json["oracle"]["match"] is True
    image, trust = f"oci:{tmp_path / 'image'}:1", ["--verify-key", f"{key}.pub"]

    pair = [start(rekindle, image, *trust, port=free_port()) for _ in range(2)]
    answers = {answered(server, replica) for replica in pair for _ in range(3)}
    assert len(answers) == 1, answers
    listeners = [each["server"] for each in pair[0].report["addresses"]]
    assert server.further is None or len(listeners) == 1 + server.further, listeners
    for replica in pair:
        replica.process.send_signal(signal.SIGTERM)
        replica.process.wait(60)
        assert "error" not in replica.log.read_text(errors="replace").rpartition("rekindle: ready")[2]

    # Whatever the server left beside its program is not there on another machine.
    for name in set(os.listdir(tempfile.gettempdir())) - before:
        path = Path(tempfile.gettempdir()) / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elsewhere = Rekindle(tmp_path / "elsewhere", rekindle.env)
    fresh = start(elsewhere, image, *trust, port=free_port())
    assert {answered(server, fresh)} == answers
