# SPDX-License-Identifier: Apache-2.0
"""Gather what `rekindle dashboard` shows, as one JSON document."""

import contextlib
import os
import socket
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from cli import _memory
from oci import image as images
from oci import resolve
from oci.cache import image as cache_image
from oci.image import Image
from oci.options import RegistryOptions, TrustOptions
from oci.reference import parse
from rekindle import __version__, history, replicas
from rekindle.errors import RekindleError
from rekindle.fields import JSON
from rekindle.history import KeptReport
from rekindle.home import Home
from rekindle.replicas import ReplicaEntry
from rekindle.report import Outcome, Rung
from restore import housekeeping
from restore.housekeeping import Kept, KeptKind

SCHEMA = "rekindle.dashboard/1"
_STARTS = 12
_ENDED = 5


class DashboardState:
    """The state of a home now. Of an image, what its manifests say is read again when the store changes."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._read: dict[tuple[str, str], dict[str, JSON]] = {}
        self._marks: tuple[int, ...] = ()

    def document(self) -> dict[str, JSON]:
        """Look at the home and return the document."""
        kept = housekeeping.kept(self._home)
        reports = [
            each for each in history.newest(self._home, 50) if each.report["verb"] in {"restore", "run"}
        ]
        found = replicas.found(self._home)
        ended = [each for each in found if not each.runs and not each.can_wake]
        shown = [each for each in found if each not in ended[:-_ENDED]]
        return {
            "schema": SCHEMA,
            "version": __version__,
            "host": socket.gethostname(),
            "home": str(self._home.root),
            "now": time.time(),
            "summary": _summary(reports, kept),
            "replicas": [_replica(each) for each in reversed(shown)],
            "starts": [_start(each) for each in reports[:_STARTS]],
            "images": self._images(kept),
        }

    def _images(self, kept: list[Kept]) -> list[dict[str, JSON]]:
        marks = tuple(map(_mark, (self._home.store / "index.json", self._home.policy)))
        if marks != self._marks:
            self._read, self._marks = {}, marks
        found: list[dict[str, JSON]] = []
        for each in kept:
            if each.kind is KeptKind.IMAGE:
                key = each.name, each.digest
                if key not in self._read:
                    self._read[key] = _image(each.name, self._home)
                facts: dict[str, JSON] = {"name": each.name, "digest": each.digest, "bytes": each.bytes}
                found.append({**facts, "used": each.used, "in_use": each.in_use, **self._read[key]})
        return found


def _mark(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def _summary(reports: list[KeptReport], kept: list[Kept]) -> dict[str, JSON]:
    first = [
        each.report["first_token_seconds"]
        for each in reports
        if each.report["outcome"] == Outcome.RESTORED and each.report["first_token_seconds"]
    ]
    size = {
        str(kind): housekeeping.total_bytes([each for each in kept if each.kind is kind]) for kind in KeptKind
    }
    return {
        "first_token_seconds": statistics.median(first) if first else None,
        "first_tokens": len(first),
        "kept_bytes": size,
    }


def _replica(replica: ReplicaEntry) -> dict[str, JSON]:
    status, memory = replica.status, _memory.of(replica)
    in_cell = replica.state is replicas.ReplicaState.READY and status.cell is not None
    actions = ["hibernate"] if in_cell and status.rung is Rung.PROCESS else []
    actions += ["wake"] if replica.can_wake else []
    actions += ["stop"] if replica.runs or replica.can_wake else []
    return {
        "name": status.name,
        "image": status.image,
        "state": replica.state,
        "rung": status.rung,
        "endpoint": status.endpoint,
        "created": status.created,
        "detached": status.detached,
        "exit_status": None if replica.runs or replica.can_wake else replica.exit_status,
        "memory": None if memory is None else {"own_bytes": memory[0], "shared_bytes": memory[1]},
        "actions": list[JSON](actions),
    }


def _start(kept: KeptReport) -> dict[str, JSON]:
    report = kept.report
    hard = [each for each in report["reasons"] if each["hard"]]
    rest = {"name": "other", "seconds": max(0.0, report["unaccounted_seconds"])}
    return {
        "at": kept.at,
        "wakes": kept.wakes,
        "verb": report["verb"],
        "replica": report["replica"],
        "image": report["image"].get("reference"),
        "outcome": report["outcome"],
        "seconds": report["seconds"],
        "first_token_seconds": report["first_token_seconds"],
        "phases": [*report["phases"], rest],
        "fetched_bytes": report["bytes"].get("fetched", 0),
        "reasons": [{"code": each["code"], "here": each["here"], "advice": each["advice"]} for each in hard],
        "error": report["error"]["message"] if report["error"] else None,
    }


def _image(name: str, home: Home) -> dict[str, JSON]:
    """Return the signer of an image and what it needs, or why that cannot be read."""
    facts: dict[str, JSON] = {"signer": None, "problem": None, "kind": "image", "needs": []}
    reference = parse(name)
    try:
        with resolve.source(reference, home, RegistryOptions()) as source:
            try:
                trust = resolve.verified(source, reference, home, TrustOptions(allow_rollback=True)).trust
                facts["signer"] = trust.by
            except RekindleError as error:
                facts["problem"] = error.message
            with contextlib.suppress(RekindleError):
                image = images.load(source.blobs, source.root, source.limits)
                return {**facts, "kind": "snapshot", **_needs(image)}
            kernels = cache_image.load(source.blobs, source.root, source.limits)
            targets = [f"{target.backend} {target.arch}" for target in kernels.inventory.targets]
            needs = {"made for": ", ".join(targets) or "unknown targets", "processor": kernels.architecture}
            return {**facts, "kind": "kernel cache", "created": kernels.created, "needs": _pairs(needs)}
    except (RekindleError, OSError) as error:
        return {**facts, "problem": facts["problem"] or str(error)}


def _needs(image: Image) -> dict[str, JSON]:
    record = image.record
    node = record.node
    gpus = [gpu.name for gpu in node.devices.gpus]
    model = os.path.basename(str(record.weights.get("model", "")).rstrip("/"))  # noqa: PTH119
    engine = node.packages.get("vllm")
    needs = {
        "processor": f"{node.architecture}, {node.cpu_vendor or 'any'}",
        "GPU": ", ".join(gpus),
        "driver": node.devices.driver if gpus else "",
        "CRIU": record.criu.version,
        "libc": node.libc,
        "server": f"vLLM {engine}" if engine else record.engine.name,
        "model": model,
        "files": f"{len(record.mapped_files)} of the node",
        "shares": f"memory of {str(record.dump.base)[:19]}" if record.dump.base else "",
    }
    return {
        "created": record.created,
        "proved": record.proved,
        "start_seconds": record.start_seconds,
        "memory_bytes": record.dump.stored_bytes,
        "needs": _pairs(needs),
    }


def _pairs(needs: Mapping[str, str]) -> list[JSON]:
    return [[name, value] for name, value in needs.items() if value]
