# SPDX-License-Identifier: Apache-2.0
"""The first step of the acceptance test: questions to this machine's driver, each with what it decides.

The answers are lines of JSON in OUT/probes.jsonl, so that a run that ends early has told the most.
docs/gpu/risks.md names the rows that wait for them.
"""

import contextlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hack.gpu import subjects
from hack.gpu.errors import LateError, StepError, in_words
from hack.gpu.journal import Found
from hack.gpu.starts import started
from hack.gpu.trial import Trial
from rekindle.cuda import search
from rekindle.cuda.backend import Backend
from rekindle.cuda.session import Session, holders
from rekindle.errors import CudaError
from rekindle.home import Home
from rekindle.node import gpu
from rekindle.run import end_group, run, spawn

_PROBE_SECONDS = 60.0
_NVML_ONLY = """
import ctypes, os, sys, time
nvml = ctypes.CDLL("libnvidia-ml.so.1")
assert nvml.nvmlInit_v2() == 0
open(sys.argv[1] + ".ready", "w").close()
while not os.path.exists(sys.argv[1] + ".go"): time.sleep(0.02)
nvml.nvmlShutdown()
open(sys.argv[1] + ".done", "w").close()
time.sleep(60)
"""
_INIT_ONLY = """
import ctypes, sys, time
assert ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
open(sys.argv[1] + ".ready", "w").close()
time.sleep(60)
"""
# The result and the seconds of a first question, before and after cuInit in the process that asks.
_CALLER = """
import ctypes, json, sys, time
cuda, state, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), {}
def ask(name):
    began = time.monotonic()
    status = cuda.cuCheckpointProcessGetState(int(sys.argv[1]), ctypes.byref(state))
    found[name] = [status, time.monotonic() - began]
ask("before cuInit")
began = time.monotonic()
found["cuInit"] = [cuda.cuInit(0), time.monotonic() - began]
ask("after cuInit")
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A question. `act` returns the answer in words and adds facts to the dictionary."""

    name: str
    decides: str
    act: Callable[[Trial, Found], str]


def probe(trial: Trial, found: Found) -> None:
    """Ask every question; fail if a server's state cannot be checkpointed and restored, as all else needs."""
    lines: list[Found] = []
    found["probes"] = lines
    for each in PROBES:
        facts: Found = {}
        began = time.monotonic()
        try:
            answer = each.act(trial, facts)
        except LateError:
            raise
        except Exception as error:
            answer = f"failed: {in_words(error)}"
        seconds = round(time.monotonic() - began, 3)
        lines.append(
            {
                "probe": each.name,
                "decides": each.decides,
                "answer": answer,
                "facts": facts,
                "seconds": seconds,
            }
        )
        trial.journal.results["probes"] = {
            **found,
            "status": "unfinished",
            "reason": "not all were asked",
            "seconds": 0.0,
        }
        trial.journal.write()
    if str(lines[-1]["answer"]).startswith("failed"):
        raise StepError(f"see dmesg: {lines[-1]['answer']}")


def _node(_: Trial, facts: Found) -> str:
    devices = gpu.probe()
    facts |= {
        "kernel": platform.release(),
        "driver": devices.driver,
        "problem": devices.problem,
        "without_persistence": gpu.without_persistence(),
        "free_bytes": gpu.free_bytes(),
        "devices": sorted(str(path) for path in Path("/dev").glob("nvidia*")),
    }
    with contextlib.suppress(OSError):
        facts["module"] = Path("/proc/driver/nvidia/version").read_text()
    return f"driver {devices.driver or 'none'}, {len(devices.gpus)} GPUs"


def _nvml_only(trial: Trial, facts: Found) -> str:
    with _process(trial, "nvml", _NVML_ONLY) as (pid, place):
        before = _devices(pid)
        place.with_name("nvml.go").touch()
        _wait(place.with_name("nvml.done").exists)
        facts |= {"before": before, "after": _devices(pid)}
    if not before:
        return "an initialized NVML holds no device: nothing to shut down"
    return "nvmlShutdown lets go of every device" if not facts["after"] else "nvmlShutdown keeps devices"


def _init_only(trial: Trial, facts: Found) -> str:
    with _process(trial, "init", _INIT_ONLY) as (pid, _), _backend(trial) as backend:
        facts["devices"] = _devices(pid)
        thread = backend.restore_thread(pid)
        facts["restore_thread"] = thread is not None
        if thread is None:
            return "cuInit alone starts no restore thread"
        try:
            backend.lock(pid, 10.0)
        except CudaError as error:
            facts["lock"] = error.cause
            return f"a process that has only called cuInit cannot be locked ({error.number})"
        backend.checkpoint(pid, timeout_seconds=_PROBE_SECONDS)
        facts["devices_checkpointed"] = _devices(pid)
        return "a process that has only called cuInit can be checkpointed"


def _caller(trial: Trial, facts: Found) -> str:
    import json

    with _process(trial, "init", _INIT_ONLY) as (pid, _):
        out = trial.lab.work / "caller.json"
        argv = [trial.options.python, "-c", _CALLER, str(pid)]
        done = run(argv, timeout=_PROBE_SECONDS, env=trial.lab.built(), stdout=out)
        if done.status:
            raise StepError(done.output[-500:])
        facts |= json.loads(out.read_bytes())
    status, seconds = facts["before cuInit"]
    return f"without cuInit, a question is answered with {status} after {seconds:.3f} s"


def _cycle(trial: Trial, facts: Found) -> str:
    """Checkpoint a live server and restore it, without CRIU."""
    subject, home = subjects.decoder(trial), Home(trial.lab.home)
    with (
        started(trial.lab, subject) as server,
        _backend(trial) as backend,
        home.work("acceptance") as work,
    ):
        pids = holders(backend, [server.pid])
        if not pids:
            raise StepError("the driver reports no CUDA state in the server")
        held = sum(gpu.memory_held(pids).values())
        before = _memory(pids[0])
        began = time.monotonic()
        session = Session(backend, pids, work / "cuda.json")
        session.checkpoint_all(_PROBE_SECONDS)
        facts["checkpoint_seconds"] = time.monotonic() - began
        after = _memory(pids[0])
        facts |= {
            "nvml_bytes": held,
            "moved_bytes": sum(after.values()) - sum(before.values()),
            "memory": {name: [before[name], after[name]] for name in before},
            "devices_checkpointed": _devices(pids[0]),
        }
        began = time.monotonic()
        session.restore_all({})
        facts["restore_seconds"] = time.monotonic() - began
        if not server.answers():
            raise StepError("the server does not answer after a checkpoint and a restore")
    missing = held - int(facts["moved_bytes"])
    open_devices = "no device" if not facts["devices_checkpointed"] else "devices"
    return f"of {held:,} bytes by NVML, {missing:,} are not moved; {open_devices} stayed open"


PROBES = (
    Probe(name="node", decides="which rows of docs/gpu/drivers.md apply", act=_node),
    Probe(
        name="nvml-only", decides="whether NVML must be shut down before a dump, and may be", act=_nvml_only
    ),
    Probe(name="init-only", decides="whether a process without a context must be left out", act=_init_only),
    Probe(name="caller", decides="whether calls need cuInit in the process that makes them", act=_caller),
    Probe(
        name="cycle",
        decides="the slack between NVML's bytes and the dump; whether devices are let go of; all other steps",
        act=_cycle,
    ),
)


@contextlib.contextmanager
def _process(trial: Trial, name: str, program: str) -> Iterator[tuple[int, Path]]:
    """Run a program in the server's Python until it is ready; kill it afterwards."""
    place = trial.lab.work / name
    for path in place.parent.glob(f"{name}.*"):
        path.unlink()
    log = trial.lab.log(f"probe-{name}")
    with open(log, "ab") as output:
        argv = [trial.options.python, "-c", program, str(place)]
        process = spawn(argv, env=trial.lab.built(), stdout=output.fileno(), stderr=output.fileno())
    try:
        ready = place.with_name(f"{name}.ready")
        _wait(lambda: ready.exists() or process.poll() is not None)
        if not ready.exists():
            raise StepError(log.read_text()[-500:])
        yield process.pid, place
    finally:
        end_group(process)


@contextlib.contextmanager
def _backend(trial: Trial) -> Iterator[Backend]:
    with contextlib.closing(search.find(Home(trial.lab.home))) as backend:
        yield backend


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PROBE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise StepError(f"not done after {_PROBE_SECONDS:.0f} s")
        time.sleep(0.02)


def _devices(pid: int) -> list[str]:
    """Return the NVIDIA devices that a process has open or mapped."""
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(descriptor.readlink()))
    found |= {line.split()[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
    return sorted(path for path in found if path.startswith("/dev/nvidia"))


def _memory(pid: int) -> dict[str, int]:
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in {"RssAnon:", "RssShmem:"}}
