# SPDX-License-Identifier: Apache-2.0
"""Measure decisions with a warm store; see hack/bench-decision.

Each run is a process of its own, as in a restore. `start` is a Python that imports nothing but the command,
`decide` the decision in it, `whole` the process from its start to its end. The processor's time says the same
where other work makes everything slower.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

_ONE = """
import sys, time
began = time.perf_counter()
from cli import restore as command
from restore.flow import plan
from restore.options import Options
options = Options(image=sys.argv[1], command=tuple(sys.argv[2:]))
ready, used = time.perf_counter(), time.process_time()
first = plan(options).plan.first
used = time.process_time() - used
print(ready - began, time.perf_counter() - ready, used, first.rung if first else "none")
"""


def measure(image: str, command: Sequence[str]) -> tuple[dict[str, float], str]:
    """Return the seconds of one run by what they were spent on, and the rung that it decided on."""
    began, before = time.perf_counter(), os.times()
    words = [sys.executable, "-c", _ONE, image, *command]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    whole, after = time.perf_counter() - began, os.times()
    start, decide, used, rung = done.stdout.split()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    found = {"start": start, "decide": decide, "decide, processor": used}
    return {
        **{name: float(each) for name, each in found.items()},
        "whole": whole,
        "processor": processor,
    }, rung


def main(words: Sequence[str]) -> int:
    at = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="hack/bench-decision")
    parser.add_argument("image")
    parser.add_argument("--runs", type=int, default=15, metavar="N")
    args = parser.parse_args(words[:at])
    command = words[at + 1 :]
    time.sleep(2.1)  # younger times of files prove nothing, so their contents would be compared each time
    for _ in range(2):
        measure(args.image, command)
    found = [measure(args.image, command) for _ in range(args.runs)]
    print(f"rung: {found[-1][1]}, n = {args.runs}, load {os.getloadavg()[0]:.1f}")
    for name in found[0][0]:
        seconds = [each[name] for each, _ in found]
        print(
            f"{name:17} median {statistics.median(seconds) * 1000:6.1f} ms, "
            f"{min(seconds) * 1000:.1f} to {max(seconds) * 1000:.1f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
