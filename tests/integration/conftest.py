# SPDX-License-Identifier: Apache-2.0
"""These tests look at what a command leaves on a machine, so they have one of their own.

What many of them would do anew, and are not about, is done once: finding out what the node can do, and taking
a snapshot of a workhorse.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Done, Rekindle, free_port


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
    ignore = shutil.ignore_patterns("dumps", "logs", "run", "tools")
    shutil.copytree(_workhorse.home, rekindle.home, ignore=ignore, dirs_exist_ok=True)
    return _workhorse.port
