# SPDX-License-Identifier: Apache-2.0
"""The versions that are found are those that a Python itself would import."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from rekindle.node.packages import versions
from tests.conftest import VLLM_BIN
from tests.samples.python_environments import install, site

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


ASK = """
import importlib.metadata, json, sys
found = {"python": "%d.%d" % sys.version_info[:2]}
for name in ("vllm", "torch", "triton"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def asked(python: Path, *options: str, environment: Mapping[str, str], cwd: Path) -> dict[str, str]:
    """What that Python itself says, but for the working directory, which -c would add."""
    command = [str(python), *options, "-P", "-c", ASK]
    done = subprocess.run(
        command, env=dict(environment), cwd=cwd, capture_output=True, text=True, check=True, timeout=60
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["own", "system"])
def real_venv(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("real")
    flags = ["--system-site-packages"] if request.param else []
    command = [sys.executable, "-m", "venv", "--without-pip", *flags, str(top / "venv")]
    subprocess.run(command, check=True, timeout=60)
    places = {
        site(top / "venv", PYTHON): ["vllm-0.1", "torch-2.1"],
        site(top / "home/.local", PYTHON): ["vllm-0.2", "torch-2.2", "triton-3.2"],
        site(top / "user", PYTHON): ["vllm-0.3", "triton-3.3"],
        top / "added": ["vllm-0.4"],
        top / "more": ["torch-2.5", "vllm-0.5"],
        top / "here": ["triton-3.6"],
    }
    for directory, names in places.items():
        for name in names:
            install(directory, name)
            title, _, version = name.partition("-")
            metadata = f"Metadata-Version: 2.1\nName: {title}\nVersion: {version}\n"
            (directory / f"{name}.dist-info" / "METADATA").write_text(metadata)
    return top


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ([], {}),
        ([], {"PYTHONPATH": "{top}/added:{top}/more"}),
        ([], {"PYTHONPATH": "{top}/more:relative:{top}/added"}),
        ([], {"PYTHONPATH": "{top}/added:"}),
        ([], {"PYTHONPATH": "../more"}),
        ([], {"PYTHONUSERBASE": "{top}/user"}),
        ([], {"PYTHONUSERBASE": "{top}/user", "PYTHONNOUSERSITE": "1"}),
        (["-s"], {"PYTHONPATH": "{top}/added"}),
        (["-E"], {"PYTHONPATH": "{top}/added", "PYTHONUSERBASE": "{top}/user"}),
        (["-E"], {"PYTHONNOUSERSITE": "1"}),
        (["-I"], {"PYTHONPATH": "{top}/added"}),
        (["-X", "utf8", "-uE"], {"PYTHONPATH": "{top}/added"}),
    ],
)
def test_it_is_what_python_says(
    real_venv: Path, options: list[str], variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"HOME": str(real_venv / "home"), "PATH": "/usr/bin:/bin"}
    environment |= {name: value.format(top=real_venv) for name, value in variables.items()}
    python = real_venv / "venv" / "bin" / "python"
    monkeypatch.chdir(real_venv / "here")
    found = versions([str(python), *options], environment)
    assert {name: found[name] for name in ("python", "vllm", "torch", "triton") if name in found} == asked(
        python, *options, environment=environment, cwd=real_venv / "here"
    )


@pytest.mark.vllm
def test_it_is_what_vllms_python_says() -> None:
    environment = {"PATH": f"{VLLM_BIN}:/usr/bin:/bin", "HOME": "/nonexistent"}
    found = versions(["vllm", "serve", "model"], environment)
    said = asked(VLLM_BIN / "python", environment=environment, cwd=VLLM_BIN)
    assert said["vllm"].endswith("+cpu")
    assert {name: found.get(name) for name in said} == said
    start = time.perf_counter()
    versions(["vllm", "serve", "model"], environment)
    assert time.perf_counter() - start < 0.1  # 0.7 ms on a machine with nothing else to do
