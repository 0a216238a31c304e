# SPDX-License-Identifier: Apache-2.0
"""What a server has loaded is what a start would load here, or it is said what a start would load."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from rekindle.engine import weights
from rekindle.node import loaded, sampled
from rekindle.node.loaded import CodeDirectory, Loaded, LoadedFile, LoadedKind
from restore.decide import match_loaded
from restore.decide.difference import Difference
from tests.samples.record import RECORD


def short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def compared(*files: LoadedFile, given: tuple[str, ...] = (), **changes: Any) -> list[Difference]:
    loaded = Loaded(files=files, **{k: v for k, v in changes.items() if k in {"code", "search_path"}})
    others = {k: v for k, v in changes.items() if k not in {"code", "search_path"}}
    record = structs.replace(RECORD, mapped_files=[], loaded=loaded, **others)
    return match_loaded.compare(record, given, {})


def codes(found: list[Difference]) -> list[tuple[str, str]]:
    return [(each.code, each.here) for each in found]


def recorded(path: Path, kind: LoadedKind, name: str = "") -> LoadedFile:
    return LoadedFile(
        path=name or str(path), size=path.stat().st_size, identity=sampled.identity(path), kind=kind
    )


KINDS = [
    (LoadedKind.NAMED, "named-file", "named-file"),
    (LoadedKind.MODEL, "model-changed", "model-file"),
    (LoadedKind.CODE, "code-file", "code-file"),
    (LoadedKind.OTHER, "read-file", "read-file"),
]


@pytest.mark.parametrize(("kind", "changed", "missing"), KINDS)
def test_a_file_of_a_kind(kind: LoadedKind, changed: str, missing: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1")
    file = recorded(path, kind)
    assert compared(file) == []
    path.write_bytes(b"2")
    assert codes(compared(file)) == [(changed, f"sha256:{short(b'2')}")]
    path.write_bytes(b"longer")
    assert codes(compared(file)) == [(changed, "6 bytes")]
    path.unlink()
    assert codes(compared(file)) == [(missing, "missing")]
    path.mkdir()
    assert [each.code for each in compared(file)] == [changed]


def test_a_relative_path_starts_where_a_start_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("then", "now"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    file = recorded(tmp_path / "then/file", LoadedKind.NAMED, "file")
    monkeypatch.chdir(tmp_path / "now")
    there = str(tmp_path / "then")
    assert compared(file, directory=there) == [], "the recorded command starts in its directory"
    assert codes(compared(file, directory=there, given=("server",))) == [("named-file", "3 bytes")]
    assert codes(compared(file, directory="/nothing")) == [("named-file", "3 bytes")]


@pytest.mark.parametrize("path", ["/dev/zero", "/", "/proc/self/mem", "x" * 5000])
def test_no_record_makes_anybody_read_for_ever(path: str) -> None:
    digest = short(b"")
    code = CodeDirectory(path="/", files={path.lstrip("/") or "x": digest, "a\0b": digest})
    file = LoadedFile(path=path, size=0, identity="sha256:" + "0" * 64)
    found = compared(file, code=(code,))
    assert {each.code for each in found} >= {"code-file", "read-file"}


def test_changes_of_one_package_are_told_once(tmp_path: Path) -> None:
    for name in ("a.py", "b.py", "c.py"):
        (tmp_path / "package").mkdir(exist_ok=True)
        (tmp_path / "package" / name).write_bytes(b"1")
    files = {f"package/{name}": short(b"1") for name in ("a.py", "b.py", "c.py")}
    code = CodeDirectory(path=str(tmp_path), files=files, entries=("package",))
    assert compared(code=(code,)) == []
    (tmp_path / "package/a.py").write_bytes(b"2")
    (tmp_path / "package/c.py").unlink()
    (found,) = compared(code=(code,))
    assert found.field == f"{tmp_path}/package/a.py and 1 others of its package"
    assert (found.code, found.here) == ("code-file", f"sha256:{short(b'2')}")


def test_a_directory_of_code_that_is_gone(tmp_path: Path) -> None:
    code = CodeDirectory(path=str(tmp_path / "gone"), files={"a.py": short(b"")})
    assert codes(compared(code=(code,))) == [("code-file", "missing")]
    assert compared(code=(structs.replace(code, files={}),)) == []


def python(prefix: Path) -> Path:
    """A virtual environment, as far as the search for packages looks."""
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin/python3.11").write_bytes(b"")
    (prefix / "bin/python3.11").chmod(0o755)
    (prefix / "pyvenv.cfg").write_text("home = /nothing/bin\ninclude-system-site-packages = false\n")
    (prefix / "lib/python3.11/site-packages").mkdir(parents=True)
    return prefix / "lib/python3.11/site-packages"


def test_another_environment_is_another_search_path(tmp_path: Path) -> None:
    old, new = python(tmp_path / "old"), python(tmp_path / "new")
    code = (CodeDirectory(path=str(old)),)
    program = f"{tmp_path}/old/bin/python3.11", f"{tmp_path}/new/bin/python3.11"
    assert compared(code=code, search_path=(str(old),), given=(program[0],)) == []
    (found,) = compared(code=code, search_path=(str(old),), given=(program[1],))
    assert (found.code, found.recorded, found.here) == ("package", str(old), f"not searched: {new} is")


def test_a_directory_that_is_searched_in_addition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, added = python(tmp_path / "venv"), tmp_path / "added"
    (site / "module.py").write_bytes(b"")
    (added / "tool-1.0.dist-info").mkdir(parents=True)
    code = (CodeDirectory(path=str(site), files={"module.py": short(b"")}, entries=("module.py",)),)
    record = structs.replace(
        RECORD, mapped_files=[], loaded=Loaded(search_path=(str(site),), code=code, files=())
    )

    def found() -> list[tuple[str, str]]:
        command = [f"{tmp_path}/venv/bin/python3.11", "server.py"]
        differences = match_loaded.compare(record, command, {"PYTHONPATH": str(added)})
        return [(each.code, each.field) for each in differences]

    assert found() == [("package-other", "tool")]
    (added / "module.py").write_bytes(b"")
    assert found() == [("package-other", "tool"), ("package", f"{added}/module.py")]


COMMIT, OTHER = "0" * 40, "1" * 40


class Hub:
    """The cache of the hub with one model of two revisions, and a record of the first."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.place = home / "hub/models--org--name"
        large = b"x" * (2 << 20)
        for commit in (COMMIT, OTHER):
            self.add(commit, "config.json", b"{}", "2" * 40)
            self.add(commit, "model.safetensors", large, hashlib.sha256(large).hexdigest())
        self.main(COMMIT)
        self.weights = weights.identify("org/name", "main", self.environment)

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_HOME": str(self.home)}

    def main(self, commit: str) -> None:
        (self.place / "refs").mkdir(parents=True, exist_ok=True)
        (self.place / "refs/main").write_text(commit)

    def add(self, commit: str, name: str, content: bytes, digest: str) -> None:
        blob, link = self.place / "blobs" / digest, self.place / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.unlink(missing_ok=True)
        link.symlink_to(f"../../blobs/{digest}")

    def compared(self, **options: Any) -> list[tuple[str, str]]:
        engine = structs.replace(RECORD.engine, options=options)
        record = structs.replace(RECORD, mapped_files=[], weights=self.weights, engine=engine)
        found = match_loaded.compare(record, (), self.environment)
        return [(each.code, each.field.removeprefix(f"{self.place}/snapshots/")) for each in found]


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path)


def test_a_model_of_the_hub_is_the_same(hub: Hub) -> None:
    assert hub.compared() == []
    (hub.place / "snapshots" / COMMIT / "README.txt").write_text("another program fetched this file")
    assert hub.compared() == []


def test_a_branch_that_has_moved_is_another_model(hub: Hub) -> None:
    hub.main(OTHER)
    assert hub.compared() == [("model-changed", "revision of org/name")]
    assert hub.compared(asleep=2) == [("model-reloaded", "revision of org/name")]


def test_the_hubs_name_of_a_large_file_is_believed(hub: Hub) -> None:
    """It is the sha256; to read gigabytes is not the task of a restore."""
    blob = (hub.place / "snapshots" / COMMIT / "model.safetensors").resolve()
    blob.write_bytes(b"y" * (2 << 20))
    assert hub.compared() == []


def test_other_content_with_another_name(hub: Hub) -> None:
    hub.add(COMMIT, "model.safetensors", b"y" * (2 << 20), "3" * 64)
    assert hub.compared() == [("model-changed", f"{COMMIT}/model.safetensors")]


def test_the_same_content_with_another_name(hub: Hub) -> None:
    hub.add(COMMIT, "model.safetensors", b"x" * (2 << 20), "3" * 64)
    assert hub.compared() == []


def test_a_small_file_is_read(hub: Hub) -> None:
    (hub.place / "snapshots" / COMMIT / "config.json").resolve().write_bytes(b"[]")
    assert hub.compared() == [("model-changed", f"{COMMIT}/config.json")]


def test_a_model_that_is_gone_is_only_told(hub: Hub) -> None:
    (hub.place / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert hub.compared() == [("model-file", f"{COMMIT}/model.safetensors")]
    assert hub.compared(asleep=2) == [("model-reloaded", f"{COMMIT}/model.safetensors")]


CHANGES: dict[str, tuple[Callable[[Path], object], list[tuple[str, str]]]] = {
    "nothing": (lambda _: None, []),
    "a chat template": (lambda d: (d / "chat.jinja").write_text("2"), [("model-changed", "chat.jinja")]),
    "weights": (
        lambda d: (d / "model.safetensors").write_bytes(b"y" * (2 << 20)),
        [("model-changed", "model.safetensors")],
    ),
    "a new file": (
        lambda d: (d / "generation_config.json").write_text("{}"),
        [("model-changed", "generation_config.json")],
    ),
    "a new file that is not of a model": (lambda d: (d / "notes.md").write_text("{}"), []),
    "a file that is gone": (lambda d: (d / "chat.jinja").unlink(), [("model-file", "chat.jinja")]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_in_a_directory(name: str, tmp_path: Path) -> None:
    change, wanted = CHANGES[name]
    (tmp_path / "chat.jinja").write_text("1")
    (tmp_path / "model.safetensors").write_bytes(b"x" * (2 << 20))
    described = weights.identify(str(tmp_path), "main", {})
    change(tmp_path)
    record = structs.replace(RECORD, mapped_files=[], weights=described)
    found = match_loaded.compare(record, (), {})
    assert [(each.code, each.field.removeprefix(f"{tmp_path}/")) for each in found] == wanted


def test_a_large_file_of_an_older_record_is_known_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * (2 << 20))
    described = weights.identify(str(tmp_path), "main", {})
    del described["files"][0]["sampled"]
    (tmp_path / "model.safetensors").write_bytes(b"y" * (2 << 20))
    record = structs.replace(RECORD, mapped_files=[], weights=described)
    assert match_loaded.compare(record, (), {}) == []


@pytest.mark.parametrize(
    ("name", "matters"),
    [
        *(
            (name, False)
            for name in ("server.log", "server.bak", "json.txt", "server.py.orig", "server.so.1")
        ),
        *((name, True) for name in ("json.py", "json.pyc", "json.cpython-311-x86_64-linux-gnu.so", "json/")),
        *((name, True) for name in ("server.abi3.so", "sitecustomize.py", "extra.pth")),
        *((name, False) for name in ("notes.md", "other.py", "sitecustomize.txt")),
    ],
)
def test_what_lies_beside_loaded_code_matters_if_python_can_import_it(
    name: str, matters: bool, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    _, entries = loaded.listing(str(tmp_path), {"server", "json"})
    assert entries == ([name.rstrip("/")] if matters else [])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_model_that_this_user_may_not_look_at_is_a_difference(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("1")
    record = structs.replace(RECORD, mapped_files=[], weights=weights.identify(str(tmp_path), "main", {}))
    tmp_path.chmod(0o700)
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.setuid(65534)
        with contextlib.suppress(BaseException):
            os.write(writer, repr(match_loaded.compare(record, (), {})).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as said:
        found = said.read()
    os.waitpid(pid, 0)
    assert "Permission denied" in found
    assert "model-changed" in found


def test_a_secret_file_is_compared_with_the_key_and_not_without(tmp_path: Path) -> None:
    path, key = tmp_path / "password", b"k" * 32
    path.write_text("1234")
    identity = sampled.keyed_identity(path, key)
    file = LoadedFile(path=str(path), size=0, identity=identity, kind=LoadedKind.NAMED)
    record = structs.replace(RECORD, mapped_files=[], loaded=Loaded(files=(file,)))
    assert [each.code for each in compared(file)] == ["secret-unknown"]
    assert match_loaded.compare_secret_files(record, (), {}, key) == []
    for other in (b"", b"l" * 32):
        assert [each.code for each in match_loaded.compare_secret_files(record, (), {}, other)] == [
            "named-file"
        ]
    path.write_text("4321")
    (found,) = match_loaded.compare_secret_files(record, (), {}, key)
    assert (found.code, found.here) == ("named-file", "different")
