# SPDX-License-Identifier: Apache-2.0
"""Start a server by its command or by `rekindle restore`, and time it from outside: from the start of the
command to the first token at a client."""

import contextlib
import functools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hack.gpu.errors import StepError
from rekindle.engine import Engine, Request
from rekindle.engine.client import Client, Response
from rekindle.errors import NotReadyError
from rekindle.fields import JSON
from rekindle.files import remove_tree
from rekindle.node import gpu
from rekindle.record import Oracle
from rekindle.run import end_group, run, spawn
from restore.rungs.cuda_state import HANGING_DRIVER

_POLL_SECONDS = 0.005
_ANSWER_SECONDS = 120.0
_AGAIN_SECONDS = 15.0  # for a server that has answered before
# A limit for commands; the deadline of a step is shorter.
LONG_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """The directories of a run. Every process that the run starts has `mark` in its environment; a restored
    process has it from its snapshot."""

    work: Path
    mark: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.work / "home"

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    def built(self, *more: Mapping[str, str]) -> dict[str, str]:
        """Return the environment for a command."""
        built = {**os.environ, **self.environment, "REKINDLE_HOME": str(self.home), MARK: self.mark}
        for each in more:
            built |= each
        return built

    def log(self, name: str) -> Path:
        """Return the file for the output of a command; commands of one name append to the same file."""
        return self.logs / f"{name}.log"


MARK = "REKINDLE_ACCEPTANCE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A server under test. `name` is also the name of its image; `options` are for `rekindle snapshot`.
    `own` says that it is hack/gpu/server.py, which has /facts and /count."""

    name: str
    command: Sequence[str]
    engine: Engine
    caches: Path
    environment: Mapping[str, str]
    options: Sequence[str] = ()
    own: bool = False


@dataclass(slots=True, kw_only=True)
class Started:
    """A server that answers. `request` is the oracle's and `answer` the first answer to it; `seconds` are
    from the start of the command to the first token. `report` is rekindle's; a start by the server's
    command has none."""

    subject: Subject
    client: Client
    request: Request
    pid: int
    seconds: float
    answer: JSON
    report: dict[str, Any] = field(default_factory=dict)

    def ask(self, path: str, body: JSON = None) -> Any:
        """Return the JSON at another path. Raises StepError for any status but 200."""
        method = "GET" if body is None else "POST"
        response = self.client.ask(
            Request(method=method, path=path, headers={}, body=body), timeout=_ANSWER_SECONDS
        )
        if response.status != 200:
            raise StepError(f"{path}: HTTP status {response.status}")
        return json.loads(response.body)

    def answers(self) -> bool:
        """Return whether the server still gives its first answer."""
        try:
            again = self.client.ask(self.request, timeout=_AGAIN_SECONDS)
        except (OSError, NotReadyError):
            return False
        return self.subject.engine.agree(self.answer, self.subject.engine.answer(again))


def rekindle(lab: Lab, words: Sequence[str], *more: Mapping[str, str], log: str = "rekindle") -> int:
    """Run a rekindle command; return its exit status."""
    env = lab.built(*more)
    argv = [sys.executable, "-m", "rekindle", *words]
    if words[0] == "snapshot":
        for name in env:  # the image is deleted with the run
            argv[4:4] = ["--allow-secret", name]
    done = run(argv, timeout=LONG_SECONDS, env=env)
    with open(lab.log(log), "a") as file:
        file.write(f"$ rekindle {' '.join(words)}\n{done.output}\n")
    return done.status


@contextlib.contextmanager
def started(lab: Lab, subject: Subject, *, empty_caches: bool = False) -> Iterator[Started]:
    """Run the server's command and wait for its first answer; end it afterwards. Raises StepError."""
    if empty_caches:
        remove_tree(subject.caches)
    subject.caches.mkdir(exist_ok=True)
    log = lab.log(subject.name)
    began = time.monotonic()
    with _running(subject.command, lab.built(subject.environment), log) as process:
        client = Client(subject.engine.endpoint, _connect)

        def ready() -> bool:
            with contextlib.suppress(OSError, NotReadyError):
                return subject.engine.ready(client, _ANSWER_SECONDS)
            return False

        _wait(ready, process.poll, log, "the server")
        request = subject.engine.authorize(subject.engine.oracle_request(client), os.environ)
        first = client.ask(request, timeout=_ANSWER_SECONDS)
        yield Started(
            subject=subject,
            client=client,
            request=request,
            pid=process.pid,
            seconds=first.first_byte - began,
            answer=subject.engine.answer(first),
        )


@contextlib.contextmanager
def restored(
    lab: Lab,
    subject: Subject,
    image: str,
    oracle: Oracle,
    outcome: str,
    *more: Mapping[str, str],
    options: Sequence[str] = (),
    kill: bool | None = None,
) -> Iterator[Started]:
    """Run `rekindle restore` in the environment of the snapshot and `more`, and wait for a client's answer to
    the recorded question. Afterwards, kill it if it restored the process, and terminate it if the server is
    its child, or if a kill could hang the machine (driver 590 or newer) and `kill` is not True. Raises
    StepError, also for any other outcome than `outcome`."""
    report, log = lab.work / "report.json", lab.log("restore")
    report.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "rekindle", "restore", image, "--report", str(report), *options]
    began = time.monotonic()
    if kill is None:
        kill = outcome == "restored" and not _may_hang()
    with _running(argv, lab.built(subject.environment, *more), log, kill=kill) as process:
        _wait(report.exists, process.poll, log, "rekindle restore")
        document = json.loads(report.read_bytes())
        if document["outcome"] != outcome:
            reasons = [reason for reason in document["reasons"] if reason["hard"]]
            raise StepError(f"the outcome was {document['outcome']}: {document['error'] or reasons}")
        client = Client(subject.engine.endpoint, _connect)
        request = subject.engine.authorize(oracle.request, os.environ)
        response: list[Response] = []

        def answered() -> bool:
            with contextlib.suppress(ConnectionError):
                response.append(client.ask(request, timeout=_ANSWER_SECONDS))
            return bool(response)

        _wait(answered, process.poll, log, "the published port")
        yield Started(
            subject=subject,
            client=client,
            request=request,
            pid=process.pid,
            seconds=response[0].first_byte - began,
            answer=subject.engine.answer(response[0]),
            report=document,
        )


def phases(started: Started) -> dict[str, float]:
    """Return the phases of rekindle's report, and the time that is left until the client's first token."""
    found = {phase["name"]: float(phase["seconds"]) for phase in started.report["phases"]}
    return {**found, "until the first token": max(0.0, started.seconds - sum(found.values()))}


def marked(lab: Lab) -> list[int]:
    """Return the PIDs of this run's processes, whoever their parents are now, without this process."""
    wanted = f"{MARK}={lab.mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@functools.cache
def _may_hang() -> bool:
    major = gpu.probe_nvidia().driver.partition(".")[0]
    return major.isdecimal() and int(major) >= HANGING_DRIVER


def _connect(host: str, port: int, timeout: float, source: str | None = None) -> socket.socket:
    return socket.create_connection((host, port), timeout, (source, 0) if source else None)


@contextlib.contextmanager
def _running(argv: Sequence[str], env: Mapping[str, str], log: Path, *, kill: bool = False) -> Iterator[Any]:
    with open(log, "ab") as output:
        output.write(f"$ {' '.join(argv)}\n".encode())
        output.flush()
        process = spawn(argv, env=env, stdout=output.fileno(), stderr=output.fileno())
    try:
        yield process
    finally:
        if kill:
            process.kill()
            process.wait()
        end_group(process)


def _wait(condition: Callable[[], bool], poll: Callable[[], int | None], log: Path, what: str) -> None:
    while not condition():
        status = poll()
        if status is not None and not condition():
            end = log.read_bytes()[-1500:].decode(errors="replace")
            raise StepError(f"{what} exited with status {status}: {end}")
        time.sleep(_POLL_SECONDS)
