# SPDX-License-Identifier: Apache-2.0
"""The arrows between the packages, the one module that runs commands, and what a start may import."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from oci.trust.keys import PrivateKey
from tests.conftest import ROOT
from tests.samples.registry import make_sample
from tests.servers.registry.simulator import Registry

PACKAGES = ("rekindle", "oci", "restore", "snapshot", "cli")
"""From the ground up: each may import those before it, and none of those after it."""

ROOMS = {
    "rekindle": (
        "rekindle.secrets",
        "rekindle.node",
        "rekindle.cell",
        "rekindle.criu",
        "rekindle.cuda",
        "rekindle.engine",
        "rekindle.fleet",
    ),
    "oci": ("oci.trust", "oci.registry", "oci.cache"),
    "restore": ("restore.decide", "restore.serve", "restore.rungs"),
}
"""The rooms of a package, in the same order."""

FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAIN = "rekindle.__main__"


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Every module that a file names in an import, wherever that stands, relative ones made absolute."""
    return frozenset(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    here = module(path) if path.name == "__init__.py" else module(path).rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=name, names=names, level=level):
                base = ".".join(here.split(".")[: len(here.split(".")) - level + 1]) if level else ""
                origin = ".".join(part for part in (base, name) if part)
                yield origin
                yield from (f"{origin}.{alias.name}" for alias in names)
            case ast.Constant(value=str(text)):  # for import_module and the like, however that is called
                name = text.partition(":")[0]
                if "." in name and name in MODULES:
                    yield name
            case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
                package, dot, _ = text.partition(".")
                if dot and package in PACKAGES:
                    yield package


def below(name: str, *tops: str) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def test_there_are_files() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)
    assert len(FILES) > 30


def test_imports_are_seen_wherever_they_stand() -> None:
    assert "rekindle.engine.http" in imports(ROOT / "rekindle/engine/choose.py")  # in a function
    assert "rekindle.engine.client" in imports(ROOT / "restore/rungs/process.py")
    assert "rekindle.run.spawn" in imports(ROOT / "rekindle/cell/__init__.py")


MODULES = {module(path): path for path in FILES}


@functools.cache
def arrows(name: str) -> set[str]:
    """The modules of ours that a module imports, wherever the import stands, also for types alone."""
    found = {other if other in MODULES else other.rpartition(".")[0] for other in imports(MODULES[name])}
    # `from package import module` names both; the arrow is to the module.
    named = {other for other in found if other in MODULES and other != name}
    return {
        other for other in named if not any(below(inner, other) and inner != other for inner in named)
    } | {other for other in named if _takes_from(name, other)}


def _takes_from(name: str, package: str) -> bool:
    """Whether a module takes something else than a module from a package."""
    for node in ast.walk(parsed(MODULES[name])):
        match node:
            case ast.ImportFrom(module=origin, names=names) if origin == package:
                if any(f"{package}.{alias.name}" not in MODULES for alias in names):
                    return True
    return False


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_imported_from_above(name: str) -> None:
    own = name.partition(".")[0]
    allowed = PACKAGES[: PACKAGES.index(own) + 1 if name != MAIN else None]  # it starts the commands
    assert {other.partition(".")[0] for other in arrows(name)} <= set(allowed)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_imported_from_a_room_above(name: str) -> None:
    for rooms in ROOMS.values():
        own = next((room for room in rooms if below(name, room)), None)
        if own is not None:
            above = rooms[rooms.index(own) + 1 :]
            assert not [other for other in arrows(name) if below(other, *above)]
            assert own.partition(".")[0] not in arrows(name), "through the package's face"


def test_there_is_no_circle() -> None:
    """Each module can be understood with those below it alone, also within a folder."""
    left = {name: arrows(name) for name in MODULES}
    while free := {name for name, others in left.items() if not others}:
        left = {name: others - free for name, others in left.items() if name not in free}
    assert not left


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nobody_imports_the_start_and_the_core_names_commands_as_text(name: str) -> None:
    found = imports(MODULES[name])
    assert not [other for other in found if below(other, MAIN)]
    if not below(name, "cli"):
        assert not [other for other in found if below(other, "cli") and name != MAIN]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_command_line_is_read_below_the_commands(name: str) -> None:
    if not below(name, "cli"):
        assert "argparse" not in imports(MODULES[name])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_is_short_and_so_are_its_functions(name: str) -> None:
    text = MODULES[name].read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, node.name


def test_one_name_of_a_class_means_one_thing() -> None:
    where: dict[str, list[str]] = {}
    for path in [*FILES, *(ROOT / "hack").rglob("*.py")]:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    twice = {name: places for name, places in where.items() if len(places) > 1}
    assert not twice


@pytest.mark.parametrize("path", FILES, ids=module)
def test_commands_are_run_in_one_place(path: Path) -> None:
    assert ("subprocess" in imports(path)) is (module(path) == "rekindle.run")


@pytest.mark.parametrize("path", FILES, ids=module)
def test_a_file_names_its_licence_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert text.count("SPDX-License-Identifier") == 1
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring
    assert docstring.splitlines()[0][-1] in ".:"


def test_the_tree_has_no_machine_in_it() -> None:
    home = str(Path.home())
    for path in FILES:
        text = path.read_text()
        assert str(ROOT) not in text
        assert len(home) < 6 or home not in text


def imported_by(name: str) -> set[str]:
    """The modules that a fresh interpreter has after one import."""
    return loaded_after(f"import {name}")


def loaded_after(program: str) -> set[str]:
    """The modules that a fresh interpreter has after a program."""
    command = [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split())


def test_a_start_imports_little() -> None:
    loaded = imported_by("rekindle.__main__")
    heavy = [
        *("argparse", "zstandard", "http.client", "ssl", "asyncio", "concurrent.futures", "tempfile"),
        *("urllib.request", "subprocess", "json", "psutil", "rich", "email", "ctypes", "inspect", "logging"),
    ]
    assert not loaded & set(heavy)
    assert not [name for name in loaded if below(name, "oci", "restore", "snapshot", "cli")]


def test_a_start_imports_nothing_from_outside_the_standard_library() -> None:
    plain = set(
        subprocess.run(
            [sys.executable, "-c", "import sys; print(*sys.modules)"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.split()
    )
    tops = {name.partition(".")[0] for name in imported_by("rekindle.__main__") - plain}
    assert tops - set(sys.stdlib_module_names) == {"rekindle"}


@pytest.mark.parametrize("verb", ["match", "inspect"])
def test_a_verb_imports_what_it_needs(verb: str) -> None:
    loaded = imported_by(f"cli.{verb}")
    heavy = [
        *("zstandard", "http.client", "concurrent.futures", "torch", "vllm", "tempfile", "asyncio"),
        *("ssl", "email", "rich", "psutil", "logging", "numpy", "sigstore", "oras", "nacl"),
    ]
    assert not loaded & set(heavy)


CLIENTS = {"urllib3", "requests", "oras"}


@pytest.mark.parametrize(
    "name", ["cli.pull", "cli.push", "cli.copy", "cli.snapshot", "oci.registry.repository"]
)
def test_connections_are_imported_when_there_is_one_to_make(name: str) -> None:
    assert not imported_by(name) & CLIENTS


def test_between_two_layouts_nothing_of_the_network_is_imported(tmp_path: Path) -> None:
    sample = make_sample(tmp_path / "from")
    sample.layout.publish(sample.layout, sample.root, "1")
    words = ["--quiet", f"oci:{tmp_path}/from:1", f"oci:{tmp_path}/to:1"]
    loaded = loaded_after(f"from cli.copy import main\nassert main({words!r}) == 0")
    assert "oci.registry.repository" in loaded
    assert not loaded & CLIENTS


def test_a_registry_needs_urllib3_and_no_second_client(tmp_path: Path) -> None:
    sample = make_sample(tmp_path / "from")
    with Registry() as registry:
        sample.serve(registry)
        words = ["--quiet", f"{registry.host}/a/b:1", f"oci:{tmp_path}/to:1"]
        loaded = loaded_after(f"from cli.copy import main\nassert main({words!r}) == 0")
    assert "urllib3" in loaded
    assert not loaded & {"requests", "oras"}


NOT_AT_A_RESTORE = [
    *("dataclasses", "inspect", "ast", "traceback", "typing_extensions", "shutil", "tempfile", "random"),
    *("ssl", "http.client", "email", "asyncio", "concurrent.futures", "logging", "importlib.metadata"),
    *("cryptography", "nacl", "sigstore", "psutil", "rich", "zstandard", "urllib3"),
    *("rekindle.history", "prometheus_client", "opentelemetry"),
    *("rekindle.engine.client", "rekindle.secrets.forms", "rekindle.secrets.redact", "oci.cache.image"),
]
"""Modules that a restore of an unpacked image does not need before CRIU runs."""


def test_a_restore_imports_little_before_criu_runs() -> None:
    program = """
import rekindle.__main__
rekindle.__main__._import_msgspec()
import cli.restore, cli._restoring, restore.rungs.process, rekindle.engine.vllm, rekindle.engine.http
"""
    loaded = loaded_after(program)
    assert "restore.rungs.process" in loaded
    assert not loaded & set(NOT_AT_A_RESTORE)


def test_the_words_of_restore_are_read_without_shutil() -> None:
    program = """
import contextlib, io, cli.restore
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    cli.restore.main(["--help"])
"""
    assert not loaded_after(program) & {"shutil", "rekindle.cell"}


def test_to_verify_imports_the_curve_alone(tmp_path: Path) -> None:
    key = PrivateKey.generate()
    (tmp_path / "key.pub").write_bytes(key.public.to_pem())
    loaded = loaded_after(f"""
from pathlib import Path
from oci.trust.keys import PublicKey
key = PublicKey.read(Path({str(tmp_path / "key.pub")!r}))
assert key.verifies({key.sign(b"content")!r}, b"content")
assert not key.verifies({key.sign(b"content")!r}, b"other content")
""")
    assert "cryptography.hazmat.primitives.asymmetric.ec" in loaded
    assert not [name for name in loaded if below(name, "cryptography.hazmat.backends")]
    assert "cryptography.hazmat.primitives.serialization" not in loaded


def test_hidden_modules_can_be_imported_later() -> None:
    program = "import rekindle.__main__\nrekindle.__main__._import_msgspec()\nimport typing_extensions"
    assert {"msgspec", "typing_extensions"} <= loaded_after(program)


@pytest.mark.parametrize("path", FILES, ids=module)
def test_no_class_is_compiled_from_source_at_a_start(path: Path) -> None:
    assert "dataclasses" not in imports(path)


def test_the_words_of_restore_need_nothing_of_what_it_does() -> None:
    loaded = imported_by("cli.restore")
    assert not [name for name in loaded if below(name, "oci", "restore", "snapshot")]
    assert not loaded & {"cryptography", "ctypes", "rekindle.cell", "rekindle.engine", "rekindle.record"}


def test_a_verb_is_in_the_table() -> None:
    from rekindle.__main__ import VERBS as TABLE

    files = {path.stem for path in (ROOT / "cli").glob("[!_]*.py")}
    assert {name.replace("-", "_") for name in TABLE} == files
