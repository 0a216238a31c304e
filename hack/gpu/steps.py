# SPDX-License-Identifier: Apache-2.0
"""The steps of the acceptance test, most valuable first, since time may run out."""

import dataclasses
import functools
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from hack.gpu import checkpoints, measure, probes, subjects
from hack.gpu.errors import SkippedError, StepError
from hack.gpu.features import FEATURES
from hack.gpu.journal import Found
from hack.gpu.starts import LONG_SECONDS
from hack.gpu.trial import Trial
from rekindle import __version__
from rekindle.files import drop_from_page_cache, files_below, write_back
from rekindle.node import gpu
from rekindle.node.fingerprint import Fingerprint
from rekindle.run import end_group, run, spawn

_READ_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceStep:
    """A step and its deadline. `act` fills the dictionary that goes into the report, so that a failed step
    also reports what it found before. `needs` names the steps that must be done first. One that is `asked`
    runs only if it is named."""

    name: str
    seconds: float
    act: Callable[[Trial, Found], None]
    needs: tuple[str, ...] = ()
    asked: bool = False


def describe_machine(trial: Trial, found: Found) -> None:
    """Describe this machine. There is nothing to fail."""
    devices = gpu.probe()
    node = Fingerprint.probe(subjects.server(trial.options), os.environ)
    memory = psutil.virtual_memory()
    found |= {
        "gpus": [
            {"name": each.name, "arch": each.arch, "memory_bytes": each.memory_bytes} for each in devices.gpus
        ],
        "driver": devices.driver,
        "cuda": devices.cuda,
        "problem": devices.problem,
        "mps": devices.mps,
        "processor": node.cpu_model,
        "cores": os.cpu_count(),
        "memory_bytes": memory.total,
        "available_bytes": memory.available,
        "disk_free_bytes": shutil.disk_usage(trial.lab.work).free,
        "kernel": platform.release(),
        "packages": dict(node.packages),
        "python": platform.python_version(),
        "rekindle": __version__,
    }


def run_doctor(trial: Trial, found: Found) -> None:
    """Run `rekindle doctor`; fail if something that rekindle needs is missing."""
    out = trial.lab.work / "doctor.json"
    argv = [sys.executable, "-m", "rekindle", "doctor", "--json"]
    done = run(argv, timeout=LONG_SECONDS, env=trial.lab.built(), stdout=out)
    try:
        found["checks"] = json.loads(out.read_bytes())["checks"]
    except ValueError:
        raise StepError(f"rekindle doctor exited with status {done.status}: {done.output[-1000:]}") from None
    missing = [check for check in found["checks"] if check["needed"] and not check["ok"]]
    if missing:
        raise StepError("; ".join(f"{check['name']}: {check['detail']}" for check in missing))


def start(trial: Trial, found: Found) -> None:
    """Time starts of the decoder with empty and with warm kernel caches; all must give one answer."""
    subject = subjects.decoder(trial)
    found |= {"cold": [], "warm": []}
    measure.starts(trial.lab, subject, trial.options.cold_runs, found["cold"], empty_caches=True)
    measure.starts(trial.lab, subject, trial.options.cold_runs, found["warm"], empty_caches=False)
    answers = {json.dumps(one["answer"]) for one in (*found["cold"], *found["warm"])}
    if len(answers) > 1:
        raise StepError(f"the same server gave {len(answers)} different answers")


def take_snapshot(trial: Trial, found: Found) -> None:
    """Take the snapshot that later steps restore; it must hold CUDA state."""
    subject = subjects.decoder(trial)
    found |= measure.snapshot(trial.lab, subject, subject.name, [])
    if not found["cuda_pids"]:
        raise StepError("the snapshot holds no CUDA state")


def restore(trial: Trial, found: Found) -> None:
    """Time restores of the process: the main figure."""
    subject = subjects.decoder(trial)
    found["runs"] = []
    measure.restores(trial.lab, subject, subject.name, trial.options.runs, found["runs"])


def measure_floor(trial: Trial, found: Found) -> None:
    """Measure copy rates. A restore takes at least as long as its bytes at these rates."""
    dump = measure.dump(trial.lab, "gpu")
    write_back(dump)
    drop_from_page_cache(dump)
    found["dump_bytes"], from_disk = _read_all(dump)
    found["disk_rate"] = found["dump_bytes"] / from_disk
    found["page_cache_rate"] = found["dump_bytes"] / _read_all(dump)[1]
    starts = trial.journal.results.get("cold", {}).get("cold") or [{}]
    found["held_bytes"] = starts[0].get("facts", {}).get("held_bytes", 0)
    out = trial.lab.work / "rates.json"
    argv = subjects.server(trial.options, "rates")
    done = run(argv, timeout=LONG_SECONDS, env=trial.lab.built(), stdout=out)
    if done.status:
        raise StepError(f"could not measure copy rates: {done.output[-1000:]}")
    found["device"] = json.loads(out.read_bytes())


def start_on_cache(trial: Trial, found: Found) -> None:
    """Time starts on the kernel cache of an image whose process cannot be restored here."""
    subject = subjects.decoder(trial)
    measure.cache_starts(trial.lab, subject, subject.name, trial.options.few, found)


def restore_beside_load(trial: Trial, found: Found) -> None:
    """Time restores while another process uses the GPU and half of the processors."""
    subject = subjects.decoder(trial)
    begun, until = trial.lab.work / "load-began", trial.lab.work / "load-ends"
    for path in (begun, until):
        path.unlink(missing_ok=True)
    # A mark of its own: this process must not count as left over from a restored server.
    other = dataclasses.replace(trial.lab, mark=f"{trial.lab.mark}-load")
    log = trial.lab.log("load")
    with open(log, "ab") as output:
        argv = subjects.server(trial.options, "load", str(begun), str(until))
        process = spawn(argv, env=other.built(), stdout=output.fileno(), stderr=output.fileno())
    try:
        while not begun.exists():
            if process.poll() is not None:
                raise StepError(f"the load exited: {log.read_text()[-1000:]}")
            time.sleep(0.05)
        found["runs"] = []
        measure.restores(trial.lab, subject, subject.name, trial.options.few, found["runs"])
    finally:
        until.touch()
        end_group(process)


def restore_uncached(trial: Trial, found: Found) -> None:
    """Time restores of a dump that is not in the page cache."""
    subject, dump = subjects.decoder(trial), measure.dump(trial.lab, "gpu")
    write_back(dump)
    found["runs"] = []

    def forget() -> None:
        drop_from_page_cache(dump)

    runs = trial.options.few
    measure.restores(trial.lab, subject, subject.name, runs, found["runs"], before=forget)


def compare_memory(trial: Trial, found: Found) -> None:
    """Time restores with memory mapped and copied, from the page cache and without: does the driver read what
    is mapped at the rate of the page cache?"""
    subject, dump = subjects.decoder(trial), measure.dump(trial.lab, "gpu")
    write_back(dump)
    found["runs"] = {}
    for memory in ("map", "copy"):
        found["runs"][memory] = {"cached": [], "uncached": []}
        for cache, runs in found["runs"][memory].items():
            measure.restores(
                trial.lab,
                subject,
                subject.name,
                trial.options.few,
                runs,
                before=(lambda: drop_from_page_cache(dump)) if cache == "uncached" else lambda: None,
                options=["--memory", memory],
            )


def start_vllm(trial: Trial, found: Found) -> None:
    """Time starts of vLLM, if the server's Python has it."""
    subject = subjects.vllm(trial)
    found |= {"command": subject.command, "cold": [], "warm": []}
    measure.starts(trial.lab, subject, 1, found["cold"], empty_caches=True)
    measure.starts(trial.lab, subject, 1, found["warm"], empty_caches=False)


def take_vllm_snapshot(trial: Trial, found: Found) -> None:
    subject = subjects.vllm(trial)
    found["snapshot"] = measure.snapshot(trial.lab, subject, subject.name, [])


def restore_vllm(trial: Trial, found: Found) -> None:
    subject = subjects.vllm(trial)
    found["runs"] = []
    measure.restores(trial.lab, subject, subject.name, trial.options.runs, found["runs"])


def start_vllm_on_cache(trial: Trial, found: Found) -> None:
    subject = subjects.vllm(trial)
    measure.cache_starts(trial.lab, subject, subject.name, 1, found)


def try_feature(feature: str, trial: Trial, found: Found) -> None:
    """Take a snapshot of a server that also holds what real ones hold, and restore it once."""
    if trial.options.stand_in and not feature.endswith("-parent"):
        raise SkippedError("the stand-in has no torch")
    subject = subjects.decoder(trial, feature)
    found["runs"] = []
    found["snapshot"] = measure.snapshot(trial.lab, subject, subject.name, ["--no-prove"])
    measure.restores(trial.lab, subject, subject.name, 1, found["runs"])


def kill_live(trial: Trial, found: Found) -> None:
    """Kill a live restored server at once, which hung hosts with driver 595 (NVIDIA/cuda-checkpoint#53)."""
    subject = subjects.decoder(trial)
    found["runs"] = []
    measure.restores(trial.lab, subject, subject.name, 1, found["runs"], kill=True)


def _read_all(directory: Path) -> tuple[int, float]:
    """Read every file once, one after the other; return the bytes and the seconds."""
    buffer = bytearray(_READ_BYTES)
    total, began = 0, time.monotonic()
    for path in files_below(directory):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total, max(time.monotonic() - began, 1e-6)


STEPS = (
    AcceptanceStep(name="machine", seconds=30, act=describe_machine),
    AcceptanceStep(name="probes", seconds=300, act=probes.probe),
    AcceptanceStep(name="doctor", seconds=120, act=run_doctor),
    AcceptanceStep(name="cold", seconds=300, act=start),
    AcceptanceStep(name="snapshot", seconds=400, act=take_snapshot),
    AcceptanceStep(name="restore", seconds=400, act=restore, needs=("snapshot",)),
    AcceptanceStep(name="rollback", seconds=240, act=checkpoints.roll_back),
    AcceptanceStep(name="cache", seconds=240, act=start_on_cache, needs=("snapshot",)),
    AcceptanceStep(name="floor", seconds=90, act=measure_floor, needs=("snapshot",)),
    AcceptanceStep(name="backends", seconds=400, act=checkpoints.try_backends, needs=("snapshot",)),
    AcceptanceStep(name="load", seconds=150, act=restore_beside_load, needs=("snapshot",)),
    AcceptanceStep(name="uncached", seconds=150, act=restore_uncached, needs=("snapshot",)),
    AcceptanceStep(name="memory", seconds=300, act=compare_memory, needs=("snapshot",)),
    *(
        AcceptanceStep(name=f"with-{name}", seconds=240, act=functools.partial(try_feature, name))
        for name in FEATURES
    ),
    AcceptanceStep(name="vllm-start", seconds=500, act=start_vllm),
    AcceptanceStep(name="vllm-snapshot", seconds=500, act=take_vllm_snapshot, needs=("vllm-start",)),
    AcceptanceStep(name="vllm-restore", seconds=400, act=restore_vllm, needs=("vllm-snapshot",)),
    AcceptanceStep(name="vllm-cache", seconds=400, act=start_vllm_on_cache, needs=("vllm-snapshot",)),
    AcceptanceStep(name="kill", seconds=120, act=kill_live, needs=("snapshot",), asked=True),
)
