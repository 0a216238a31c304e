# SPDX-License-Identifier: Apache-2.0
"""Identify the weights that a server has loaded: the digests of the model's files, and their revision."""

import os
from collections.abc import Mapping
from pathlib import Path

from rekindle.digest import Digest
from rekindle.fields import JSON

# The files that determine a model's answers: weights, configuration, tokenizer, chat template.
_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf", ".json", ".model", ".jinja", ".txt"}
_FILES_LIMIT = 10_000


def identify(model: str, revision: str, environment: Mapping[str, str]) -> dict[str, JSON]:
    """Return a model's `{"model", "revision", "files": [{"name", "size", "sha256"}]}`.

    `model` is a directory or a name in the cache of Hugging Face's hub; "files" is empty if it is neither.
    "revision" is a commit of the hub, or "". Reads every byte, with all cores: some 1.7 GB/s each.
    """
    from concurrent.futures import ThreadPoolExecutor

    directory, commit = Path(model), ""
    if not directory.is_dir():
        directory, commit = _in_hub_cache(model, revision, environment)
    paths = sorted(path for path in _list(directory) if path.suffix in _SUFFIXES and path.is_file())
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        digests = list(pool.map(Digest.of_file, paths[:_FILES_LIMIT]))
    files = [
        {"name": path.name, "size": path.stat().st_size, "sha256": digest.hex}
        for path, digest in zip(paths, digests, strict=False)
    ]
    return {"model": model, "revision": commit, "files": files}


def changed_files(recorded: Mapping[str, JSON], environment: Mapping[str, str]) -> list[str]:
    """Return the names of recorded files that are missing or different on this node. Reads every byte."""
    model, revision = recorded.get("model"), recorded.get("revision")
    if not isinstance(model, str) or not recorded.get("files"):
        return []
    here = identify(model, revision if isinstance(revision, str) else "", environment)
    known = {file["name"]: file["sha256"] for file in here["files"]}
    return [
        str(file["name"])
        for file in recorded["files"]
        if isinstance(file, dict) and known.get(file.get("name")) != file.get("sha256")
    ]


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
