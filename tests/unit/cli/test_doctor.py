# SPDX-License-Identifier: Apache-2.0
"""`rekindle doctor` runs without dependencies, and finds a package that hides one of rekindle's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from oci import image, media_types
from oci.layout import Layout
from tests.conftest import ROOT, Rekindle
from tests.samples.record import RECORD


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


def test_what_is_missing_for_an_image_is_told(rekindle: Rekindle, tmp_path: Path) -> None:
    work = Layout.create(tmp_path / "work")
    node = structs.replace(RECORD.node, kernel="99.1")
    built = image.build(work, structs.replace(RECORD, node=node), [work.put(b"x", media_types.DUMP_LAYER)])
    Layout.create(tmp_path / "images").publish(work, built.index, "1")
    done = rekindle("doctor", "--check", "root", f"oci:{tmp_path / 'images'}:1", "--json")
    assert done.status == 10
    found = [check for check in done.json["checks"] if check["name"] == "image"]
    assert any(check["detail"].startswith("kernel-older: kernel was 99.1, is ") for check in found)
    assert all(check["remedy"] and not check["ok"] for check in found)


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
