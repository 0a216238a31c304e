# SPDX-License-Identifier: Apache-2.0
"""Compare the entries of a kernel cache with this node. Pure."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from rekindle.engine.caches import CacheKind, is_within
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.mapped import MappedFile
from rekindle.record import Record
from rekindle.report import Reason
from restore.decide.difference import Difference
from restore.decide.match_gpus import held_gpus
from restore.decide.match_process import missing_features
from restore.decide.rules import reason_for

if TYPE_CHECKING:
    from oci.cache.inventory import Entry, Inventory


_VENDORS = {"cuda": "nvidia", "hip": "amd"}

# Compiled graphs, by the beginning of their keys. They hold GPU kernels without naming their target.
_GRAPHS = {
    CacheKind.VLLM: ("torch_compile_cache/",),
    CacheKind.INDUCTOR: ("aotautograd/", "fxgraph/"),
}
_NONE: tuple[str, ...] = ()
_METADATA = {".", "modelinfos"}  # entries without kernels: not worth fetching a root that also holds kernels


def roots_with_missing(
    files: Sequence[MappedFile], different: Mapping[str, str], inventory: "Inventory"
) -> list[str]:
    """Return the names of the roots of a kernel cache to which files belong that are missing here."""
    missing = [file.path for file in files if different.get(file.path) == "missing"]
    return [root.name for root in inventory.roots if any(is_within(path, root.recorded) for path in missing)]


class CacheFit(Struct, frozen=True, kw_only=True):
    """The fit of a kernel cache to this node.

    `roots` names the roots with usable entries; a root is fetched as a whole. `entries` counts all entries,
    `usable` those that this node can use.
    """

    reasons: Sequence[Reason]
    roots: Sequence[str] = ()
    entries: int = 0
    usable: int = 0


def compare(
    inventory: "Inventory",
    architecture: str,
    record: Record | None,
    node: Fingerprint,
    soft: Collection[str] = (),
) -> CacheFit:
    """Compare every entry of a kernel cache with this node.

    `architecture` is the image's, as `uname -m` names it. `record` tells for which processor C++ kernels, and
    for which GPUs graphs were compiled. `soft` are codes that a policy makes soft: an entry with no other
    differences is usable.
    """
    if architecture != node.architecture:
        found = Difference("cache-architecture", "architecture", architecture, node.architecture)
        reason = reason_for(found)
        return CacheFit(reasons=[reason], entries=sum(len(root.entries) for root in inventory.roots))
    counts: Counter[Difference] = Counter()
    roots: list[str] = []
    entries = fitting = usable = 0
    for root in inventory.roots:
        compared = [
            (entry, list(_entry_differences(root.kind, entry, record, node))) for entry in root.entries
        ]
        for _, differences in compared:
            counts.update([each for each in differences if each.code not in soft][:1] or differences[:1])
        usable_here = _count_usable(compared, soft)
        if usable_here or not root.entries:
            roots.append(root.name)
        entries += len(root.entries)
        fitting += _count_usable(compared)
        usable += usable_here
    reasons = []
    for difference, count in counts.items():
        was = f"{difference.recorded} ({count} of {entries} entries)"
        hard = (fitting if difference.code in soft else usable) == 0
        reason = reason_for(structs.replace(difference, recorded=was))
        reasons.append(structs.replace(reason, hard=hard))
    return CacheFit(reasons=reasons, roots=roots, entries=entries, usable=usable)


def _count_usable(
    compared: "Sequence[tuple[Entry, Sequence[Difference]]]", soft: Collection[str] = ()
) -> int:
    """Count the usable entries of a root.

    None are usable if there is C++ code for another processor among them: a server might load it.
    """
    left = [
        (entry, [each.code for each in differences if each.code not in soft])
        for entry, differences in compared
    ]
    if any("cache-cpu-feature" in codes for _, codes in left):
        return 0
    kernels = [each for each in left if each[0].key not in _METADATA]
    return sum(not codes for _, codes in kernels or left)


def _entry_differences(
    kind: CacheKind, entry: "Entry", record: Record | None, node: Fingerprint
) -> Iterator[Difference]:
    """Yield the differences that make an entry unusable here, the gravest first."""
    kernels = {
        (_VENDORS.get(target.backend, target.backend), target.arch, target.warp_size)
        for target in entry.targets
        if target.backend != "cpu"
    }
    if record and not entry.targets and entry.key.startswith(_GRAPHS.get(kind, _NONE)):
        kernels = {(gpu.vendor, gpu.arch, gpu.warp_size) for gpu in held_gpus(record)}
    if kernels and not any(
        (vendor, _chip(vendor, arch)) == (gpu.vendor, gpu.arch) and warp in {0, gpu.warp_size}
        for vendor, arch, warp in kernels
        for gpu in node.devices.gpus
    ):
        was = ", ".join(sorted({f"{vendor} {arch}" for vendor, arch, _ in kernels}))
        archs = sorted({f"{gpu.vendor} {gpu.arch}" for gpu in node.devices.gpus})
        here = ", ".join(archs) or "no GPU"
        yield Difference("cache-target", "kernels' target", was, here)
    if record and any(target.backend == "cpu" for target in entry.targets):
        yield from missing_features("cache-cpu-feature", record.node, node)
    for name, version in entry.versions.items():
        installed = node.packages.get(name)
        if installed is not None and not _same_version(version, installed):
            yield Difference("cache-version", name, version, installed)


def _chip(vendor: str, arch: str) -> str:
    """Return the compute capability of a target. FlashInfer compiles for `90a`, which only runs on 9.0."""
    return arch.rstrip("af") if vendor == "nvidia" else arch


def _same_version(recorded: str, here: str) -> bool:
    """Return whether versions are equal. A local part (`+cu129`) counts only if both have one."""
    if "+" in recorded and "+" in here:
        return recorded == here
    return recorded.partition("+")[0] == here.partition("+")[0]
