# SPDX-License-Identifier: Apache-2.0
"""A kernel cache against this node: which entries are of use here. Pure."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rekindle.engine.caches import CacheKind, is_within
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.mapped import MappedFile
from rekindle.record import Record
from rekindle.report import Reason
from restore.decide.difference import Difference
from restore.decide.match_process import held_gpus, missing_features
from restore.decide.rules import reason_for

if TYPE_CHECKING:
    from oci.cache.inventory import Entry, Inventory


_BACKENDS = {"cuda": "nvidia", "hip": "amd"}


# Compiled graphs, by the beginning of their keys. They hold kernels, and say nowhere what for.
_GRAPHS = {
    CacheKind.VLLM: ("torch_compile_cache/",),
    CacheKind.INDUCTOR: ("aotautograd/", "fxgraph/"),
}


_NONE: tuple[str, ...] = ()
_NOTES = {".", "modelinfos"}  # nobody fetches a cache for what is no kernel, if there are kernels in it


def cached(files: Sequence[MappedFile], different: Mapping[str, str], inventory: "Inventory") -> list[str]:
    """The names of the roots of a kernel cache that bring files which are missing here."""
    missing = [file.path for file in files if different.get(file.path) == "missing"]
    return [root.name for root in inventory.roots if any(is_within(path, root.recorded) for path in missing)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A kernel cache as this node can use it, entry by entry. `roots` names those with an entry of use; they
    are fetched whole. `usable` counts these entries."""

    reasons: Sequence[Reason]
    roots: Sequence[str] = ()
    entries: int = 0
    usable: int = 0


def cache(
    inventory: "Inventory",
    architecture: str,
    record: Record | None,
    node: Fingerprint,
    soft: Collection[str] = (),
) -> Judged:
    """Which entries of a kernel cache are of use here. `architecture` is the image's, as the kernel names it;
    with a record, it is known which processor its C++ kernels, and which GPUs its graphs were compiled for.
    An entry that differs in nothing but what a policy calls `soft` is of use, too."""
    if architecture != node.architecture:
        found = Difference("cache-architecture", "architecture", architecture, node.architecture)
        reason = reason_for(found)
        return Judged(reasons=[reason], entries=sum(len(root.entries) for root in inventory.roots))
    counts: Counter[Difference] = Counter()
    roots: list[str] = []
    entries = fitting = usable = 0
    for root in inventory.roots:
        looked_at = [
            (entry, list(_entry_differences(root.kind, entry, record, node))) for entry in root.entries
        ]
        for _, differences in looked_at:
            counts.update([each for each in differences if each.code not in soft][:1] or differences[:1])
        useful = _useful(looked_at, soft)
        if useful or not root.entries:
            roots.append(root.name)
        entries += len(root.entries)
        fitting += _useful(looked_at)
        usable += useful
    reasons = []
    for difference, count in counts.items():
        was = f"{difference.recorded} ({count} of {entries} entries)"
        hard = (fitting if difference.code in soft else usable) == 0
        reason = reason_for(dataclasses.replace(difference, recorded=was))
        reasons.append(dataclasses.replace(reason, hard=hard))
    return Judged(reasons=reasons, roots=roots, entries=entries, usable=usable)


def _useful(looked_at: "Sequence[tuple[Entry, Sequence[Difference]]]", soft: Collection[str] = ()) -> int:
    """How many entries of a root are worth fetching it. None, if C++ for another processor is among them:
    it comes with the others, and nothing keeps a server from loading it."""
    left = [
        (entry, [each.code for each in differences if each.code not in soft])
        for entry, differences in looked_at
    ]
    if any("cache-cpu-feature" in codes for _, codes in left):
        return 0
    kernels = [each for each in left if each[0].key not in _NOTES]
    return sum(not codes for _, codes in kernels or left)


def _entry_differences(
    kind: CacheKind, entry: "Entry", record: Record | None, node: Fingerprint
) -> Iterator[Difference]:
    """Yield what speaks against an entry here, the gravest first."""
    kernels = {
        (_BACKENDS.get(target.backend, target.backend), target.arch, target.warp_size)
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
    """The compute capability of a target. FlashInfer compiles for `90a`, which runs on 9.0 alone."""
    return arch.rstrip("af") if vendor == "nvidia" else arch


def _same_version(recorded: str, here: str) -> bool:
    """Equal; a local part (`+cu129`) counts only if both sides have one."""
    if "+" in recorded and "+" in here:
        return recorded == here
    return recorded.partition("+")[0] == here.partition("+")[0]
