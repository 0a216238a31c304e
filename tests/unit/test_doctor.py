# SPDX-License-Identifier: Apache-2.0
"""`rekindle doctor` finds a package that hides one of rekindle's."""

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
