# SPDX-License-Identifier: Apache-2.0
"""Identify the weights that a server has loaded: the digests of the model's files, and their revision."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from rekindle.digest import Digest
from rekindle.fields import JSON
from rekindle.node import sampled

# The files that determine a model's answers: weights, configuration, tokenizer, chat template.
_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf", ".json", ".model", ".jinja", ".txt"}
_FILES_LIMIT = 10_000


def identify(model: str, revision: str, environment: Mapping[str, str]) -> dict[str, JSON]:
    """Return a model's `{"model", "revision", "asked", "files": [{"name", "size", "sha256", "sampled"}]}`.

    `model` is a directory or a name in the cache of Hugging Face's hub; "files" is empty if it is neither.
    "revision" is a commit of the hub, or "", and "asked" is what names it: a branch, a tag, or the commit.
    "sampled" identifies a large file by parts of it. Reads every byte, with all cores: some 1.7 GB/s each.
    """
    from concurrent.futures import ThreadPoolExecutor

    directory, commit = locate(model, revision, environment)
    paths = [directory / name for name in names(directory)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        digests = list(pool.map(Digest.of_file, paths))
    return {
        "model": model,
        "revision": commit,
        "asked": revision,
        "files": [_describe(path, digest) for path, digest in zip(paths, digests, strict=True)],
    }


def _describe(path: Path, digest: Digest) -> dict[str, JSON]:
    size = path.stat().st_size
    found = {"name": path.name, "size": size, "sha256": digest.hex}
    return {**found, "sampled": sampled.identity(path)} if size > sampled.WHOLE_BYTES else found


class RecordedFile(Struct, frozen=True, kw_only=True):
    """A file of a recorded model. `identity` is that of `sampled.identity`, "" if only the size counts."""

    name: str
    size: int
    sha256: str
    identity: str


class RecordedModel(Struct, frozen=True, kw_only=True):
    """A model as `identify` described it."""

    name: str
    revision: str
    asked: str
    files: Sequence[RecordedFile]


def recorded(weights: Mapping[str, JSON]) -> RecordedModel | None:
    """Read what `identify` has described; None if that is nothing. Ignores what is malformed."""
    files = []
    listed = weights.get("files")
    for file in listed if isinstance(listed, list) else ():
        match file:
            case {"name": str(name), "size": int(size)}:
                sha256 = str(file.get("sha256", ""))
                small = sha256 and size <= sampled.WHOLE_BYTES
                identity = f"sha256:{sha256}" if small else str(file.get("sampled", ""))
                files.append(RecordedFile(name=name, size=size, sha256=sha256, identity=identity))
    name, revision, asked = (weights.get(each, "") for each in ("model", "revision", "asked"))
    if not files or not isinstance(name, str) or not isinstance(revision, str):
        return None
    asked = asked if isinstance(asked, str) and asked else "main"
    return RecordedModel(name=name, revision=revision, asked=asked, files=files)


def locate(model: str, asked: str, environment: Mapping[str, str], base: str = "") -> tuple[Path, str]:
    """Return the directory of a model, which need not exist, and its revision; "" for a directory.

    A relative path starts at `base`, by default the working directory.
    """
    directory = Path(base, model)
    # Unlike Path.is_dir, os.path.isdir is false for what this user may not look at.
    is_directory = model.startswith("/") or os.path.isdir(directory)  # noqa: PTH112
    return (directory, "") if is_directory else _in_hub_cache(model, asked, environment)


def names(directory: Path) -> list[str]:
    """Return the names of the files in a directory that belong to a model, in order."""
    found = [path for path in _list(directory) if path.suffix in _SUFFIXES and os.path.isfile(path)]  # noqa: PTH113
    return sorted(path.name for path in found)[:_FILES_LIMIT]


def hub_digest(path: str) -> str:
    """Return the sha256 by which the hub's cache names the content of a large file, or "".

    There, `snapshots/COMMIT/NAME` is a link to `blobs/DIGEST`. Small files have the digest of a git blob.
    """
    try:
        target = os.readlink(path)  # noqa: PTH115
    except (OSError, ValueError):
        return ""
    above, _, name = target.rpartition("/")
    return name if above.endswith("/blobs") and len(name) == 64 else ""


def recorded_paths(recorded: Mapping[str, JSON], environment: Mapping[str, str]) -> list[Path]:
    """Return where the files of a recorded model are to be on this node, in order; none if it has none."""
    return [path for path, _ in _expected(recorded, environment) if path is not None]


def _expected(recorded: Mapping[str, JSON], environment: Mapping[str, str]) -> list[tuple[Path | None, str]]:
    """Return the paths of a recorded model's files on this node, with the digests that they are to have.

    The path is None if no file can have the recorded name.
    """
    model, revision = recorded.get("model"), recorded.get("revision")
    if not isinstance(model, str) or not recorded.get("files"):
        return []
    directory, _ = locate(model, revision if isinstance(revision, str) else "", environment)
    names = [(str(file.get("name")), str(file.get("sha256"))) for file in recorded["files"]]
    return [(directory / name if _is_name(name) else None, sha256) for name, sha256 in names]


def _is_name(name: str) -> bool:
    return "/" not in name and name not in {"", ".", ".."}


class Comparison:
    """Compares a recorded model's files with those of this node, in threads, and reads every byte of them.

    The files are read in order, which brings them into the page cache for a server that reads them next.
    """

    def __init__(self, recorded: Mapping[str, JSON], environment: Mapping[str, str]) -> None:
        """Begin."""
        self._left = deque(_expected(recorded, environment))
        self._changed: list[str] = []
        self._running = min(len(os.sched_getaffinity(0)), len(self._left))
        self._lock, self._over = threading.Lock(), threading.Event()
        if not self._running:
            self._over.set()
        for _ in range(self._running):
            threading.Thread(target=self._run, name="weights", daemon=True).start()

    def changed(self) -> list[str]:
        """Wait for the result: the names of files that are missing or different."""
        self._over.wait()
        return sorted(self._changed)

    def stop(self) -> None:
        """Compare no further file. Idempotent."""
        self._left.clear()

    def _run(self) -> None:
        with contextlib.suppress(IndexError):  # there is none left
            while True:
                path, expected = self._left.popleft()
                try:
                    same = path is not None and Digest.of_file(path).hex == expected
                except (OSError, ValueError):
                    same = False
                if not same:
                    self._changed.append(path.name if path else "a file without a name")
        with self._lock:
            self._running -= 1
            if not self._running:
                self._over.set()


def _list(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def _in_hub_cache(model: str, revision: str, environment: Mapping[str, str]) -> tuple[Path, str]:
    """Return huggingface_hub's directory of a model, `models--ORG--NAME/snapshots/COMMIT`, and the commit."""
    home = Path(environment.get("HF_HOME") or Path(environment.get("HOME") or "/", ".cache/huggingface"))
    cache = Path(environment.get("HF_HUB_CACHE") or home / "hub")
    directory = cache / ("models--" + model.replace("/", "--"))
    try:
        commit = (directory / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    return directory / "snapshots" / commit, commit
