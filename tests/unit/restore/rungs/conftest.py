# SPDX-License-Identifier: Apache-2.0
"""A kernel cache to watch, and the check that a watch leaves nothing."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.samples.cache import write


@pytest.fixture
def nothing_outlives_a_watch() -> Iterator[None]:
    """Neither threads nor descriptors outlive a watch."""
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    root = tmp_path / "cache"
    for key in ("OLD", "OTHER"):
        for name in ("k.cubin", "k.json", "__grp__k.json"):
            write(root / key / name)
    return root
