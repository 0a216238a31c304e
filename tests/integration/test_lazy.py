# SPDX-License-Identifier: Apache-2.0
"""A server starts before all of its image is here, and never sees a byte that was not verified."""

import contextlib
import http.client
import json
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from oci.blocks import read_blocks
from oci.descriptor import Descriptor
from rekindle.record import StoredBlocks
from tests.conftest import KeyPair, Rekindle, Replica, free_port, wait_for
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.simulator import Registry
from tests.servers.registry.wire import Answer, Kind, Request

pytestmark = pytest.mark.criu


@dataclass
class Shop:
    """A registry with the image of a server, and a node that has nothing of it.

    Of the memory, the registry gives what is needed first, and the rest when `gives` is set.
    """

    registry: Registry
    image: str
    node: Rekindle
    memory: str
    size: int
    first_bytes: int
    flags: list[str]
    restore: Callable[..., Replica]
    gives: threading.Event = field(default_factory=threading.Event)

    def start(self, port: int, *more: str) -> Replica:
        return self.restore(self.image, port, *self.flags, *more, of=self.node)

    def hold(self, request: Request, proceed: Callable[[Request], Answer]) -> Answer:
        if request.kind is Kind.BLOB and request.reference == self.memory and self.begin(request) > 0:
            self.gives.wait(60)
        return proceed(request)

    def begin(self, request: Request) -> int:
        found = re.fullmatch(r"bytes=(\d+)-\d*", request.headers.get("range", "bytes=0-"))
        assert found
        return int(found[1]) if int(found[1]) >= self.first_bytes else 0

    @property
    def dump(self) -> Path | None:
        return next((path.parent for path in (self.node.home / "dumps").glob("*/ready.json")), None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Registry, str, KeyPair, dict[str, Any]]]:
    """The image in a registry, its key, and what `inspect` says of it."""
    place = tmp_path_factory.mktemp("made")
    rekindle = Rekindle(place / "home", {"TMPDIR": str(place), "COSIGN_PASSWORD": ""})
    assert rekindle("generate-key-pair", "--output-key-prefix", str(place / "test")).status == 0
    keys = KeyPair(place / "test")
    with Registry() as registry:
        image = f"{registry.host}/a/b:1"
        done = rekindle.snapshot_workhorse(image, free_port(), flags=keys.sign)
        assert done.status == 0, done.stderr
        yield registry, image, keys, rekindle("inspect", image, *keys.verify, "--json").json


@pytest.fixture
def shop(
    made: tuple[Registry, str, KeyPair, dict[str, Any]], tmp_path: Path, restore: Callable[..., Replica]
) -> Iterator[Shop]:
    registry, image, keys, known = made
    layers = known["process_image"]["layers"]
    memory = next(each for each in layers if each["annotations"]["vnd.rekindle.role"] == "memory")
    (stored,) = known["record"]["dump"]["blocks"]
    blocks = read_blocks(StoredBlocks(**stored), Descriptor.from_json(memory, "layer"))
    first = next(block.offset for block in blocks if block.length > 1 << 20)
    node = Rekindle(tmp_path / "node", {"TMPDIR": str(tmp_path)})
    registry.behave()
    registry.requests.clear()
    flags = ["--lazy", "always", "--require", "process", *keys.verify]
    shop = Shop(registry, image, node, memory["digest"], memory["size"], first, flags, restore)
    yield shop
    shop.gives.set()
    registry.behave()


def fillers(node: Rekindle) -> list[psutil.Process]:
    """The fillers of a home, without the processes that read ahead for them."""
    found = []
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if "restore.lazy.filler" in (process.info["cmdline"] or ()):
            with open(f"/proc/{process.pid}/mountinfo") as file:
                if str(node.home) in file.read():
                    found.append(process)
    pids = {each.pid for each in found}
    return [each for each in found if each.info["ppid"] not in pids]


def mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


def ended(replica: Replica, seconds: float = 30) -> int:
    return int(replica.process.wait(seconds))


def test_a_server_answers_before_all_is_here_and_the_next_needs_no_registry(
    shop: Shop, port: int, nothing_left: Callable[[], None]
) -> None:
    shop.registry.misbehave(shop.hold)
    before = mounts()
    replica = shop.start(port)
    assert replica.report["outcome"] == "restored"
    assert replica.report["memory"]["mode"] == "mapped"
    assert replica.report["lazy"]["complete"] is False
    assert shop.dump is None, "it has answered the oracle's question, and not all of the dump is here"
    assert mounts() == before, "the node sees nothing of it"
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(replica.ask("/herd", timeout=60)))
    asking.start()
    time.sleep(0.5)
    assert not answers, "it waits for what is not here"
    shop.gives.set()
    asking.join(60)
    herd = json.loads(answers[0])
    wait_for(lambda: shop.dump, 30)
    assert json.loads(replica.ask("/count", {})) == 1
    replica.kill()
    wait_for(lambda: not fillers(shop.node), 20)

    shop.registry.requests.clear()
    again = shop.start(port)
    assert again.report["lazy"] is None
    assert not shop.registry.downloads(shop.memory)
    assert json.loads(again.ask("/herd")) == herd
    again.kill()
    nothing_left()


def test_two_restores_share_one_filler(shop: Shop, port: int) -> None:
    shop.registry.misbehave(shop.hold)
    one, other = shop.start(port), shop.start(free_port())
    assert len(fillers(shop.node)) == 1
    one.kill()
    shop.gives.set()
    assert json.loads(other.ask("/herd"))
    wait_for(lambda: shop.dump, 30)
    sent = sum(request.sent_bytes for request in shop.registry.downloads(shop.memory))
    assert sent <= shop.size
    other.kill()
    wait_for(lambda: not fillers(shop.node), 20)


def test_wrong_bytes_end_the_server_that_waits_for_them(
    shop: Shop, port: int, nothing_left: Callable[[], None]
) -> None:
    shop.registry.misbehave(shop.hold, wrong.wrong_bytes(shop.memory, at=(shop.first_bytes + shop.size) // 2))
    replica = shop.start(port)
    shop.gives.set()
    assert ended(replica) == 21, replica.log.read_text()
    assert "does not match its digest" in replica.log.read_text()
    assert shop.dump is None
    replica.kill()
    nothing_left()


def test_wrong_bytes_before_it_was_ready_end_the_restore(
    shop: Shop, nothing_left: Callable[[], None]
) -> None:
    shop.registry.misbehave(wrong.wrong_bytes(shop.memory, at=100))
    done = shop.node("restore", shop.image, *shop.flags)
    assert done.status == 21, done.stderr
    assert shop.dump is None
    nothing_left()


def test_a_mirror_that_lies_costs_time_only(shop: Shop, port: int) -> None:
    with Registry(misbehave=[wrong.wrong_bytes(shop.memory, at=100)]) as mirror:
        mirror.repositories = shop.registry.repositories
        replica = shop.start(port, "--mirror", f"http://{mirror.host}")
        assert json.loads(replica.ask("/herd"))
        assert mirror.downloads(shop.memory)
    replica.kill()


def test_a_server_waits_for_a_registry_that_is_away(shop: Shop, port: int) -> None:
    shop.registry.misbehave(shop.hold)
    replica = shop.start(port)
    shop.registry.pause()
    shop.gives.set()
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.append(replica.ask("/herd", timeout=60)))
    asking.start()
    time.sleep(1)
    assert not answers
    shop.registry.resume()
    asking.join(60)
    assert json.loads(answers[0])
    replica.kill()


def test_a_registry_without_ranges_gives_all_before_the_start(shop: Shop, port: int) -> None:
    shop.registry.misbehave(wrong.ignores_range())
    replica = shop.start(port)
    assert replica.report["lazy"] is None
    assert "all of the image is fetched before the server starts" in replica.log.read_text()
    assert json.loads(replica.ask("/herd"))
    replica.kill()


def test_without_fuse_all_is_fetched_before_the_start(shop: Shop, port: int) -> None:
    hide = 'mount --bind /dev/null /dev/fuse && exec "$@"'
    shop.node.prefix[:] = ["unshare", "--mount", "sh", "-c", hide, "sh"]
    replica = shop.start(port)
    assert replica.report["lazy"] is None
    assert "FUSE cannot be had" in replica.log.read_text()
    assert replica.ask("/health")
    replica.kill()


def test_the_end_of_the_filler_is_the_end_of_the_server(
    shop: Shop, port: int, nothing_left: Callable[[], None]
) -> None:
    shop.registry.misbehave(shop.hold)
    replica = shop.start(port)
    (filler,) = fillers(shop.node)
    filler.kill()
    assert ended(replica) == 34, replica.log.read_text()
    assert "memory of the server cannot be had any more" in replica.log.read_text()
    shop.gives.set()
    again = shop.start(port)
    assert json.loads(again.ask("/herd")), "nothing that was left behind is trusted"
    again.kill()
    wait_for(lambda: not fillers(shop.node), 20)
    nothing_left()


@pytest.mark.parametrize("pause", [0.2, 0.4, 0.6, 0.8, 1.0, 1.3])
def test_kill_at_any_moment_leaves_nothing_that_is_trusted(
    shop: Shop, port: int, pause: float, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    before = mounts()
    process = shop.node.spawn(
        "restore", shop.image, "--publish", str(port), *shop.flags, log=tmp_path / "killed.log"
    )
    time.sleep(pause)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not fillers(shop.node), 20)
    assert mounts() == before
    replica = shop.start(port)
    assert json.loads(replica.ask("/herd"))
    replica.kill()
    wait_for(lambda: not fillers(shop.node), 20)
    nothing_left()


@pytest.mark.parametrize("seed", range(int(os.environ.get("REKINDLE_LAZY_RUNS", "4"))))
def test_whatever_happens_no_wrong_answer_is_given_and_no_mount_is_left(
    shop: Shop, port: int, seed: int, tmp_path: Path
) -> None:
    """The registry stalls, fails and lies now and then, and somebody may kill who fetches or serves.

    $REKINDLE_LAZY_RUNS is the number of runs.
    """
    chance = random.Random(seed)
    kills = chance.choice(["nobody", "nobody", "filler", "restore"])

    def misbehave(request: Request, proceed: Callable[[Request], Answer]) -> Answer:
        if request.kind is not Kind.BLOB or request.reference != shop.memory:
            return proceed(request)
        match chance.choice(["", "", "", "", "stall", "wrong", "error"]):
            case "stall":
                time.sleep(chance.uniform(0.1, 1.5))
            case "wrong":
                return wrong.wrong_bytes(shop.memory, at=chance.randrange(shop.size))(request, proceed)
            case "error":
                return wrong.status(503, on=wrong.blob())(request, proceed)
        return proceed(request)

    before, report = mounts(), tmp_path / "report.json"
    shop.registry.misbehave(misbehave)
    process = shop.node.spawn(
        *("restore", shop.image, "--publish", str(port), "--report", str(report), *shop.flags),
        log=tmp_path / "log",
    )
    replica = Replica(process, port, tmp_path / "log", {})
    if kills != "nobody":
        time.sleep(chance.uniform(0.3, 2.0))
        for each in fillers(shop.node) if kills == "filler" else [psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    wait_for(lambda: report.exists() or process.poll() is not None, 90)
    answer = None
    with contextlib.suppress(OSError, http.client.HTTPException):
        answer = json.loads(replica.ask("/herd", timeout=60))
    if answer is None:
        assert process.wait(60) != 0, "no answer, and the server runs on"
    shop.registry.behave()
    replica.kill()
    wait_for(lambda: not fillers(shop.node), 20)
    assert mounts() == before
    again = shop.start(port)
    expected = json.loads(again.ask("/herd"))
    assert answer in (None, expected)
    again.kill()
