# SPDX-License-Identifier: Apache-2.0
"""Starts of a server, by its command and by `rekindle restore`, timed from outside to the first token that a
client gets. For hack/gpu-acceptance."""

import contextlib
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
from rekindle.record import Oracle
from rekindle.run import end_group, run, spawn

_POLL_SECONDS = 0.005
_ANSWER_SECONDS = 120.0
_AGAIN_SECONDS = 15.0  # of a server that has answered before
# Nothing waits longer; a step's own deadline comes before.
LONG_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """Where everything of a run lies. Every process that it starts has the mark in its environment, and every
    restored one has it from its snapshot."""

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
        """The environment of a command."""
        built = {**os.environ, **self.environment, "REKINDLE_HOME": str(self.home), MARK: self.mark}
        for each in more:
            built |= each
        return built

    def log(self, name: str) -> Path:
        """A file for what a command prints; those of one name come one after the other."""
        return self.logs / f"{name}.log"


MARK = "REKINDLE_ACCEPTANCE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A server that is tried: `name` is its image's, `options` are what `rekindle snapshot` must be told.
    `own`: it is hack/gpu/server.py, which has /facts and /count."""

    name: str
    command: Sequence[str]
    engine: Engine
    caches: Path
    environment: Mapping[str, str]
    options: Sequence[str] = ()
    own: bool = False


@dataclass(slots=True, kw_only=True)
class Started:
    """A server that answers `request`. `seconds` are those from the start of its command to the first token
    that we got, `report` is rekindle's, of a server that it brought."""

    subject: Subject
    client: Client
    request: Request
    pid: int
    seconds: float
    answer: JSON
    report: dict[str, Any] = field(default_factory=dict)

    def ask(self, path: str, body: JSON = None) -> Any:
        """The answer to a question that is not the oracle's. Raises StepError if there is none."""
        method = "GET" if body is None else "POST"
        response = self.client.ask(
            Request(method=method, path=path, headers={}, body=body), timeout=_ANSWER_SECONDS
        )
        if response.status != 200:
            raise StepError(f"{path} was answered with status {response.status}")
        return json.loads(response.body)

    def answers(self) -> bool:
        """Whether it still gives the answer that it gave."""
        try:
            again = self.client.ask(self.request, timeout=_AGAIN_SECONDS)
        except (OSError, NotReadyError):
            return False
        return self.subject.engine.agree(self.answer, self.subject.engine.answer(again))


def rekindle(lab: Lab, words: Sequence[str], *more: Mapping[str, str], log: str = "rekindle") -> int:
    """Runs a command of rekindle's to its end; returns its status."""
    env = lab.built(*more)
    argv = [sys.executable, "-m", "rekindle", *words]
    if words[0] == "snapshot":
        for name in env:  # the image does not outlive the run
            argv[4:4] = ["--allow-secret", name]
    done = run(argv, timeout=LONG_SECONDS, env=env)
    with open(lab.log(log), "a") as file:
        file.write(f"$ rekindle {' '.join(words)}\n{done.output}\n")
    return done.status


@contextlib.contextmanager
def started(lab: Lab, subject: Subject, *, empty_caches: bool = False) -> Iterator[Started]:
    """The command as it is, until it answers; it is ended afterwards. Raises StepError."""
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
) -> Iterator[Started]:
    """`rekindle restore`, until a client has an answer to the recorded question; it is killed afterwards if
    it brought the process, and asked to end if its server is a child. Raises StepError, also for another
    outcome."""
    report, log = lab.work / "report.json", lab.log("restore")
    report.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "rekindle", "restore", image, "--report", str(report), *options]
    began = time.monotonic()
    with _running(argv, lab.built(*more), log, kill=outcome == "restored") as process:
        _wait(report.exists, process.poll, log, "rekindle restore")
        document = json.loads(report.read_bytes())
        if document["outcome"] != outcome:
            reasons = [reason for reason in document["reasons"] if reason["hard"]]
            raise StepError(f"the outcome is {document['outcome']}: {document['error'] or reasons}")
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
    """Those of rekindle's report, and the rest until our client had its first token."""
    found = {phase["name"]: float(phase["seconds"]) for phase in started.report["phases"]}
    return {**found, "until a client is answered": max(0.0, started.seconds - sum(found.values()))}


def marked(lab: Lab) -> list[int]:
    """Our processes that are still there, whoever their parents are now; not this one."""
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
            raise StepError(f"{what} ended with status {status}: {end}")
        time.sleep(_POLL_SECONDS)
