# SPDX-License-Identifier: Apache-2.0
"""The wheel holds all that rekindle needs, and nothing of the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import rekindle
from tests.conftest import ROOT
from tests.unit.test_imports import MODULES, PACKAGES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
"""


def run(*argv: str | Path, cwd: Path, path: str = "") -> str:
    """Run a command with nothing of this environment but PATH, and `path` as PYTHONPATH."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "PYTHONPATH": path}
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built of a copy: a build writes into the source tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--no-build-isolation", "--wheel-dir", out, source, cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel alone."""
    place = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin/python"), "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", wheel, cwd=place)
    return place


def test_every_module_is_in_the_wheel_and_nothing_else(wheel: Path) -> None:
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    page = {path.relative_to(ROOT) for path in (ROOT / "cli/dashboard_files").iterdir()}
    modules = {path.relative_to(ROOT) for path in MODULES.values()}
    assert names == modules | page | {Path("rekindle/py.typed")}


def test_the_version_is_that_of_the_package(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == PROJECT["name"]
    assert metadata["Version"] == rekindle.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert "version" not in PROJECT


def test_the_command_runs_without_a_dependency(environment: Path, tmp_path: Path) -> None:
    command = environment / "bin/rekindle"
    assert "usage: rekindle" in run(command, "--help", cwd=tmp_path)
    assert run(command, "--version", cwd=tmp_path) == f"rekindle {rekindle.__version__}\n"


def test_every_module_can_be_imported_without_the_checkout(environment: Path, tmp_path: Path) -> None:
    """The dependencies are those of this environment, whose entry for the checkout is not read there."""
    names = sorted(set(MODULES) - {"rekindle.cell.python_site"})  # a sitecustomize, for the cell alone
    files = run(
        environment / "bin/python",
        "-c",
        IMPORT_ALL,
        *names,
        cwd=tmp_path,
        path=sysconfig.get_path("purelib"),
    )
    assert len(files.splitlines()) == len(names)
    assert all(Path(file).is_relative_to(environment) for file in files.splitlines())
