# SPDX-License-Identifier: Apache-2.0
"""Restore a server many times, and kill parts of some restores at any moment; see hack/soak.

Up to three replicas run at a time, each asked when it is ready and again before it ends. Beside them, another
image is restored again and again with room for no other dump, so a dump is evicted whenever it is unused.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rekindle.cell.descendants import inner_pid
from rekindle.engine import Endpoint, Engine
from rekindle.engine.choose import from_record
from rekindle.engine.client import Client
from rekindle.record import Record
from tests.traces import Traces, adopting_orphans, descendants, take_own_machine

ROOT = Path(__file__).resolve().parents[1]
SERVERS = ROOT / "tests" / "servers"
REPLICAS = 3
READY_SECONDS = 120.0
END_SECONDS = 60.0
FIND_SECONDS = 3.0  # how long to look for what is to be killed: CRIU runs for a tenth of a second
# What may be killed, by a word of its command line; "rekindle" is the process that we start.
TARGETS = {"launcher": "cell/init.py", "init": "cell/init.py", "criu": "--restore-detached", "server": ""}
KINDS = ("serve", "rekindle", *TARGETS)
WEIGHTS = (5, 1, 1, 1, 1, 1)


class SoakError(Exception):
    """Something that must never happen has happened."""


@dataclass(slots=True, kw_only=True)
class SoakedReplica:
    """A `rekindle restore` in the foreground."""

    process: "subprocess.Popen[bytes]"
    report: Path
    log: Path
    port: int
    counted: int = 0
    killed: str = ""

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


@dataclass(slots=True, kw_only=True)
class Soak:
    """One run. `memory` are the digests of the memory files of the image's dump."""

    home: Path
    image: str
    work: Path
    rng: random.Random
    record: Record
    dump: Path
    counts: bool
    memory: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    done: "collections.Counter[str]" = field(default_factory=collections.Counter)
    running: list[SoakedReplica] = field(default_factory=list)

    def start(self, number: int) -> SoakedReplica:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        report, log = self.work / f"report-{number}", self.work / f"log-{number}"
        words = ["restore", self.image, "--require", "process", "--publish", f"127.0.0.1:{port}"]
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*rekindle(), *words, "--report", str(report)],
                env={**os.environ, "REKINDLE_HOME": str(self.home)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        return SoakedReplica(process=process, report=report, log=log, port=port)

    def once(self, number: int) -> None:
        """Restore once, and kill a part of it or serve with it."""
        (kind,) = self.rng.choices(KINDS, WEIGHTS)
        replica = self.start(number)
        if kind != "serve":
            time.sleep(self.rng.uniform(0, 1.3 * statistics.median(self.seconds)))
            deadline = time.monotonic() + FIND_SECONDS
            while not (killed := self._kill(replica, kind)) and time.monotonic() < deadline:
                if replica.process.poll() is not None:
                    break
                time.sleep(self.rng.uniform(0, 0.02))
            if killed:
                self.done[f"killed {kind}"] += 1
                self._await_end(replica)
                return
        self._await_ready(replica)
        self.done["served"] += 1
        self._check(replica)
        self.running.append(replica)
        if len(self.running) >= REPLICAS:
            self.end(self.running.pop(self.rng.randrange(len(self.running))))

    def end(self, replica: SoakedReplica) -> None:
        """Ask a replica once more, look at the files that it maps, and end it."""
        self._check(replica)
        self._check_memory(replica)
        replica.process.send_signal(self.rng.choice((signal.SIGTERM, signal.SIGKILL)))
        self._await_end(replica)

    def _kill(self, replica: SoakedReplica, kind: str) -> bool:
        """Kill a part of a restore; return False if there is none (yet)."""
        if kind == "rekindle":
            replica.process.kill()
            return True
        found = sorted(descendants(replica.process.pid).items())
        match kind:
            case "launcher" | "init":
                both = [pid for pid, line in found if TARGETS[kind] in line]
                pids = both[:1] if kind == "launcher" else both[1:2]
            case "criu":
                pids = [pid for pid, line in found if TARGETS[kind] in line]
            case _:
                # Not the shell above it: if that is killed, the server goes on, and so do we.
                server = self.record.process.server_pid
                pids = [pid for pid, _ in found if inner_pid(pid) == server]
        for pid in pids[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                replica.killed = f"{kind} {pid}, {dict(found).get(pid)}"
                return True
        return False

    def _await_ready(self, replica: SoakedReplica) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not replica.report.exists():
            if replica.process.poll() is not None or time.monotonic() > deadline:
                raise SoakError(f"a restore that was left alone failed: {replica.said}")
            time.sleep(0.01)
        report = json.loads(replica.report.read_text())
        if report["outcome"] != "restored" or report["memory"]["mode"] != "mapped":
            raise SoakError(f"a restore took another way: {report}")
        self.seconds.append(report["first_token_seconds"])

    def _await_end(self, replica: SoakedReplica) -> None:
        try:
            replica.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            left = descendants(replica.process.pid)
            raise SoakError(
                f"a restore does not end (killed: {replica.killed}): {left} {replica.said}"
            ) from None

    def _check(self, replica: SoakedReplica) -> None:
        """Ask the oracle, and count: what one replica counts, no other sees."""
        engine = engine_of(self.record)
        client = Client(Endpoint(host="127.0.0.1", port=replica.port), _connect)
        request = engine.authorize(self.record.oracle.request, os.environ)
        answer = engine.answer(client.ask(request, timeout=READY_SECONDS))
        if not engine.agree(self.record.oracle.answer, answer):
            raise SoakError(f"a wrong answer: {answer}")
        self.done["answers"] += 1
        if self.counts:
            replica.counted += 1
            with urllib.request.urlopen(f"http://127.0.0.1:{replica.port}/count", b"{}", 30) as response:
                counted = int(response.read())
            if counted != replica.counted:
                raise SoakError(f"a replica counted {counted} instead of {replica.counted}")

    def _check_memory(self, replica: SoakedReplica) -> None:
        """Compare the memory files with what they were at first, and with the files that are mapped."""
        if digests(self.dump / "memory") != self.memory:
            raise SoakError("a memory file has changed")
        inodes = {str(path.stat().st_ino) for path in (self.dump / "memory").iterdir()}
        mapped = set()
        for pid in descendants(replica.process.pid):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    if "/.rekindle/memory/" in line:
                        mapped.add(line.split()[4])
        if not mapped or not mapped <= inodes:
            raise SoakError(f"a replica maps other files: {mapped} instead of {inodes}")
        self.done["looks at mapped files"] += 1


def _connect(host: str, port: int, timeout: float) -> socket.socket:
    return socket.create_connection((host, port), timeout)


def engine_of(record: Record) -> Engine:
    return from_record(record.engine.name, record.endpoint, record.engine.options)


def rekindle() -> list[str]:
    return [sys.executable, "-m", "rekindle"]


def call(home: Path, *words: str, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        [*rekindle(), *words],
        env={**os.environ, "REKINDLE_HOME": str(home), **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        raise SoakError(f"rekindle {words[0]} failed: {done.stderr}")
    return done.stdout


def save(home: Path, name: str, port: int) -> None:
    """Make a snapshot of a small server."""
    command = [sys.executable, str(SERVERS / "workhorse.py"), str(port)]
    ready = ["--ready-url", f"http://127.0.0.1:{port}/health"]
    oracle = ["--oracle-request", str(SERVERS / "oracle.json")]
    call(home, "snapshot", name, *ready, *oracle, "--", *command)


def digests(directory: Path) -> dict[str, str]:
    found = {}
    for path in sorted(directory.iterdir()):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


@contextlib.contextmanager
def evicting(home: Path, image: str, work: Path) -> Iterator["collections.Counter[str]"]:
    """Restore another image again and again, with room for no other dump."""
    over, done = threading.Event(), collections.Counter[str]()

    def run() -> None:
        while not over.is_set():
            report = work / "other"
            report.unlink(missing_ok=True)
            with open(work / "other.log", "wb") as output:
                other = subprocess.Popen(
                    [*rekindle(), "restore", image, "--require", "process", "--report", str(report)],
                    env={**os.environ, "REKINDLE_HOME": str(home), "REKINDLE_DUMPS_LIMIT": "0"},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            deadline = time.monotonic() + READY_SECONDS
            while other.poll() is None and not report.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            done["evictions" if other.poll() is None and report.exists() else "failed evictions"] += 1
            other.terminate()
            other.wait()
            over.wait(1.0)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def cgroups() -> set[str]:
    return {directory for directory, _, _ in os.walk("/sys/fs/cgroup")}


def soak(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    home, work = Path(os.environ.get("REKINDLE_HOME") or place / "home"), place / "work"
    work.mkdir()
    image = args.image or "soak"
    if not args.image:
        save(home, image, 8101)
    save(home, "soak-other", 8102)
    inspected = json.loads(call(home, "inspect", image, "--json"))
    record = Record.parse(json.dumps(inspected["record"]).encode())
    dump = home / "dumps" / inspected["process_image"]["digest"].removeprefix("sha256:")
    rng = random.Random(args.seed)  # noqa: S311 - to be repeated
    run = Soak(home=home, image=image, work=work, rng=rng, record=record, dump=dump, counts=not args.image)
    before, groups = Traces.now(), cgroups()
    first = run.start(-1)
    run._await_ready(first)
    run.memory = digests(dump / "memory")
    run.end(first)
    began = time.monotonic()
    with evicting(home, "soak-other", work) as evicted:
        try:
            for number in range(args.restores):
                if time.monotonic() - began > args.seconds:
                    break
                run.once(number)
                run.done["restores"] += 1
            while run.running:
                run.end(run.running.pop())
        finally:
            for replica in run.running:
                replica.process.kill()
                replica.process.wait()
    call(home, "doctor", "--check", "root")  # the next command removes what killed ones left
    before.wait_until_nothing_is_left(30)
    if left := [str(path) for path in (home / "run").iterdir()]:
        raise SoakError(f"work directories are left: {left}")
    if left := sorted(cgroups() - groups):
        raise SoakError(f"cgroups are left: {left}")
    return {
        **run.done,
        **evicted,
        "wrong answers": 0,
        "seconds": round(time.monotonic() - began, 1),
        "median first token": round(statistics.median(run.seconds), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="hack/soak", description=__doc__.splitlines()[0])
    parser.add_argument("--restores", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--seconds", type=float, default=1e9, metavar="S", help="stop after so many seconds")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--image", metavar="NAME", help="an image in the store of $REKINDLE_HOME")
    args = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        take_own_machine(base, keep=[base, ROOT])
        with adopting_orphans():
            found = soak(args, base)
    except SoakError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print(json.dumps({"seed": args.seed, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
