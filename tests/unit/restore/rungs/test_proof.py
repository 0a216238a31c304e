# SPDX-License-Identifier: Apache-2.0
"""Whether a cache was hit is judged by what was read and made in it, and by what the server says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from oci.cache.inventory import Entry, StoredRoot
from rekindle.digest import Digest
from rekindle.engine import Compiled
from rekindle.engine.caches import CacheKind
from restore.rungs.observe import Made, Observed, ObservedRoot
from restore.rungs.proof import Proof, WatchedCache
from tests.samples.cache import write

VLLM, TRITON, INDUCTOR = CacheKind.VLLM, CacheKind.TRITON, CacheKind.INDUCTOR
GRAPH, OTHER = "torch_compile_cache/0", "torch_compile_cache/1"
Seen = tuple[CacheKind, str, str, str]  # known, used and made entries of a root


def observed(*roots: Seen, seconds: float = 0.0, complete: bool = True) -> Observed:
    found = [
        ObservedRoot(
            kind=kind,
            path=Path("/c"),
            used=frozenset(used.split()),
            made={key: Made(files=2, bytes=10) for key in made.split()},
        )
        for kind, _, used, made in roots
    ]
    return Observed(roots=found, made_seconds=seconds, complete=complete)


def proof(*roots: Seen, loaded: int = 0, compiled: int = 0, **more: Any) -> Proof:
    return Proof(
        known=[frozenset(known.split()) for _, known, _, _ in roots],
        observed=observed(*roots, **more),
        engine=Compiled(
            loaded=loaded, loaded_seconds=loaded * 0.5, compiled=compiled, compiled_seconds=compiled * 10.0
        ),
    )


VERDICTS: dict[str, tuple[list[Seen], Mapping[str, int], str]] = {
    "nothing at all": ([], {}, "unused"),
    "nothing was looked at": ([(TRITON, "A B", "", "")], {}, "unused"),
    "all was read": ([(TRITON, "A B", "A B", "")], {}, "hit"),
    "some was read": ([(TRITON, "A B", "A", "")], {}, "hit"),
    "some was read, and some made": ([(TRITON, "A B", "A", "C")], {}, "partial"),
    "another was made": ([(TRITON, "A B", "", "C")], {}, "miss"),
    "it was read, and made again": ([(TRITON, "A", "A", "A")], {}, "miss"),
    "what was read came from elsewhere": ([(TRITON, "A", "X", "")], {}, "unused"),
    "what was read came from elsewhere, and some was made": ([(TRITON, "A", "X", "C")], {}, "miss"),
    "all of many were read": ([(TRITON, "*", "A", "")], {}, "hit"),
    "read in one, made in another": ([(TRITON, "A", "A", ""), (VLLM, GRAPH, "", OTHER)], {}, "partial"),
    "only notes are new": ([(VLLM, GRAPH, GRAPH, ". modelinfos")], {}, "hit"),
    "only notes are new, and nothing was read": ([(VLLM, GRAPH, "", ".")], {}, "miss"),
    "only notes were read": ([(VLLM, "modelinfos", "modelinfos", "")], {}, "hit"),
    "only notes were read, and a graph was made": (
        [(VLLM, f"modelinfos . {GRAPH}", "modelinfos .", OTHER)],
        {},
        "miss",
    ),
    "code of Inductor's was read, and some made": ([(INDUCTOR, ".", ".", "fxgraph/a/b")], {}, "partial"),
    "the log says that it was loaded": ([(VLLM, GRAPH, "", "")], {"loaded": 2}, "hit"),
    "loaded, and files were written": ([(VLLM, GRAPH, GRAPH, OTHER)], {"loaded": 2}, "hit"),
    "loaded, and compiled": ([(VLLM, GRAPH, GRAPH, OTHER)], {"loaded": 2, "compiled": 1}, "partial"),
    "the log says that it was compiled": ([(VLLM, GRAPH, "", "")], {"compiled": 1}, "miss"),
    "compiled, with kernels that were read": (
        [(VLLM, GRAPH, "", OTHER), (TRITON, "A", "A", "")],
        {"compiled": 1},
        "partial",
    ),
    "compiled, with notes that were read": (
        [(VLLM, f"{GRAPH} modelinfos", "modelinfos", OTHER)],
        {"compiled": 1},
        "miss",
    ),
}


@pytest.mark.parametrize(("roots", "log", "wanted"), VERDICTS.values(), ids=VERDICTS)
def test_a_cache_is_judged(roots: list[Seen], log: Mapping[str, int], wanted: str) -> None:
    assert proof(*roots, **log).verdict == wanted


def test_a_proof_in_a_report() -> None:
    found = proof(
        (TRITON, "A B", "A B X", "B"),
        (VLLM, GRAPH, GRAPH, ""),
        loaded=2,
        compiled=1,
        seconds=1.23456,
        complete=False,
    )
    assert json.loads(json.dumps(found.summary.to_json())) == {
        "verdict": "partial",
        "entries": 3,
        "used": 2,
        "used_entries": ["triton: A", f"vllm: {GRAPH}"],
        "made": 1,
        "made_entries": ["triton: B"],
        "made_files": 2,
        "made_bytes": 10,
        "made_seconds": 1.235,
        "complete": False,
        "log": {"loaded": 2, "loaded_seconds": 1.0, "compiled": 1, "compiled_seconds": 10.0},
    }


def test_a_report_names_some_of_many() -> None:
    keys = " ".join(f"K{number:03}" for number in range(100))
    document = proof((TRITON, keys, keys, "")).summary.to_json()
    assert (document["entries"], document["used"], len(document["used_entries"])) == (100, 100, 20)


def stored(kind: CacheKind, name: str, *keys: str) -> StoredRoot:
    entries = [
        Entry(key=key, targets=[], versions={}, files=1, bytes=1, digest=Digest.of_bytes(key.encode()))
        for key in keys
    ]
    prefix = f"io.rekindle.cache/{name}"
    return StoredRoot(kind=kind, recorded="/was", prefix=prefix, layer=0, files=1, bytes=1, entries=entries)


def test_a_cache_in_its_place_is_watched(tmp_path: Path) -> None:
    first, second = write(tmp_path / "one/KEY/k.json"), write(tmp_path / "two/KEY/k.json")
    roots = [stored(TRITON, "triton", "KEY"), stored(TRITON, "triton-2", "KEY", "OTHER")]
    where = {"triton-2": second.parents[1], "triton": first.parents[1]}
    with WatchedCache(roots, where) as watched:
        assert watched.proof(Compiled()).verdict == "unused"
        second.read_bytes()
        write(tmp_path / "one/NEW/k.json", b"12345")
        found = watched.proof(Compiled())
    assert found.verdict == "partial"
    document = found.summary.to_json()
    assert (document["entries"], document["used_entries"]) == (3, ["triton: KEY"])
    assert (document["made_entries"], document["made_bytes"]) == (["triton: NEW"], 5)
