# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm.snapshot.server --ready-file R --release-file L --release-timeout-s T -- OPTIONS OF SERVE`.

What it promises is what that of vLLM 0.32 does: a question to itself, a rehearsed sleep at level 2, the
question again, sleep, R, and once L is there: awake, and only then a port, where L says.
"""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from ..api import Api, listen, text_of
from ..cli import parse
from ..engine import Engine

CANARY = "The capital of France is"


async def canary(engine: Engine) -> dict[str, object]:
    ((number, logprob),) = await engine.ask("generate", prompt=CANARY, tokens=1)
    return {"sampled_token_logprob": logprob, "token_ids": [number], "text": text_of(number)}


async def restore(engine: Engine) -> None:
    await engine.ask("wake_up", tags=["weights"])
    await engine.ask("reload_weights")
    await engine.ask("wake_up", tags=["kv_cache"])


async def run(control: argparse.Namespace, rest: list[str]) -> None:
    args = parse(rest, prog="python -m vllm.snapshot.server")
    if "FAKE_CUDA" not in os.environ:
        sys.exit("Sleep mode is not supported on current platform.")
    engine = await Engine.start(args.model)
    oracle = await canary(engine)
    await engine.ask("sleep", level=2)
    await restore(engine)
    if await canary(engine) != oracle:
        sys.exit("SnapshotCanaryError: snapshot rehearsal changed canary output")
    await engine.ask("sleep", level=2)

    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.close(sink)
    staged = control.ready_file.with_suffix(".new")
    staged.write_text(json.dumps(oracle))
    staged.rename(control.ready_file)
    left = control.release_timeout_s
    while not control.release_file.exists():
        if left <= 0:
            sys.exit("TimeoutError")
        await asyncio.sleep(0.05)
        left -= 0.05
    marker = json.loads(control.release_file.read_bytes())
    if marker.get("release") is not True or not 1 <= marker["port"] <= 65535:
        sys.exit("SnapshotBarrierError")
    await restore(engine)
    await listen(Api(engine, args), marker["host"], marker["port"])


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--release-file", type=Path, required=True)
    parser.add_argument("--release-timeout-s", type=float, default=900.0)
    control, rest = parser.parse_known_args()
    asyncio.run(run(control, rest[1:] if rest[:1] == ["--"] else rest))


if __name__ == "__main__":
    main()
