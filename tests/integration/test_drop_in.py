# SPDX-License-Identifier: Apache-2.0
"""`rekindle restore IMAGE -- COMMAND` stands in for COMMAND: in a container, below systemd, in a pipe."""

import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import free_port, listening, wait_for
from tests.integration.scenes import MULE, Running, Saved, Scene, save, scene

pytestmark = pytest.mark.criu
OUTCOMES = {"process": "restored", "cache": "cache", "cold": "cold"}
EVERY_RUNG = pytest.mark.parametrize("rung", OUTCOMES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture(name="scene")
def _scene(saved: Saved, tmp_path: Path) -> Iterator[Scene]:
    with scene(saved, tmp_path) as made:
        yield made


def state_of(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return ""


def children_of(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


# As PID 1.


def as_pid_1(scene: Scene, *flags: str) -> tuple[Running, int]:
    """A restore in PID and mount namespaces of its own, and the PID that it has outside."""
    scene.rekindle.prefix = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    running = scene.restore(*flags)
    wait_for(lambda: children_of(running.process.pid), 20)
    (pid,) = children_of(running.process.pid)
    return running, pid


@EVERY_RUNG
def test_as_pid_1_it_reaps_and_forwards_and_ends_as_its_server_does(scene: Scene, rung: str) -> None:
    scene.puts(*MULE, "orphans")
    running, pid = as_pid_1(scene, "--rung", rung)
    running.until_ready(OUTCOMES[rung])
    assert running.report["pid"] == 1
    wait_for(lambda: psutil.STATUS_ZOMBIE not in map(state_of, children_of(pid)), 10)
    before = set(children_of(pid))
    # Who is started in the container later may leave orphans, too.
    inside = ["nsenter", "--target", str(pid), "--pid", "--mount"]
    orphan = "import os, time\nif os.fork() == 0:\n    time.sleep(0.3)"
    subprocess.run([*inside, sys.executable, "-c", orphan], check=True)
    assert set(children_of(pid)) > before
    wait_for(lambda: set(children_of(pid)) == before, 10)
    os.kill(pid, signal.SIGTERM)
    assert running.process.wait(20) == {"process": 7}.get(rung, 5)
    scene.nothing_is_left(kept=rung == "cache")


def test_as_pid_1_it_goes_down_the_ladder(scene: Scene) -> None:
    scene.puts(*MULE, "dies-on-a-cache")
    image = scene.doctored(node__kernel="99.1")
    scene.rekindle.prefix = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    running = scene.restore(image=image)
    running.until_ready("cold")
    assert running.end() == 3
    scene.nothing_is_left()


def test_as_pid_1_it_ends_before_it_is_ready(scene: Scene) -> None:
    scene.puts(*MULE, "never-ready")
    running, pid = as_pid_1(scene, "--rung", "cold")
    running.until("mule: starts")
    os.kill(pid, signal.SIGTERM)
    assert running.process.wait(20) == 143
    scene.nothing_is_left()


def test_what_was_started_before_it_is_not_its_own(scene: Scene) -> None:
    """As an entrypoint does that starts a helper, and then becomes us."""
    note = scene.directory / "helper"
    scene.rekindle.prefix = ["sh", "-c", f'sleep 1000 & echo $! >{note}; exec "$@"', "sh"]
    scene.puts(*MULE, "dies-on-a-cache", "daemon")
    running = scene.restore("--rung", "cache")
    running.until_ready("cold")
    helper = int(note.read_text())
    assert state_of(helper) == psutil.STATUS_SLEEPING
    assert running.end() == 3
    assert state_of(helper) == psutil.STATUS_SLEEPING
    os.kill(helper, signal.SIGKILL)
    scene.nothing_is_left()


# Who waits for it.


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, scene: Scene) -> Iterator[socket.socket]:
    """systemd, as far as a server can tell."""
    name = f"@{scene.directory}" if request.param == "abstract" else str(scene.directory / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0", 1))
        scene.rekindle.env["NOTIFY_SOCKET"] = name
        yield sock


def told(manager: socket.socket, seconds: float) -> list[str]:
    """The state that comes next; none if none comes in time."""
    manager.settimeout(seconds)
    try:
        return manager.recv(1000).decode().splitlines()
    except TimeoutError:
        return []


@EVERY_RUNG
def test_systemd_learns_when_the_server_is_ready_and_when_it_ends(
    scene: Scene, manager: socket.socket, rung: str
) -> None:
    ready = scene.directory / "ready"
    ready.write_text("of a server before")
    scene.puts(*MULE, "slow-end=1")
    running = scene.restore("--rung", rung, "--ready-file", str(ready))
    assert "READY=1" in told(manager, 30), running.said
    running.ask("/health")
    wait_for(ready.exists, 1)
    if rung != "process":
        assert "NOTIFY_SOCKET" not in running.ask("/facts")
    running.send(signal.SIGTERM)
    assert told(manager, 10) == ["STOPPING=1"]
    assert not ready.exists()
    if rung != "process":
        assert running.process.poll() is None, "it was told when it began to end"
    assert running.process.wait(20) in {5, 7}
    assert told(manager, 0.1) == []
    assert not ready.exists()


@pytest.mark.parametrize("how", ["dies=4", "never-ready"])
def test_nobody_is_told_of_a_server_that_does_not_get_ready(
    scene: Scene, manager: socket.socket, how: str
) -> None:
    ready = scene.directory / "ready"
    scene.puts(*MULE, how)
    running = scene.restore("--ready-file", str(ready), "--rung", "cold")
    running.until("mule: starts")
    assert told(manager, 0.5) == []
    assert not ready.exists()
    running.send(signal.SIGTERM)
    running.process.wait(20)
    assert told(manager, 0.1) == []
    scene.nothing_is_left()


def test_a_server_that_ends_by_itself_is_ready_no_more(scene: Scene) -> None:
    ready = scene.directory / "ready"
    scene.puts(*MULE, "daemon")
    running = scene.restore("--ready-file", str(ready), "--rung", "cold")
    running.until_ready("cold")
    wait_for(ready.exists, 1)
    assert running.end() == 0
    assert not ready.exists()
    scene.nothing_is_left()


def test_a_server_that_reads_its_configuration_again_stays_ready(scene: Scene) -> None:
    ready = scene.directory / "ready"
    program = "import signal, sys, http.server as h; signal.signal(1, lambda *_: print('read', flush=True)); "
    program += "h.test(h.SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind='127.0.0.1')"
    port = free_port()
    running = scene.restore(
        *("--rung", "cold", "--ready-file", str(ready), "--ready-url", f"http://127.0.0.1:{port}/"),
        command=[sys.executable, "-c", program, str(port)],
        port=port,
    )
    running.until_ready("cold")
    wait_for(ready.exists, 1)
    running.send(signal.SIGHUP)
    running.until("read\n")
    assert ready.exists()
    running.send(signal.SIGINT)
    running.process.wait(20)
    assert not ready.exists()


# Its output.

BLOCK = bytes(range(256)) * 4


@pytest.mark.parametrize("rung", ["cache", "cold"])
def test_output_in_one_pipe_is_what_the_server_wrote_in_its_order(scene: Scene, rung: str) -> None:
    scene.puts(*MULE, "loud")
    running = scene.restore("--rung", rung, "--quiet")
    running.until_ready(rung)
    running.ask("/say", {})
    wait_for(lambda: running.log.read_bytes().endswith(b"stderr\n"), 10)
    assert running.end() == 0
    start = f"mule: starts on {2 if rung == 'cache' else 0} files\n".encode()
    assert running.log.read_bytes() == start + BLOCK * 1024 + b"to stdout\nto stderr\n"


@pytest.mark.parametrize("rung", ["cache", "cold"])
def test_output_in_two_places_goes_to_each(scene: Scene, rung: str) -> None:
    scene.puts(*MULE, "loud")
    out = scene.directory / "out"
    with open(out, "wb") as stdout:
        running = scene.restore("--rung", rung, "--quiet", stdout=stdout)
    running.until_ready(rung)
    running.ask("/say", {})
    assert running.end() == 0
    assert out.read_bytes() == BLOCK * 512 + b"to stdout\n"
    assert running.log.read_bytes().endswith(BLOCK * 512 + b"to stderr\n")


def test_the_output_of_a_restored_process_is_what_it_wrote(scene: Scene) -> None:
    out = scene.directory / "out"
    with open(out, "wb") as stdout:
        running = scene.restore("--quiet", stdout=stdout)
    running.until_ready("restored")
    for _ in range(100):
        running.ask("/count", {})
    running.send(signal.SIGTERM)
    assert running.process.wait(20) == 7
    assert out.read_bytes() == b"".join(b"count %d\n" % number for number in range(1, 101))
    assert running.said.startswith("workhorse: signal 15\n")  # then Python's tracker of resources


@EVERY_RUNG
def test_a_reader_that_goes_away_and_a_full_pipe(scene: Scene, rung: str) -> None:
    """The pipe is non-blocking, as a parent may make it, and nobody reads for a while."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    scene.puts(*MULE, "loud")
    running = scene.restore("--rung", rung, "--quiet", stdout=writer)
    os.close(writer)
    if rung == "cache":
        time.sleep(1)
        content = b""
        while len(content) < 512 * 1024:
            content += os.read(reader, 65536)
        assert content == BLOCK * 512
    os.close(reader)
    if rung != "cold":  # there, it writes by itself, and is told by the system
        running.until_ready(OUTCOMES[rung])
    running.send(signal.SIGTERM)
    running.process.wait(20)
    scene.nothing_is_left(kept=rung == "cache")


def test_its_standard_input_is_the_servers(scene: Scene) -> None:
    given = scene.directory / "given"
    given.write_text("hello")
    scene.rekindle.prefix = ["sh", "-c", f'exec "$@" <{given}', "sh"]
    running = scene.restore("--rung", "cold", command=["cat"])
    assert running.process.wait(20) == 0
    assert "hello" in running.said


# Its address.


@pytest.mark.parametrize("rung", ["cache", "cold"])
def test_another_address_is_published_on_lower_rungs_too(scene: Scene, rung: str) -> None:
    other = free_port()
    running = scene.restore("--rung", rung, "--publish", str(other), port=other)
    running.until_ready(rung)
    assert running.report["endpoint"] == f"127.0.0.1:{other}"
    assert running.ask("/health") == "ready"
    assert running.ask("/health", port=scene.saved.port) == "ready"
    assert running.end() == 0
    scene.nothing_is_left(kept=rung == "cache")


@pytest.mark.parametrize("rung", ["cache", "cold"])
def test_the_last_answer_of_a_server_arrives_though_the_server_has_ended(scene: Scene, rung: str) -> None:
    other, body = free_port(), b"x" * 4_000_000
    running = scene.restore("--rung", rung, "--publish", str(other), port=other)
    running.until_ready(rung)
    with socket.create_connection(("127.0.0.1", other), timeout=20) as client:
        client.sendall(b"POST /end HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        time.sleep(0.5)  # it has ended by now; how much of its answer is on its way is the kernel's business
        answer = b"".join(iter(lambda: client.recv(1 << 20), b""))
    assert body in answer, f"{len(answer)} bytes"
    assert running.process.wait(30) == 0


def test_a_request_takes_hardly_longer_than_to_a_server_without_us(scene: Scene) -> None:
    """A loop that sleeps, by however little, at each of its turns takes ten times as long."""
    direct = free_port()
    running = scene.restore()
    running.until_ready("restored")
    with subprocess.Popen([*MULE, str(direct)], stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(lambda: listening(direct), 10)
            ratios = [median_of_requests(running.port) / median_of_requests(direct) for _ in range(3)]
        finally:
            server.kill()
    assert min(ratios) < 6


def median_of_requests(port: int) -> float:
    seconds = []
    for _ in range(60):
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert b"".join(iter(lambda: sock.recv(1000), b"")).endswith(b"ready")
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def test_an_address_is_closed_until_the_server_is_ready(scene: Scene) -> None:
    other = free_port()
    scene.faults("restore.serve.address:listen=once fails PortError")
    scene.puts(*MULE, "never-ready")
    running = scene.restore("--publish", str(other), port=other)
    running.until("mule: starts")
    wait_for(lambda: listening(scene.saved.port), 10)
    assert not listening(other)
    running.send(signal.SIGTERM)
    running.process.wait(20)
    scene.nothing_is_left()


def test_the_address_of_a_wildcard_needs_nobody_to_carry(scene: Scene) -> None:
    port = free_port()
    program = "import sys, http.server as h; h.test(h.SimpleHTTPRequestHandler, port=int(sys.argv[1]))"
    running = scene.restore(
        *("--rung", "cold", "--publish", f"127.0.0.1:{port}", "--ready-url", f"http://0.0.0.0:{port}/"),
        command=[sys.executable, "-c", program, str(port)],
        port=port,
    )
    running.until_ready("cold")
    running.send(signal.SIGTERM)
    assert running.process.wait(20) == 143


def test_another_server_at_its_own_address_is_not_taken_for_it(scene: Scene) -> None:
    other = free_port()
    with subprocess.Popen([*MULE, str(scene.saved.port)], stderr=subprocess.DEVNULL) as stranger:
        wait_for(lambda: listening(scene.saved.port), 10)
        running = scene.ended("--rung", "cold", "--publish", str(other))
        assert running.process.returncode == 13, running.said
        assert f"cannot publish 127.0.0.1:{scene.saved.port}" in running.said
        assert "mule" not in running.said
        stranger.kill()


def test_a_server_that_takes_the_address_before_ours_listens_is_not_taken_for_it(scene: Scene) -> None:
    scene.puts(*MULE, "late=3")
    ready = scene.directory / "is-ready"
    running = scene.restore("--rung", "cold", "--ready-file", str(ready))
    running.until("mule: starts")
    with subprocess.Popen([*MULE, str(scene.saved.port)], stderr=subprocess.DEVNULL) as stranger:
        running.until("another server answers at")
        assert running.process.wait(30) == 1  # ours cannot listen
        assert "ready (cold)" not in running.said
        assert not ready.exists()
        stranger.kill()


def test_a_server_of_a_daemon_is_waited_for(scene: Scene, tmp_path: Path) -> None:
    """What listens for `docker run` is no process below it."""
    daemon, docker = free_port(), tmp_path / "docker"
    shutil.copy("/bin/sleep", docker)
    with subprocess.Popen([*MULE, "late=1", str(daemon)], stderr=subprocess.DEVNULL) as stranger:
        running = scene.restore(
            *("--rung", "cold", "--ready-url", f"http://127.0.0.1:{daemon}/health"),
            command=[str(docker), "600"],
            port=daemon,
        )
        running.until_ready("cold")
        running.send(signal.SIGTERM)
        running.process.wait(20)
        stranger.kill()


def test_the_limit_of_descriptors_of_the_server_is_that_of_who_started_it(scene: Scene) -> None:
    """Also after a process that failed when its address was published already."""
    scene.faults("restore.serve.forward:Forwarder.accept_from=once fails RestoreError")
    scene.rekindle.prefix = ["prlimit", "--nofile=1000:5000", *scene.rekindle.prefix]
    other = free_port()
    running = scene.restore("--publish", str(other), port=other)
    running.until_ready("cache")
    assert running.reasons == [("process", "restore-failed")]
    assert re.search(r'"nofile": 1000\b', running.ask("/facts"))
    limits = Path(f"/proc/{running.process.pid}/limits").read_text()
    assert re.search(r"Max open files +5000 +5000", limits), "it has two for each connection"
    assert running.end() == 3
    scene.nothing_is_left(kept=True)
