# SPDX-License-Identifier: Apache-2.0
"""The rules for comparing credentials: a part of restore/decide/rules.py, which explains them."""

from collections.abc import Mapping

from rekindle.report import Rung
from restore.decide.rule import Rule

CREDENTIAL_RULES: Mapping[str, Rule] = {
    "more-privileged": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process keeps the credentials of its snapshot, and may do more with them than a start here: "
        "it has ambient capabilities, lacks securebits that are set here, or has a group that it could not "
        "give itself.",
        source="credentials(7), capabilities(7); CRIU, criu/pie/restorer.c: restore_creds",
        advice="run rekindle with the groups and securebits of the snapshot, or make one with today's",
    ),
    "other-credentials": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="The process keeps the credentials of its snapshot, and may do less with them than a start here: "
        "it lacks a group, or has securebits, no_new_privs or a filter of system calls. Or it has another "
        "group, but the capability to give itself any.",
        source="credentials(7), capabilities(7), prctl(2), seccomp(2)",
        advice="make a snapshot with the credentials of today if the server needs them",
    ),
    "security-label": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process keeps the label of its snapshot, by which AppArmor or SELinux decide what it may "
        "do. A process without one gets that of a start here.",
        source="CRIU, criu/lsm.c; apparmor(7), selinux(8)",
        advice="run the container with the recorded label: --security-opt label=… or apparmor=…",
    ),
}
