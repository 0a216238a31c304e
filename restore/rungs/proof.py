# SPDX-License-Identifier: Apache-2.0
"""The proof of the cache rung: which entries of the cache a start has used, and what it compiled anew."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rekindle.engine import Compiled
from rekindle.engine.caches import CacheKind

if TYPE_CHECKING:
    from oci.cache.inventory import StoredRoot
    from restore.rungs.observe import Observed

_NOTES = {f"{CacheKind.VLLM}: .", f"{CacheKind.VLLM}: modelinfos"}  # read in any case, and no kernels
_NAMED = 20  # entries of each kind that a report names


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What was seen of the file system, and what the engine's log says of it.

    `known` are the entries of the cache that the image brought, by root in the order of what was observed.
    """

    known: Sequence[frozenset[str]]
    observed: "Observed"
    engine: Compiled

    @property
    def used(self) -> list[str]:
        """The entries of the image that were read, and not made again."""
        return [
            f"{root.kind}: {key}"
            for root, known in zip(self.observed.roots, self.known, strict=True)
            for key in sorted(root.used & known if "*" not in known else root.used)
            if key not in root.made
        ]

    @property
    def made(self) -> list[str]:
        """The entries in which something was compiled."""
        return [f"{root.kind}: {key}" for root in self.observed.roots for key in sorted(root.made)]

    @property
    def verdict(self) -> str:
        """`hit`: of the cache only; `partial`: something was compiled, too; `miss`: no kernel of the cache
        was of use; `unused`: the server neither read nor compiled anything."""
        if self.engine.compiled or self._many_made():
            kernels = [entry for entry in self.used if entry not in _NOTES]
            return "partial" if kernels or self.engine.loaded else "miss"
        if self.used or self.engine.loaded:
            return "hit"
        return "miss" if self.made else "unused"

    def _many_made(self) -> bool:
        """Whether more was made than the notes that a start leaves in any case."""
        made = any(key not in {".", "modelinfos"} for root in self.observed.roots for key in root.made)
        return made and not self.engine.loaded

    def to_json(self) -> dict[str, Any]:
        """The field `cache` of the report."""
        made = list(itertools.chain.from_iterable(root.made.values() for root in self.observed.roots))
        return {
            "verdict": self.verdict,
            "entries": sum(len(known) for known in self.known),
            "used": len(self.used),
            "used_entries": self.used[:_NAMED],
            "made": len(self.made),
            "made_entries": self.made[:_NAMED],
            "made_files": sum(each.files for each in made),
            "made_bytes": sum(each.bytes for each in made),
            "made_seconds": round(self.observed.made_seconds, 3),
            "complete": self.observed.complete,
            "log": {
                "loaded": self.engine.loaded,
                "loaded_seconds": round(self.engine.loaded_seconds, 3),
                "compiled": self.engine.compiled,
                "compiled_seconds": round(self.engine.compiled_seconds, 3),
            },
        }


class Watched:
    """A kernel cache that has been put in place, watched while a server starts on it."""

    def __init__(self, roots: Sequence["StoredRoot"], where: Mapping[str, Path]) -> None:
        """`where` says by the names of the roots where each of them is."""
        from restore.rungs.observe import Watch

        self._known = [frozenset(entry.key for entry in root.entries) for root in roots]
        self._watch = Watch([(root.kind, where[root.name]) for root in roots])

    def __enter__(self) -> Self:
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.__exit__(kind, error, trace)

    def proof(self, engine: Compiled) -> Proof:
        """What has come of it until now; `engine` is what its log says."""
        return Proof(known=self._known, observed=self._watch.observed(), engine=engine)
