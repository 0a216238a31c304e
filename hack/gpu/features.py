# SPDX-License-Identifier: Apache-2.0
"""Things that real servers hold besides weights and kernels, one at a time, for the acceptance test.

    pinned          page-locked host memory
    registered      host memory that was page-locked later (cudaHostRegister)
    segments        memory that grows by mapping (torch's expandable_segments, CUDA VMM)
    cublas          a handle of cuBLAS with its workspace
    compile         a graph that torch.compile made
    nccl            a NCCL communicator of one
    nvml-parent     the server's parent has initialized NVML, and uses no CUDA
    init-parent     the server's parent has called cuInit, and makes no context

Each gives a number that must be the same after a restore. Runs in the server's Python.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any

FEATURES = (
    "pinned",
    "registered",
    "segments",
    "cublas",
    "compile",
    "nccl",
    "nvml-parent",
    "init-parent",
)
_BYTES = 64 << 20


def before_torch(feature: str) -> None:
    """Do what must be done before torch is imported: its settings, or a parent of another kind."""
    if feature == "segments":
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if not feature.endswith("-parent"):
        return
    if os.environ.get("REKINDLE_FEATURE_PARENT"):
        return
    if feature == "nvml-parent":
        assert ctypes.CDLL("libnvidia-ml.so.1").nvmlInit_v2() == 0
    else:
        assert ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    argv = [sys.executable, *sys.argv]
    environment = {**os.environ, "REKINDLE_FEATURE_PARENT": "1"}
    pid = os.posix_spawn(sys.executable, argv, environment)  # a fork would share what the parent holds
    import signal

    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
    _, status = os.waitpid(pid, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def held(feature: str) -> Callable[[], int]:
    """Hold it; return a function whose result must always be the same."""
    if feature not in FEATURES or feature.endswith("-parent"):
        return lambda: 0
    import torch

    if feature == "pinned":
        pinned = torch.arange(_BYTES // 8, dtype=torch.int64).pin_memory()
        return lambda: int(pinned.to("cuda").sum().item())
    if feature == "registered":
        plain = torch.arange(_BYTES // 8, dtype=torch.int64)
        status: Any = torch.cuda.cudart().cudaHostRegister(plain.data_ptr(), _BYTES, 0)
        assert int(status) == 0, status
        return lambda: int(plain.to("cuda").sum().item())
    if feature == "segments":
        parts = [torch.full((_BYTES // 32,), number, dtype=torch.int32, device="cuda") for number in range(8)]
        return lambda: sum(int(part.sum().item()) for part in parts)
    if feature == "cublas":
        one = torch.ones(1024, 1024, device="cuda")
        return lambda: int((one @ one).sum().item())
    if feature == "compile":
        numbers = torch.arange(1 << 20, device="cuda")
        doubled = torch.compile(lambda tensor: (tensor * 2 + 1).sum())
        doubled(numbers)
        return lambda: int(doubled(numbers).item())
    import torch.distributed as group

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = group.HashStore()
    group.init_process_group("nccl", store=store, rank=0, world_size=1)
    total = torch.ones(1 << 20, device="cuda")
    group.all_reduce(total)

    def reduced() -> int:
        group.all_reduce(total)
        return int(total.sum().item())

    return reduced
