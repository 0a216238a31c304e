# SPDX-License-Identifier: Apache-2.0
"""The rules for comparing variables: a part of restore/decide/rules.py, which explains them."""

from collections.abc import Mapping

from rekindle.report import Rung
from restore.decide.rule import Rule

OF_PROCESSES: Mapping[str, Rule] = {
    "environment": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process keeps the variables of its own start. One that the server, CUDA, torch, OpenMP, the "
        "libraries of Hugging Face or the dynamic linker read is another today, or set in one of the two "
        "alone. What platforms set anew for every start, and the places of kernel caches, are not compared.",
        source="docs/adr/0026-environment.md; rekindle/engine/variables.py",
        advice="set the recorded value, make a snapshot with this one, or use --accept-environment NAME",
    ),
    "environment-secret": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="A variable that holds a secret, by its name or form, is set today and was not, or the other way "
        "round: a server without the key of today may let everyone in. If it was set and is set, it is "
        "compared once the process is restored, before its port opens.",
        source="docs/adr/0026-environment.md; docs/secrets.md",
        advice="restore without it if the server does not need it, or use --accept-environment NAME",
    ),
    "environment-other": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="Any other variable differs: whether the server reads it is unknown, or it is an address of the "
        "node. The first 50 are reported. "
        "The record has 16 bits of a digest of such a value, so one change of 65,536 is not noticed.",
        source="docs/adr/0026-environment.md",
        advice="if the server reads it, make a snapshot with it; a policy can make the rule hard",
    ),
    "secret-unknown": Rule(
        rung=Rung.PROCESS,
        hard=False,
        fixed=True,
        why="A secret was set and is set, or a file that may hold one was read and is here. The record does "
        "not hold it, so it is compared after the process is restored: if it is another, that is "
        "`environment-secret`, or the code of the file.",
        source="docs/adr/0026-environment.md, docs/adr/0034-secret-files.md",
        advice="no action needed if it is the same",
    ),
    "oracle-variable": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="A header of the oracle's request has the value of a variable, which is not set today or cannot "
        "be sent. Without the oracle's answer, it is unknown whether the restored server works.",
        source="docs/format.md, requests",
        advice="set the variable for rekindle restore",
    ),
}
OF_CACHES: Mapping[str, Rule] = {
    "cache-replayed": Rule(
        rung=Rung.CACHE,
        hard=False,
        fixed=True,
        why="A variable that does nothing but choose kernels was set, and is not set here. The server gets "
        "the recorded value, so that it finds the cache. It gets no other recorded variable.",
        source="docs/adr/0026-environment.md",
        advice="set the variable here, if the server is to have another value",
    ),
}
