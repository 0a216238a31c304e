# SPDX-License-Identifier: Apache-2.0
"""Which weights a server has loaded: the files of its model, by digest, and their revision on a hub."""

import os
from collections.abc import Mapping
from pathlib import Path

from rekindle.digest import Digest
from rekindle.fields import JSON

# What decides a model's answers: weights, configuration, tokenizer, chat template.
_SUFFIXES = {".safetensors", ".bin", ".pt", ".gguf", ".json", ".model", ".jinja", ".txt"}
_FILES_LIMIT = 10_000


def identify(model: str, revision: str, environment: Mapping[str, str]) -> dict[str, JSON]:
    """The identity of a model that is a directory, or in the cache of Hugging Face's hub, as
    `{"model", "revision", "files": [{"name", "size", "sha256"}]}`; without files if it is neither.

    Reads every byte, with all cores: some 1.7 GB/s each. The revision is a commit of the hub, or empty.
    """
    from concurrent.futures import ThreadPoolExecutor

    directory, commit = Path(model), ""
    if not directory.is_dir():
        directory, commit = _in_hub_cache(model, revision, environment)
    paths = sorted(path for path in _listed(directory) if path.suffix in _SUFFIXES and path.is_file())
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        digests = list(pool.map(Digest.of_file, paths[:_FILES_LIMIT]))
    files = [
        {"name": path.name, "size": path.stat().st_size, "sha256": digest.hex}
        for path, digest in zip(paths, digests, strict=False)
    ]
    return {"model": model, "revision": commit, "files": files}


def changed(recorded: Mapping[str, JSON], environment: Mapping[str, str]) -> list[str]:
    """The names of the recorded files that are missing here, or have other content. Reads every byte."""
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


def _listed(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except OSError:
        return []


def _in_hub_cache(model: str, revision: str, environment: Mapping[str, str]) -> tuple[Path, str]:
    """Where huggingface_hub keeps a model, and of which commit: `models--ORG--NAME/snapshots/COMMIT`."""
    home = Path(environment.get("HF_HOME") or Path(environment.get("HOME") or "/", ".cache/huggingface"))
    cache = Path(environment.get("HF_HUB_CACHE") or home / "hub")
    directory = cache / ("models--" + model.replace("/", "--"))
    try:
        commit = (directory / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    return directory / "snapshots" / commit, commit
