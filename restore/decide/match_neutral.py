# SPDX-License-Identifier: Apache-2.0
"""Compare what a neutral process needs with this node, and what it is with the command of today."""

import os
from collections.abc import Mapping, Sequence

from msgspec import Struct, field

from rekindle.command_line import UnclearCommand, Unwrapped, unwrap
from rekindle.node import packages
from rekindle.node.fingerprint import Fingerprint
from rekindle.record import Record
from restore.decide import match_process
from restore.decide.abilities import Abilities
from restore.decide.difference import Difference

# Read by Python, the C library and their like before any module is imported, or by libraries of C and C++.
_READ_BY_ALL = (
    *(
        "PYTHON",
        "LD_",
        "GLIBC_",
        "MALLOC_",
        "LC_",
        "LANG",
        "TZ",
        "OMP_",
        "GOMP_",
        "KMP_",
        "MKL_",
        "OPENBLAS_",
    ),
    *("GOTO_", "BLIS_", "ONEDNN_", "DNNL_", "TORCH_", "PYTORCH_", "ATEN_", "C10_", "GRPC_", "TCMALLOC_"),
)


class NeutralFacts(Struct, frozen=True, kw_only=True):
    """The facts about a neutral process here: its record, and the results of comparing it.

    `different` and `loaded` are as those of a process; `variables` are the differences of all variables.
    `fetch_bytes` are to be fetched for it.
    """

    record: Record
    different: Mapping[str, str] = field(default_factory=dict)
    loaded: Sequence[Difference] = ()
    variables: Sequence[Difference] = ()
    fetch_bytes: int = 0


def compare(
    facts: NeutralFacts,
    node: Fingerprint,
    abilities: Abilities,
    command: Sequence[str],
    environment: Mapping[str, str],
) -> list[Difference]:
    """Return the differences that may keep a neutral process from becoming the command here."""
    neutral = facts.record.neutral
    assert neutral is not None
    found = match_process.compare(facts.record, node, abilities, facts.different, loaded=facts.loaded)
    read = set(neutral.variables)
    for each in facts.variables:
        if each.field in read or each.field.startswith(_READ_BY_ALL):
            found.append(Difference("neutral-variable", each.field, each.recorded, each.here))
    program = becomes(facts.record, command, environment)
    if program is None:
        found.append(Difference("neutral-command", "command", neutral.script, " ".join(command)[:200]))
    return found


def becomes(record: Record, command: Sequence[str], environment: Mapping[str, str]) -> Unwrapped | None:
    """Return what a neutral process has to become for a command; None if it cannot."""
    assert record.neutral is not None
    try:
        found = unwrap(command, environment)
    except UnclearCommand:
        return None
    script = packages.program(found.argv, found.environment)
    if found.wrappers or script is None:
        return None
    same = os.path.realpath(script) == os.path.realpath(record.neutral.script)
    return found if same else None
