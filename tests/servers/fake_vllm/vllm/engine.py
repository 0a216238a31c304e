# SPDX-License-Identifier: Apache-2.0
"""The engine: in the server, who gives orders; and, run as a program, the process that carries them out."""

import asyncio
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

KV_BYTES = 512 << 20
CONTEXT_BYTES = 256 << 20
GARBAGE = b"what was in the memory before"


class Engine:
    """One order at a time, as a line of JSON each way."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process  # asyncio kills one that nothing refers to
        self._orders = process.stdin
        self._answers = process.stdout
        self._turn = asyncio.Lock()

    @classmethod
    async def start(cls, model: str) -> "Engine":
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "vllm.engine", model),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        engine = cls(process)
        await engine.ask("ready")
        return engine

    async def ask(self, order: str, **arguments: object) -> Any:
        async with self._turn:
            self._orders.write(json.dumps([order, arguments]).encode() + b"\n")
            await self._orders.drain()
            line = await self._answers.readline()
        if not line:
            print("EngineCore died", file=sys.stderr, flush=True)
            os._exit(1)
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]


class Core:
    def __init__(self, model: str) -> None:
        self._file = Path(model) / "model.safetensors"
        self._weights: bytes | None = self._file.read_bytes()
        self._saved: bytes | None = None
        self._known: tuple[bytes | None, bytes] = (None, b"")
        self._asleep: set[str] = set()
        self._salt = b""
        self._state = Path(f"/dev/shm/fake-cuda-{os.getpid()}") if "FAKE_CUDA" in os.environ else None
        self._tell_driver()

    def ready(self) -> None:
        pass

    def generate(self, prompt: object, tokens: int) -> list[tuple[int, float]]:
        """Numbers and logprobs, which follow from the weights and from the prompt."""
        if self._asleep or self._weights is None:
            raise RuntimeError(f"asleep: {', '.join(sorted(self._asleep))}")
        found = []
        if self._known[0] is not self._weights:
            self._known = (self._weights, hashlib.sha256(self._weights).digest())
        for number in range(tokens):
            key = b"|".join([self._known[1], self._salt, json.dumps(prompt).encode(), b"%d" % number])
            digest = hashlib.sha256(key).digest()
            found.append((int.from_bytes(digest[:2]), -digest[2] / 256))
        return found

    def sleep(self, level: int) -> None:
        self._saved = self._weights if level == 1 else None
        self._weights = None
        self._asleep = {"weights", "kv_cache"}
        if faults().get("drift"):
            self._salt = b"drift"

    def wake_up(self, tags: list[str] | None) -> bool:
        for tag in tags or sorted(self._asleep):
            if tag == "weights" and tag in self._asleep:
                self._weights = GARBAGE if faults().get("lose") else self._saved or GARBAGE
            self._asleep.discard(tag)
        return not self._asleep

    def is_sleeping(self) -> bool:
        return bool(self._asleep)

    def reload_weights(self) -> None:
        if "weights" in self._asleep:
            raise RuntimeError("there is no memory for weights")
        self._weights = GARBAGE if faults().get("lose") else self._file.read_bytes()

    def run(self) -> None:
        for line in sys.stdin:
            order, arguments = json.loads(line)
            self._wait_for_driver()
            if order in faults().get("exit", []):
                self.leave()
                os._exit(9)
            try:
                if order in faults().get("fail", []):
                    raise RuntimeError(f"{order} was made to fail")
                answer = {"value": getattr(self, order)(**arguments)}
            except Exception as error:
                answer = {"error": str(error)}
            self._tell_driver()
            print(json.dumps(answer), flush=True)

    def leave(self) -> None:
        if self._state is not None:
            self._state.unlink(missing_ok=True)

    def _tell_driver(self) -> None:
        """What is on the GPU now, for tests/fakes/cuda_engine.py."""
        if self._state is None:
            return
        known = {"state": "running", "uuids": os.environ["FAKE_VLLM_GPUS"].split(",")}
        if self._state.exists():
            known = json.loads(self._state.read_bytes())
        else:
            from vllm.cuda_engine import begin_restore_thread  # type: ignore  # tests/fakes/vllm.py puts it here

            begin_restore_thread()
        device_bytes = CONTEXT_BYTES + len(self._weights or b"")
        device_bytes += 0 if "kv_cache" in self._asleep else KV_BYTES
        staged = self._state.with_suffix(".new")
        staged.write_text(json.dumps({**known, "device_bytes": device_bytes}))
        staged.rename(self._state)

    def _wait_for_driver(self) -> None:
        while self._state is not None and json.loads(self._state.read_bytes())["state"] != "running":
            time.sleep(0.005)


def faults() -> dict[str, Any]:
    try:
        return dict(json.loads(Path(os.environ["FAKE_VLLM"]).read_bytes()))
    except (KeyError, FileNotFoundError):
        return {}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    core = Core(sys.argv[1])
    try:
        core.run()
    finally:
        core.leave()
