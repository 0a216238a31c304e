# SPDX-License-Identifier: Apache-2.0
"""The rules for comparing limits and CPUs: a part of restore/decide/rules.py, which explains them."""

from collections.abc import Mapping

from rekindle.report import Rung
from restore.decide.rule import Rule

LIMIT_RULES: Mapping[str, Rule] = {
    "limit": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The server gets the limits of this node, as by a start here, and what it set itself is set "
        "again. Here it could not have set a limit, or it would use more open files, locked memory or "
        "address space than it may. CAP_SYS_RESOURCE allows raising hard limits, CAP_IPC_LOCK locking "
        "memory.",
        source="getrlimit(2); capabilities(7); CRIU, criu/pie/restorer.c: restore_rlims ignores errors",
        advice="raise the limit: ulimit, --ulimit of a container, LimitNOFILE= of a systemd unit",
    ),
    "cpu-count": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="The server chose the number of its threads at its start, by the CPUs that it could use.",
        source="sched_getaffinity(2); OpenMP, OMP_NUM_THREADS",
        advice="make a snapshot with as many CPUs, or expect another speed",
    ),
    "cpu-quota": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="A control group limits the CPU time in every period. Runtimes that read it at their start chose "
        "their threads by it.",
        source="Linux, Documentation/admin-guide/cgroup-v2.rst (cpu.max)",
        advice="make a snapshot with the same quota, or expect another speed",
    ),
    "cpu-affinity": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="A thread is bound again to those of its CPUs that can be used here. If there is none, it may "
        "run on all of them.",
        source="sched_setaffinity(2); CRIU does not save it",
        advice="make a snapshot on the same CPUs, or without binding threads",
    ),
    "memory-policy": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="The server bound memory to NUMA nodes that are not all of those here. CRIU does not save that, "
        "and no other process can set it.",
        source="set_mempolicy(2), mbind(2)",
        advice="start rekindle with the policy: numactl",
    ),
    "setting": Rule(
        rung=Rung.PROCESS,
        hard=False,
        fixed=True,
        why="A priority, a binding, a limit or a socket's option that the server had set could not be set "
        "again. Reported after the restore.",
        source="setpriority(2), sched_setscheduler(2), prlimit(2), proc(5)",
        advice="run with the capabilities that the server had",
    ),
}
