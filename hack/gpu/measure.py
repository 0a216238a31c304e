# SPDX-License-Identifier: Apache-2.0
"""Operations that steps share, timed: starts of a server, a snapshot, restores of its process and of its
kernel cache. All of them raise StepError for a wrong result; `found` then has the results before it."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import structs

from hack.gpu.errors import StepError
from hack.gpu.journal import Found
from hack.gpu.starts import Lab, Started, Subject, marked, phases, rekindle, restored, started
from oci import image as images
from oci.layout import Layout
from rekindle.home import Home

_SETTLE_SECONDS = 10.0


def starts(lab: Lab, subject: Subject, runs: int, found: list[Found], *, empty_caches: bool) -> None:
    """Time `runs` starts of the server by its command."""
    for _ in range(runs):
        with started(lab, subject, empty_caches=empty_caches) as server:
            one: Found = {"seconds": server.seconds, "answer": server.answer}
            if subject.own:
                one["facts"] = server.ask("/facts")
            found.append(one)


def snapshot(
    lab: Lab, subject: Subject, name: str, options: Sequence[str], *environments: Mapping[str, str]
) -> Found:
    """Take a snapshot of the server. Return figures of the image and of rekindle's report."""
    path = lab.work / "snapshot.json"
    words = ["snapshot", name, "--report", str(path), *subject.options, *options, "--", *subject.command]
    path.unlink(missing_ok=True)
    status = rekindle(lab, words, subject.environment, *environments, log="snapshot")
    report = json.loads(path.read_bytes()) if path.exists() else {"error": f"status {status}"}
    if status != 0:
        raise StepError(f"the snapshot failed: {report['error']}")
    made = image(lab, name)
    fields = ("phases", "seconds", "bytes", "peak_rss_bytes", "oracle")
    return {
        "report": {field: report[field] for field in fields},
        "image_bytes": made.size_bytes,
        "dump_bytes": made.record.dump.dump_bytes,
        "stored_bytes": made.record.dump.stored_bytes,
        "cuda_pids": list(made.record.process.cuda_pids),
        "gpus": list(made.record.process.gpus),
        "threads": made.record.process.tasks,
        "command": list(made.record.command),
    }


def restores(
    lab: Lab,
    subject: Subject,
    name: str,
    runs: int,
    found: list[Found],
    *environments: Mapping[str, str],
    before: Callable[[], None] = lambda: None,
    options: Sequence[str] = (),
    kill: bool | None = None,
) -> None:
    """Time `runs` restores of the process, each after the end of the one before, as `restored` has it. A
    restored server must give the recorded answer, and leave no process behind."""
    oracle = image(lab, name).record.oracle
    for _ in range(runs):
        before()
        with restored(
            lab, subject, name, oracle, "restored", *environments, options=options, kill=kill
        ) as server:
            if not subject.engine.agree(oracle.answer, server.answer):
                raise StepError(f"answered {server.answer} instead of {oracle.answer}")
            one = _measured(server)
            if subject.own:
                one["count"] = server.ask("/count", {})
                if one["count"] != 1:
                    raise StepError(f"the counter in device memory is {one['count']} instead of 1")
            found.append(one)
        _require_nothing_left(lab)


def cache_starts(lab: Lab, subject: Subject, name: str, runs: int, found: Found) -> None:
    """Time `runs` starts on the kernel cache of the image, on a node without one, with the proof that the
    server used it. The record is doctored, so that the process cannot be restored here."""
    other, oracle = _doctored(lab, name), image(lab, name).record.oracle
    found["runs"] = []
    options = ["--verify-key", str(lab.work / "doctor.pub")]
    for _ in range(runs):
        with (
            _without(subject.caches),
            restored(lab, subject, other, oracle, "cache", options=options) as server,
        ):
            agrees = subject.engine.agree(oracle.answer, server.answer)
            proof, reasons = server.report["cache"], server.report["reasons"]
            found["runs"].append({**_measured(server), "agrees": agrees, "proof": proof})
            found["reasons"] = [reason for reason in reasons if reason["hard"]]
        if not proof or not proof["used"]:
            raise StepError(f"no entry of the kernel cache was used: {proof}")


def image(lab: Lab, name: str) -> images.Image:
    """Load an image of the local store."""
    layout = Layout(Home(lab.home).store)
    return images.load(layout, layout.resolve(f"{name}:latest"))


def dump(lab: Lab, name: str) -> Path:
    """Return the directory of the dump that a restore of this image reads."""
    found = [path for path in Home(lab.home).dumps.iterdir() if path.is_dir()]
    wanted = image(lab, name).process.digest.rpartition(":")[2]
    return next(path for path in found if path.name.startswith(wanted))


def _doctored(lab: Lab, name: str) -> str:
    """Store the same snapshot under a record that names another GPU model of the same compute capability, and
    sign that image with a key of its own. Return its name."""
    doctored, key = f"{name}-doctored", lab.work / "doctor.key"
    loaded = image(lab, name)
    if not loaded.record.process.gpus:
        raise StepError("the record names no GPU to doctor")
    devices = loaded.record.node.devices
    others = tuple(structs.replace(each, name=f"{each.name} (doctored)") for each in devices.gpus)
    node = structs.replace(loaded.record.node, devices=structs.replace(devices, gpus=others))
    record = structs.replace(loaded.record, node=node)
    layout = Layout(Home(lab.home).store)
    built = images.build(layout, record, loaded.layers, loaded.cache)
    layout.publish(layout, built.index, f"{doctored}:latest")
    no_password = {"COSIGN_PASSWORD": ""}
    prefix = str(key.with_suffix(""))
    if not key.exists() and rekindle(lab, ["generate-key-pair", "--output-key-prefix", prefix], no_password):
        raise StepError("could not generate a key")
    if rekindle(lab, ["sign", doctored, "--sign-key", str(key)], no_password):
        raise StepError("could not sign the doctored image")
    return doctored


@contextmanager
def _without(caches: Path) -> Iterator[None]:
    """Move the kernel caches aside, and back at the end."""
    aside = caches.with_name(f"{caches.name}-aside")
    caches.rename(aside)
    try:
        yield
    finally:
        shutil.rmtree(caches, ignore_errors=True)
        aside.rename(caches)


def _require_nothing_left(lab: Lab) -> None:
    deadline = time.monotonic() + _SETTLE_SECONDS
    while left := marked(lab):
        if time.monotonic() > deadline:
            raise StepError(f"processes left after the server was killed: {left}")
        time.sleep(0.05)


def _measured(server: Started) -> Found:
    first = server.report["first_token_seconds"]
    return {"seconds": server.seconds, "first_token_seconds": first, "phases": phases(server)}
