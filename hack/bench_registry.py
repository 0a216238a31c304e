# SPDX-License-Identifier: Apache-2.0
"""Time pushes and pulls of one dump by the oras CLI and by rekindle; see hack/bench-registry.

With both, a push starts from CRIU's files and ends with blobs in the registry: rekindle's includes packing. A
pull starts from an empty disk and ends with files that CRIU can restore: rekindle's includes unpacking.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from msgspec import structs

from oci import dump_layers
from oci import image as images
from oci.layout import Layout
from rekindle import dump_tree
from rekindle.criu import zero_pages
from rekindle.criu.memory_files import move_memory
from rekindle.home import Home
from rekindle.run import run
from tests.servers.registry.simulator import Registry

RATE = 80e6
_MEMORY_BYTES = 6 << 30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("registry")
    parser.add_argument("image")
    parser.add_argument("dump", type=Path)
    parser.add_argument("runs", type=int, nargs="?", default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        compare(args.registry, args.image, args.dump, args.runs, Path(name))
        throttled(args.image, args.runs, Path(name))


def compare(registry: str, name: str, dump: Path, runs: int, work: Path) -> None:
    total = sum(path.stat().st_size for path in dump.rglob("*") if path.is_file())
    print(f"{total / 1e9:.2f} GB of dump, n = {runs}, medians; peak memory of the program itself")
    times: dict[str, list[float]] = {"oras push": [], "push": [], "oras pull": [], "pull": []}
    peaks: dict[str, int] = dict.fromkeys(times, 0)

    def timed(what: str, action: Callable[[], int]) -> None:
        have_memory()
        began = time.monotonic()
        peak = action()
        times[what].append(time.monotonic() - began)
        peaks[what] = max(peaks[what], peak)
        print(f"{what:<10} {times[what][-1]:6.2f} s", file=sys.stderr)

    rekindle(["generate-key-pair", "--output-key-prefix", str(work / "key")], work / "home")
    copy, into = work / "copy", work / "oras"
    for number in range(runs):
        theirs, ours = f"{registry}/dump{number}/oras:1", f"{registry}/dump{number}/ours:1"
        shutil.copytree(dump, copy, symlinks=True)
        into.mkdir()
        timed("oras push", partial(oras, ["push", theirs, "criu", "shm"], dump))
        timed("push", partial(packed_and_pushed, name, copy, ours, work))
        shutil.rmtree(copy)
        timed("oras pull", partial(oras, ["pull", theirs], into))
        shutil.rmtree(into)
        words = ["pull", "--unpack", ours, "--verify-key", str(work / "key.pub")]
        timed("pull", partial(rekindle, words, work / "home"))
        shutil.rmtree(work / "home")
    for what, seconds in times.items():
        print(
            f"{what:<10} {statistics.median(seconds):6.2f} s  ({min(seconds):.2f}-{max(seconds):.2f})"
            f"  {peaks[what] / 1e6:.0f} MB"
        )
    for what in ("push", "pull"):
        ratio = statistics.median(times[f"oras {what}"]) / statistics.median(times[what])
        print(f"{what}: rekindle is {ratio:.1f} times as fast")


def have_memory() -> None:
    """Touch as much memory as a pull needs. A virtual machine returns free memory to its host after seconds,
    and getting it back takes up to 3 s of any pull."""
    run([sys.executable, "-c", f"b'x' * {_MEMORY_BYTES}"], timeout=60)


def oras(words: list[str], directory: Path) -> int:
    done = run([os.environ["ORAS"], *words, "--plain-http", "--no-tty"], timeout=600, cwd=directory)
    assert done.status == 0, done.output
    return done.peak_rss_bytes


def rekindle(words: list[str], home: Path) -> int:
    argv = [sys.executable, "-m", "rekindle", *words]
    done = run(argv, timeout=600, env={**os.environ, "REKINDLE_HOME": str(home), "COSIGN_PASSWORD": ""})
    assert done.status == 0, done.output
    return done.peak_rss_bytes


def packed_and_pushed(name: str, dump: Path, target: str, work: Path) -> int:
    """Do what `rekindle snapshot` does after the dump, from dropping zero pages on, sign, and push.

    Return the peak memory in bytes.
    """
    home = work / "packed"
    sys.stdout.flush()
    pid = os.fork()  # a process of its own, whose peak memory can be measured
    if pid == 0:
        began = time.monotonic()
        pack(name, dump, Layout.create(home / "store"))
        print(f"  packing alone {time.monotonic() - began:.2f} s", file=sys.stderr)
        os._exit(0)
    _, status, usage = os.wait4(pid, 0)
    assert status == 0
    rekindle(["sign", "x", "--sign-key", str(work / "key.key")], home)
    peak = max(usage.ru_maxrss * 1024, rekindle(["push", "x", target], home))
    shutil.rmtree(home)
    return peak


def pack(name: str, dump: Path, layout: Layout) -> None:
    store = Layout(Home.from_environment().store)
    record = images.load(store, store.resolve(f"{name}:latest")).record
    zero_pages.drop(dump / "criu")
    move_memory(dump / "criu", dump / "memory")  # the same files as those of the record
    files = dump_tree.scan(dump)
    record = structs.replace(record, dump=structs.replace(record.dump, files=files))
    built = images.build(layout, record, dump_layers.pack(dump, files, layout, workers=dump_layers.workers()))
    layout.publish(layout, built.index, "x:latest")


def throttled(name: str, runs: int, work: Path) -> None:
    """Time pulls from a registry that limits each request to 80 MB/s, over one connection and over many."""
    for jobs in (1, 8, 16):
        seconds = []
        for _ in range(runs):
            with Registry(rate_bytes_per_second=RATE) as registry:
                rekindle(["push", name, f"{registry.host}/x:1"], Home.from_environment().root)
                report = work / "report.json"
                words = ["pull", f"{registry.host}/x:1", f"oci:{work}/layout", "--jobs", str(jobs)]
                rekindle([*words, "--report", str(report)], work / "home")
                phases = {p["name"]: p["seconds"] for p in json.loads(report.read_bytes())["phases"]}
                fetched = json.loads(report.read_bytes())["bytes"]["fetched"]
                seconds.append(phases["transfer"])
                shutil.rmtree(work / "layout")
        middle = statistics.median(seconds)
        print(f"80 MB/s a request, {jobs:2} connections: {middle:.2f} s, {fetched / middle / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()
