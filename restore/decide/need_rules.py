# SPDX-License-Identifier: Apache-2.0
"""The rules for what a process takes from a node: a part of restore/decide/rules.py, which explains them."""

from collections.abc import Mapping

from rekindle.report import Rung
from restore.decide.rule import Rule

NEED_RULES: Mapping[str, Rule] = {
    "huge-pages": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The server has mapped huge pages, which a restore must reserve again before anything else can "
        "use them. Their number on this node is set by its administrator, and a control group may allow "
        "fewer.",
        source="Linux, Documentation/admin-guide/mm/hugetlbpage.rst; observed: mmap fails with ENOMEM",
        advice="reserve more: sysctl vm.nr_hugepages, hugepages-2Mi in a pod's limits",
    ),
    "tasks": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="A control group limits the number of processes and threads, and the server had more.",
        source="Linux, Documentation/admin-guide/cgroup-v2.rst (pids.max)",
        advice="raise the limit: --pids-limit of a container, TasksMax= of a systemd unit, podPidsLimit",
    ),
    "disk": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The dump is unpacked to a disk before it is mapped. Other unpacked dumps are removed to make "
        "room, and count as free.",
        source="docs/adr/0004-ready-dumps.md",
        advice="set REKINDLE_HOME to a directory on a larger disk",
    ),
    "ipv6": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The server has sockets for IPv6, which this OS kernel does not offer.",
        source="Linux, Documentation/networking/ipv6.rst (disable)",
        advice="boot without ipv6.disable=1, or make the snapshot of a server that listens on IPv4 alone",
    ),
    "port": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="A server on the host's network has its ports itself, and another process has one of them.",
        source="bind(2)",
        advice="end the other process, or make the snapshot without --network host",
    ),
    "slow": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="To fetch, unpack and restore the dump is expected to take longer than the process rung may, "
        "which is no longer than the cold start that it spares. So it is not begun, if a lower rung is "
        "possible. Expected are 100 MB/s from a registry and 500 MB/s to the disk, or what they gave in "
        "the last hour.",
        source="docs/adr/0008-ladder.md",
        advice="do it beforehand: `rekindle pull --unpack`; or allow more: --process-deadline S",
    ),
    "cache-slow": Rule(
        rung=Rung.CACHE,
        hard=True,
        why="Likewise, for the layers of the kernel cache.",
        source="docs/adr/0008-ladder.md",
        advice="fetch it beforehand: `rekindle pull`; or allow more: --cache-deadline S",
    ),
}
