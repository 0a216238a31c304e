# SPDX-License-Identifier: Apache-2.0
"""What a server has read becomes what a start would read again, named as its command names it."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rekindle.errors import WorkloadError
from rekindle.node.loaded import Loaded, LoadedKind
from snapshot import loaded
from snapshot.loaded import Sources, describe

OTHER, NAMED, MODEL, CODE = LoadedKind.OTHER, LoadedKind.NAMED, LoadedKind.MODEL, LoadedKind.CODE


def write(path: Path, content: str = "x") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return str(path)


def described(tmp_path: Path, opened: list[str], *argv: str, **changes: Any) -> Loaded:
    values: dict[str, Any] = {
        "argv": ["server", *argv],
        "environment": {},
        "directory": str(tmp_path),
        "opened": opened,
        "written": set(),
        "since_ns": time.time_ns() + 10**9,
        "left_out": [],
        "mapped": set(),
    }
    found, left_out = describe(Sources(**{**values, **changes}))
    assert left_out == 0
    return found


def files(found: Loaded) -> dict[str, LoadedKind]:
    return {file.path: file.kind for file in found.files}


def code(found: Loaded) -> set[str]:
    return {f"{each.path}: {path}" for each in found.code for path in each.files}


def test_code_is_its_digest_below_its_directory(tmp_path: Path) -> None:
    write(tmp_path / "lib/package/__init__.py")
    write(tmp_path / "lib/package/inner/__init__.py")
    opened = [write(tmp_path / "lib/package/inner/module.py", "content")]
    (directory,) = described(tmp_path, opened).code
    assert directory.path == str(tmp_path / "lib")
    wanted = hashlib.sha256(b"content").hexdigest()[:16]
    assert directory.files == {"package/inner/module.py": wanted}
    assert directory.entries == ("package",)


BYTECODE = "module.cpython-311.pyc", "module.cpython-312.opt-2.pyc", "module.pypy310-73.pyc"


@pytest.mark.parametrize("name", BYTECODE)
def test_the_source_of_bytecode_counts(name: str, tmp_path: Path) -> None:
    write(tmp_path / "lib/module.py")
    opened = [write(tmp_path / "lib/__pycache__" / name)]
    assert code(described(tmp_path, opened)) == {f"{tmp_path}/lib: module.py"}


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_source_of_bytecode_elsewhere_counts(slash: str, tmp_path: Path) -> None:
    write(tmp_path / "lib/module.py")
    prefix = tmp_path / "elsewhere"
    opened = [write(Path(f"{prefix}{tmp_path}/lib/module.cpython-311.pyc"))]
    environment = {"PYTHONPYCACHEPREFIX": f"{prefix}{slash}"}
    assert code(described(tmp_path, opened, environment=environment)) == {f"{tmp_path}/lib: module.py"}


def test_bytecode_without_a_source_counts_itself(tmp_path: Path) -> None:
    opened = [write(tmp_path / "lib/module.pyc")]
    assert code(described(tmp_path, opened)) == {f"{tmp_path}/lib: module.pyc"}


def test_what_is_not_read_again_is_left_out(tmp_path: Path) -> None:
    own = Path(write(tmp_path / "own.py"))
    status = own.stat()
    opened = [
        str(own),
        write(tmp_path / "cache/kernel.py"),
        str(tmp_path / "gone.py"),
        str(tmp_path),
        "/proc/self/status",
        "/etc/hosts",
        "/dev/null",
    ]
    written = {(status.st_dev, status.st_ino)}
    found = described(tmp_path, opened, written=written, left_out=[f"{tmp_path}/cache/"])
    assert found == Loaded()


KINDS: dict[str, tuple[str, LoadedKind | None]] = {
    "a file that nothing names": ("data/other.json", OTHER),
    "weights": ("data/model.safetensors", MODEL),
    "a file of the hub's": ("hub/models--a--b/blobs/0123", MODEL),
    "data of a package": ("lib/python3.11/site-packages/package/data.json", None),
    "metadata of a package": ("lib/python3.11/site-packages/package-1.dist-info/METADATA", None),
    "a list of a package's files": ("lib/python3.11/site-packages/package-1.dist-info/RECORD", OTHER),
    "a module of JavaScript": ("node_modules/package/index.js", None),
    "data of a package of JavaScript": ("node_modules/package/package.json", None),
    "a script": ("bin/server.rb", None),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind(name: str, tmp_path: Path) -> None:
    path, kind = KINDS[name]
    found = described(tmp_path, [write(tmp_path / path)])
    assert list(files(found).values()) == ([kind] if kind else [])
    assert bool(code(found)) == (kind is None)


WORDS: dict[str, Callable[[str], list[str]]] = {
    "a word": lambda path: [path],
    "an option": lambda path: ["--config", path],
    "an option and its value in one word": lambda path: [f"--config={path}"],
    "a list": lambda path: [f"--adapters=a={path},b=/nothing"],
    "JSON": lambda path: ["--adapter", json.dumps({"name": "a", "path": path})],
    "JSON in one word": lambda path: [f"--adapter={json.dumps([{'path': path}])}"],
}


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("relative", [False, True])
def test_the_command_names(name: str, relative: bool, tmp_path: Path) -> None:
    path = tmp_path / "data/file"
    word = "data/file" if relative else str(path)
    assert files(described(tmp_path, [write(path)], *WORDS[name](word))) == {word: NAMED}
    assert files(described(tmp_path, [str(path)], *WORDS[name](str(Path(word).parent)))) == {word: NAMED}


@pytest.mark.parametrize("word", ["/", "/tmp", "..", "nothing", "\0", "x" * 5000, ""])
def test_the_command_does_not_name(word: str, tmp_path: Path) -> None:
    assert files(described(tmp_path, [write(tmp_path / "data/file")], word, directory="/tmp")) == {
        str(tmp_path / "data/file"): OTHER
    }


def test_a_variable_names(tmp_path: Path) -> None:
    path = write(tmp_path / "file")
    assert files(described(tmp_path, [path], environment={"APP_CONFIG": path})) == {path: NAMED}
    assert files(described(tmp_path, [path], environment={"DATA": str(tmp_path)})) == {path: OTHER}


def test_what_a_link_leads_to_has_the_name_of_the_link(tmp_path: Path) -> None:
    opened = [write(tmp_path / "models/one/config"), write(tmp_path / "releases/1/module.py")]
    opened.append(write(tmp_path / "releases/1/start.py"))
    (tmp_path / "live").symlink_to("models/one")
    (tmp_path / "current").symlink_to("releases/1")
    found = described(tmp_path, opened, str(tmp_path / "live"), f"{tmp_path}/current/start.py")
    assert files(found) == {f"{tmp_path}/live/config": NAMED, f"{tmp_path}/current/start.py": NAMED}
    assert code(found) == {f"{tmp_path}/current: module.py", f"{tmp_path}/current: start.py"}


def test_a_config_map_has_the_names_that_a_pod_sees(tmp_path: Path) -> None:
    place = tmp_path / "config"
    opened = [write(place / "..2026_01_02_03_04_05.123456789/chat.jinja")]
    (place / "..data").symlink_to("..2026_01_02_03_04_05.123456789")
    (place / "chat.jinja").symlink_to("..data/chat.jinja")
    assert files(described(tmp_path, opened, str(place))) == {f"{place}/chat.jinja": NAMED}
    assert files(described(tmp_path, opened, f"{place}/chat.jinja")) == {f"{place}/chat.jinja": NAMED}


def test_branches_of_the_hub_count_although_nobody_opened_them(tmp_path: Path) -> None:
    hub = tmp_path / "hub/models--org--name"
    blob = write(hub / "blobs/0123")
    main, fix = write(hub / "refs/main"), write(hub / "refs/pr/1")
    assert files(described(tmp_path, [blob])) == {blob: MODEL, main: MODEL, fix: MODEL}
    status = Path(main).stat()
    downloaded = described(tmp_path, [blob], written={(status.st_dev, status.st_ino)})
    assert main in files(downloaded), "what a download has left is what a start would find"


def test_large_code_is_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "lib/python3.11/site-packages/package/table.json", "x" * (2 << 20))
    assert files(described(tmp_path, [path])) == {path: CODE}


def test_what_is_mapped_is_not_described_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "models/one/model.safetensors")
    (tmp_path / "live").symlink_to("models/one")
    assert files(described(tmp_path, [path], mapped={path})) == {}
    found = described(tmp_path, [path], str(tmp_path / "live"), mapped={path})
    assert files(found) == {f"{tmp_path}/live/model.safetensors": NAMED}, "the link may lead elsewhere"


def test_packages_are_those_of_the_directory(tmp_path: Path) -> None:
    site = tmp_path / "lib/python3.11/site-packages"
    opened = [write(site / "one_module.py"), write(site / "two/__init__.py")]
    write(site / "One.Dist-1.0.dist-info/RECORD", "one_module.py,sha256=x,1\n")
    write(site / "two-2.0.dist-info/METADATA")
    write(site / "three-3.0-py3.11.egg-info/top_level.txt", "three\n")
    write(site / "path.pth")
    write(site / "other.py")
    (directory,) = described(tmp_path, opened).code
    assert directory.distributions == {"one-dist": "1.0", "two": "2.0", "three": "3.0"}
    assert directory.used == ("one-dist", "two")
    assert directory.entries == ("one_module.py", "path.pth", "two")


def test_what_was_changed_meanwhile_is_unknown(tmp_path: Path) -> None:
    since = time.time_ns() - 10**9
    path = write(tmp_path / "module.py")
    with pytest.raises(WorkloadError, match="was changed while the server was running"):
        described(tmp_path, [path], since_ns=since)
    other = write(tmp_path / "status.json")
    assert files(described(tmp_path, [other], since_ns=since)) == {other: OTHER}


def test_there_is_a_limit_for_each_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded, "_OTHERS_LIMIT", 3)
    monkeypatch.setattr(loaded, "_FILES_LIMIT", 2)
    opened = [write(tmp_path / f"{number}{suffix}") for number in range(5) for suffix in (".txt", ".py")]
    sources = Sources(
        argv=["server"],
        environment={},
        directory="/",
        opened=opened,
        written=set(),
        since_ns=time.time_ns() + 10**9,
        left_out=[],
        mapped=set(),
    )
    found, left_out = describe(sources)
    assert (len(found.files), len(code(found)), left_out) == (3, 2, 5)


HEADERS = "lib/python3.11/site-packages/torch/include/a.h", "data/kernel.cuh"


@pytest.mark.parametrize("path", HEADERS)
def test_what_compilers_read_is_left_out(path: str, tmp_path: Path) -> None:
    assert described(tmp_path, [write(tmp_path / path)]) == Loaded()


def test_without_a_watch_what_is_named_counts(tmp_path: Path) -> None:
    write(tmp_path / "lib/python3.11/site-packages/one-1.0.dist-info/METADATA")
    write(tmp_path / "bin/python3.11")
    (tmp_path / "bin/python3.11").chmod(0o755)
    write(tmp_path / "pyvenv.cfg", "home = /nothing/bin\ninclude-system-site-packages = false\n")
    config, script = write(tmp_path / "config.yaml"), write(tmp_path / "server.py")
    argv = [f"{tmp_path}/bin/python3.11", script, f"--config={config}"]
    found = described(tmp_path, [], argv=argv, watched=False)
    assert files(found) == {config: NAMED, script: NAMED, argv[0]: NAMED}
    assert code(found) == {f"{tmp_path}: server.py"}
    site = found.code[1]
    assert (site.distributions, site.used) == ({"one": "1.0"}, ("one",))


@pytest.mark.parametrize(
    ("word", "wanted"), [("{}/server.py", "{}"), ("server.py", "."), ("./server.py", "."), ("nothing", ".")]
)
def test_code_in_the_working_directory_is_called_as_the_command_does(
    word: str, wanted: str, tmp_path: Path
) -> None:
    found = described(tmp_path, [write(tmp_path / "server.py")], word.format(tmp_path))
    assert code(found) == {f"{wanted.format(tmp_path)}: server.py"}
