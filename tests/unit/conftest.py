# SPDX-License-Identifier: Apache-2.0
"""How hypothesis runs here: no database beside the code, no deadline on a shared machine.

And what tests of several packages share: an image, a transfer of many small stretches, and a CUDA driver with
its backends.
"""

import pwd
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from rekindle.cuda import search
from rekindle.cuda.backend import Backend
from rekindle.home import Home
from tests.fakes.cuda import FakeCuda

if TYPE_CHECKING:
    from tests.samples.registry import Sample

settings.register_profile(
    "unit",
    deadline=None,
    database=None,
    # Examples share tmp_path: each makes what it needs anew, or a directory of its own.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("unit")


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What root remembers for the host stays out of /var/lib."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REKINDLE_STATE", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> "Sample":
    """An image that can be pulled and pushed."""
    from tests.samples.registry import make_sample

    return make_sample(tmp_path_factory.mktemp("sample"))


@pytest.fixture
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blobs of many stretches that are small all the same; and no thread may outlive its transfer."""
    from oci.registry import download
    from tests.samples.registry import STRETCH

    monkeypatch.setattr(download, "STRETCH_BYTES", STRETCH)
    yield
    deadline = time.monotonic() + 2
    while left := [t.name for t in threading.enumerate() if t.name.startswith(("download", "ThreadPool"))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.fixture(scope="session")
def built_cuda(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    return FakeCuda(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def fake(built_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """The driver of this test, which it may describe anew."""
    built_cuda.describe()
    built_cuda.forget()
    for name, value in built_cuda.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("REKINDLE_CUDA_BACKEND", "REKINDLE_CUDA_DOOR", "REKINDLE_CUDA_CHECKPOINT"):
        monkeypatch.delenv(name, raising=False)
    return built_cuda


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture(params=["driver", "utility"])
def backend(
    request: pytest.FixtureRequest, fake: FakeCuda, home: Home, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Backend]:
    """Each of the backends in turn."""
    monkeypatch.setenv("REKINDLE_CUDA_BACKEND", request.param)
    found = search.find(home)
    yield found
    found.close()


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test as a user without a home directory: no $HOME, and no entry in /etc/passwd."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
