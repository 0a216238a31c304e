# SPDX-License-Identifier: Apache-2.0
"""Test `rekindle fleet` from outside."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from cli.fleet import main
from rekindle.errors import CapabilityError, UsageError
from tests.conftest import ROOT


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    """The description that the page shows."""
    page = (ROOT / "docs/fleet.md").read_text()
    file = tmp_path / "fleet.toml"
    file.write_text(page.partition("```toml\n")[2].partition("```")[0])
    return file


def test_a_plan_for_a_person_a_program_a_cluster_and_the_eye(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn, written = tmp_path / "plan.svg", tmp_path / "plan.yaml"
    assert main(["plan", str(file), "--picture", str(drawn), "--configmap", str(written)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.split()[0].isdecimal()]) == 24
    assert any(line.startswith("cost ") and "gap" in line for line in lines)
    ElementTree.fromstring(drawn.read_text())
    configmap = yaml.safe_load(written.read_text())
    assert configmap["kind"] == "ConfigMap"
    assert json.loads(configmap["data"]["images.l4"])["chat"] >= 1
    assert len(json.loads(configmap["data"]["min-replicas"])) == 24

    assert main(["plan", str(file), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "rekindle.fleet-plan/1"
    assert document["bound"] <= document["program_cost"]


def test_simulations_are_compared(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(file), "--seeds", "2"]) == 0
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()][:3] == ["policy", "plan", "all-warm"]
    assert "n = 2" in table
    assert main(["simulate", str(file), "--seeds", "1", "--json"]) == 0
    policies = json.loads(capsys.readouterr().out)["policies"]
    assert policies["plan"][0]["requests"] > 1000


def test_nodes_that_are_missing_give_status_3(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(file.read_text().replace("nodes = 50", "nodes = 1").replace("1.5,", "50.0,"))
    assert main(["plan", str(file)]) == 3
    assert "MISSING l4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("nodes = 50", "nodes = -1", "nodes"),
        ("gpus = 1", "gpus = 9", "fits on no node"),
        ("starts.l4", "starts.h100", "h100"),
        ("late_share = 0.01", "late_share = 2.0", "late_share"),
        ("demand = [", "demand = [[", ""),
        ("periods = 24", "periods = 24\nperiod = 1", "period"),
        ('name = "l4"', 'name = "L 4"', "name"),
    ],
)
def test_a_wrong_description_is_named(file: Path, old: str, new: str, cause: str) -> None:
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UsageError, match="not a valid description") as raised:
        main(["plan", str(file)])
    assert cause in raised.value.cause


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"cannot read /nowhere/fleet\.toml"):
        main(["plan", "/nowhere/fleet.toml"])


def test_without_highs_it_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    for name in ("plan", "program"):
        monkeypatch.delitem(sys.modules, f"rekindle.fleet.{name}", raising=False)
    monkeypatch.delattr("rekindle.fleet.plan", raising=False)
    with pytest.raises(CapabilityError) as raised:
        main(["plan", str(file)])
    assert "rekindle-llm[fleet]" in raised.value.hint
