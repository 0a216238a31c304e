# SPDX-License-Identifier: Apache-2.0
"""Prove that a start used the kernel cache: which entries it read, and which it compiled again."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from msgspec import Struct

from rekindle.engine import Compiled
from rekindle.engine.caches import CacheKind
from rekindle.report import CacheUse

if TYPE_CHECKING:
    from oci.cache.inventory import StoredRoot
    from restore.rungs.observe import Observed

_METADATA = {f"{CacheKind.VLLM}: .", f"{CacheKind.VLLM}: modelinfos"}  # read by every start
_REPORTED_LIMIT = 20  # entries of each list in a report


class Proof(Struct, frozen=True, kw_only=True):
    """The observations in the file system, and the words of the engine's log.

    `known` holds the keys of the image's entries, one set for each observed root, in the same order.
    """

    known: Sequence[frozenset[str]]
    observed: "Observed"
    engine: Compiled

    @property
    def used(self) -> list[str]:
        """The entries of the image that were read and not made again."""
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
        """The share of the cache that was used.

        `hit`: everything came from the cache; `partial`: something was compiled, too; `miss`: no entry
        of the cache was used; `unused`: the server neither read nor compiled anything.
        """
        if self.engine.compiled or self._made_kernels():
            kernels = [entry for entry in self.used if entry not in _METADATA]
            return "partial" if kernels or self.engine.loaded else "miss"
        if self.used or self.engine.loaded:
            return "hit"
        return "miss" if self.made else "unused"

    def _made_kernels(self) -> bool:
        """Return whether more was made than the metadata that every start writes."""
        made = any(key not in {".", "modelinfos"} for root in self.observed.roots for key in root.made)
        return made and not self.engine.loaded

    @property
    def summary(self) -> CacheUse:
        """The proof in the form of the report."""
        made = list(itertools.chain.from_iterable(root.made.values() for root in self.observed.roots))
        return CacheUse(
            verdict=self.verdict,
            entries=sum(len(known) for known in self.known),
            used=len(self.used),
            used_entries=self.used[:_REPORTED_LIMIT],
            made=len(self.made),
            made_entries=self.made[:_REPORTED_LIMIT],
            made_files=sum(each.files for each in made),
            made_bytes=sum(each.bytes for each in made),
            made_seconds=self.observed.made_seconds,
            complete=self.observed.complete,
            loaded=self.engine.loaded,
            loaded_seconds=self.engine.loaded_seconds,
            compiled=self.engine.compiled,
            compiled_seconds=self.engine.compiled_seconds,
        )


class WatchedCache:
    """An extracted kernel cache, watched within the context while a server starts on it."""

    def __init__(self, roots: Sequence["StoredRoot"], where: Mapping[str, Path]) -> None:
        """`where` is the directory of each root, by the root's name."""
        from restore.rungs.observe import CacheWatch

        self._known = [frozenset(entry.key for entry in root.entries) for root in roots]
        self._watch = CacheWatch([(root.kind, where[root.name]) for root in roots])

    def __enter__(self) -> Self:
        self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.__exit__(kind, error, trace)

    def proof(self, engine: Compiled) -> Proof:
        """Return what has been observed so far, with what the engine's log says."""
        return Proof(known=self._known, observed=self._watch.observed(), engine=engine)
