# SPDX-License-Identifier: Apache-2.0
"""A model without a GPU: it holds CUDA state only according to the fake driver (tests/fakes/cuda_engine.py).

As with CUDA, it computes nothing while the process is locked or checkpointed. It compiles GPU kernels at the
first start and reads them from Triton's cache afterwards.
"""

import atexit
import base64
import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fakes import cuda

KERNELS = 6
_COMPILE_SECONDS = 0.2
_GAVE_UP_SECONDS = 60.0


class StandIn:
    """The model. It uses one MiB of host memory for each GiB of device memory of a real model."""

    def __init__(self, gib: float, began: float, *, quick: bool = False) -> None:
        self.phases: dict[str, float] = {}
        self._last = began
        self._mark("imports")
        self._kernels = KERNELS // 2 if quick else KERNELS
        self._weights = hashlib.shake_256(b"weights").digest(int(gib * (1 << 20)))
        self._mark("weights")
        cache = Path(os.environ["TRITON_CACHE_DIR"])
        self._code = b"".join(_kernel(cache, f"project_{number}") for number in range(self._kernels))
        self._mark("kernels")
        self._lock = threading.Lock()
        self._counter = 0
        self._claim = cuda.claim(max(1, int(gib)))
        atexit.register(self._claim.unlink, missing_ok=True)

    def answer(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        self._wait()
        question = json.dumps(list(prompt)).encode() + self._code
        tokens = hashlib.shake_256(question + self._weights).digest(count)
        return {"tokens": list(tokens), "checksum": hashlib.sha256(self._weights).hexdigest()}

    def count(self) -> int:
        self._wait()
        with self._lock:
            self._counter += 1
            return self._counter

    def be_busy(self, seconds: float) -> None:
        """Make the fake driver report this process as one that does not become idle."""
        self._tell_driver(busy=[os.getpid()])
        threading.Timer(seconds, self._tell_driver, kwargs={"busy": []}).start()

    def facts(self) -> dict[str, Any]:
        return {
            "kernels": self._kernels,
            "phases": self.phases,
            "gpu": "none: the driver is a stand-in",
            "weights_bytes": len(self._weights),
            "held_bytes": len(self._weights),
        }

    def _wait(self) -> None:
        deadline = time.monotonic() + _GAVE_UP_SECONDS
        while json.loads(self._claim.read_bytes())["state"] != "running":
            if time.monotonic() > deadline:
                raise TimeoutError("CUDA does not resume")
            time.sleep(0.01)

    def _mark(self, name: str) -> None:
        now = time.monotonic()
        self.phases[name] = round(now - self._last, 3)
        self._last = now

    def _tell_driver(self, **facts: Any) -> None:
        path = Path(os.environ["FAKE_CUDA"])
        staged = path.with_name(f"{path.name}.{os.getpid()}")
        staged.write_text(json.dumps({**json.loads(path.read_bytes()), **facts}))
        staged.replace(path)


def _kernel(cache: Path, name: str) -> bytes:
    """Return a GPU kernel from the cache; compile it first if it is not there. The files are Triton's."""
    digest = hashlib.sha256(name.encode()).digest()
    entry = cache / base64.b32encode(digest).decode().rstrip("=")
    group = entry / f"__grp__{name}.json"
    if not group.exists():
        time.sleep(_COMPILE_SECONDS)
        entry.mkdir(parents=True, exist_ok=True)
        target = {"backend": "cuda", "arch": 90, "warp_size": 32}
        facts = {"hash": digest.hex(), "target": target, "name": name, "triton_version": "3.9.0"}
        (entry / f"{name}.json").write_text(json.dumps(facts))
        (entry / f"{name}.cubin").write_bytes(digest * 100)
        children = {path.name: str(path) for path in entry.iterdir()}
        group.write_text(json.dumps({"child_paths": children}))
    children = json.loads(group.read_bytes())["child_paths"]
    return Path(children[f"{name}.cubin"]).read_bytes()
