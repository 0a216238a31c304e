# SPDX-License-Identifier: Apache-2.0
"""A restored server maps its memory: replicas share it, and one can be dumped by what it has written."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Rekindle, Replica, free_port, wait_for, workhorse, workhorse_flags

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
        "import sys, snapshot.compact; snapshot.compact.move_memory = lambda *_: []; "
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
