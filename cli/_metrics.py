# SPDX-License-Identifier: Apache-2.0
"""Collect metrics for Prometheus from what a home keeps. Needs prometheus-client.

Nothing is counted here: commands add to the totals of their home (`rekindle/history.py`), and the replicas
and what is kept are looked at when they are asked for.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from cli import _memory
from rekindle import __version__, history, replicas
from rekindle.home import Home
from rekindle.replicas import ReplicaState
from rekindle.report import Rung
from restore import housekeeping
from restore.housekeeping import KeptKind

_COUNTED = {
    "commands": "Commands that have ended, and restores whose server was ready.",
    "errors": "Commands that have failed, by the code of the error.",
    "verification_failures": "Commands that refused an image for its signature, its age or its digests.",
    "restores": "Restores by how the server was started, and by the rung that was asked for.",
    "reasons": "Differences that restores found, and why rungs failed. A hard one forbids its rung.",
    "wakes": "Restores of servers that had hibernated.",
    "bytes": "Bytes that commands moved, by kind.",
    "kernel_cache_starts": "Servers that were started on a kernel cache, by how they used it.",
    "kernel_cache_entries": "Entries of kernel caches that servers used, and that they compiled again.",
}
_TIMED = {
    "command_seconds": "Seconds until a command ended, or the server of a restore was ready.",
    "phase_seconds": "Seconds of each phase of a command.",
    "first_token_seconds": "Seconds from the start of a restore to the first byte of the oracle's answer.",
    "pause_seconds": "Seconds for which the clients of a running server waited for a snapshot of it.",
}


# Prometheus sees how much a counter has increased only from its second value on: these begin with 0.
_ZEROS: dict[str, list[tuple[str, ...]]] = {
    "restores": [(outcome, Rung.PROCESS) for outcome in ("restored", "cache", "cold", "failed")],
    "wakes": [("restored",), ("failed",)],
    "verification_failures": [
        (verb, code) for verb in ("restore", "extract", "pull") for code in ("trust", "integrity")
    ],
    "kernel_cache_starts": [(verdict,) for verdict in ("hit", "partial", "miss", "unused")],
    "kernel_cache_entries": [("used",), ("compiled",)],
}


class HomeCollector(Collector):
    """The metrics of a home."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def describe(self) -> Iterable[Metric]:
        """Return nothing: names are not compared with those of other collectors."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Look at the home and yield every metric."""
        yield InfoMetricFamily("rekindle_build", "This version.", {"version": __version__})
        yield from self._of_commands()
        yield from self._of_replicas()
        yield from self._of_what_is_kept()

    def _of_commands(self) -> Iterator[Metric]:
        totals = history.read_totals(self._home)
        yield GaugeMetricFamily(
            "rekindle_counted_since_seconds", "Unix time since which commands are counted.", totals.since
        )
        for name, labels in history.COUNTED.items():
            counter = CounterMetricFamily(f"rekindle_{name}", _COUNTED[name], labels=labels)
            values = dict.fromkeys(_ZEROS.get(name, ()), 0)
            values |= {each.labels: each.value for each in totals.counts if each.name == name}
            for found, value in values.items():
                if len(found) == len(labels):
                    counter.add_metric(found, value)
            yield counter
        for name, labels in history.TIMED.items():
            histogram = HistogramMetricFamily(f"rekindle_{name}", _TIMED[name], labels=labels)
            for timed in totals.times:
                if timed.name == name and len(timed.labels) == len(labels):
                    bounds = [*map(str, history.BUCKETS), "+Inf"]
                    below = zip(bounds, itertools.accumulate(timed.counts), strict=True)
                    histogram.add_metric(timed.labels, list(below), timed.sum_seconds)
            yield histogram

    def _of_replicas(self) -> Iterator[Metric]:
        found = replicas.found(self._home)
        states = GaugeMetricFamily(
            "rekindle_replicas", "Servers by state; of those that have ended, the newest.", labels=["state"]
        )
        count = Counter(each.state for each in found)
        for state in ReplicaState:
            states.add_metric([state], count[state])
        yield states
        ready = GaugeMetricFamily(
            "rekindle_replica_ready", "Whether a server that runs is ready.", labels=["replica", "image"]
        )
        memory = GaugeMetricFamily(
            "rekindle_replica_memory_bytes",
            "Memory of a server: its own, and mapped files, which replicas of an image share.",
            labels=["replica", "image", "kind"],
        )
        for each in found:
            if not each.runs:
                continue
            ready.add_metric([each.name, each.status.image], each.state is ReplicaState.READY)
            if (used := _memory.of(each)) is not None:
                for kind, number in zip(("own", "shared"), used, strict=True):
                    memory.add_metric([each.name, each.status.image, kind], number)
        yield ready
        yield memory

    def _of_what_is_kept(self) -> Iterator[Metric]:
        kept = housekeeping.kept(self._home)
        size = GaugeMetricFamily(
            "rekindle_kept_bytes",
            "Sizes of the images, unpacked dumps and kernel caches that are kept. Images may share blobs.",
            labels=["kind"],
        )
        number = GaugeMetricFamily(
            "rekindle_kept",
            "How many of each are kept.",
            labels=["kind"],
        )
        for kind in KeptKind:
            of_kind = [each for each in kept if each.kind is kind]
            size.add_metric([kind], housekeeping.total_bytes(of_kind))
            number.add_metric([kind], len(of_kind))
        yield size
        yield number


def registry(home: Home) -> CollectorRegistry:
    """Return a registry of these metrics alone."""
    found = CollectorRegistry()
    found.register(HomeCollector(home))
    return found
