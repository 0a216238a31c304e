# SPDX-License-Identifier: Apache-2.0
"""These tests look at what a command leaves on a machine, so they have one of their own.

What many of them would do anew, and are not about, is done once: finding out what the node can do, and taking
a snapshot of a workhorse, and one of a real vLLM.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from rekindle.engine import vllm_gate
from tests.conftest import TINY_MODEL, VLLM_BIN, Done, Rekindle, free_port

VLLM_PORT = 18_200


@pytest.fixture(autouse=True, scope="session")
def _own_machine(own_machine: None) -> None:
    """Before any other fixture starts something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workhorse:
    """A home with a snapshot of a workhorse in it, as `horse`; and what the commands that made it said."""

    home: Path
    port: int
    done: Done


@pytest.fixture(scope="session")
def _workhorse(_own_machine: None, tmp_path_factory: pytest.TempPathFactory) -> Workhorse:
    rekindle, port = Rekindle(tmp_path_factory.mktemp("workhorse") / "home"), free_port()
    done = rekindle.snapshot_workhorse("horse", port, flags=["--no-prove"])
    rekindle("restore", "horse", "--plan")  # tries whether cells work here, and remembers it
    return Workhorse(home=rekindle.home, port=port, done=done)


@pytest.fixture
def rekindle(rekindle: Rekindle, _workhorse: Workhorse) -> Rekindle:
    """The command line, with a home of its own that knows what this node can do."""
    if (tools := _workhorse.home / "tools").exists():
        shutil.copytree(tools, rekindle.home / "tools", dirs_exist_ok=True)
    return rekindle


@pytest.fixture
def horse_port(rekindle: Rekindle, _workhorse: Workhorse) -> int:
    """The port of a workhorse whose snapshot is in the home, as `horse`; its dump is not unpacked yet."""
    assert _workhorse.done.status == 0, _workhorse.done.stderr
    ignore = shutil.ignore_patterns("dumps", "history", "logs", "run", "tools")
    shutil.copytree(_workhorse.home, rekindle.home, ignore=ignore, dirs_exist_ok=True)
    return _workhorse.port


@pytest.fixture(scope="session")
def vllm(_own_machine: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Rekindle, dict[str, object]]:
    """A snapshot of a real vLLM server, and the report of its making.

    Two modules use it, one after the other, in one lane. It is in development
    mode behind our gate, as one that sleeps, but that this one cannot: it has no GPU.
    """
    home = tmp_path_factory.mktemp("vllm")
    (home / "gate").mkdir()
    shutil.copyfile(vllm_gate.__file__, home / "gate/rekindle_gate.py")
    rekindle = Rekindle(
        home / "home",
        {
            "PATH": f"{VLLM_BIN}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_USE_AOT_COMPILE": "0",
            "VLLM_CACHE_ROOT": str(home / "caches/vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(home / "caches/inductor"),
            "PYTHONPATH": str(home / "gate"),
            "VLLM_SERVER_DEV_MODE": "1",
        },
    )
    done = rekindle(
        *("snapshot", "tiny", "--json", "--", "vllm", "serve", str(TINY_MODEL)),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(VLLM_PORT)),
        *("--max-model-len", "512", "--gpu-memory-utilization", "0.3"),
        *("--middleware", "rekindle_gate.Gate"),
        timeout=600,
    )
    assert done.status == 0, done.stderr
    return rekindle, done.json
