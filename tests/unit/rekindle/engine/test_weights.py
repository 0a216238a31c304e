# SPDX-License-Identifier: Apache-2.0
"""A model's identity: its files by digest, wherever vLLM finds them."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs

from oci.trust import signer
from rekindle.engine.vllm import VllmEngine
from rekindle.engine.weights import Comparison, identify, recorded_paths
from rekindle.errors import FormatError
from rekindle.record import Record
from tests.samples.record import RECORD

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill(directory: Path) -> list[dict[str, object]]:
    directory.mkdir(parents=True)
    contents = {"config.json": b"{}", "model.safetensors": b"weights"}
    for name, content in {**contents, "README.md": b"not of it"}.items():
        (directory / name).write_bytes(content)
    return [
        {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    ]


def test_a_directory_is_its_files(tmp_path: Path) -> None:
    files = fill(tmp_path / "model")
    found = identify(str(tmp_path / "model"), "main", {})
    assert found == {"model": str(tmp_path / "model"), "revision": "", "asked": "main", "files": files}


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_model_of_the_hub_is_its_commit(tmp_path: Path, revision: str) -> None:
    cached = tmp_path / "hub" / "models--org--name"
    files = fill(cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT + "\n")
    found = identify("org/name", revision, {"HF_HOME": str(tmp_path)})
    assert found == {"model": "org/name", "revision": COMMIT, "asked": revision, "files": files}


def test_what_is_nowhere_has_no_files(tmp_path: Path) -> None:
    assert identify("org/name", "main", {"HF_HUB_CACHE": str(tmp_path)})["files"] == []


def lose(model: Path) -> None:
    (model / "model.safetensors").unlink()


def spoil(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"Weights")


def add(model: Path) -> None:
    (model / "other.safetensors").write_bytes(b"more")


@pytest.mark.parametrize(
    ("change", "found"),
    [(lose, ["model.safetensors"]), (spoil, ["model.safetensors"]), (add, []), (Path.stat, [])],
)
def test_every_byte_of_a_model_is_compared(
    tmp_path: Path, change: Callable[[Path], object], found: list[str]
) -> None:
    fill(tmp_path / "model")
    known = identify(str(tmp_path / "model"), "main", {})
    change(tmp_path / "model")
    assert Comparison(known, {}).changed() == found


@pytest.mark.parametrize("known", [{}, {"model": "org/name", "files": []}])
def test_a_model_without_known_files_is_not_compared(known: dict[str, object]) -> None:
    assert Comparison(known, {}).changed() == []
    assert recorded_paths(known, {}) == []


def test_no_file_outside_of_a_model_is_read(tmp_path: Path) -> None:
    fill(tmp_path / "model")
    known = identify(str(tmp_path / "model"), "main", {})
    strangers = [{"name": name} for name in ("/etc/passwd", "../model", "", "..")]
    others = {**known, "files": [*known["files"], *strangers]}
    assert Comparison(others, {}).changed() == ["a file without a name"] * 4
    paths = recorded_paths(others, {})
    assert paths == [tmp_path / "model/config.json", tmp_path / "model/model.safetensors"]


@pytest.mark.parametrize(
    ("words", "model"),
    [
        (["vllm", "serve", "org/name", "--port", "1"], ("org/name", "main")),
        (["vllm", "serve", "--port", "1", "--model", "/m"], ("/m", "main")),
        (["vllm", "serve", "/m", "--revision", "v2"], ("/m", "v2")),
        (["python", "-m", "vllm.entrypoints.openai.api_server", "--model=/m"], ("/m", "main")),
        (["vllm", "serve", "--port", "1"], None),
    ],
)
def test_a_command_names_its_model(words: list[str], model: tuple[str, str] | None) -> None:
    engine = VllmEngine.recognize(words)
    assert engine is not None
    assert engine.model(words) == model


def test_a_record_and_its_attestation_carry_it(tmp_path: Path) -> None:
    fill(tmp_path / "model")
    weights = identify(str(tmp_path / "model"), "main", {})
    record = Record.parse(structs.replace(RECORD, weights=weights).to_bytes())
    assert record.weights == weights
    assert signer.predicate(record)["weights"] == weights


def test_weights_that_are_no_object_are_refused() -> None:
    content = RECORD.to_bytes().replace(b'"weights": {}', b'"weights": []')
    with pytest.raises(FormatError, match="weights"):
        Record.parse(content)
