# SPDX-License-Identifier: Apache-2.0
"""`rekindle doctor`: try what this node can do, and say how to add what is missing.

Imports nothing from outside the project and the standard library at start, so that it also runs before
dependencies are installed.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rekindle import proc
from rekindle.cell import Cell, Clocks, Network
from rekindle.criu import amx, faults
from rekindle.criu.search import FILTER_HINT, candidates, dump_problem
from rekindle.errors import CapabilityError, RekindleError
from rekindle.home import Home
from rekindle.journal import CUDA_JOURNAL

SCHEMA = "rekindle.doctor/1"
_FREE_BYTES = 8 << 30


class Check(NamedTuple):
    """The result of a check. `needed`: snapshot and restore do not work without it."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = True
    path: Path | None = None


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle doctor",
        description="Check what snapshot and restore need on this node, and what an image needs. "
        "Exits with status 10 if something is missing.",
    )
    parser.add_argument(
        "image",
        metavar="IMAGE",
        nargs="?",
        help="also check what this node lacks for the process of an image",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--check",
        choices=list(_CHECKS),
        metavar="NAME",
        help=f"run only this check: {', '.join(_CHECKS)}",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="first give GPUs back to servers that a killed command left without them",
    )
    args = parser.parse_args(words)
    home = Home.from_environment()
    repaired, left = _repair(home) if args.repair else ([], False)
    removed = _sweep(home)
    names = [args.check] if args.check else list(_CHECKS)
    checks = [check for name in names for check in _CHECKS[name](home)]
    if args.image:
        checks += _image(args.image, home)
    ok = all(check.ok or not check.needed for check in checks) and not left
    if args.json:
        document = {
            "schema": SCHEMA,
            "ok": ok,
            "kernel": platform.release(),
            "checks": [
                {
                    "name": c.name,
                    "ok": c.ok,
                    "needed": c.needed,
                    "detail": c.detail,
                    "remedy": c.remedy,
                    "path": c.path and str(c.path),
                }
                for c in checks
            ],
            "removed": [str(path) for path in removed],
            "repaired": repaired,
        }
        print(json.dumps(document, indent=2))
    else:
        for check in checks:
            mark = "ok  " if check.ok else "FAIL" if check.needed else "note"
            print(f"{mark}  {check.name:<11}{check.detail}")
            if check.remedy and not check.ok:
                print(f"      {'':<11}→ {check.remedy}")
        for line in repaired:
            print(f"      {'':<11}{line}")
        for path in removed:
            print(f"      {'':<11}removed the work directory of a killed command: {path}")
    return 0 if ok else CapabilityError.exit_status


def _sweep(home: Home) -> list[Path]:
    """Remove what killed commands left; without the dependencies, no other command has run."""
    if importlib.util.find_spec("msgspec") is None:
        return []
    from oci import store

    return store.sweep(home)


def _image(name: str, home: Home) -> Iterator[Check]:
    """Yield what this node lacks for the process of an image. Its signature does not matter here."""
    from oci import image as images
    from oci import resolve
    from oci.options import RegistryOptions
    from oci.reference import parse
    from restore.decide import abilities, facts, plan

    reference = parse(name)
    with resolve.source(reference, home, RegistryOptions()) as source:
        image = images.load(source.blobs, source.root, source.limits)
        step = plan.make(
            facts.of_image(image, home, able=abilities.probe(home)), strictness=facts.strictness()
        ).steps[0]
    hard = [reason for reason in step.reasons if reason.hard]
    if not hard:
        yield Check(name="image", ok=True, detail=f"the process of {name} can be restored here")
    for reason in hard:
        yield Check(name="image", ok=False, detail=str(reason), remedy=reason.advice)


def _root(_: Home) -> Iterator[Check]:
    root = os.geteuid() == 0
    yield Check(
        name="root",
        ok=root,
        detail="yes" if root else f"no, this is user {os.geteuid()}",
        remedy="run rekindle with sudo, or as root",
    )


def _cell(_: Home) -> Iterator[Check]:
    try:
        with Cell() as cell:
            cell.enter(Network.PRIVATE, Clocks.now())
    except RekindleError as error:
        yield Check(name="cell", ok=False, detail=error.summary, remedy=error.hint)
        return
    yield Check(name="cell", ok=True, detail="processes, mounts, IPC, clocks and network of its own")


def _criu(home: Home) -> Iterator[Check]:
    remedy = "run hack/get-criu, or set REKINDLE_CRIU to a CRIU that works"
    works = False
    try:
        for candidate in candidates(home):
            works = works or not candidate.problem
            problem = f" does not work here: {candidate.problem}" if candidate.problem else ""
            yield Check(
                name="criu",
                ok=not candidate.problem,
                needed=not candidate.problem,
                detail=f"{candidate.version} ({candidate.path}){problem}",
                remedy=remedy,
                path=candidate.path,
            )
            if works:
                yield from _criu_faults(candidate.version)
                if problem := dump_problem():
                    yield Check(name="criu", ok=False, needed=False, detail=problem, remedy=FILTER_HINT)
                return
    except CapabilityError as error:
        yield Check(name="criu", ok=False, detail=error.message, remedy=error.hint)
        return
    yield Check(name="criu", ok=False, detail="no working CRIU", remedy=remedy)


def _criu_faults(version: str) -> Iterator[Check]:
    for fault in sorted(faults.of(version)):
        yield Check(
            name="criu",
            ok=False,
            needed=False,
            detail=f"{version} {fault.what}; {fault.right} can",
            remedy="run hack/get-criu --newer, which stays with the old one if the newer does not work here",
        )


def _amx(_: Home) -> Iterator[Check]:
    if not amx.present():
        yield Check(name="amx", ok=True, detail="not needed: this processor has no AMX")
        return
    try:
        os.close(amx.open_object())
        yield Check(name="amx", ok=True, detail="CRIU requests the permission for restored processes")
    except CapabilityError as error:
        yield Check(name="amx", ok=False, detail=error.summary)


def _shell(_: Home) -> Iterator[Check]:
    there = os.access("/bin/sh", os.X_OK)
    yield Check(
        name="shell", ok=there, detail="/bin/sh" if there else "no /bin/sh", remedy="install a POSIX shell"
    )


def _cuda(home: Home) -> Iterator[Check]:
    yield from _cuda_journals(home)
    try:
        from rekindle.node import gpu

        found = gpu.probe_nvidia()
        seen = bool(found.gpus or found.problem)
    except ImportError:  # dependencies are not installed, so the GPUs cannot be listed
        seen = _has_nvml()
    if not seen:
        yield Check(name="cuda", ok=False, needed=False, detail="this node has no NVIDIA GPU")
        return

    from rekindle.cuda import search

    yield from _cuda_notes()
    candidates = search.candidates(home)
    opens = any(candidate.chosen for candidate in candidates)
    for candidate in candidates:
        works = candidate.detail + ("" if candidate.chosen else ", not needed")
        yield Check(
            name="cuda",
            ok=not candidate.problem,
            needed=not opens,
            detail=f"{candidate.name}: {candidate.problem or works}",
            remedy=candidate.hint,
        )


def _cuda_notes() -> Iterator[Check]:
    """Report what is known of this node's driver, and of its modes; needs the dependencies."""
    if importlib.util.find_spec("pynvml") is None:
        return
    from rekindle.cuda import drivers
    from rekindle.node import gpu

    version = gpu.probe_nvidia().driver
    for note in drivers.notes(version):
        yield Check(
            name="cuda", ok=False, needed=False, detail=f"driver {version}: {note.text}", remedy=note.remedy
        )
    for pid, name in proc.not_ending().items():
        yield Check(
            name="cuda",
            ok=False,
            needed=False,
            detail=f"process {pid} ({name}) was killed and does not end: it keeps its memory, on GPUs too",
            remedy="if it waits for the GPU's driver, reboot this node",
        )
    for name in gpu.without_persistence():
        yield Check(
            name="cuda",
            ok=False,
            needed=False,
            detail=f"persistence mode is off: {name} is shut down when nobody uses it, so starts take longer",
            remedy="nvidia-smi -pm 1, or run nvidia-persistenced",
        )


def _has_nvml() -> bool:
    with contextlib.suppress(OSError):
        ctypes.CDLL("libnvidia-ml.so.1")
        return True
    return False


def _cuda_journals(home: Home) -> Iterator[Check]:
    """Report servers that a killed command may have left without their GPUs."""
    with home.abandoned() as found:
        for directory in found:
            if (directory / CUDA_JOURNAL).exists():  # the sweep has kept only journals that are needed
                yield Check(
                    name="cuda",
                    ok=False,
                    needed=False,
                    detail=f"a killed command may have left a server without its GPUs: {directory}",
                    remedy="rekindle doctor --repair",
                )


def _repair(home: Home) -> tuple[list[str], bool]:
    """Give GPUs back to servers that killed commands left without them.

    Returns a line for each process, and whether any journal is left that could not be undone.
    """
    done: list[str] = []
    left = False
    with home.abandoned() as found:
        for directory in found:
            journal = directory / CUDA_JOURNAL
            if journal.exists():
                from rekindle.cuda.search import find
                from rekindle.cuda.session import repair

                try:
                    done += repair(journal, lambda: find(home))
                except CapabilityError as error:
                    done.append(f"cannot repair the servers in {journal}: {error.cause or error.message}")
                left = left or journal.exists()
    return done, left


def _disk(home: Home) -> Iterator[Check]:
    free = shutil.disk_usage(home.root).free
    yield Check(
        name="disk",
        ok=free > _FREE_BYTES,
        needed=False,
        detail=f"{free / (1 << 30):.0f} GiB free in {home.root}",
        remedy="a dump is as large as the server's memory: set REKINDLE_HOME to a directory on a larger disk",
    )


def _packages(_: Home) -> Iterator[Check]:
    ours = Path(__file__).parents[1]
    for name in ("oci", "rekindle", "snapshot", "restore"):
        spec = importlib.util.find_spec(name)
        where = Path(spec.origin).parents[1] if spec and spec.origin else None
        if where != ours:
            yield Check(
                name="packages",
                ok=False,
                detail=f"`import {name}` finds {where or 'nothing'}, not rekindle's",
                remedy="install rekindle in a virtual environment of its own",
            )
            return
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check(name="packages", ok=True, detail=f"rekindle in {ours}, Python {version}")


_CHECKS: dict[str, Callable[[Home], Iterator[Check]]] = {
    "root": _root,
    "cell": _cell,
    "criu": _criu,
    "amx": _amx,
    "cuda": _cuda,
    "shell": _shell,
    "disk": _disk,
    "packages": _packages,
}
