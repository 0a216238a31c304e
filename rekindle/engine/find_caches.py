# SPDX-License-Identifier: Apache-2.0
"""Find the kernel caches of a server by its environment, its open files and the content of directories."""

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from rekindle.engine.caches import VARIABLES, CacheKind, CacheRoot, is_within, path_below, path_of

_DELETED = " (deleted)"
_ENTRIES_LIMIT = 1000  # entries of a directory that are read to recognise it

# Paths of files within caches; the group is the cache's directory. Triton's keys are 32 bytes in base32.
_PATTERNS: tuple[tuple[CacheKind, re.Pattern[str]], ...] = (
    (CacheKind.VLLM, re.compile(r"(/.+?)/torch_compile_cache/.+")),
    (CacheKind.INDUCTOR, re.compile(r"(/(?:.+?/)?torchinductor_[^/]+)/.+")),
    (CacheKind.FLASHINFER, re.compile(r"(/(?:.+?/)?\.cache/flashinfer)/.+")),
    (CacheKind.TORCH_EXTENSIONS, re.compile(r"(/(?:.+?/)?torch_extensions/py3[^/]*)/.+")),
    (CacheKind.DEEP_GEMM, re.compile(r"(/.+?)/cache/kernel\.[^/]+/.+")),
    (CacheKind.CUDA, re.compile(r"(/(?:.+?/)?\.nv/ComputeCache)/.+")),
    (CacheKind.TRITON, re.compile(r"(/.+)/[A-Z2-7]{52}/[^/]+")),
    (CacheKind.TRITON, re.compile(r"(/(?:.+?/)?\.triton/cache)/.+")),
)
_TRITON_KEY = re.compile(r"[A-Z2-7]{52}")
_TORCH_BUILD = re.compile(r"py3\d+\w*_\w+")
_FLASHINFER_VERSION = re.compile(r"\d+\.\d+.*|\d+[a-z]?(_\d+[a-z]?)*")


def find(
    environment: Mapping[str, str],
    opened: Iterable[str],
    readable: Callable[[str], Path],
    *,
    usual_places: bool = True,
) -> list[CacheRoot]:
    """Return the caches of a server that hold files, each once and none within another.

    `opened` are the paths that its processes have open or mapped. `readable` maps a path as the server sees
    it to a path that can be read here. Without `usual_places`, only caches that a variable names or that
    have open files are returned.
    """
    candidates: dict[str, CacheKind] = {}
    for kind in CacheKind:
        if not usual_places and not environment.get(VARIABLES[kind]):
            continue
        where = path_of(kind, environment)
        if kind is CacheKind.TORCH_EXTENSIONS and not environment.get("TORCH_EXTENSIONS_DIR"):
            for name in _names(readable(where)):
                if _TORCH_BUILD.fullmatch(name):
                    candidates.setdefault(posixpath.join(where, name), kind)
            continue
        candidates.setdefault(where, kind)
    for path in opened:
        for kind, pattern in _PATTERNS:
            if match := pattern.fullmatch(posixpath.normpath(path.removesuffix(_DELETED))):
                candidates.setdefault(match[1], kind)
                break
    hubs = models(environment)
    roots = [
        CacheRoot(kind=kind, path=readable(recorded), recorded=recorded)
        for recorded, kind in candidates.items()
        if not any(is_within(model, recorded) or is_within(recorded, model) for model in hubs)
    ]
    return _outermost(root for root in roots if _holds_a_file(root.path))


def recognise(directory: Path) -> CacheKind | None:
    """Return the kind of cache that a directory is, by its content; None if it is unknown."""
    names = _names(directory)
    inner = [name for name in names if (directory / name).is_dir()]
    if {"torch_compile_cache", "modelinfos"} & set(inner):
        return CacheKind.VLLM
    if any(_TRITON_KEY.fullmatch(name) or _has(directory / name, "__grp__*.json") for name in inner):
        return CacheKind.TRITON
    if {"fxgraph", "aotautograd"} & set(inner) or directory.name.startswith("torchinductor_"):
        return CacheKind.INDUCTOR
    if _has(directory, "cache/kernel.*"):
        return CacheKind.DEEP_GEMM
    if any(_has(directory / name, "build.ninja") for name in inner):
        return CacheKind.TORCH_EXTENSIONS
    if any(
        _FLASHINFER_VERSION.fullmatch(name)
        and any(
            _has(directory / name, f"{depth}{part}")
            for depth in ("", "*/")
            for part in ("cached_ops", "generated")
        )
        for name in inner
    ):
        return CacheKind.FLASHINFER
    if "index" in names and any(re.fullmatch(r"[0-9a-f]", name) for name in inner):
        return CacheKind.CUDA
    return None


def find_below(directory: Path, kind: CacheKind | None = None) -> list[CacheRoot]:
    """Return the cache that a directory is, by its content or `kind`, or else those in its subdirectories.

    A subdirectory named like a kind is of that kind, as `rekindle extract --to` makes them.
    """
    directory = directory.absolute()
    found = kind or recognise(directory)
    if found is not None:
        inside = path_below(found, directory)
        roots = [_root(found, inside if inside.is_dir() else directory)]
    else:
        roots = []
        for name in _names(directory):
            path = directory / name
            known = next((each for each in CacheKind if re.fullmatch(rf"{each}(-\d+)?", name)), None)
            if path.is_dir() and (inner := known or recognise(path)):
                inside = path_below(inner, path)
                roots.append(_root(inner, inside if inside.is_dir() else path))
    return [root for root in roots if _holds_a_file(root.path)]


def _root(kind: CacheKind, path: Path) -> CacheRoot:
    return CacheRoot(kind=kind, path=path, recorded=str(path))


def _outermost(roots: Iterable[CacheRoot]) -> list[CacheRoot]:
    """Drop the caches that lie in another one: vLLM keeps an Inductor and a Triton cache in its own."""
    kept: list[CacheRoot] = []
    for root in sorted(roots, key=lambda root: len(root.recorded)):
        if not any(
            is_within(root.recorded, other.recorded) or root.path.resolve() == other.path.resolve()
            for other in kept
        ):
            kept.append(root)
    order = list(CacheKind)
    return sorted(kept, key=lambda root: (order.index(root.kind), root.recorded))


def models(environment: Mapping[str, str]) -> list[str]:
    """Return the directories of models. A directory that contains or lies in one is not a kernel cache."""
    home = environment.get("HOME") or "/root"
    caches = environment.get("XDG_CACHE_HOME") or posixpath.join(home, ".cache")
    named = [environment[name] for name in ("HF_HOME", "HF_HUB_CACHE") if environment.get(name)]
    return [posixpath.normpath(path) for path in (*named, posixpath.join(caches, "huggingface"))]


def _names(directory: Path) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry, _ in zip(entries, range(_ENTRIES_LIMIT), strict=False))
    except OSError:
        return []


def _has(directory: Path, pattern: str) -> bool:
    try:
        return next(directory.glob(pattern), None) is not None
    except OSError:
        return False


def _holds_a_file(directory: Path) -> bool:
    return next(_files(directory), None) is not None


def _files(directory: Path) -> Iterator[str]:
    for _, _, names in os.walk(directory):
        yield from names
