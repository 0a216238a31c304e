# SPDX-License-Identifier: Apache-2.0
"""Compare the tokens per second of restored servers, mapped and copied; see hack/bench-tokens.

Each run restores a replica of each kind, in turn and in changing order, and asks it twice: `first` counts
what the memory costs when it is touched for the first time, `again` does not.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODES = ("map", "copy")
READY_SECONDS = 120.0
ANSWER_SECONDS = 300.0


def tokens_per_second(port: int, model: str, streams: int, tokens: int) -> float:
    """Ask for `tokens` tokens in each of so many streams at once; return the tokens per second of all."""

    def ask(number: int) -> int:
        body = {"model": model, "prompt": f"{number}", "max_tokens": tokens, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps({**body, "temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:  # noqa: S310
            return int(json.load(response)["usage"]["completion_tokens"])

    began = time.monotonic()
    with ThreadPoolExecutor(streams) as pool:
        count = sum(pool.map(ask, range(streams)))
    return count / (time.monotonic() - began)


def measure(image: str, mode: str, model: str, streams: Sequence[int], tokens: int) -> dict[str, float]:
    """Restore a replica, and return its tokens per second by "STREAMS first" and "STREAMS again"."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as work:
        ready = Path(work) / "ready"
        words = ["restore", image, "--require", "process", "--memory", mode, "--ready-file", str(ready)]
        with open(Path(work) / "log", "wb") as log:
            process = subprocess.Popen(
                [ROOT / ".venv/bin/rekindle", *words, "--publish", f"127.0.0.1:{port}"],
                stdout=log,
                stderr=log,
            )
        try:
            deadline = time.monotonic() + READY_SECONDS
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit((Path(work) / "log").read_text(errors="replace"))
                time.sleep(0.01)
            return {
                f"{count} {when}": tokens_per_second(port, model, count, tokens)
                for when in ("first", "again")
                for count in streams
            }
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def show(found: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Print a table: medians of the tokens per second, from the slowest to the fastest run."""
    print(f"{'streams':16}{'mapped':>24}{'copied':>24}{'mapped / copied':>18}")
    for name in found["map"][0]:
        values = {mode: sorted(run[name] for run in found[mode]) for mode in MODES}
        middle = {mode: statistics.median(values[mode]) for mode in MODES}
        cells = [f"{middle[m]:.0f} ({values[m][0]:.0f} to {values[m][-1]:.0f})" for m in MODES]
        print(f"{name:16}{cells[0]:>24}{cells[1]:>24}{middle['map'] / middle['copy']:>18.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="hack/bench-tokens", description=__doc__)
    parser.add_argument("image", help="an image of vLLM, in the store of $REKINDLE_HOME")
    parser.add_argument("--model", default="tiny", help="the served model's name (default: tiny)")
    parser.add_argument("--runs", type=int, default=5, help="replicas of each kind (default: 5)")
    parser.add_argument("--streams", type=int, default=50, help="streams at once, beside one (default: 50)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each stream (default: 200)")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for run in range(args.runs):
        for mode in MODES if run % 2 == 0 else MODES[::-1]:
            found[mode].append(measure(args.image, mode, args.model, (1, args.streams), args.tokens))
            rates = ", ".join(f"{name} {rate:.0f}" for name, rate in found[mode][-1].items())
            print(f"{mode}: {rates} tokens/s", file=sys.stderr, flush=True)
    print(f"n = {args.runs} each, {args.tokens} tokens a stream; {os.cpu_count()} processors")
    show(found)


if __name__ == "__main__":
    main()
