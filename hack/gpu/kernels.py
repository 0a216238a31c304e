# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of the decoder in Triton's language, which looks like Python but has its own types."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["seed"])
def fill(into, seed, scale: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(into + at, (tl.rand(seed, at) - 0.5) * scale)


@triton.jit
def project(state, weights, into, size: tl.constexpr, height: tl.constexpr, width: tl.constexpr):
    """into = weights · state; each program computes some rows."""
    member = tl.program_id(1) * size
    rows = tl.program_id(0) * height + tl.arange(0, height)
    total = tl.zeros([height], tl.float32)
    for begin in range(0, size, width):
        columns = begin + tl.arange(0, width)
        part = tl.load(state + member + columns)
        square = tl.load(weights + rows[:, None] * size + columns[None, :]).to(tl.float32)
        total += tl.sum(square * part[None, :], axis=1)
    tl.store(into + member + rows, total)


@triton.jit
def settle(state, change, size: tl.constexpr):
    """state = normalised(state + silu(change))"""
    at = tl.program_id(0) * size + tl.arange(0, size)
    moved = tl.load(change + at)
    value = tl.load(state + at) + moved * tl.sigmoid(moved)
    tl.store(state + at, value * tl.rsqrt(tl.sum(value * value) / size + 1e-6))


@triton.jit
def checksum(words, into, block: tl.constexpr):
    """Sum integers, so that the order does not matter, each weighted by its place, so that a swap is
    noticed."""
    inside = tl.arange(0, block)
    value = tl.load(words + tl.program_id(0).to(tl.int64) * block + inside).to(tl.int64)
    tl.store(into + tl.program_id(0), tl.sum(value * (inside % 251 + 1)))
