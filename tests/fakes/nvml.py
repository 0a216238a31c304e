# SPDX-License-Identifier: Apache-2.0
"""An NVML of nodes that are not here, for every command that gets its environment; nvml.c is what it does."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rekindle.node.gpu import Gpus

_LEVELS = {"pix": 10, "pxb": 20, "phb": 30, "node": 40, "sys": 50}

# Error codes, as in nvml.h.
NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, FUNCTION_NOT_FOUND = 3, 4, 9, 13
GPU_IS_LOST, VERSION_MISMATCH, UNKNOWN = 15, 18, 999


@dataclass(frozen=True, slots=True)
class FakeNvml:
    """libnvidia-ml.so.1 in a directory, and the node that it tells of. It needs a C compiler."""

    place: Path

    def __post_init__(self) -> None:
        compiler = next(name for name in ("cc", "gcc", "clang") if shutil.which(name))
        library = self.place / "libnvidia-ml.so.1"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(
            [
                *(compiler, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"),
                *(f"-Wl,-soname,{library.name}", "-o", str(library), str(source)),
            ],
            check=True,
            timeout=60,
        )

    @property
    def environment(self) -> dict[str, str]:
        """What a process must be started with: the loader reads its path only then."""
        paths = [str(self.place), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            "LD_LIBRARY_PATH": ":".join(path for path in paths if path),
            "FAKE_NVML": str(self.place / "node"),
            "CUDA_MPS_PIPE_DIRECTORY": str(self.place / "mps"),  # a daemon of this machine's is none of its
        }

    def describe(
        self,
        node: Gpus,
        *,
        compute: Mapping[int, Iterable[int]] | None = None,
        graphics: Mapping[int, Iterable[int]] | None = None,
        mps: Mapping[int, Iterable[int]] | None = None,
        fails: Mapping[str, int] | None = None,
        one_fails: Mapping[int, Mapping[str, int]] | None = None,
        persistence: bool = True,
        context: int = 0,
        used: Mapping[int, int] | None = None,
        init: int = 0,
    ) -> None:
        """From now on the node is this one, for every process that starts NVML.

        `compute`, `graphics` and `mps` are the host PIDs on each GPU, by number; `fails` the error codes of
        functions, `one_fails` the same of single GPUs; `init` is that of nvmlInit. `used` are bytes that
        others hold on a GPU, by its number, and `context` what each process with CUDA holds besides.
        """
        major, _, minor = (node.cuda or "0.0").partition(".")
        lines = [
            f"init {init}",
            f"context {context}",
            f"driver {node.driver}",
            f"cuda {int(major) * 1000 + int(minor) * 10}",
        ]
        lines += [f"fail {function} {code}" for function, code in (fails or {}).items()]
        for number, gpu in enumerate(node.gpus):
            lines += [
                "gpu",
                f"name {gpu.name}",
                f"uuid {gpu.uuid}",
                f"capability {int(gpu.arch) // 10} {int(gpu.arch) % 10}",
                f"memory {gpu.memory_bytes}",
                f"mig {int(gpu.mig)}",
                f"ecc {int(gpu.ecc)}",
                f"persistence {int(persistence)}",
                f"used {(used or {}).get(number, 0)}",
            ]
            for kind, pids in (("compute", compute), ("graphics", graphics), ("mps", mps)):
                lines.append(f"{kind} {' '.join(map(str, (pids or {}).get(number, ())))}")
            lines += [f"fail {name} {code}" for name, code in (one_fails or {}).get(number, {}).items()]
            lines += _links(node, number)
        # Staged, since who reads it may be at it now.
        staged = self.place / "node.staged"
        staged.write_bytes(("\n".join(lines) + "\n").encode(errors="surrogateescape"))
        staged.replace(self.place / "node")


def _links(node: Gpus, number: int) -> Iterable[str]:
    peers = []
    for link in node.links:
        one, other, kind = re.split("[- ]", link)
        if str(number) in (one, other):
            peer = other if one == str(number) else one
            if kind == "nvlink":
                peers.append(peer)
            else:
                yield f"near {peer} {_LEVELS[kind]}"
    yield f"nvlink {' '.join(peers)}"
