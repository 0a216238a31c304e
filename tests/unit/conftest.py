# SPDX-License-Identifier: Apache-2.0
"""How hypothesis runs here: no database beside the code, no deadline on a shared machine.

And what the tests of transfers share: an image, and a transfer of many small stretches.
"""

import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.unit.registry_samples import Sample

settings.register_profile(
    "unit",
    deadline=None,
    database=None,
    # Examples share tmp_path: each makes what it needs anew, or a directory of its own.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("unit")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> "Sample":
    """An image that can be pulled and pushed."""
    from tests.unit.registry_samples import make_sample

    return make_sample(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blobs of many stretches that are small all the same; and no thread may outlive its transfer."""
    from oci.registry import download
    from tests.unit.registry_samples import STRETCH

    monkeypatch.setattr(download, "STRETCH_BYTES", STRETCH)
    yield
    deadline = time.monotonic() + 2
    while left := [t.name for t in threading.enumerate() if t.name.startswith(("download", "ThreadPool"))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
