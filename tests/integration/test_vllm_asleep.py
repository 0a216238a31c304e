# SPDX-License-Identifier: Apache-2.0
"""vLLM sleeps through its snapshot: real CRIU, and a vLLM, a driver and a GPU that are not there.

tests/servers/fake_vllm says what that vLLM is.
"""

import contextlib
import hashlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from rekindle import documents
from rekindle.environment import RecordedVariables
from tests.conftest import PREFIX, Done, Rekindle, Replica, free_port, listening, wait_for
from tests.fakes import nodes
from tests.fakes.gpu_node import FakeGpuNode
from tests.fakes.vllm import FakeVllm
from tests.samples import cache as cache_samples

pytestmark = pytest.mark.criu
NothingLeft = Callable[[], None]
Restore = Callable[..., Replica]

NODE = structs.replace(nodes.H200, gpus=nodes.H200.gpus[:1], links=())
UUID = NODE.gpus[0].uuid
QUESTION = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
DEVELOPMENT = [
    *(("POST", path) for path in ("/sleep?level=2", "/wake_up", "/collective_rpc", "/sleep/", "//sleep")),
    *(
        ("GET", path)
        for path in ("/is_sleeping", "/not_known_by_its_path", "/%69s_sleeping", "/is_sleeping%0a")
    ),
]

# How it sleeps by the words and the version, what its record says of it, and the phases of waking. The newest
# release for the CPU is 0.32.0, which tests/integration/test_vllm.py starts, and for GPUs 0.33.0.
WAYS: dict[str, tuple[str, list[str], Any, list[str]]] = {
    "default": ("0.32.0", [], 1, ["wake"]),
    "image": ("0.30.1", ["--weights", "image"], 1, ["wake"]),
    "newest": ("0.33.0", [], 1, ["wake"]),
    "boundary": ("0.32.0", ["--weights", "reload"], "boundary", ["wake"]),
    "newest, boundary": ("0.33.0", ["--weights", "reload"], "boundary", ["wake"]),
    "reload": ("0.30.1", ["--weights", "reload"], 2, ["wake", "reload weights", "wake kv cache"]),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> FakeGpuNode:
    return FakeGpuNode.build(tmp_path_factory.mktemp("gpu"))


@pytest.fixture
def node(built: FakeGpuNode, rekindle: Rekindle) -> FakeGpuNode:
    """The commands run on a node with a GPU."""
    built.begin(NODE)
    rekindle.env |= built.environment
    return built


def installed(rekindle: Rekindle, version: str = "0.32.0") -> FakeVllm:
    vllm = FakeVllm(rekindle.home.parent / "vllm", version)
    # Where there are no kernel caches but the test's own.
    rekindle.env |= {**vllm.environment([UUID]), "HOME": str(vllm.place), "REKINDLE_PREFIX": str(PREFIX)}
    return vllm


def snapshot(rekindle: Rekindle, vllm: FakeVllm, port: int, *flags: str, words: tuple[str, ...] = ()) -> Done:
    return rekindle("snapshot", "tiny", "--json", *flags, "--", *vllm.command(port, *words))


def record_of(rekindle: Rekindle) -> dict[str, Any]:
    found = rekindle("inspect", "tiny", "--json").json["record"]
    assert isinstance(found, dict)
    return found


def answer(replica: Replica) -> str:
    return str(json.loads(replica.ask("/v1/completions", QUESTION))["choices"][0]["text"])


def awake_answer(vllm: FakeVllm) -> str:
    """What the model answers that has never slept."""
    weights = hashlib.sha256((vllm.model / "model.safetensors").read_bytes()).digest()
    prompt = json.dumps(QUESTION["prompt"]).encode()
    digests = [hashlib.sha256(b"|".join([weights, b"", prompt, b"%d" % n])).digest() for n in range(4)]
    return "".join(f" {int.from_bytes(digest[:2])}" for digest in digests)


def status(port: int, method: str, path: str, headers: dict[str, str] | None = None) -> int:
    """What a request is answered with whose path is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        body = b'{"method": "reload_weights"}' if method == "POST" else None
        connection.request(method, path, body, headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


def below(replica: Replica) -> list[Path]:
    """The processes of a replica, by their directories in /proc."""
    found = [replica.process.pid]
    for pid in found:
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return [Path(f"/proc/{pid}") for pid in found]


def cell_of(replica: Replica) -> Path:
    """The file system of a replica's cell."""
    return next(path / "root" for path in below(replica) if (path / "root/dev/shm/tmp").exists())


def words_of(replica: Replica, vllm: FakeVllm) -> list[str]:
    """The words that the server was started with."""
    lines = [(path / "cmdline").read_bytes().decode().split("\0")[:-1] for path in below(replica)]
    return next(words[1:] for words in lines if words[1:2] == [f"{vllm.place}/bin/vllm"])


@pytest.mark.parametrize("way", WAYS)
def test_it_sleeps_through_the_snapshot_and_answers_as_before(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int, way: str, nothing_left: NothingLeft
) -> None:
    version, flags, asleep, waking = WAYS[way]
    vllm = installed(rekindle, version)
    expected = awake_answer(vllm)
    done = snapshot(rekindle, vllm, port, *flags)
    assert done.status == 0, done.stderr
    assert done.json["oracle"]["match"] is True
    assert "quiesce" in [phase["name"] for phase in done.json["phases"]]
    record = record_of(rekindle)
    assert record["engine"] == {"name": "vllm", "options": {"asleep": asleep}}
    assert len(record["process"]["cuda_pids"]) == 1
    assert record["process"]["gpus"] == [UUID]

    replica = restore("tiny", port)
    assert replica.report["outcome"] == "restored", replica.log.read_text()
    assert replica.report["oracle"]["match"] is True
    names = [phase["name"] for phase in replica.report["phases"]]
    order = ["restore", "cuda", "reseed", *waking, "oracle"]
    assert names[names.index("restore") :][: len(order)] == order
    assert answer(replica) == expected
    replica.kill()
    nothing_left()


def test_weights_in_the_image_need_no_files(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int
) -> None:
    vllm = installed(rekindle)
    expected = awake_answer(vllm)
    assert snapshot(rekindle, vllm, port, "--weights", "image").status == 0
    (vllm.model / "model.safetensors").unlink()
    replica = restore("tiny", port)
    assert replica.report["outcome"] == "restored"
    assert [(r["code"], r["hard"]) for r in replica.report["reasons"]] == [("model-file", False)]
    assert answer(replica) == expected


def test_as_it_is_it_is_started_as_the_user_says(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int
) -> None:
    vllm = installed(rekindle)
    expected = awake_answer(vllm)
    done = snapshot(rekindle, vllm, port, "--weights", "as-is")
    assert done.status == 0, done.stderr
    assert "quiesce" not in [phase["name"] for phase in done.json["phases"]]
    assert record_of(rekindle)["engine"]["options"] == {}
    replica = restore("tiny", port)
    assert replica.report["outcome"] == "restored"
    assert answer(replica) == expected
    assert words_of(replica, vllm) == vllm.command(port)


def test_without_a_gpu_it_is_taken_as_it_is(rekindle: Rekindle, restore: Restore, port: int) -> None:
    vllm = installed(rekindle)
    done = snapshot(rekindle, vllm, port)
    assert done.status == 0, done.stderr
    record = record_of(rekindle)
    assert record["engine"]["options"] == {}
    assert (record["process"]["cuda_pids"], record["process"]["gpus"]) == ([], [])
    assert answer(restore("tiny", port)) == awake_answer(vllm)


@pytest.mark.parametrize("weights", ["image", "reload"])
def test_where_it_cannot_sleep_its_own_words_say_so(rekindle: Rekindle, port: int, weights: str) -> None:
    done = snapshot(rekindle, installed(rekindle), port, "--weights", weights)
    assert done.status == 30, done.stderr
    assert "Sleep mode is not supported on current platform" in done.stderr


@pytest.mark.parametrize(
    ("way", "code", "words"),
    [("image", 35, "after a sleep"), ("reload", 35, "after a sleep"), ("boundary", 30, "")],
)
def test_a_sleep_that_changes_the_answer_is_refused(
    rekindle: Rekindle,
    node: FakeGpuNode,
    port: int,
    way: str,
    code: int,
    words: str,
    nothing_left: NothingLeft,
) -> None:
    version, flags, *_ = WAYS[way]
    vllm = installed(rekindle, version)
    vllm.fail(drift=True)
    done = snapshot(rekindle, vllm, port, *flags)
    assert done.status == code, done.stderr
    assert (words or "rehearsal changed canary output") in done.stderr
    assert {event.step for event in node.cuda.log()} <= {"init"}
    assert rekindle("inspect", "tiny").status == 12
    nothing_left()


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"fail": ["sleep"]}, "vLLM answered /sleep?level=1 with status 500"),
        ({"fail": ["wake_up"]}, "wake_up was made to fail"),
        ({"exit": ["sleep"]}, "did not answer /sleep?level=1"),
    ],
)
def test_a_rehearsal_that_fails_is_told(
    rekindle: Rekindle, node: FakeGpuNode, port: int, faults: dict[str, Any], words: str
) -> None:
    vllm = installed(rekindle)
    vllm.fail(**faults)
    done = snapshot(rekindle, vllm, port)
    assert done.status == 30, done.stderr
    assert words in done.stderr


@pytest.mark.parametrize("way", WAYS)
def test_the_record_holds_what_the_user_said_and_nothing_that_was_added(
    rekindle: Rekindle, node: FakeGpuNode, port: int, way: str
) -> None:
    version, flags, *_ = WAYS[way]
    vllm = installed(rekindle, version)
    rekindle.env |= {"PYTHONPATH": "/of/the/user", "THEIRS": "too"}
    done = snapshot(rekindle, vllm, port, "--no-prove", *flags, words=("--max-model-len", "256"))
    assert done.status == 0, done.stderr
    record = record_of(rekindle)
    assert record["command"] == vllm.command(port, "--max-model-len", "256")
    variables = documents.read(record["variables"], RecordedVariables, "variables")
    assert variables.is_same("PYTHONPATH", "/of/the/user")
    assert variables.is_same("THEIRS", "too")
    text = json.dumps({name: value for name, value in record.items() if name != "dump"})
    for added in ("VLLM_SERVER_DEV_MODE", "rekindle_gate", "--middleware", "sleep-mode", "vllm.snapshot"):
        assert added not in text


def test_a_middleware_and_a_root_path_of_the_users_are_kept(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int, tmp_path: Path
) -> None:
    vllm = installed(rekindle)
    (tmp_path / "theirs.py").write_text(
        "class Theirs:\n"
        "    def __init__(self, app):\n"
        "        self.app = app\n"
        "    async def __call__(self, scope, receive, send):\n"
        "        async def sending(message):\n"
        "            if 'headers' in message:\n"
        "                message['headers'].append((b'x-theirs', b'yes'))\n"
        "            await send(message)\n"
        "        await self.app(scope, receive, sending)\n"
    )
    rekindle.env["PYTHONPATH"] = str(tmp_path)
    done = snapshot(rekindle, vllm, port, words=("--middleware", "theirs.Theirs", "--root-path", "/api"))
    assert done.status == 0, done.stderr
    replica = restore("tiny", port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=20) as response:
        assert response.headers["x-theirs"] == "yes"
    for method, path in DEVELOPMENT:
        assert status(port, method, f"/api{path}") == 404
    assert answer(replica) == awake_answer(vllm)


@pytest.mark.parametrize("network", ["private", "host"])
def test_the_development_endpoints_are_closed_to_clients_and_open_to_rekindle(
    rekindle: Rekindle, node: FakeGpuNode, port: int, network: str, tmp_path: Path
) -> None:
    vllm = installed(rekindle)
    assert snapshot(rekindle, vllm, port, "--network", network).status == 0
    report = tmp_path / "report.json"
    process = rekindle.spawn("restore", "tiny", "--report", str(report), log=tmp_path / "log")
    replica = Replica(process, port, tmp_path / "log", {})
    try:
        wait_for(lambda: report.exists() or process.poll() is not None, 60)
        wait_for(lambda: listening(port), 10)
        assert json.loads(report.read_text())["outcome"] == "restored"
        directory = cell_of(replica) / "dev/shm/tmp/rekindle"
        assert {path.name for path in directory.iterdir()} <= {"rekindle_gate.py", "__pycache__"}, (
            "a key is left"
        )
        for headers in (
            {},
            {"X-Forwarded-For": "127.83.0.1", "X-Forwarded-Proto": "http"},
            {"Forwarded": "for=127.0.0.1"},
            {"X-Real-IP": "127.0.0.1"},
            {"X-Rekindle-Key": "0" * 64},
            {"X-Rekindle-Key": ""},
        ):
            for method, path in DEVELOPMENT:
                assert status(port, method, path, headers) == 404, path
        assert answer(replica) == awake_answer(vllm)
        # What rekindle does, as long as it has something to order.
        key = "0123456789abcdef" * 4
        (directory / "key").write_text(key)
        ours = {"X-Rekindle-Key": key}
        assert status(port, "GET", "/is_sleeping", ours) == 200
        assert status(port, "POST", "/sleep?level=1", ours) == 200
        assert status(port, "GET", "/is_sleeping") == 404
        assert status(port, "POST", "/wake_up", ours) == 200
        (directory / "key").unlink()
        assert status(port, "GET", "/is_sleeping", ours) == 404
    finally:
        replica.kill()


LARGE = "w" * (2 << 20)
UNSAMPLED = (1 << 20) + 6000
"""A place between the pages of a large file that rekindle/node/sampled.py compares."""


@pytest.mark.parametrize("way", ["boundary", "reload"])
@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        ("weights", "WEIGHTS", "model-reloaded"),
        ("weights", "other weights", "model-reloaded"),
        (LARGE, f"{LARGE[:UNSAMPLED]}x{LARGE[UNSAMPLED + 1 :]}", "mismatch"),
    ],
    ids=["other content", "another size", "other content where a decision does not look"],
)
def test_weights_that_are_read_again_must_be_those_that_were_there(
    rekindle: Rekindle,
    restore: Restore,
    node: FakeGpuNode,
    port: int,
    tmp_path: Path,
    way: str,
    before: str,
    after: str,
    code: str,
    nothing_left: NothingLeft,
) -> None:
    version, flags, *_ = WAYS[way]
    vllm = installed(rekindle, version)
    cache_samples.triton(tmp_path / "triton")
    rekindle.env["TRITON_CACHE_DIR"] = str(tmp_path / "triton")
    vllm.train(before)
    assert snapshot(rekindle, vllm, port, *flags).status == 0
    vllm.train(after)
    node.cuda.forget()
    done = rekindle("restore", "tiny", "--require", "process")
    assert done.status == 11, done.stderr
    assert "model.safetensors" in done.stderr
    replica = restore("tiny", port)
    assert replica.report["outcome"] == "cache", "what was compiled for it is of use all the same"
    started = words_of(replica, vllm)
    assert started == [*vllm.command(port), "--enable-sleep-mode"], "vLLM would not look a kernel up"
    assert code in [reason["code"] for reason in replica.report["reasons"] if reason["hard"]]
    if code == "model-reloaded":
        assert {event.step for event in node.cuda.log()} <= {"init"}, (
            "it was restored before they were compared"
        )
    assert answer(replica) == awake_answer(vllm)
    replica.kill()
    vllm.train(before)
    assert restore("tiny", free_port()).report["outcome"] == "restored"


def test_nobody_is_served_before_all_files_of_a_model_were_compared(
    rekindle: Rekindle, node: FakeGpuNode, port: int
) -> None:
    """Also if the answer is the right one."""
    vllm = installed(rekindle)
    (vllm.model / "other.safetensors").write_text(LARGE)
    assert snapshot(rekindle, vllm, port, "--weights", "reload").status == 0
    (vllm.model / "other.safetensors").write_text(f"{LARGE[:UNSAMPLED]}x{LARGE[UNSAMPLED + 1 :]}")
    done = rekindle("restore", "tiny", "--require", "process", "--json")
    assert done.status == 11, done.stderr
    assert "other.safetensors" in done.stderr
    assert "ready" not in done.stderr


@pytest.mark.parametrize(
    ("way", "faults", "code"),
    [
        ("image", {"fail": ["wake_up"]}, "workload"),
        ("image", {"exit": ["wake_up"]}, "workload"),
        ("reload", {"fail": ["reload_weights"]}, "workload"),
        ("boundary", {"exit": ["wake_up"]}, "restore-failed"),
        ("boundary", {"fail": ["reload_weights"]}, "restore-failed"),
    ],
)
def test_one_that_does_not_wake_is_started_anew(
    rekindle: Rekindle,
    restore: Restore,
    node: FakeGpuNode,
    port: int,
    way: str,
    faults: dict[str, Any],
    code: str,
    nothing_left: NothingLeft,
) -> None:
    version, flags, *_ = WAYS[way]
    vllm = installed(rekindle, version)
    assert snapshot(rekindle, vllm, port, "--no-prove", *flags).status == 0
    vllm.fail(**faults)
    began = time.monotonic()
    replica = restore("tiny", port)
    assert time.monotonic() - began < 30
    assert replica.report["outcome"] == "cold"
    assert next(reason["code"] for reason in replica.report["reasons"] if reason["hard"]) == code
    assert words_of(replica, vllm) == vllm.command(port)
    assert answer(replica) == awake_answer(vllm)
    replica.kill()
    nothing_left()


@pytest.mark.parametrize("way", ["image", "boundary"])
def test_one_that_wakes_to_another_answer_never_serves(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int, way: str, nothing_left: NothingLeft
) -> None:
    version, flags, *_ = WAYS[way]
    vllm = installed(rekindle, version)
    assert snapshot(rekindle, vllm, port, "--no-prove", *flags).status == 0
    vllm.fail(lose=True)
    assert rekindle("restore", "tiny", "--require", "process").status == 35
    replica = restore("tiny", port)
    assert replica.report["outcome"] == "cold"
    assert "oracle-mismatch" in [reason["code"] for reason in replica.report["reasons"]]
    assert answer(replica) == awake_answer(vllm)
    replica.kill()
    nothing_left()


def test_users_own_requests_warm_it_before_it_sleeps(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int, tmp_path: Path
) -> None:
    vllm = installed(rekindle)
    requests = tmp_path / "requests"
    requests.write_text(json.dumps({"method": "POST", "path": "/v1/completions", "body": QUESTION}) + "\n")
    done = snapshot(rekindle, vllm, port, "--weights", "reload", "--warm-requests", str(requests))
    assert done.status == 0, done.stderr
    assert record_of(rekindle)["engine"]["options"] == {"asleep": 2}
    assert restore("tiny", port).report["outcome"] == "restored"


def test_a_server_that_asks_for_a_key_gets_it_and_no_record_holds_it(
    rekindle: Rekindle, restore: Restore, node: FakeGpuNode, port: int
) -> None:
    vllm = installed(rekindle)
    rekindle.env["VLLM_API_KEY"] = "sk-of-this-server-0123456789"
    done = snapshot(rekindle, vllm, port, "--allow-secret", "VLLM_API_KEY")
    assert done.status == 0, done.stderr
    assert "sk-of-this-server" not in json.dumps(record_of(rekindle))
    replica = restore("tiny", port)
    assert replica.report["outcome"] == "restored"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        answer(replica)


@pytest.mark.parametrize("way", WAYS)
def test_asleep_it_leaves_its_gpu_to_others(
    rekindle: Rekindle, node: FakeGpuNode, port: int, way: str, tmp_path: Path
) -> None:
    """What goes through host memory and into the image is what is on the GPU when it is checkpointed."""
    version, flags, *_ = WAYS[way]
    vllm = installed(rekindle, version)
    done = snapshot(rekindle, vllm, port, "--no-prove", "--keep-dump", str(tmp_path / "dump"), *flags)
    assert done.status == 0, done.stderr
    (state,) = (tmp_path / "dump/shm").glob("fake-cuda-*")
    held = json.loads(state.read_text())
    assert held["state"] == "checkpointed"
    assert held["device_bytes"] == 256 << 20, "the KV cache, or weights, are among it"
    assert not list((tmp_path / "dump/shm/tmp/rekindle").glob("key"))
