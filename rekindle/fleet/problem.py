# SPDX-License-Identifier: Apache-2.0
"""The description of a fleet: classes of nodes, models with their demand, and the promised service."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from rekindle import documents
from rekindle.errors import FormatError, UsageError

PERIOD_SECONDS = 3600.0
"""A plan is made for each period."""

_FILE_LIMIT_BYTES = 64 << 20
_Name = Annotated[str, Meta(pattern=documents.whole(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?"))]
_Bytes = Annotated[int, Meta(ge=0, le=1 << 60)]
_Seconds = Annotated[float, Meta(ge=0, le=1e6)]
_Rate = Annotated[float, Meta(ge=0, le=1e6)]


class NodeClass(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nodes of one kind: how many there are at most, what each has, and what one costs per hour.

    `boot_seconds` pass from the decision to use a node until it can start a server. A node fails after
    `hours_between_failures` on average, and is back after `repair_seconds`; 0 hours for never.
    """

    name: _Name
    nodes: Annotated[int, Meta(ge=1, le=1_000_000)]
    price: Annotated[float, Meta(ge=0, le=1e6)]
    memory_bytes: _Bytes
    disk_bytes: _Bytes
    gpus: Annotated[int, Meta(ge=0, le=1024)] = 0
    boot_seconds: _Seconds = 120.0
    hours_between_failures: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    repair_seconds: _Seconds = 600.0


class StartSeconds(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds to the first token of a new replica, on a node that has the image and on one that has not.

    The first is that of the rung `process` or of a wake, the second includes fetching. A node of another
    kind than the snapshot's has those of the rung that it gets: `rekindle match --class`.
    """

    ready: _Seconds
    absent: _Seconds


class ServedModel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model: its image, a replica's needs, and the requests that it gets.

    The replicas on a node share `shared_bytes` of memory, and each has `own_bytes`. A replica serves
    `concurrency` requests at once, each for `service_seconds`. `demand` are requests per second, one figure
    for each `step_seconds`, and begins anew at its end. `starts` are the start times by class of node; a
    model runs on no class that is not named.
    """

    name: _Name
    image_bytes: _Bytes
    own_bytes: _Bytes
    starts: Annotated[Mapping[_Name, StartSeconds], Meta(min_length=1, max_length=1000)]
    demand: Annotated[tuple[_Rate, ...], Meta(min_length=1, max_length=1_000_000)]
    shared_bytes: _Bytes = 0
    gpus: Annotated[int, Meta(ge=0, le=1024)] = 0
    concurrency: Annotated[int, Meta(ge=1, le=100_000)] = 1
    service_seconds: Annotated[float, Meta(gt=0, le=1e5)] = 1.0
    step_seconds: Annotated[float, Meta(ge=1, le=PERIOD_SECONDS)] = PERIOD_SECONDS

    @property
    def seconds(self) -> float:
        """The length of the demand."""
        return len(self.demand) * self.step_seconds

    def rate(self, at: float) -> float:
        """Return the requests per second at a time."""
        return self.demand[int(at / self.step_seconds) % len(self.demand)]

    def rates(self, period: int) -> tuple[float, ...]:
        """Return the requests per second in the steps of a period."""
        first = period * PERIOD_SECONDS
        steps = max(1, round(PERIOD_SECONDS / self.step_seconds))
        return tuple(self.rate(first + index * self.step_seconds) for index in range(steps))


class Service(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The promise: at most this share of the requests waits longer than so many seconds for a replica."""

    wait_seconds: _Seconds
    late_share: Annotated[float, Meta(gt=0, lt=1)] = 0.01


class Fleet(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it, for a number of periods."""

    service: Service
    classes: Annotated[tuple[NodeClass, ...], Meta(min_length=1, max_length=1000)]
    models: Annotated[tuple[ServedModel, ...], Meta(min_length=1, max_length=100_000)]
    periods: Annotated[int, Meta(ge=1, le=24 * 31)] = 24

    def node_class(self, name: str) -> NodeClass:
        return next(each for each in self.classes if each.name == name)


def read(path: Path) -> Fleet:
    """Read a description in TOML. Raises UsageError that names the field that is wrong."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}", cause=str(error)) from None
    try:
        return parse(content)
    except FormatError as error:
        raise UsageError(
            f"{path} is not a valid description of a fleet", cause=error.summary, hint="see docs/fleet.md"
        ) from None


def parse(content: bytes) -> Fleet:
    """Parse a description. Raises FormatError."""
    if len(content) > _FILE_LIMIT_BYTES:
        raise FormatError("the description is too large", cause=f"over {_FILE_LIMIT_BYTES:,} bytes")
    try:
        document = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError("not TOML", cause=str(error)) from None
    fleet = documents.read(document, Fleet, "the description")
    for what, names in (
        ("class", [each.name for each in fleet.classes]),
        ("model", [each.name for each in fleet.models]),
    ):
        if again := next((name for index, name in enumerate(names) if name in names[:index]), None):
            raise FormatError(f"the {what} {again} is described twice")
    classes = {each.name: each for each in fleet.classes}
    for model in fleet.models:
        if unknown := sorted(model.starts.keys() - classes.keys()):
            raise FormatError(f"models.{model.name}.starts names an unknown class: {unknown[0]}")
        if not any(fits(model, classes[name]) for name in model.starts):
            raise FormatError(
                f"the model {model.name} fits on no node", cause="memory, disk or GPUs are too few"
            )
    return fleet


def fits(model: ServedModel, node: NodeClass) -> int:
    """Return how many replicas of a model fit on an empty node."""
    if model.image_bytes > node.disk_bytes or model.gpus > node.gpus:
        return 0
    limits = [100_000]
    if model.own_bytes:
        limits.append((node.memory_bytes - model.shared_bytes) // model.own_bytes)
    elif model.shared_bytes > node.memory_bytes:
        limits.append(0)
    if model.gpus:
        limits.append(node.gpus // model.gpus)
    return max(0, min(limits))
