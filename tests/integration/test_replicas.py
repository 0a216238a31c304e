# SPDX-License-Identifier: Apache-2.0
"""A restored server maps its memory: replicas share it, and one can be dumped by what it has written."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from oci import image as images
from oci.layout import Layout
from rekindle import criu
from rekindle.cell import Cell
from rekindle.config import Limits
from rekindle.engine.client import Client
from rekindle.home import Home
from rekindle.report import MemoryMode, Report
from restore.delta import Delta, dump_replica
from restore.options import Memory, Output
from restore.rungs import process
from tests.conftest import SERVERS, Rekindle, Replica, free_port, wait_for, workhorse, workhorse_flags

pytestmark = pytest.mark.criu

MIB = 1 << 20


@pytest.fixture
def image(rekindle: Rekindle, port: int) -> str:
    done = rekindle.snapshot_workhorse("horse", port)
    assert done.status == 0, done.stderr
    return "horse"


def test_replicas_map_one_file(
    image: str, restore: Callable[..., Replica], rekindle: Rekindle, nothing_left: Callable[[], None]
) -> None:
    replicas = [restore(image, free_port()) for _ in range(3)]
    for number, replica in enumerate(replicas):
        use = replica.report["memory"]
        assert use["mode"] == "mapped"
        assert use["own_bytes"] < 12 * MIB, "of 36 MiB that were dumped"
        for _ in range(number + 1):
            count = replica.ask("/count", {})
        assert json.loads(count) == number + 1, "what one writes, no other sees"
    files = {
        line.split()[4]
        for replica in replicas
        for process in psutil.Process(replica.process.pid).children(recursive=True)
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        if "/dev/shm/.rekindle/memory/" in line
    }
    kept = list((rekindle.home / "dumps").glob("*/memory/*"))
    assert files == {str(path.stat().st_ino) for path in kept}, "whatever the number of replicas"
    for replica in replicas:
        replica.kill()
    nothing_left()


def test_memory_is_copied_if_asked_for(image: str, restore: Callable[..., Replica]) -> None:
    for _ in range(2):  # the second finds what the first has made
        replica = restore(image, free_port(), "--memory", "copy")
        assert replica.report["memory"]["mode"] == "copied"
        assert replica.report["memory"]["own_bytes"] > 20 * MIB
        assert "reason" not in replica.report["memory"]
        assert json.loads(replica.ask("/count", {})) == 1
    mapped = restore(image, free_port())
    assert mapped.report["memory"]["mode"] == "mapped"
    assert "unpack" not in [phase["name"] for phase in mapped.report["phases"]], "the dump was not touched"


LISTENED = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7fff0000))
program = struct.pack("HxxxxxxP", 1, ctypes.addressof(allow))
fd = libc.syscall(317, 1, 8, program)  # seccomp(SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER)
assert fd >= 0, ctypes.get_errno()
os.set_inheritable(fd, True)  # the listener lives as long as one has it
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_memory_is_copied_where_it_cannot_be_mapped(image: str, rekindle: Rekindle, tmp_path: Path) -> None:
    """A container's runtime may have a listener of its own, and the OS kernel allows one."""
    report = tmp_path / "report.json"
    rekindle.prefix = [sys.executable, "-c", LISTENED, "-m", "rekindle"]
    port = free_port()
    words = ["restore", image, "--publish", str(port), "--report", str(report), "--require", "process"]
    with open(tmp_path / "log", "wb") as log:
        import subprocess

        running = subprocess.Popen(
            [*rekindle.prefix, *words], env=rekindle.environment(), stdout=log, stderr=log
        )
    try:
        wait_for(lambda: report.exists() or running.poll() is not None, 60)
        document = json.loads(report.read_text())
    finally:
        running.kill()
        running.wait()
    assert document["outcome"] == "restored", document
    assert document["memory"]["mode"] == "copied"
    assert document["memory"]["reason"]


def test_a_dump_stays_while_it_is_mapped(
    image: str, restore: Callable[..., Replica], rekindle: Rekindle
) -> None:
    replica = restore(image, free_port())
    (dump,) = [path for path in (rekindle.home / "dumps").iterdir() if path.is_dir()]
    before = {path: path.stat() for path in (dump / "memory").iterdir()}
    done = rekindle.snapshot_workhorse("other", free_port(), env={"REKINDLE_DUMPS_LIMIT": "0"})
    assert done.status == 0, done.stderr
    assert {path: path.stat().st_ino for path in before} == {path: s.st_ino for path, s in before.items()}
    assert json.loads(replica.ask("/count", {})) == 1
    replica.kill()
    wait_for(lambda: not _is_locked(dump), 10)
    done = rekindle.snapshot_workhorse("another", free_port(), env={"REKINDLE_DUMPS_LIMIT": "0"})
    assert done.status == 0, done.stderr
    assert not dump.exists(), "now there was no reason to keep it"


def _is_locked(dump: Path) -> bool:
    import fcntl

    with open(dump.with_name(f"{dump.name}.lock")) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_an_image_of_the_first_format_is_restored_as_before(
    rekindle: Rekindle, restore: Callable[..., Replica], port: int
) -> None:
    program = (
        "import sys, snapshot.make; snapshot.make.move_memory = lambda *_: []; "
        "from rekindle.__main__ import run; run()"
    )
    words = ["snapshot", "old", *workhorse_flags(port), "--", *workhorse(port)]
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env=rekindle.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    record = rekindle("inspect", "old", "--json").json["record"]
    assert record["schema"] == "rekindle.record/1"
    assert "memory" not in record["dump"]
    replica = restore("old", free_port())
    assert replica.report["memory"]["mode"] == "copied"
    assert json.loads(replica.ask("/count", {})) == 1


def test_the_record_knows_the_working_set(image: str, rekindle: Rekindle) -> None:
    record = rekindle("inspect", image, "--json").json["record"]
    assert record["schema"] == "rekindle.record/2"
    memory = record["dump"]["memory"]
    assert [each["path"] for each in memory] == sorted(each["path"] for each in memory)
    touched = sum(length for each in memory for _, length in each["working_set"])
    data = sum(each["data_bytes"] for each in memory)
    assert 0 < touched < data


# A replica is dumped again.


class Base:
    """An image's ready dump, and what is needed to restore it."""

    def __init__(self, rekindle: Rekindle, name: str) -> None:
        self.home = Home(rekindle.home)
        layout = Layout(self.home.store)
        image = images.load(layout, layout.resolve(f"{name}:latest"), Limits())
        self.record, self.dump = image.record, self.home.dumps / image.process.digest.hex
        self.tool = criu.find(self.home)


@pytest.fixture
def base(image: str, rekindle: Rekindle) -> Base:
    return Base(rekindle, image)


@contextlib.contextmanager
def restored(
    base: Base, work: Path, output: int, delta: Delta | None = None
) -> Iterator[tuple[Cell, Client]]:
    work.mkdir()
    record = delta.record if delta else base.record
    report = Report(verb="restore")
    with Cell() as cell:
        process.restore(
            cell,
            record,
            delta.directory if delta else base.dump,
            tool=base.tool,
            home=base.home,
            work=work,
            output=Output(stdout=output, stderr=output),
            report=report,
            memory=Memory.MAP,
        )
        assert report.memory is not None
        assert report.memory.mode is MemoryMode.MAPPED
        yield cell, Client(record.endpoint, cell.connect)


def count(client: Client) -> int:
    from rekindle.engine import Request

    response = client.ask(Request(method="POST", path="/count", headers={}, body={}), timeout=30)
    return int(json.loads(response.body))


def test_a_replica_is_dumped_by_what_it_has_written(base: Base, tmp_path: Path) -> None:
    """Three generations: each goes on where the last one was, and each dump is small."""
    log = os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    delta: Delta | None = None
    counted = 0
    for generation in range(3):
        with restored(base, tmp_path / f"work-{generation}", log, delta) as (cell, client):
            for _ in range(10):
                counted += 1
                assert count(client) == counted
            delta = dump_replica(
                cell,
                delta.record if delta else base.record,
                base.dump,
                tmp_path / f"delta-{generation}",
                tool=base.tool,
                output=Output(stdout=log, stderr=log),
            )
        pages = sum(path.stat().st_size for path in (delta.directory / "criu").glob("pages-*.img"))
        assert pages < 10 * MIB, "of 36 MiB"
        assert not list((delta.directory / "shm").glob(".rekindle*"))
    with restored(base, tmp_path / "last", log, delta) as (_, client):
        assert count(client) == counted + 1
    os.close(log)


@pytest.mark.parametrize("kind", ["pipe", "/dev/null"])
def test_its_output_may_be(base: Base, tmp_path: Path, kind: str) -> None:
    reader, writer = os.pipe() if kind == "pipe" else (-1, os.open(kind, os.O_WRONLY))
    with restored(base, tmp_path / "work", writer) as (cell, client):
        assert count(client) == 1
        delta = dump_replica(
            cell,
            base.record,
            base.dump,
            tmp_path / "delta",
            tool=base.tool,
            output=Output(stdout=writer, stderr=writer),
        )
    with restored(base, tmp_path / "again", writer, delta) as (_, client):
        assert count(client) == 2
    for fd in {reader, writer} - {-1}:
        os.close(fd)


def test_memory_that_a_replica_has_moved_is_known_after_its_next_restore(
    rekindle: Rekindle, port: int, tmp_path: Path
) -> None:
    words = ["snapshot", "mover", *workhorse_flags(port), "--", sys.executable, str(SERVERS / "mover.py")]
    done = rekindle(*words, str(port))
    assert done.status == 0, done.stderr
    base = Base(rekindle, "mover")
    output = os.open(os.devnull, os.O_WRONLY)
    with restored(base, tmp_path / "work", output) as (cell, client):
        assert ask(client, "/move") == {"at": 0x3000_0000_0000}
        assert ask(client, "/drop") == {"failed": 0, "shown": ["00", "78"]}
        delta = dump_replica(
            cell,
            base.record,
            base.dump,
            tmp_path / "delta",
            tool=base.tool,
            output=Output(stdout=output, stderr=output),
        )
    with restored(base, tmp_path / "again", output, delta) as (_, client):
        assert ask(client, "/drop") == {"failed": 0, "shown": ["00", "78"]}
    os.close(output)


def ask(client: Client, path: str) -> object:
    from rekindle.engine import Request

    return json.loads(client.ask(Request(method="GET", path=path, headers={}, body=None), timeout=30).body)
