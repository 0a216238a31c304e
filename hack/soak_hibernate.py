# SPDX-License-Identifier: Apache-2.0
"""Let a server on demand hibernate and wake many times, under random requests and kills: hack/soak-hibernate.

This process is what a service manager is: it holds the listening socket, and starts `rekindle restore
--on-demand` again when that has ended. So a client that comes after a kill waits.
"""

import argparse
import collections
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.traces import Traces, adopting_orphans, descendants, take_own_machine

ROOT = Path(__file__).resolve().parents[1]
SERVERS = ROOT / "tests" / "servers"
IDLE_SECONDS = 0.2
CLIENTS = 4
NAME = "soaked"


class HibernationError(Exception):
    """Something that must never happen has happened."""


@dataclass(slots=True, kw_only=True)
class Sample:
    """A sample after a cycle: memory of all processes below us, files of the home, mounts, processes."""

    cycle: int
    memory_mb: float
    files: int
    mounts: int
    processes: int


@dataclass(slots=True, kw_only=True)
class HibernationSoak:
    """One run."""

    home: Path
    listener: socket.socket
    log: Path
    rng: random.Random
    process: "subprocess.Popen[bytes] | None" = None
    ends: threading.Event = field(default_factory=threading.Event)
    kills: list[float] = field(default_factory=list)
    failures: list[tuple[float, float, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    done: "collections.Counter[str]" = field(default_factory=collections.Counter)
    samples: list[Sample] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def start(self) -> None:
        """Start rekindle, as a service manager would."""
        words = ["restore", "soak", "--on-demand", "--name", NAME, "--idle", str(IDLE_SECONDS)]
        words += ["--publish", f"127.0.0.1:{self.port}", "--listen-fds", str(self.listener.fileno())]
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                [*rekindle(), *words],
                env={**os.environ, "REKINDLE_HOME": str(self.home)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[self.listener.fileno()],
            )
        self.done["started"] += 1

    def cycles(self) -> int:
        """Return the number of hibernations so far."""
        return self.log.read_bytes().count(f"{NAME} hibernates".encode())

    def kill(self) -> None:
        """Kill one of the rekindles: the one that holds the port, or the one that restores and serves."""
        assert self.process is not None
        served = [pid for pid in descendants(self.process.pid) if b"--listen-fds" in words_of(pid)]
        victim = self.rng.choice([self.process.pid, *served])
        self.kills.append(time.monotonic())
        os.kill(victim, signal.SIGKILL)
        self.done["killed the server's" if victim in served else "killed the port's"] += 1

    def watch(self) -> None:
        """Start rekindle again whenever it has ended."""
        while not self.ends.wait(0.05):
            assert self.process is not None
            if self.process.poll() is not None:
                self.start()

    def ask(self, seed: int) -> None:
        """Ask at random times, until the end."""
        rng = random.Random(seed)  # noqa: S311 - to be repeated
        while not self.ends.wait(rng.expovariate(1 / (4 * IDLE_SECONDS))):
            began = time.monotonic()
            client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            try:
                client.request("GET", f"/stream?n={rng.randrange(1, 4)}")
                response = client.getresponse()
                content = response.read()
                if response.status != 200 or not content.count(b"data"):
                    self.wrong.append(f"{response.status} {content!r}")
                self.done["answered"] += 1
            except (OSError, http.client.HTTPException) as error:
                self.failures.append((began, time.monotonic(), repr(error)))
            finally:
                client.close()
            self.waited.append(time.monotonic() - began)

    def sample(self, cycle: int) -> None:
        assert self.process is not None
        pids = [self.process.pid, *descendants(self.process.pid)]
        self.samples.append(
            Sample(
                cycle=cycle,
                memory_mb=sum(map(private_kib, pids)) / 1024,
                files=sum(len(names) for _, _, names in os.walk(self.home)),
                mounts=len(Path("/proc/self/mountinfo").read_text().splitlines()),
                processes=len(pids),
            )
        )

    def unexplained(self) -> list[tuple[float, float, str]]:
        """The failures of requests that were not in flight at a kill."""
        return [each for each in self.failures if not any(each[0] <= at <= each[1] for at in self.kills)]


def private_kib(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def words_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def rekindle() -> list[str]:
    return [sys.executable, "-m", "rekindle"]


def save(home: Path) -> None:
    port = 8103
    flags = ["--no-prove", "--ready-url", f"http://127.0.0.1:{port}/health"]
    flags += ["--oracle-request", str(SERVERS / "oracle.json")]
    command = [sys.executable, str(SERVERS / "workhorse.py"), str(port)]
    subprocess.run(
        [*rekindle(), "snapshot", "soak", *flags, "--", *command],
        env={**os.environ, "REKINDLE_HOME": str(home)},
        check=True,
        capture_output=True,
    )


def soak(args: argparse.Namespace, base: Path) -> dict[str, Any]:
    home = base / "home"
    save(home)
    rng = random.Random(args.seed)  # noqa: S311 - to be repeated
    before = Traces.now()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        run = HibernationSoak(home=home, listener=listener, log=base / "log", rng=rng)
        run.log.touch()
        run.start()
        threads = [threading.Thread(target=run.watch)]
        threads += [threading.Thread(target=run.ask, args=[args.seed * 100 + n]) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        began, seen = time.monotonic(), 0
        try:
            while seen < args.cycles and time.monotonic() - began < args.seconds:
                time.sleep(0.1)
                if (now := run.cycles()) > seen:
                    seen = now
                    run.sample(seen)
                    if rng.random() < args.kills:
                        time.sleep(rng.uniform(0, 1.0))
                        run.kill()
        finally:
            run.ends.set()
            for thread in threads:
                thread.join(90)
            assert run.process is not None
            run.process.terminate()
            run.process.wait(60)
    subprocess.run([*rekindle(), "stop", NAME], env={**os.environ, "REKINDLE_HOME": str(home)}, check=False)
    before.wait_until_nothing_is_left(30)
    if args.picture:
        args.picture.write_text(picture(run.samples))
    if run.wrong:
        raise HibernationError(f"wrong answers: {run.wrong[:3]}")
    if lost := run.unexplained():
        raise HibernationError(
            f"{len(lost)} requests were lost that were not in flight at a kill: {lost[:3]}"
        )
    waited = sorted(run.waited)
    return {
        "cycles": seen,
        **run.done,
        "failed, in flight at a kill": len(run.failures),
        "wrong answers": 0,
        "seconds": round(time.monotonic() - began, 1),
        "median request": round(waited[len(waited) // 2], 3) if waited else None,
        "slowest request": round(waited[-1], 3) if waited else None,
        "first": sample_of(run.samples[:20]),
        "last": sample_of(run.samples[-20:]),
    }


def sample_of(samples: list[Sample]) -> dict[str, float]:
    """The medians of some samples."""
    names = ("memory_mb", "files", "mounts", "processes")
    return {name: sorted(getattr(each, name) for each in samples)[len(samples) // 2] for name in names}


def picture(samples: list[Sample]) -> str:
    """Draw the samples: a line each, from 0 to its largest value."""
    rows = (("memory_mb", "MB"), ("files", "files"), ("mounts", "mounts"), ("processes", "processes"))
    width, height, gap, left = 640, 70, 34, 110
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + left + 20} '
        f'{len(rows) * (height + gap) + 30}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    last = max((each.cycle for each in samples), default=1)
    for row, (name, unit) in enumerate(rows):
        values = [getattr(each, name) for each in samples]
        top, most = 20 + row * (height + gap), max([*values, 1])
        points = " ".join(
            f"{left + each.cycle / last * width:.1f},{top + height * (1 - getattr(each, name) / most):.1f}"
            for each in samples
        )
        out += [
            f'<line x1="{left}" y1="{top + height}" x2="{left + width}" y2="{top + height}" stroke="#bbb"/>',
            f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="1"/>',
            f'<text x="4" y="{top + 12}">{most:.0f} {unit}</text>',
            f'<text x="4" y="{top + height}">0</text>',
        ]
    out.append(f'<text x="{left + width - 60}" y="{20 + len(rows) * (height + gap)}">{last} cycles</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="hack/soak-hibernate", description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=500, metavar="N", help="default: 500")
    parser.add_argument("--seconds", type=float, default=1e9, metavar="S", help="stop after so many seconds")
    parser.add_argument(
        "--kills", type=float, default=0.1, metavar="P", help="kills per cycle (default: 0.1)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw what is there after each cycle")
    args = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        take_own_machine(base, keep=[base, ROOT, *([args.picture.parent] if args.picture else [])])
        with adopting_orphans():
            found = soak(args, base)
    except HibernationError as error:
        print(f"soak-hibernate: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(base, ignore_errors=True)
    print(json.dumps({"seed": args.seed, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
