# SPDX-License-Identifier: Apache-2.0
"""A node with NVIDIA GPUs that are not there: the fake driver and the fake NVML, which tell of the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle.node.gpu import Gpus
from tests.fakes.cuda import FakeCuda
from tests.fakes.nvml import FakeNvml

# A /dev of its own for a command: $1 is an empty directory to build it in, $2 the path of a device that is to
# be there, and the rest is the command. CRIU refuses the device, as it would the real one: its kind is that
# of /dev/loop-control, if there is one, and else that of /dev/zero.
_DEVICES = """
mount -t tmpfs -o mode=755 none "$1"
mkdir "$1/shm" "$1/pts"
mount --rbind /dev/shm "$1/shm"
mount --rbind /dev/pts "$1/pts"
for name in null zero full random urandom tty; do cp -a "/dev/$name" "$1/$name"; done
mkdir -p "$1$(dirname "${2#/dev}")"
kind="c 1 5"
test ! -c /dev/loop-control || kind="c 10 237"
mknod "$1${2#/dev}" $kind
mount --move "$1" /dev
shift 2
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class FakeGpuNode:
    """It needs a C compiler."""

    cuda: FakeCuda
    nvml: FakeNvml

    @classmethod
    def build(cls, place: Path) -> "FakeGpuNode":
        for name in ("cuda", "nvml"):
            (place / name).mkdir()
        return cls(FakeCuda(place / "cuda"), FakeNvml(place / "nvml"))

    @property
    def environment(self) -> dict[str, str]:
        cuda, nvml = self.cuda.environment, self.nvml.environment
        libraries = f"{self.nvml.place}:{cuda['LD_LIBRARY_PATH']}"
        return {**nvml, **cuda, "LD_LIBRARY_PATH": libraries}

    def describe(self, devices: Gpus, **facts: Any) -> None:
        """From now on the node has these GPUs; `facts` are the driver's, as FakeCuda takes them."""
        self.nvml.describe(devices)
        driver = {"driver": devices.driver} if devices.driver else {}
        self.cuda.describe(**{**driver, "gpus": [gpu.uuid for gpu in devices.gpus], **facts})

    def begin(self, devices: Gpus, **facts: Any) -> None:
        """As `describe`, and nothing has happened yet."""
        self.describe(devices, **facts)
        self.cuda.forget()


def with_device(path: str, place: Path) -> list[str]:
    """What stands before a command, so that this device is there for it and for nobody else."""
    place.mkdir()
    return ["unshare", "--mount", "--propagation=private", "sh", "-ec", _DEVICES, "sh", str(place), path]
