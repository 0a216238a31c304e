# SPDX-License-Identifier: Apache-2.0
"""Compare the tokens per second of restored servers, mapped and copied; see hack/bench-tokens.

Each run restores a replica of each kind, in turn and in changing order, and asks it twice: `first` counts
what the memory costs when it is touched for the first time, `again` does not. The tokens for each second of
processor time say the same where other work makes everything slower.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[1]
MODES = ("map", "copy")
READY_SECONDS = 120.0
ANSWER_SECONDS = 300.0
RESAMPLED = 2000


class Rates(NamedTuple):
    """Tokens for each second, and for each second of processor time."""

    wall: float
    processor: float


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process and its descendants."""
    found = 0.0
    for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found += times.user + times.system
    return found


def rates(port: int, pid: int, model: str, streams: int, tokens: int) -> Rates:
    """Ask for `tokens` tokens in each of so many streams at once; return the rates of all together."""

    def ask(number: int) -> int:
        body = {"model": model, "prompt": f"{number}", "max_tokens": tokens, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps({**body, "temperature": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:  # noqa: S310
            return int(json.load(response)["usage"]["completion_tokens"])

    began, used = time.monotonic(), processor_seconds(pid)
    with ThreadPoolExecutor(streams) as pool:
        count = sum(pool.map(ask, range(streams)))
    return Rates(count / (time.monotonic() - began), count / (processor_seconds(pid) - used))


@contextlib.contextmanager
def served(image: str, mode: str) -> Iterator[tuple[int, int]]:
    """Restore a replica; yield its port and the PID of rekindle."""
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
            yield port, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def measure(image: str, mode: str, model: str, streams: Sequence[int], tokens: int) -> dict[str, Rates]:
    """Restore a replica, and return its rates by "STREAMS first" and "STREAMS again"."""
    with served(image, mode) as (port, pid):
        return {
            f"{count} {when}": rates(port, pid, model, count, tokens)
            for when in ("first", "again")
            for count in streams
        }


def compare_pairs(image: str, model: str, streams: Sequence[int], tokens: int, pairs: int) -> None:
    """Restore a replica of each kind, ask them in turn, and print the medians of the ratios of each pair.

    What else the machine does changes more slowly than the turns, so that it counts for both.
    """
    with contextlib.ExitStack() as stack:
        replicas = {mode: stack.enter_context(served(image, mode)) for mode in MODES}
        for count in streams:
            for place in replicas.values():
                rates(*place, model, count, tokens)  # the first touch of the memory
            found: list[dict[str, Rates]] = []
            for number in range(pairs):
                turn = MODES if number % 2 == 0 else MODES[::-1]
                found.append({mode: rates(*replicas[mode], model, count, tokens) for mode in turn})
            for index, unit in enumerate(("tokens per second", "tokens per second of processor time")):
                ratios = [each["map"][index] / each["copy"][index] for each in found]
                samples = (random.choices(ratios, k=pairs) for _ in range(RESAMPLED))  # noqa: S311
                again = sorted(map(statistics.median, samples))
                middle = {mode: statistics.median(each[mode][index] for each in found) for mode in MODES}
                print(
                    f"{count} streams, {unit}: mapped {middle['map']:.0f}, copied {middle['copy']:.0f}; "
                    f"median of the ratios {statistics.median(ratios):.3f}, "
                    f"95 % from {again[RESAMPLED // 40]:.3f} to {again[-RESAMPLED // 40]:.3f}; n = {pairs}",
                    flush=True,
                )


def show(found: Mapping[str, Sequence[Mapping[str, Rates]]]) -> None:
    """Print a table: medians of the rates, from the slowest to the fastest run."""
    print(f"{'streams, tokens per second':40}{'mapped':>24}{'copied':>24}{'mapped / copied':>18}")
    for name in found["map"][0]:
        for number, unit in enumerate(("", "of processor time")):
            values = {mode: sorted(run[name][number] for run in found[mode]) for mode in MODES}
            middle = {mode: statistics.median(values[mode]) for mode in MODES}
            cells = [f"{middle[m]:.0f} ({values[m][0]:.0f} to {values[m][-1]:.0f})" for m in MODES]
            ratio = middle["map"] / middle["copy"]
            print(f"{f'{name} {unit}':40}{cells[0]:>24}{cells[1]:>24}{ratio:>18.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="hack/bench-tokens", description=__doc__)
    parser.add_argument("image", help="an image of vLLM, in the store of $REKINDLE_HOME")
    parser.add_argument("--model", default="tiny", help="the served model's name (default: tiny)")
    parser.add_argument("--runs", type=int, default=5, help="replicas of each kind (default: 5)")
    parser.add_argument("--streams", type=int, default=50, help="streams at once, beside one (default: 50)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each stream (default: 200)")
    parser.add_argument(
        "--pairs", type=int, help="ask one replica of each kind in turn, so many times, instead of many once"
    )
    args = parser.parse_args()
    if args.pairs:
        compare_pairs(args.image, args.model, (1, args.streams), args.tokens, args.pairs)
        return
    found: dict[str, list[dict[str, Rates]]] = {mode: [] for mode in MODES}
    for run in range(args.runs):
        for mode in MODES if run % 2 == 0 else MODES[::-1]:
            found[mode].append(measure(args.image, mode, args.model, (1, args.streams), args.tokens))
            told = ", ".join(
                f"{name} {each.wall:.0f} {each.processor:.0f}" for name, each in found[mode][-1].items()
            )
            print(f"{mode}: {told} tokens/s", file=sys.stderr, flush=True)
    print(f"n = {args.runs} each, {args.tokens} tokens a stream; {os.cpu_count()} processors")
    show(found)


if __name__ == "__main__":
    main()
