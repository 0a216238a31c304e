# SPDX-License-Identifier: Apache-2.0
"""`rekindle doctor` runs without dependencies, and finds a package that hides one of rekindle's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Rekindle


def test_the_packages_are_those_of_this_checkout(rekindle: Rekindle) -> None:
    done = rekindle("doctor", "--check", "packages", "--json")
    (check,) = done.json["checks"]
    assert check["ok"], check
    assert str(ROOT) in check["detail"]


@pytest.mark.parametrize("name", ["restore", "snapshot"])
def test_a_package_that_hides_one_of_rekindle_is_named(
    rekindle: Rekindle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "other" / name).mkdir(parents=True)
    (tmp_path / "other" / name / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)  # with `-m`, the working directory comes first
    rekindle.env["PYTHONPATH"] = str(tmp_path / "other")
    done = rekindle("doctor", "--check", "packages", "--json")
    (check,) = done.json["checks"]
    assert not check["ok"]
    assert f"`import {name}` finds {tmp_path}/other" in check["detail"]


def test_it_runs_where_no_dependency_is_installed(tmp_path: Path) -> None:
    """hack/get-criu runs it with the system's Python."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "rekindle", "doctor", "--json"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "REKINDLE_HOME": str(tmp_path)},
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    names = {check["name"] for check in json.loads(done.stdout)["checks"]}
    assert names >= {"root", "cell", "criu", "amx", "cuda", "shell", "disk", "packages"}, done.stderr
