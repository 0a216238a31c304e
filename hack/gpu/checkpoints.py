# SPDX-License-Identifier: Apache-2.0
"""Steps of the acceptance test that checkpoint a live server through the driver, without CRIU."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from hack.gpu import measure, rollback, subjects
from hack.gpu.errors import StepError, in_words
from hack.gpu.journal import Found
from hack.gpu.starts import LONG_SECONDS, Lab, Started, Subject, started
from hack.gpu.trial import Trial
from rekindle.cuda import search
from rekindle.cuda.backend import Backend
from rekindle.cuda.session import holders
from rekindle.errors import CapabilityError, RekindleError
from rekindle.home import Home
from rekindle.run import run, spawn


def roll_back(trial: Trial, found: Found) -> None:
    """Provoke every failure in turn; the server must answer as before after each."""
    subject, home = subjects.decoder(trial), Home(trial.lab.home)
    waiting = list(rollback.CASES)
    found["cases"] = []
    with contextlib.closing(search.find(home)) as backend:
        found["backend"] = backend.name
        while waiting:
            with started(trial.lab, subject) as server, home.work("acceptance") as work:
                pids = _holders(backend, server)
                while waiting:
                    case = _provoke(waiting.pop(0), backend, pids, server, work / rollback.JOURNAL)
                    found["cases"].append(case)
                    if not case["answers"]:
                        break  # the other cases need a server that answers
    found["cases"].append(_kill_and_repair(trial.lab, subject))
    lost = [case["name"] for case in found["cases"] if not (case["answers"] and case["failed"])]
    if lost:
        raise StepError("; ".join(lost))


def _provoke(case: rollback.Case, backend: Backend, pids: list[int], server: Started, journal: Path) -> Found:
    if case.busy_seconds:
        server.ask("/busy", {"seconds": case.busy_seconds})
    began = time.monotonic()
    message = rollback.provoke(case, backend, pids, journal)
    seconds = time.monotonic() - began
    try:
        states = [str(backend.state(pid)) for pid in pids]
    except RekindleError as error:
        states = [in_words(error)]
    answers = server.answers()
    time.sleep(max(0.0, began + case.busy_seconds - time.monotonic()))
    return {
        "name": case.name,
        "failed": bool(message) and case.expected in message,
        "message": message,
        "seconds": seconds,
        "states": states,
        "answers": answers,
    }


def _kill_and_repair(lab: Lab, subject: Subject) -> Found:
    with started(lab, subject) as server:
        log = lab.log("hold")
        argv = [sys.executable, "-m", "hack.gpu.rollback", str(server.pid), str(lab.home)]
        with open(log, "wb") as output:
            process = spawn(argv, env=lab.built(), stdout=output.fileno(), stderr=output.fileno())
        try:
            while b"locked" not in log.read_bytes():
                if process.poll() is not None:
                    raise StepError(f"could not lock the process: {log.read_text()[-1000:]}")
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
        began = time.monotonic()
        out = lab.work / "doctor.json"
        argv = [sys.executable, "-m", "rekindle", "doctor", "--repair", "--check", "root", "--json"]
        done = run(argv, timeout=LONG_SECONDS, env=lab.built(), stdout=out)
        repaired = json.loads(out.read_bytes())["repaired"] if done.status == 0 else []
        return {
            "name": "rekindle is killed between lock and checkpoint, then `rekindle doctor --repair`",
            "failed": True,
            "message": "; ".join(repaired) or done.output[-500:],
            "seconds": time.monotonic() - began,
            "states": [],
            "answers": server.answers(),
        }


def try_backends(trial: Trial, found: Found) -> None:
    """Use each backend alone: checkpoint a live server, take a snapshot, time restores."""
    subject = subjects.decoder(trial)
    found["backends"] = {"driver": {}, "utility": {}}
    for name, one in found["backends"].items():
        try:
            _try_backend(trial, subject, name, one)
        except CapabilityError as error:  # this machine has no such backend
            one["missing"] = in_words(error)
        except (RekindleError, StepError) as error:
            one["problem"] = in_words(error)
    if all("missing" in one for one in found["backends"].values()):
        raise StepError("; ".join(one["missing"] for one in found["backends"].values()))
    problems = [f"{name}: {one['problem']}" for name, one in found["backends"].items() if "problem" in one]
    if problems:
        raise StepError("; ".join(problems))


def _try_backend(trial: Trial, subject: Subject, name: str, found: Found) -> None:
    only = {"REKINDLE_CUDA_BACKEND": name}
    home = Home(trial.lab.home)
    found |= {"cycles": [], "runs": []}
    with started(trial.lab, subject) as server, _environment(only):
        began = time.monotonic()
        with contextlib.closing(search.find(home)) as backend, home.work("acceptance") as work:
            pids = _holders(backend, server)
            found["open_seconds"] = time.monotonic() - began
            for _ in range(trial.options.few):
                watched = rollback.Watched(backend)
                rollback.cycle(watched, pids, work / rollback.JOURNAL)
                found["cycles"].append(watched.seconds)
                if not server.answers():
                    raise StepError("the server does not answer after a checkpoint and a restore")
    found["snapshot"] = measure.snapshot(trial.lab, subject, f"gpu-{name}", ["--no-prove"], only)
    measure.restores(trial.lab, subject, f"gpu-{name}", trial.options.few, found["runs"], only)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _holders(backend: Backend, server: Started) -> list[int]:
    found = holders(backend, [server.pid])
    if not found:
        raise StepError("the driver reports no CUDA state in the server")
    return found
