# SPDX-License-Identifier: Apache-2.0
"""A replica is saved as an image: what it has written, on top of the memory that it was restored with."""

import contextlib
import fcntl
import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oci import image as images
from oci import resolve, store
from oci.options import RegistryOptions
from oci.reference import parse
from oci.trust import signer, verifier
from oci.trust.keys import PrivateKey
from rekindle.cell import Cell, processes
from rekindle.criu import search
from rekindle.engine import Request
from rekindle.engine.client import Client
from rekindle.errors import DumpError, NotDumpableError, SecretError
from rekindle.files import copy_sparse_tree
from rekindle.report import MemoryMode, Report
from restore import delta, dumps
from restore.options import Memory, Output
from restore.rungs import process
from snapshot import ReplicaOptions, RunningReplica, save_replica
from snapshot.outside_connections import Outside
from tests.conftest import SERVERS, KeyPair, Rekindle, Replica, free_port, wait_for, workhorse_flags
from tests.servers.daemon import outside_daemon
from tests.servers.registry.simulator import Registry

pytestmark = pytest.mark.criu

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _home(rekindle: Rekindle, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process uses the library with the home of the command line."""
    for name, value in rekindle.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def image(rekindle: Rekindle, port: int) -> str:
    done = rekindle.snapshot_workhorse("horse", port)
    assert done.status == 0, done.stderr
    return "horse"


class Runs:
    """A replica in a cell of this process."""

    def __init__(self, replica: RunningReplica, report: Report) -> None:
        self.replica, self.report = replica, report
        self.client = Client(replica.image.record.endpoint, replica.cell.connect)

    def ask(self, path: str, method: str = "POST") -> Any:
        request = Request(method=method, path=path, headers={}, body={} if method == "POST" else None)
        return json.loads(self.client.ask(request, timeout=30).body)

    def save(self, name: str, **options: Any) -> images.Image:
        return save_replica(self.replica, ReplicaOptions(image=name, **options))

    def connect(self) -> socket.socket:
        return self.replica.cell.connect("127.0.0.1", self.replica.image.record.endpoint.port, 5)

    @property
    def lives(self) -> bool:
        return self.replica.cell.wait(self.replica.image.record.process.root_pid, 0.0) is None


@contextlib.contextmanager
def running(name: str, work: Path, output: int = -1, memory: Memory = Memory.MAP) -> Iterator[Runs]:
    home, reference, report = store.open_home(), parse(name), Report(verb="restore")
    with contextlib.ExitStack() as stack:
        if output < 0:
            output = os.open(work / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            stack.callback(os.close, output)
        with resolve.source(reference, home, RegistryOptions()) as found:
            image = images.load(found.blobs, found.root)
            here = stack.enter_context(home.work("restore"))
            dump = stack.enter_context(dumps.ready(home, here, verifier.dangerously_skip(image), report))
        cell = stack.enter_context(Cell())
        tool = search.find(home)
        out = Output(stdout=output, stderr=output)
        process.restore(
            cell,
            image.record,
            dump,
            tool=tool,
            home=home,
            work=here,
            output=out,
            report=report,
            memory=memory,
        )
        assert report.memory is not None
        mapped = dump if report.memory.mode is MemoryMode.MAPPED else None
        yield Runs(
            RunningReplica(cell=cell, image=image, reference=reference, dump=mapped, output=out), report
        )


def blobs(home: Path) -> set[str]:
    return {path.name for path in (home / "store" / "blobs" / "sha256").iterdir()}


def memory_layers(image: images.Image) -> list[str]:
    return [str(layer.digest) for layer in image.layers if layer.is_memory]


def test_it_answers_elsewhere_with_the_state_of_then(
    image: str, restore: Callable[..., Replica], rekindle: Rekindle, key_pair: KeyPair, tmp_path: Path
) -> None:
    """Ten questions, an image, a registry, another node; and the same again from there."""
    key = signer.by_key(PrivateKey.read(Path(f"{key_pair.prefix}.key"), b""))
    before = blobs(rekindle.home)
    with running(image, tmp_path) as runs:
        for number in range(10):
            assert runs.ask("/count") == number + 1
        saved = runs.save("monday", sign=key)
        assert not runs.lives
        base = runs.replica.image
    assert saved.record.dump.base == base.index.digest
    assert memory_layers(saved) == memory_layers(base) != []
    own = sum(layer.size for layer in saved.layers if layer not in base.layers)
    assert own < 0.5 * base.size_bytes
    new = blobs(rekindle.home) - before
    sizes = [(rekindle.home / "store/blobs/sha256" / name).stat().st_size for name in new]
    assert sum(sizes) < own + MIB, "nothing is stored twice"
    assert "unpack" not in [phase["name"] for phase in restore("monday", free_port()).report["phases"]]

    with Registry() as registry:
        where = f"{registry.host}/horses"
        assert rekindle("push", image, f"{where}:base").status == 0
        pushed = rekindle("push", "monday", f"{where}:monday", "--json").json
        assert pushed["bytes"]["sent"] < own + MIB, "nor pushed twice"

        elsewhere = Rekindle(tmp_path / "elsewhere", rekindle.env)
        flags = (*key_pair.verify, "--require", "process")
        replica = restore(f"{where}:monday", free_port(), *flags, of=elsewhere)
        assert replica.report["memory"]["mode"] == "mapped"
        assert json.loads(replica.ask("/count", {})) == 11
        assert (
            json.loads(restore(f"{where}:monday", free_port(), *flags, of=elsewhere).ask("/count", {})) == 11
        )
        copied = restore(f"{where}:monday", free_port(), *flags, "--memory", "copy", of=elsewhere)
        assert copied.report["memory"]["mode"] == "copied"
        assert json.loads(copied.ask("/count", {})) == 11
    inspected = rekindle("inspect", "monday")
    assert f"shares      the memory of {base.index.digest}" in inspected.stdout, inspected.stdout


def test_a_kept_dump_of_the_base_is_used(
    image: str, restore: Callable[..., Replica], rekindle: Rekindle, tmp_path: Path
) -> None:
    with running(image, tmp_path) as runs:
        assert runs.ask("/count") == 1
        saved = runs.save("monday", prove=False)
        base = runs.replica.image
    replica = restore("monday", free_port())
    assert json.loads(replica.ask("/count", {})) == 2
    assert "unpack" not in [phase["name"] for phase in replica.report["phases"]], "the dump was kept"
    dump = rekindle.home / "dumps" / saved.process.digest.hex
    assert (dump / "memory").readlink() == rekindle.home / "dumps" / base.process.digest.hex / "memory"
    small = {"REKINDLE_DUMPS_LIMIT": "0"}
    assert rekindle.snapshot_workhorse("other", free_port(), env=small).status == 0
    assert (dump / "memory" / "..").resolve().is_dir(), "the base's dump stays while it is mapped"
    assert json.loads(replica.ask("/count", {})) == 3
    replica.kill()
    wait_for(lambda: not is_locked(dump), 10)
    assert rekindle.snapshot_workhorse("another", free_port(), env=small).status == 0
    assert not dump.exists()
    assert not (rekindle.home / "dumps" / base.process.digest.hex).exists()
    alone = restore("monday", free_port())
    assert json.loads(alone.ask("/count", {})) == 2
    assert not (dump / "memory").is_symlink(), "nothing was here to link to"
    before = {path.name: path.stat() for path in (dump / "memory").iterdir()}
    based = restore(image, free_port())
    assert json.loads(based.ask("/count", {})) == 1
    again = rekindle.home / "dumps" / base.process.digest.hex / "memory"
    assert {path.name: path.stat().st_ino for path in again.iterdir()} == {
        name: status.st_ino for name, status in before.items()
    }


def is_locked(dump: Path) -> bool:
    with open(dump.with_name(f"{dump.name}.lock")) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("memory", ["map", "copy"])
def test_a_replica_that_has_forked(
    image: str, restore: Callable[..., Replica], tmp_path: Path, memory: str
) -> None:
    """Processes share the memory file of their parent, each with pages of its own."""
    with running(image, tmp_path) as runs:
        assert [runs.ask("/fork"), runs.ask("/count"), runs.ask("/fork")] == [1, 1, 2]
        herd = runs.ask("/herd", "GET")
        assert len({tuple(each) for each in herd}) == 3
        runs.save("forked")
    replica = restore("forked", free_port(), "--memory", memory)
    assert {"map": "mapped", "copy": "copied"}[memory] == replica.report["memory"]["mode"]
    assert json.loads(replica.ask("/herd")) == herd


def test_generations_stay_small_until_one_is_complete(
    image: str, restore: Callable[..., Replica], tmp_path: Path
) -> None:
    """Each goes on where the last one was. One that has written too much has memory files of its own."""
    name, counted = image, 0
    sizes, bases = [], []
    for generation, mib in enumerate((1, 1, 1, 40, 1)):
        with running(name, tmp_path) as runs:
            for _ in range(3):
                counted += 1
                assert runs.ask("/count") == counted
            assert runs.ask(f"/grow?mib={mib}") == mib * MIB
            herd = runs.ask("/herd", "GET")
            name = f"generation-{generation}"
            saved = runs.save(name)
        sizes.append(sum(layer.size for layer in saved.layers if not layer.is_memory))
        bases.append(saved.record.dump.base)
    assert bases[0] == bases[1] == bases[2] is not None
    assert sizes[2] < sizes[0] + 3 * MIB
    assert bases[3] is None, "it was complete"
    assert bases[4] is not None
    assert sizes[4] < sizes[3] + 3 * MIB
    replica = restore(name, free_port())
    assert json.loads(replica.ask("/herd")) == herd
    assert json.loads(replica.ask("/count", {})) == counted + 1


def test_a_replica_may_be_saved_under_the_name_of_its_image(
    image: str, restore: Callable[..., Replica], tmp_path: Path
) -> None:
    with running(image, tmp_path) as runs:
        base = runs.replica.image.index.digest
        for number in range(2):
            assert runs.ask("/count") == number + 1
            assert runs.save(image, runs_on=True, prove=False).record.dump.base == base
    assert json.loads(restore(image, free_port()).ask("/count", {})) == 3


def test_a_replica_may_run_on(image: str, restore: Callable[..., Replica], tmp_path: Path) -> None:
    with running(image, tmp_path) as runs:
        facts = runs.ask("/facts", "GET")
        for name in ("first", "second"):
            count = runs.ask("/count")
            runs.save(name, runs_on=True)
            assert runs.lives
            assert runs.ask("/count") == count + 1
        after = runs.ask("/facts", "GET")
        for found in (facts, after):
            found |= {"monotonic": 0, "boottime": 0, "descriptors": 0}  # the last has this client's socket
            # The hook's thread has the number of the last request in its name.
            found["threads"] = [name.partition(" ")[0] for name in found["threads"]]
        assert after == facts
    assert json.loads(restore("first", free_port()).ask("/count", {})) == 2
    assert json.loads(restore("second", free_port()).ask("/count", {})) == 4


def test_a_replica_whose_memory_was_copied(
    image: str, restore: Callable[..., Replica], tmp_path: Path
) -> None:
    with running(image, tmp_path, memory=Memory.COPY) as runs:
        assert runs.ask("/count") == 1
        saved = runs.save("complete")
    assert saved.record.dump.base is None
    replica = restore("complete", free_port())
    assert replica.report["memory"]["mode"] == "mapped"
    assert json.loads(replica.ask("/count", {})) == 2


def test_a_replica_whose_image_is_gone(
    image: str, restore: Callable[..., Replica], rekindle: Rekindle, tmp_path: Path
) -> None:
    with running(image, tmp_path) as runs:
        assert runs.ask("/count") == 1
        shutil.rmtree(rekindle.home / "store")
        saved = runs.save("complete")
    assert saved.record.dump.base is None
    assert json.loads(restore("complete", free_port()).ask("/count", {})) == 2


@pytest.mark.parametrize("kind", ["pipe", "/dev/null", "terminal"])
def test_its_output_may_be(image: str, restore: Callable[..., Replica], tmp_path: Path, kind: str) -> None:
    match kind:
        case "pipe":
            reader, writer = os.pipe()
        case "terminal":
            reader, writer = os.openpty()
        case _:
            reader, writer = -1, os.open(kind, os.O_WRONLY)
    with running(image, tmp_path, writer) as runs:
        assert runs.ask("/count") == 1
        runs.save("saved")
    replica = restore("saved", free_port())
    assert json.loads(replica.ask("/count", {})) == 2
    assert "count 2" in replica.log.read_text()
    for fd in {reader, writer} - {-1}:
        os.close(fd)


def test_memory_that_a_replica_has_moved(
    rekindle: Rekindle, restore: Callable[..., Replica], port: int, tmp_path: Path
) -> None:
    words = ["snapshot", "mover", *workhorse_flags(port), "--", sys.executable, str(SERVERS / "mover.py")]
    done = rekindle(*words, str(port))
    assert done.status == 0, done.stderr
    with running("mover", tmp_path) as runs:
        assert runs.ask("/move", "GET") == {"at": 0x3000_0000_0000}
        assert runs.ask("/drop", "GET") == {"failed": 0, "shown": ["00", "78"]}
        runs.save("moved")
    assert json.loads(restore("moved", free_port()).ask("/drop")) == {"failed": 0, "shown": ["00", "78"]}


def test_a_client_that_is_connected_stays_so(image: str, tmp_path: Path) -> None:
    with running(image, tmp_path) as runs, runs.connect() as sock:
        for number in range(3):
            sock.sendall(b"POST /count HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            answer = b""
            while not answer.endswith(b"\r\n\r\n%d" % (number + 1)):
                answer += sock.recv(4096)
            runs.save("first", runs_on=True)


# What can go wrong


MOMENTS = {
    "criu": "rekindle.criu.frozen:FrozenDump._await_frozen",
    "shared memory": "restore.delta:copy_sparse_tree",
    "pages": "rekindle.criu.zero_pages:drop",
    "describe": "snapshot.replica:_describe",
    "search": "snapshot.secret_search:require_no_secrets",
    "pack": "oci.dump_layers:pack_layers",
    "prove": "restore.rungs.process:restore",
    "sign": "oci.trust.made_here:sign",
    "publish": "oci.layout:Layout.publish",
}


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt here, also where whoever started the tests has ignored it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interruption_changes_nothing(
    image: str, rekindle: Rekindle, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the middle of a step; the replica runs on, and nothing is left of the attempt."""
    module, _, function = MOMENTS[moment].partition(":")
    place: Any = importlib.import_module(module)
    *parents, name = function.split(".")
    for parent in parents:
        place = getattr(place, parent)
    original = getattr(place, name)

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if moment == "criu":
            os.kill(os.getpid(), signal.SIGINT)
            return original(*arguments, **named)
        found = original(*arguments, **named)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
        return found

    before = blobs(rekindle.home)
    with running(image, tmp_path) as runs, interruptible():
        assert runs.ask("/count") == 1
        with monkeypatch.context() as patch:
            patch.setattr(place, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                runs.save("never")
        assert runs.ask("/count") == 2
        assert len(list((rekindle.home / "run").iterdir())) == 1, "its own"
        assert not list(runs.replica.cell.root.glob("dev/shm/.rekindle/[!m]*"))
        assert not list(runs.replica.cell.root.glob("dev/shm/link_remap*"))
        store.sweep(store.open_home())
        left = blobs(rekindle.home) - before
        if moment == "publish":  # the tag was there already
            assert left
        else:
            assert not left
            assert rekindle("restore", "never", "--plan").status == 12
        runs.save("then")
        assert not runs.lives
    with running("then", tmp_path) as runs:
        assert runs.ask("/count") == 3


@contextlib.contextmanager
def debugger(pid: int) -> Iterator[None]:
    """Traces a process meanwhile, so that CRIU cannot."""
    program = f"import ctypes; print(ctypes.CDLL(None).ptrace(0x4206, {pid}, 0, 0), flush=True); input()"
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tracer:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == b"0\n"
        yield
        tracer.kill()


def test_a_replica_that_cannot_be_dumped_serves_on(image: str, rekindle: Rekindle, tmp_path: Path) -> None:
    with running(image, tmp_path) as runs:
        before = runs.ask("/count")
        with debugger(processes.host_pids(runs.replica.cell)[-1]):
            with pytest.raises(DumpError, match="CRIU could not dump") as caught:
                runs.save("never")
            assert caught.value.server == "it serves on"
        assert runs.ask("/count") == before + 1
        assert rekindle("restore", "never", "--plan").status == 12


def test_a_killed_criu_ends_the_replica(
    image: str, rekindle: Rekindle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CRIU was in the middle of is unknown then."""

    def kills(*arguments: Any, **named: Any) -> Any:
        for pid in processes.host_pids(runs.replica.cell):
            if b"--action-script" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        return copy_sparse_tree(*arguments, **named)

    monkeypatch.setattr(delta, "copy_sparse_tree", kills)
    with running(image, tmp_path) as runs:
        with pytest.raises(DumpError, match="ended, too") as caught:
            runs.save("never", runs_on=True)
        assert caught.value.server == "it has ended"
        assert runs.replica.cell.wait(runs.replica.image.record.process.root_pid, 5.0) is not None
        assert rekindle("restore", "never", "--plan").status == 12


def test_a_secret_in_a_replica_is_found(image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery-staple-0815")
    with running(image, tmp_path) as runs:
        body = {"key": os.environ["MY_API_KEY"]}
        request = Request(method="POST", path="/keep", headers={}, body=body)
        runs.client.ask(request, timeout=10)
        with pytest.raises(SecretError, match="MY_API_KEY"):
            runs.save("never")
        assert runs.lives
        runs.save("allowed", secrets=("MY_API_KEY",))


def test_a_saved_replica_keeps_its_own_files(
    rekindle: Rekindle, port: int, tmp_path: Path, restore: Callable[..., Replica]
) -> None:
    room = tmp_path / "room"
    room.mkdir()
    command = [sys.executable, str(SERVERS / "keeper.py"), str(port), str(room), str(room / "place")]
    done = rekindle("snapshot", "keeper", *workhorse_flags(port), "--no-prove", "--", *command)
    assert done.status == 0, done.stderr
    (room / "old").write_text("there before the replica\n")
    with running("keeper", tmp_path) as runs:
        runs.ask("/write?1")
        runs.ask("/open?new")
        saved = runs.save("monday", runs_on=True)
        assert set(saved.record.process.private) == {
            str(room / name) for name in ("lock", "log", "place", "new")
        }
        runs.ask("/open?old")
        with pytest.raises(NotDumpableError, match="share files") as refused:
            runs.save("tuesday", runs_on=True)
        assert str(room / "old") in refused.value.cause
        assert runs.lives
    shutil.rmtree(room / "place")
    (room / "new").unlink()
    replica = restore("monday", free_port())
    replica.ask("/write?2", {})
    found = json.loads(replica.ask("/check"))
    assert (found["log"], found["log by name"]) == (["began", "1", "2"], ["began", "1", "2"])
    assert (found["map"], found["new"]) == ("2", ["new-1", "new-2"])
    assert found["locked"]
    assert (room / "log").read_text() == "began\n"


def test_a_saved_replica_closes_what_leads_out(
    rekindle: Rekindle, port: int, tmp_path: Path, restore: Callable[..., Replica]
) -> None:
    place = tmp_path / "daemon.sock"
    command = [sys.executable, str(SERVERS / "caller.py"), str(port), f"unix:{place}"]
    flags = ("--outside", "close", "--no-prove")
    with outside_daemon(place, "ours"):
        done = rekindle("snapshot", "caller", *workhorse_flags(port), *flags, "--", *command)
        assert done.status == 0, done.stderr
        with running("caller", tmp_path) as runs:
            assert runs.ask("/call", "GET")["calls"][1:] == ["ours"]
            with pytest.raises(DumpError, match="could not dump") as refused:
                runs.save("monday", runs_on=True)
            assert f"is connected to {place}" in refused.value.cause
            saved = runs.save("monday", outside=Outside.CLOSE, runs_on=True)
            assert saved.record.process.closed == (f"unix:{place}",)
            assert runs.ask("/call", "GET")["calls"] == ["ours"], "the replica's own stays open"
        replica = restore("monday", free_port())
        assert json.loads(replica.ask("/call"))["calls"][1:] == ["ours"]
