# SPDX-License-Identifier: Apache-2.0
"""A small decoder for hack/gpu/server.py, which holds everything that a checkpoint of a GPU must keep:
gigabytes of weights, GPU kernels that Triton compiled, CUDA graphs, and a counter in device memory alone.

Its numbers come from a fixed seed and every sum has a fixed order: all starts on GPUs of one model give the
same answers. It runs in an environment with torch and Triton, not in rekindle's.
"""

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from hack.gpu import kernels

WIDTH = 4096
LAYER_BYTES = WIDTH * WIDTH * 2
BATCHES = (1, 2, 4, 8)
CHECKED = 4096  # words that one program sums
# Compiled and run as by an autotuner; answers use the first.
VARIANTS = tuple(itertools.product((16, 8, 32, 64), (128, 64, 256), (4, 8)))
QUICK_VARIANTS = VARIANTS[:6]
_TOLERANCE = 1e-3
_CYCLES_PER_SECOND = 2e9  # at most; a slower GPU is busy for longer
_COPY_BYTES = 256 << 20
_COPIES = 8


class Decoder:
    """The model on one device. Several threads may call its methods."""

    def __init__(
        self, gib: float, began: float, *, quick: bool = False, device: str = "cuda", size: int = WIDTH
    ) -> None:
        """`began` is the start of the process by time.monotonic. The device `cpu` needs Triton's interpreter
        (TRITON_INTERPRET=1) and has no CUDA graphs."""
        self.phases: dict[str, float] = {}
        self._last = began
        self._mark("imports")
        self._lock = threading.Lock()
        self._device = device
        self._size = size
        self._counter = torch.zeros(1, dtype=torch.int64, device=device)
        self._sync()
        self._mark("context")
        self._weights = [
            torch.empty(size, size, dtype=torch.bfloat16, device=device)
            for _ in range(max(2, round(gib * (1 << 30) / (size * size * 2))))
        ]
        for seed, weights in enumerate(self._weights):
            kernels.fill[(weights.numel() // 1024,)](weights, seed, 3.4641 / size**0.5, block=1024)
        self._table = torch.empty(size, size, dtype=torch.float32, device=device)
        kernels.fill[(self._table.numel() // 1024,)](self._table, 1 << 20, 3.4641, block=1024)
        self._sync()
        self._mark("weights")
        self.kernels = self._try_variants(QUICK_VARIANTS if quick else VARIANTS)
        self._mark("kernels")
        self._tokens = {batch: torch.zeros(batch, dtype=torch.int64, device=device) for batch in BATCHES}
        # Graphs hold addresses. They keep nothing alive that was not allocated within them.
        self._changes = {
            batch: torch.empty(batch, size, dtype=torch.float32, device=device) for batch in BATCHES
        }
        self._steps = {batch: self._captured(batch) for batch in BATCHES}
        self._sync()
        self._mark("graphs")

    def answer(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        """Return tokens and the checksum of all weights. Equal prompts must always give equal answers."""
        with self._lock:
            token = self._tokens[1]
            for each in prompt:
                token.fill_(each % self._size)
                self._steps[1]()
            tokens = []
            for _ in range(count):
                tokens.append(int(token.item()))
                self._steps[1]()
            return {"tokens": tokens, "checksum": self._checksum()}

    def count(self) -> int:
        with self._lock:
            self._counter += 1
            return int(self._counter.item())

    def be_busy(self, seconds: float) -> None:
        """Give the GPU work for so long, and return at once."""
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(max(1, round(seconds * 10))):
                torch.cuda._sleep(int(_CYCLES_PER_SECOND / 10))

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "kernels": self.kernels,
            "phases": self.phases,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "weights_bytes": sum(each.numel() * 2 for each in self._weights),
        }
        if self._device == "cuda":
            found |= device_facts() | {"held_bytes": torch.cuda.memory_reserved(), "graphs": len(BATCHES)}
        return found

    def _mark(self, name: str) -> None:
        now = time.monotonic()
        self.phases[name] = round(now - self._last, 3)
        self._last = now

    def _sync(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def _try_variants(self, variants: Sequence[tuple[int, int, int]]) -> int:
        """Compile and run every variant; raises AssertionError if one computes another result."""
        state, wanted = self._table[0].contiguous(), None
        for rows, columns, warps in variants:
            got = torch.empty(1, self._size, dtype=torch.float32, device=self._device)
            self._project(state, self._weights[0], got, (rows, columns, warps))
            wanted = got if wanted is None else wanted
            assert torch.allclose(got, wanted, rtol=_TOLERANCE, atol=_TOLERANCE), (rows, columns, warps)
        return len(variants)

    def _project(
        self, state: Any, weights: Any, into: Any, variant: tuple[int, int, int] = VARIANTS[0]
    ) -> None:
        rows, columns, warps = variant
        kernels.project[(self._size // rows, into.shape[0])](
            state, weights, into, size=self._size, height=rows, width=columns, num_warps=warps
        )

    def _captured(self, batch: int) -> Callable[[], None]:
        """Return a function that computes one token for each member of a batch; on a GPU, a CUDA graph."""
        token, change = self._tokens[batch], self._changes[batch]

        def step() -> None:
            state = self._table.index_select(0, token)
            for weights in self._weights:
                self._project(state, weights, change)
                kernels.settle[(batch,)](state, change, size=self._size)
            self._project(state, self._weights[0], change)
            token.copy_(torch.argmax(change, dim=1))

        if self._device != "cuda":
            return step
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay: Callable[[], None] = graph.replay
        return replay

    def _checksum(self) -> int:
        total = 0
        for number, weights in enumerate(self._weights):
            words = weights.view(torch.int32).view(-1)
            block = min(CHECKED, words.numel())
            sums = torch.empty(words.numel() // block, dtype=torch.int64, device=self._device)
            kernels.checksum[(sums.numel(),)](words, sums, block=block)
            total += (number + 1) * int(sums.sum().item())
        return total


def device_facts() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "memory_bytes": properties.total_memory,
    }


def load(started: Path, until: Path) -> None:
    """Keep the GPU busy with matrix products and copies until the file `until` exists."""
    one, other = (torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    host = torch.empty(_COPY_BYTES, dtype=torch.uint8).pin_memory()
    device = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    while not until.exists():
        for _ in range(20):
            other = torch.mm(one, other).clamp_(-1, 1)
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        started.touch()


def copy_rates() -> dict[str, float]:
    """Return medians in bytes per second between host and device, and within the device (read and write)."""
    device = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(device)
    pageable = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    pinned = pageable.pin_memory()
    pairs = {
        "pinned_to_device": (pinned, device, 1),
        "device_to_pinned": (device, pinned, 1),
        "pageable_to_device": (pageable, device, 1),
        "device_to_pageable": (device, pageable, 1),
        "within_device": (device, other, 2),
    }
    rates = {}
    for name, (source, target, times) in pairs.items():
        target.copy_(source)
        torch.cuda.synchronize()
        seconds = []
        for _ in range(_COPIES):
            began = time.perf_counter()
            target.copy_(source)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        rates[name] = times * _COPY_BYTES / statistics.median(seconds)
    return rates
