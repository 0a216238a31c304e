# SPDX-License-Identifier: Apache-2.0
"""How fast a registry was is remembered for a while, and only if it was asked for enough."""

import contextlib
import json
import time
from pathlib import Path

import pytest

from oci.progress import Tally
from oci.reference import parse
from rekindle.home import Home
from restore import fetch_rates

IMAGE = parse("registry.example.com/models/llama:1")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its only element is the time."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def fetch(home: Home, clock: list[float], size: int, seconds: float) -> None:
    """A fetch that is given up."""
    tally = Tally()
    tally.fetched_bytes = 7
    with contextlib.suppress(TimeoutError), fetch_rates.measured(home, IMAGE, tally):
        tally.fetched_bytes += size
        clock[0] += seconds
        raise TimeoutError


def test_a_fetch_that_was_given_up_tells_the_speed(home: Home, clock: list[float]) -> None:
    assert fetch_rates.known(home, IMAGE) is None
    fetch(home, clock, 100 << 20, 10.0)
    assert fetch_rates.known(home, IMAGE) == 10 << 20
    assert fetch_rates.known(home, parse("elsewhere.example.com/models/llama:1")) is None
    fetch(home, clock, 50 << 20, 10.0)
    assert fetch_rates.known(home, IMAGE) == 5 << 20
    clock[0] += 3601
    assert fetch_rates.known(home, IMAGE) is None


@pytest.mark.parametrize(("size", "seconds"), [(1000, 5.0), (1 << 30, 0.5)])
def test_a_short_fetch_tells_nothing(home: Home, clock: list[float], size: int, seconds: float) -> None:
    fetch(home, clock, size, seconds)
    assert fetch_rates.known(home, IMAGE) is None


MALFORMED = ["", "[]", "null", '{"registry.example.com": 1}', '{"registry.example.com": ["a", 1]}']


@pytest.mark.parametrize("content", MALFORMED)
def test_what_cannot_be_read_tells_nothing(home: Home, content: str) -> None:
    (home.tools / "fetch-rates.json").write_text(content)
    assert fetch_rates.known(home, IMAGE) is None


def test_a_speed_of_zero_is_a_speed(home: Home) -> None:
    content = {"registry.example.com": [0, time.time()]}
    (home.tools / "fetch-rates.json").write_text(json.dumps(content))
    assert fetch_rates.known(home, IMAGE) == 1.0
