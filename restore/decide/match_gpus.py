# SPDX-License-Identifier: Apache-2.0
"""Compare the GPUs that a process held with those of this node, and choose which take their places."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from msgspec import Struct, field

from rekindle.node.fingerprint import Fingerprint
from rekindle.node.gpu import Gpu
from rekindle.node.packages import major_minor
from rekindle.record import Record
from restore.decide.difference import Difference

# From here on, the driver moves state to the GPUs that a map names; older ones ignore it.
_DRIVER_WITH_MAPS = (580, 0)
# The recorded GPU stays unless another has this much more free memory.
_NOTICEABLE_BYTES = 1 << 30


class GpuChoice(Struct, frozen=True, kw_only=True):
    """The facts by which it is decided which of this node's GPUs take the places of the recorded ones.

    `wanted` are the UUIDs that the user chose, in the order of the recorded ones. `free_bytes` is the free
    memory of each GPU, by UUID; empty if it is unknown. `replica` is the position among replicas that start
    together, and so see the same memory free.
    """

    wanted: Sequence[str] = ()
    free_bytes: Mapping[str, int] = field(default_factory=dict)
    replica: int = 0


ANY_GPU = GpuChoice()


def device_map(record: Record, node: Fingerprint, choice: GpuChoice = ANY_GPU) -> dict[str, str]:
    """Map the UUIDs of recorded GPUs to GPUs of this node; empty if they are the same.

    GPUs that are on both nodes map to themselves, the rest by position, unless the choice is another: what
    the user wants, or for a single GPU the one with the most free memory. All GPUs of the recorded node are
    named if this one has as many: the driver refused a map of only those that CUDA_VISIBLE_DEVICES left to
    the process (NVIDIA/cuda-python#1983).
    """
    held = list(record.process.gpus)
    here = [gpu.uuid for gpu in node.devices.gpus]
    recorded = [gpu.uuid for gpu in record.node.devices.gpus]
    if len(recorded) > len(here) or not set(held) <= set(recorded):
        recorded = held
    free = [uuid for uuid in here if uuid not in recorded]
    places = {uuid: uuid if uuid in here else free.pop(0) for uuid in recorded if uuid in here or free}
    for old, new in _chosen(record, node, choice, places).items():
        other = next((uuid for uuid, place in places.items() if place == new), None)
        if other is not None and old in places:
            places[other] = places[old]
        places[old] = new
    return {} if all(places.get(uuid) == uuid for uuid in held) else places


def _chosen(
    record: Record, node: Fingerprint, choice: GpuChoice, places: Mapping[str, str]
) -> dict[str, str]:
    """Return the places of held GPUs that are not those of `places`."""
    held = record.process.gpus
    by_uuid = {gpu.uuid: gpu for gpu in node.devices.gpus}
    if choice.wanted:
        pairs = zip(held, choice.wanted, strict=False)
        return {old: new for old, new in pairs if new in by_uuid and places.get(old) != new}
    if len(held) != 1 or not _maps(node) or not choice.free_bytes:
        return {}
    wanted = held_gpus(record)
    fitting = [uuid for uuid, gpu in by_uuid.items() if wanted and _same_kind(gpu, wanted[0])]
    free = {uuid: choice.free_bytes.get(uuid, 0) for uuid in fitting}
    with_room = [uuid for uuid in fitting if free[uuid] >= record.process.device_bytes]
    ordered = sorted(with_room or fitting, key=lambda uuid: -free[uuid])
    now = places.get(held[0], "")
    if now in ordered and free[ordered[0]] - free[now] <= _NOTICEABLE_BYTES:
        ordered = [now, *(uuid for uuid in ordered if uuid != now)]
    place = ordered[choice.replica % len(ordered)] if ordered else now
    return {held[0]: place} if place != now else {}


def choice_problem(record: Record, node: Fingerprint, wanted: Sequence[str]) -> str:
    """Return why the GPUs that the user chose cannot take the places of the recorded ones, or ""."""
    held, here = record.process.gpus, [gpu.uuid for gpu in node.devices.gpus]
    if not wanted or not held:
        return ""
    if missing := [uuid for uuid in wanted if uuid not in here]:
        return f"this node has no GPU {missing[0]}"
    if len(set(wanted)) != len(held) or len(wanted) != len(held):
        return f"{len(set(wanted))} GPUs are named, and the server was on {len(held)}"
    if list(wanted) != list(held) and not _maps(node):
        return f"driver {node.devices.driver} cannot move state to other GPUs: that needs 580"
    return ""


def compare(record: Record, node: Fingerprint, choice: GpuChoice = ANY_GPU) -> Iterator[Difference]:
    """Yield the differences of the GPUs that the process held. Others do not matter to it."""
    if not record.process.gpus:
        return
    held = held_gpus(record)
    here = node.devices.gpus
    if any(gpu.vendor != "nvidia" for gpu in held):
        yield Difference("gpu-unsupported", "GPU", held[0].name, _models(here))
        return
    if node.devices.problem:
        yield Difference("gpu-probe", "GPUs", _models(held), node.devices.problem)
        return
    counts = {len(record.process.gpus), len(record.node.devices.gpus)}
    if len(here) not in counts and not (len(here) > max(counts) and _maps(node)):
        yield Difference("gpu-count", "GPUs", _models(held) or str(len(record.process.gpus)), _models(here))
    places = device_map(record, node, choice) or {gpu.uuid: gpu.uuid for gpu in held}
    by_uuid = {gpu.uuid: gpu for gpu in here}
    pairs = [(gpu, by_uuid[places[gpu.uuid]]) for gpu in held if places.get(gpu.uuid) in by_uuid]
    yield from _unequal("gpu-model", pairs, lambda gpu: f"{gpu.name} ({gpu.arch})", lambda a, b: a == b)
    yield from _unequal(
        "gpu-memory",
        pairs,
        lambda gpu: f"{gpu.memory_bytes / (1 << 30):.1f} GiB",
        lambda a, b: _gib(b) >= _gib(a),
    )
    yield from _unequal("gpu-ecc", pairs, lambda gpu: "on" if gpu.ecc else "off", lambda a, b: a == b)
    yield from _unequal("gpu-uuid", pairs, lambda gpu: gpu.uuid, lambda a, b: a == b)
    yield from _either("mig", any(gpu.mig for gpu in held), any(gpu.mig for gpu in here))
    yield from _either("mps", record.node.devices.mps, node.devices.mps)
    if len(held) > 1:
        was, now = " ".join(record.node.devices.links), " ".join(node.devices.links)
        if was and now and was != now:
            yield Difference("gpu-topology", "links between the GPUs", was, now)
    was, now = record.node.devices.driver, node.devices.driver
    if was != now:
        same_branch = was.partition(".")[0] == now.partition(".")[0]
        yield Difference("driver-version" if same_branch else "driver", "driver", was, now or "none")


def held_gpus(record: Record) -> list[Gpu]:
    """Return the GPUs that the process held."""
    return [gpu for gpu in record.node.devices.gpus if gpu.uuid in record.process.gpus]


def _either(code: str, recorded: bool, here: bool) -> Iterator[Difference]:
    """Yield a difference if a feature is on, here or on the recorded node."""
    if recorded or here:
        yield Difference(code, code.upper(), "on" if recorded else "off", "on" if here else "off")


def _unequal(
    code: str,
    pairs: Sequence[tuple[Gpu, Gpu]],
    shown: Callable[[Gpu], str],
    fits: Callable[[str, str], bool],
) -> Iterator[Difference]:
    """Yield the first pair of GPUs that do not fit each other in one property."""
    for recorded, here in pairs:
        if not fits(shown(recorded), shown(here)):
            yield Difference(code, code.replace("gpu-", "GPU's "), shown(recorded), shown(here))
            return


def _gib(text: str) -> float:
    return float(text.partition(" ")[0])


def _models(gpus: Sequence[Gpu]) -> str:
    counts = Counter(gpu.name for gpu in gpus)
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _maps(node: Fingerprint) -> bool:
    """Tell whether this node's driver moves state to the GPUs that a map names."""
    return major_minor(node.devices.driver) >= _DRIVER_WITH_MAPS


def _same_kind(one: Gpu, other: Gpu) -> bool:
    return (one.name, one.arch) == (other.name, other.arch) and one.memory_bytes >= other.memory_bytes
