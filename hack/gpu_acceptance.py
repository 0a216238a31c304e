# SPDX-License-Identifier: Apache-2.0
"""What `rekindle` does with a GPU, shown on the machine that this runs on; see docs/gpu/README.md.

Every step can fail without ending the others, and ends at its deadline. The report is written anew after
each, so that what was done by then is there whatever comes.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_report
import gpu_rollback
from gpu_starts import (
    LONG_SECONDS,
    MARK,
    Lab,
    Started,
    StepError,
    Subject,
    free_port,
    marked,
    phases,
    rekindle,
    restored,
    started,
)

from oci import image as images
from oci.layout import Layout
from rekindle import __version__
from rekindle.cuda import search
from rekindle.cuda.door import Door
from rekindle.cuda.session import holders
from rekindle.engine.choose import for_command
from rekindle.errors import RekindleError
from rekindle.files import drop_from_page_cache, files_below, write_back
from rekindle.home import Home
from rekindle.node import gpu
from rekindle.node.fingerprint import Fingerprint
from rekindle.run import end_group, run, spawn

SCHEMA = "rekindle.gpu-acceptance/1"
ORACLE = {
    "method": "POST",
    "path": "/answer",
    "body": {"prompt": [11, 22, 33], "count": 16},
    "select": ["/tokens", "/checksum"],
}
_HERE = Path(__file__).parent
_LOG_BYTES = 40_000  # of each command's, in the file that goes with the report
_READ_BYTES = 16 << 20


Found = dict[str, Any]
"""What a step has found out, as JSON."""


class _LateError(Exception):
    """A deadline is over."""


class _SkippedError(Exception):
    """A step has nothing to do here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """`run` fills what goes into the report, so that there is something if it breaks off; `needs` is what
    must have been done before."""

    name: str
    seconds: float
    run: "Callable[[Acceptance, Found], None]"
    needs: tuple[str, ...] = ()


@dataclass(slots=True)
class Acceptance:
    """One run: what was asked for, and what came of it."""

    args: argparse.Namespace
    lab: Lab
    results: dict[str, Found] = field(default_factory=dict)

    # The server of our own.

    @property
    def server(self) -> list[str]:
        flags = ["--stand-in"] if self.args.stand_in else []
        return [self.args.python, str(_HERE / "gpu_server.py"), *flags]

    def subject(self) -> Subject:
        """Our server; it listens on the same port in every run with this work directory."""
        port, oracle = _kept(self.lab.work / "port", str(free_port())), self.lab.work / "oracle.json"
        oracle.write_text(json.dumps(ORACLE))
        command = [*self.server, "serve", port, "--gib", str(self.args.gib)]
        command += ["--quick"] if self.args.quick else []
        ready = f"http://127.0.0.1:{port}/health"
        caches = self.lab.work / "kernels"
        environment = {"TRITON_CACHE_DIR": str(caches / "triton"), "CUDA_CACHE_PATH": str(caches / "cuda")}
        return Subject(
            name="gpu",
            command=command,
            engine=for_command(command, ready_url=ready, oracle_file=oracle),
            caches=caches,
            environment=environment,
            options=["--ready-url", ready, "--oracle-request", str(oracle)],
        )

    # What several steps do.

    def starts(self, subject: Subject, runs: int, found: list[Found], *, empty: bool) -> None:
        for _ in range(runs):
            with started(self.lab, subject, empty_caches=empty) as server:
                one = {"seconds": server.seconds, "answer": server.answer}
                if subject.name == "gpu":
                    one["facts"] = server.ask("/facts")
                found.append(one)

    def snapshot(
        self, subject: Subject, image: str, options: Sequence[str], *more: Mapping[str, str]
    ) -> Found:
        report = self.lab.work / "snapshot.json"
        words = ["snapshot", image, "--report", str(report), *subject.options, *options]
        report.unlink(missing_ok=True)
        status = rekindle(
            self.lab, [*words, "--", *subject.command], subject.environment, *more, log="snapshot"
        )
        document = json.loads(report.read_bytes()) if report.exists() else {"error": f"status {status}"}
        if status != 0:
            raise StepError(f"the snapshot failed: {document['error']}")
        record = self.image(image).record
        return {
            "report": _less(document),
            "image_bytes": self.image(image).size_bytes,
            "dump_bytes": record.dump_bytes,
            "stored_bytes": record.stored_bytes,
            "cuda_pids": list(record.process.cuda_pids),
            "gpus": list(record.process.gpus),
            "threads": record.process.tasks,
            "command": list(record.command),
        }

    def restores(
        self,
        subject: Subject,
        image: str,
        runs: int,
        found: list[Found],
        *more: Mapping[str, str],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """The process, so many times, each after `kill -9` of the one before. Raises StepError for one that
        does not answer as was recorded, or leaves something behind."""
        oracle = self.image(image).record.oracle
        for _ in range(runs):
            before()
            with restored(self.lab, subject, image, oracle, "restored", *more) as server:
                if not subject.engine.agree(oracle.answer, server.answer):
                    raise StepError(f"it answers {server.answer}, and was recorded with {oracle.answer}")
                one = _measured(server)
                if subject.name == "gpu":
                    one["count"] = server.ask("/count", {})
                    if one["count"] != 1:
                        raise StepError(f"the counter in device memory is {one['count']}, and not 1")
                found.append(one)
            self.require_nothing_left()

    def require_nothing_left(self) -> None:
        deadline = time.monotonic() + 10
        while left := marked(self.lab):
            if time.monotonic() > deadline:
                raise StepError(f"processes are left after the server was killed: {left}")
            time.sleep(0.05)

    def image(self, name: str) -> images.Image:
        layout = Layout(Home(self.lab.home).store)
        return images.load(layout, layout.resolve(f"{name}:latest"))

    def dump(self, name: str) -> Path:
        """Where the dump lies that a restore reads."""
        found = [path for path in Home(self.lab.home).dumps.iterdir() if path.is_dir()]
        wanted = self.image(name).process.digest.rpartition(":")[2]
        return next(path for path in found if path.name.startswith(wanted))

    def doctored(self, image: str) -> str:
        """The same snapshot, as if it came from another GPU of the same capability: another record, and so
        another image, signed with a key of its own. Returns its name."""
        name, key = f"{image}-doctored", self.lab.work / "doctor.key"
        loaded = self.image(image)
        if not loaded.record.process.gpus:
            raise StepError("the record names no GPU that could be doctored")
        devices = loaded.record.node.devices
        others = tuple(dataclasses.replace(each, name=f"{each.name} (doctored)") for each in devices.gpus)
        node = dataclasses.replace(loaded.record.node, devices=dataclasses.replace(devices, gpus=others))
        record = dataclasses.replace(loaded.record, node=node)
        layout = Layout(Home(self.lab.home).store)
        built = images.build(layout, record, loaded.layers, loaded.cache)
        layout.publish(layout, built.index, f"{name}:latest")
        empty = {"COSIGN_PASSWORD": ""}
        prefix = str(key.with_suffix(""))
        if not key.exists() and rekindle(
            self.lab, ["generate-key-pair", "--output-key-prefix", prefix], empty
        ):
            raise StepError("no key could be made")
        if rekindle(self.lab, ["sign", name, "--sign-key", str(key)], empty):
            raise StepError("the doctored image could not be signed")
        return name

    def on_cache(self, subject: Subject, image: str, runs: int, found: Found) -> None:
        """The doctored snapshot: the kernel cache alone, on a node that has none, with its proof."""
        name, oracle = self.doctored(image), self.image(image).record.oracle
        found["runs"] = []
        options = ["--verify-key", str(self.lab.work / "doctor.pub")]
        aside = subject.caches.with_name(f"{subject.caches.name}-aside")
        for _ in range(runs):
            subject.caches.rename(aside)
            try:
                with restored(
                    self.lab, subject, name, oracle, "cache", subject.environment, options=options
                ) as server:
                    agrees = subject.engine.agree(oracle.answer, server.answer)
                    proof, reasons = server.report["cache"], server.report["reasons"]
                    found["runs"].append({**_measured(server), "agrees": agrees, "proof": proof})
                    found["reasons"] = [reason for reason in reasons if reason["hard"]]
            finally:
                shutil.rmtree(subject.caches, ignore_errors=True)
                aside.rename(subject.caches)
            if not proof or not proof["used"]:
                raise StepError(f"no entry of the kernel cache was used: {proof}")


# The steps.


def machine(run_: Acceptance, found: Found) -> None:
    """What this machine is. Nothing here can be wrong."""
    devices = gpu.probe()
    node = Fingerprint.probe(run_.server, os.environ)
    with open("/proc/meminfo") as file:
        memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    found |= {
        "gpus": [
            {"name": each.name, "arch": each.arch, "memory_bytes": each.memory_bytes} for each in devices.gpus
        ],
        "driver": devices.driver,
        "cuda": devices.cuda,
        "lack": devices.lack,
        "mps": devices.mps,
        "processor": node.cpu_model,
        "cores": os.cpu_count(),
        "memory_bytes": memory["MemTotal"],
        "available_bytes": memory["MemAvailable"],
        "disk_free_bytes": shutil.disk_usage(run_.lab.work).free,
        "kernel": platform.release(),
        "packages": dict(node.packages),
        "python": platform.python_version(),
        "rekindle": __version__,
    }


def doctor(run_: Acceptance, found: Found) -> None:
    out = run_.lab.work / "doctor.json"
    argv = [sys.executable, "-m", "rekindle", "doctor", "--json"]
    done = run(argv, timeout=LONG_SECONDS, env=run_.lab.built(), stdout=out)
    try:
        found["checks"] = json.loads(out.read_bytes())["checks"]
    except ValueError:
        raise StepError(f"rekindle doctor ended with status {done.status}: {done.output[-1000:]}") from None
    lacks = [check for check in found["checks"] if check["needed"] and not check["ok"]]
    if lacks:
        raise StepError("; ".join(f"{check['name']}: {check['detail']}" for check in lacks))


def cold(run_: Acceptance, found: Found) -> None:
    subject = run_.subject()
    found |= {"cold": [], "warm": []}
    run_.starts(subject, run_.args.cold_runs, found["cold"], empty=True)
    run_.starts(subject, run_.args.cold_runs, found["warm"], empty=False)
    answers = {json.dumps(one["answer"]) for one in (*found["cold"], *found["warm"])}
    if len(answers) > 1:
        raise StepError(f"starts of the same server give {len(answers)} answers")


def snapshot(run_: Acceptance, found: Found) -> None:
    subject = run_.subject()
    found |= run_.snapshot(subject, subject.name, [])
    if not found["cuda_pids"]:
        raise StepError("the snapshot holds no CUDA state")


def restore(run_: Acceptance, found: Found) -> None:
    subject = run_.subject()
    found["runs"] = []
    run_.restores(subject, subject.name, run_.args.runs, found["runs"])


def floor(run_: Acceptance, found: Found) -> None:
    """What can be copied a second: the floor of a restore is its bytes at these rates."""
    dump = run_.dump("gpu")
    write_back(dump)
    drop_from_page_cache(dump)
    found["dump_bytes"], from_disk = _read_all(dump)
    found["disk_rate"] = found["dump_bytes"] / from_disk
    found["page_cache_rate"] = found["dump_bytes"] / _read_all(dump)[1]
    starts = run_.results.get("cold", {}).get("cold") or [{}]
    found["held_bytes"] = starts[0].get("facts", {}).get("held_bytes", 0)
    out = run_.lab.work / "rates.json"
    done = run([*run_.server, "rates"], timeout=LONG_SECONDS, env=run_.lab.built(), stdout=out)
    if done.status:
        raise StepError(f"the copy rates could not be measured: {done.output[-1000:]}")
    found["device"] = json.loads(out.read_bytes())


def rollback(run_: Acceptance, found: Found) -> None:
    """Each failure, after which the server must answer as before."""
    subject, home = run_.subject(), Home(run_.lab.home)
    waiting = list(gpu_rollback.CASES)
    found["cases"] = []
    with contextlib.closing(search.find(home)) as door:
        found["door"] = door.name
        while waiting:
            with started(run_.lab, subject) as server, home.work("acceptance") as work:
                pids = _holders(door, server)
                while waiting:
                    case = _rolled_back(waiting.pop(0), door, pids, server, work / gpu_rollback.JOURNAL)
                    found["cases"].append(case)
                    if not case["answers"]:
                        break  # the next ones need a server that does
    found["cases"].append(_killed_and_repaired(run_, subject))
    lost = [case["name"] for case in found["cases"] if not (case["answers"] and case["failed"])]
    if lost:
        raise StepError("; ".join(lost))


def _rolled_back(
    case: gpu_rollback.Case, door: Door, pids: list[int], server: Started, journal: Path
) -> Found:
    if case.busy_seconds:
        server.ask("/busy", {"seconds": case.busy_seconds})
    began = time.monotonic()
    told = gpu_rollback.fail(case, door, pids, journal)
    seconds = time.monotonic() - began
    try:
        states = [str(door.state(pid)) for pid in pids]
    except RekindleError as error:
        states = [_in_words(error)]
    answers = server.answers()
    time.sleep(max(0.0, began + case.busy_seconds - time.monotonic()))
    return {
        "name": case.name,
        "failed": case.told in told and bool(told),
        "told": told,
        "seconds": seconds,
        "states": states,
        "answers": answers,
    }


def _killed_and_repaired(run_: Acceptance, subject: Subject) -> Found:
    with started(run_.lab, subject) as server:
        log = run_.lab.log("hold")
        argv = [sys.executable, str(_HERE / "gpu_rollback.py"), str(server.pid), str(run_.lab.home)]
        with open(log, "wb") as output:
            process = spawn(argv, env=run_.lab.built(), stdout=output.fileno(), stderr=output.fileno())
        try:
            while b"locked" not in log.read_bytes():
                if process.poll() is not None:
                    raise StepError(f"the process could not be locked: {log.read_text()[-1000:]}")
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
        began = time.monotonic()
        out = run_.lab.work / "doctor.json"
        argv = [sys.executable, "-m", "rekindle", "doctor", "--repair", "--check", "root", "--json"]
        done = run(argv, timeout=LONG_SECONDS, env=run_.lab.built(), stdout=out)
        repaired = json.loads(out.read_bytes())["repaired"] if done.status == 0 else []
        return {
            "name": "rekindle is killed between lock and checkpoint; `rekindle doctor --repair`",
            "failed": True,
            "told": "; ".join(repaired) or done.output[-500:],
            "seconds": time.monotonic() - began,
            "states": [],
            "answers": server.answers(),
        }


def cache(run_: Acceptance, found: Found) -> None:
    subject = run_.subject()
    run_.on_cache(subject, subject.name, run_.args.few, found)


def doors(run_: Acceptance, found: Found) -> None:
    """Each door for itself: the driver's steps one by one, a snapshot, and restores."""
    subject = run_.subject()
    found["doors"] = {"driver": {}, "utility": {}}
    for name, one in found["doors"].items():
        try:
            _through(run_, subject, name, one)
        except (RekindleError, StepError) as error:
            one["lack"] = _in_words(error)
    lacks = [f"{name}: {one['lack']}" for name, one in found["doors"].items() if "lack" in one]
    if lacks:
        raise StepError("; ".join(lacks))


def _through(run_: Acceptance, subject: Subject, name: str, found: Found) -> None:
    only = {"REKINDLE_CUDA_DOOR": name}
    home = Home(run_.lab.home)
    found |= {"cycles": [], "runs": []}
    with started(run_.lab, subject) as server, _environment(only):
        began = time.monotonic()
        with contextlib.closing(search.find(home)) as door, home.work("acceptance") as work:
            pids = _holders(door, server)
            found["open_seconds"] = time.monotonic() - began
            for _ in range(run_.args.few):
                watched = gpu_rollback.Watched(door)
                gpu_rollback.cycle(watched, pids, work / gpu_rollback.JOURNAL)
                found["cycles"].append(watched.seconds)
                if not server.answers():
                    raise StepError("after a checkpoint and a restore the server does not answer")
    found["snapshot"] = run_.snapshot(subject, f"gpu-{name}", ["--no-prove"], only)
    run_.restores(subject, f"gpu-{name}", run_.args.few, found["runs"], only)


def load(run_: Acceptance, found: Found) -> None:
    """Restores while somebody else uses half of the processors, and the GPU."""
    subject = run_.subject()
    begun, until = run_.lab.work / "load-began", run_.lab.work / "load-ends"
    for path in (begun, until):
        path.unlink(missing_ok=True)
    # It is no restored server, so that it has a mark of its own.
    other = dataclasses.replace(run_.lab, mark=f"{run_.lab.mark}-load")
    log = run_.lab.log("load")
    with open(log, "ab") as output:
        argv = [*run_.server, "load", str(begun), str(until)]
        process = spawn(argv, env=other.built(), stdout=output.fileno(), stderr=output.fileno())
    try:
        while not begun.exists():
            if process.poll() is not None:
                raise StepError(f"the load ended: {log.read_text()[-1000:]}")
            time.sleep(0.05)
        found["runs"] = []
        run_.restores(subject, subject.name, run_.args.few, found["runs"])
    finally:
        until.touch()
        end_group(process)


def uncached(run_: Acceptance, found: Found) -> None:
    """Restores of a dump that is on the disk only."""
    subject, dump = run_.subject(), run_.dump("gpu")
    write_back(dump)
    found["runs"] = []
    run_.restores(
        subject, subject.name, run_.args.few, found["runs"], before=lambda: drop_from_page_cache(dump)
    )


def vllm(run_: Acceptance, found: Found) -> None:
    """The same with real vLLM, where the server's Python has it."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if run([run_.args.python, "-c", look], timeout=60).status:
        raise _SkippedError("the server's Python has no vLLM")
    subject = _vllm_subject(run_)
    found |= {"command": subject.command, "cold": [], "warm": [], "runs": [], "cache": {}}
    run_.starts(subject, 1, found["cold"], empty=True)
    run_.starts(subject, 1, found["warm"], empty=False)
    found["snapshot"] = run_.snapshot(subject, subject.name, [])
    run_.restores(subject, subject.name, run_.args.runs, found["runs"])
    run_.on_cache(subject, subject.name, 1, found["cache"])


def _vllm_subject(run_: Acceptance) -> Subject:
    python, model = run_.args.python, run_.args.vllm_model
    if model is None:
        model = run_.lab.work / "model"
        if not model.exists():
            made = run([python, str(_HERE / "tiny_model.py"), str(model)], timeout=LONG_SECONDS)
            if made.status:
                raise StepError(f"no model could be made: {made.output[-1000:]}")
    script = Path(python).with_name("vllm")
    program = [str(script)] if script.exists() else [python, "-m", "vllm.entrypoints.cli.main"]
    options = ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(free_port())]
    options += ["--max-model-len", "512", "--gpu-memory-utilization", "0.2"]
    command = [*program, "serve", str(model), *options]
    engine = for_command(command)
    caches = run_.lab.work / "vllm-kernels"
    environment = {**engine.environment(), **engine.cache_environment(caches), "HF_HUB_OFFLINE": "1"}
    return Subject(name="vllm", command=command, engine=engine, caches=caches, environment=environment)


# In the order of what they are worth, since time may run out.
STEPS = (
    Step(name="machine", seconds=30, run=machine),
    Step(name="doctor", seconds=120, run=doctor),
    Step(name="cold", seconds=300, run=cold),
    Step(name="snapshot", seconds=400, run=snapshot),
    Step(name="restore", seconds=400, run=restore, needs=("snapshot",)),
    Step(name="rollback", seconds=240, run=rollback),
    Step(name="cache", seconds=240, run=cache, needs=("snapshot",)),
    Step(name="floor", seconds=90, run=floor, needs=("snapshot",)),
    Step(name="doors", seconds=400, run=doors, needs=("snapshot",)),
    Step(name="load", seconds=150, run=load, needs=("snapshot",)),
    Step(name="uncached", seconds=150, run=uncached, needs=("snapshot",)),
    Step(name="vllm", seconds=1500, run=vllm),
)


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, _end)
    with contextlib.ExitStack() as stack:
        kept = args.work is not None
        base = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_large_disk())))
        work = base.absolute()
        for directory in (work, work / "home", work / "logs", args.out):
            directory.mkdir(parents=True, exist_ok=True)
        lab = Lab(work=work, mark=_kept(work / "mark", os.urandom(8).hex()))
        acceptance = Acceptance(args, lab)
        stack.callback(_end_all, lab)
        os.environ[MARK] = lab.mark  # of what the kernel of rekindle starts within this process
        known = work / "results.json"
        if kept and known.exists():
            acceptance.results = json.loads(known.read_bytes())
        deadline = time.monotonic() + args.deadline
        _write(acceptance, known)
        for step in _chosen(args, acceptance.results):
            acceptance.results[step.name] = _do(acceptance, step, deadline)
            _write(acceptance, known)
    wrong = [name for name, result in acceptance.results.items() if result["status"] == "failed"]
    print(f"gpu-acceptance: {args.out / 'report.md'}" + (f"; failed: {', '.join(wrong)}" if wrong else ""))
    return 1 if wrong else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-acceptance", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="where report.md, report.json and log.txt go")
    parser.add_argument("--quick", action="store_true", help="little memory, few runs")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=[step.name for step in STEPS],
        metavar="STEP",
        help="this step, and what it needs: " + ", ".join(step.name for step in STEPS),
    )
    parser.add_argument("--gib", type=float, help="GiB of weights on the device (4, quick: 1)")
    parser.add_argument("--runs", type=int, help="restores (10, quick: 3)")
    parser.add_argument("--deadline", type=float, default=1500.0, metavar="S", help="for all (1500)")
    parser.add_argument("--work", type=Path, help="keep everything here, and go on where it ended")
    parser.add_argument(
        "--python",
        default=os.environ.get("SERVER_PYTHON") or shutil.which("python3"),
        help="the server's, which has torch and Triton ($SERVER_PYTHON, python3)",
    )
    parser.add_argument("--vllm-model", type=Path, metavar="DIR", help="instead of a tiny one made here")
    parser.add_argument(
        "--stand-in", action="store_true", help="against the tests' fake driver, without torch"
    )
    args = parser.parse_args()
    args.gib = args.gib or (1.0 if args.quick else 4.0)
    args.runs = args.runs or (3 if args.quick else 10)
    args.few = 1 if args.quick else 3
    args.cold_runs = 1 if args.quick else 2
    return args


def _chosen(args: argparse.Namespace, known: Mapping[str, Any]) -> list[Step]:
    """The steps to do: all that are not done yet, or those that were asked for and what they need."""
    done = {name for name, result in known.items() if result["status"] == "done"}
    if not args.only:
        return [step for step in STEPS if step.name not in done]
    wanted = {"machine", *args.only}
    needed = {name for step in STEPS if step.name in wanted for name in step.needs}
    return [s for s in STEPS if s.name in wanted or (s.name in needed and s.name not in done)]


def _do(acceptance: Acceptance, step: Step, deadline: float) -> Found:
    """One step, with its end: `done`, `failed` or `skipped`, the reason and the seconds."""
    lost = [name for name in step.needs if acceptance.results.get(name, {}).get("status") != "done"]
    if lost:
        return {"status": "skipped", "reason": f"it needs {', '.join(lost)}", "seconds": 0.0}
    left = deadline - time.monotonic()
    if left < 1:
        return {"status": "skipped", "reason": "there was no time left", "seconds": 0.0}
    _say(f"{step.name} …")
    began = time.monotonic()
    found: Found = {}
    status, reason = "done", ""
    try:
        with _at_most(min(step.seconds, left)):
            step.run(acceptance, found)
    except _SkippedError as error:
        status, reason = "skipped", str(error)
    except Exception as error:
        status, reason = "failed", _in_words(error)
        with open(acceptance.lab.log("failures"), "a") as file:
            file.write(f"{step.name}:\n{traceback.format_exc()}\n")
    _end_all(acceptance.lab)
    seconds = time.monotonic() - began
    _say(f"{step.name} {status} after {seconds:.1f} s {reason[:300]}")
    return {**found, "status": status, "reason": reason, "seconds": seconds}


def _write(acceptance: Acceptance, known: Path) -> None:
    """The report as it stands."""
    out, args, lab = acceptance.args.out, acceptance.args, acceptance.lab
    options = {"gib": args.gib, "runs": args.runs, "quick": args.quick, "stand_in": args.stand_in}
    document = {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "options": options,
        "steps": {
            step.name: acceptance.results.get(
                step.name, {"status": "skipped", "reason": "not asked for, or not yet", "seconds": 0.0}
            )
            for step in STEPS
        },
    }
    known.write_text(json.dumps(acceptance.results))
    text = json.dumps(document, indent=1) + "\n"
    # Where things lay is of no interest to those who read it elsewhere.
    for path, name in ((lab.work, "WORK"), (_HERE.parent, "REKINDLE"), (Path.home(), "~")):
        text = text.replace(json.dumps(str(path))[1:-1], name)
    (out / "report.json").write_text(text)
    (out / "report.md").write_text(gpu_report.render(json.loads(text)))
    with open(out / "log.txt", "wb") as file:
        for log in sorted(lab.logs.iterdir()):
            file.write(f"==== {log.name}\n".encode() + log.read_bytes()[-_LOG_BYTES:] + b"\n")


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise _LateError(f"it was not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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


def _kept(path: Path, text: str) -> str:
    """What an earlier run with this work directory wrote, or else the text, for later ones."""
    if not path.exists():
        path.write_text(text)
    return path.read_text()


def _end(signum: int, _: object) -> None:
    raise SystemExit(128 + signum)


def _end_all(lab: Lab) -> None:
    """Nothing that was started here is left running."""
    for pid in marked(lab):
        _say(f"ending {pid}, which was left")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _holders(door: Door, server: Started) -> list[int]:
    found = holders(door, [server.pid])
    if not found:
        raise StepError("the server holds no CUDA, says the driver")
    return found


def _measured(server: Started) -> Found:
    first = server.report["first_token_seconds"]
    return {"seconds": server.seconds, "first_token_seconds": first, "phases": phases(server)}


def _less(document: Found) -> Found:
    return {name: document[name] for name in ("phases", "seconds", "bytes", "peak_rss_bytes", "oracle")}


def _in_words(error: Exception) -> str:
    if isinstance(error, RekindleError):
        return f"{error.message}: {error.cause}" if error.cause else error.message
    return str(error) if isinstance(error, (StepError, _LateError)) else f"{type(error).__name__}: {error}"


def _read_all(directory: Path) -> tuple[int, float]:
    """Reads every file once, one after the other: bytes, seconds."""
    buffer = bytearray(_READ_BYTES)
    total, began = 0, time.monotonic()
    for path in files_below(directory):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total, max(time.monotonic() - began, 1e-6)


def _large_disk() -> str | None:
    """Dumps have gigabytes, and /tmp may be in memory."""
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else None  # noqa: S108


def _say(text: str) -> None:
    print(f"gpu-acceptance: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
