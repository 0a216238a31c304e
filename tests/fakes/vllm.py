# SPDX-License-Identifier: Apache-2.0
"""An environment with a vLLM that is not there: tests/servers/fake_vllm says what it is."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes import cuda_engine

_PACKAGE = Path(__file__).parents[1] / "servers" / "fake_vllm" / "vllm"
_WITH_SNAPSHOT_SERVER = (0, 31)


@dataclass(frozen=True, slots=True)
class FakeVllm:
    """An environment as `python -m venv` and pip make it, and a model in a directory."""

    place: Path
    version: str = "0.32.0"

    def __post_init__(self) -> None:
        release = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = self.place / "lib" / release / "site-packages"
        packages.mkdir(parents=True)
        (self.place / "bin").mkdir()
        base = Path(sys.executable).resolve()
        (self.place / "bin/python").symlink_to(base)
        (self.place / "pyvenv.cfg").write_text(f"home = {base.parent}\n")
        shutil.copytree(_PACKAGE, packages / "vllm", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(cuda_engine.__file__, packages / "vllm/cuda_engine.py")
        if tuple(map(int, self.version.split(".")[:2])) < _WITH_SNAPSHOT_SERVER:
            shutil.rmtree(packages / "vllm/snapshot")
        (packages / f"vllm-{self.version}.dist-info").mkdir()
        launcher = self.place / "bin/vllm"
        launcher.write_text(f"#!{self.place}/bin/python\nfrom vllm.cli import main\nmain()\n")
        launcher.chmod(0o755)
        self.train("weights")

    @property
    def model(self) -> Path:
        return self.place / "model"

    def train(self, weights: str) -> None:
        """From now on the model has other weights, of the same size if the text is as long."""
        self.model.mkdir(exist_ok=True)
        (self.model / "config.json").write_text("{}")
        (self.model / "model.safetensors").write_text(weights)

    def fail(self, **faults: Any) -> None:
        """From now on this goes wrong, for every order that comes; nothing, without arguments."""
        (self.place / "faults").write_text(json.dumps(faults))

    def environment(self, gpus: Sequence[str]) -> dict[str, str]:
        """What the server must be started with; `gpus` are the UUIDs of those that it uses."""
        return {"FAKE_VLLM": str(self.place / "faults"), "FAKE_VLLM_GPUS": ",".join(gpus)}

    def command(self, port: int, *words: str) -> list[str]:
        return [
            *(str(self.place / "bin/vllm"), "serve", str(self.model)),
            *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), *words),
        ]
