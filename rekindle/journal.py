# SPDX-License-Identifier: Apache-2.0
"""The journal of what CUDA processes were found as: who must be unlocked if a command is killed.

    $REKINDLE_HOME/run/VERB-PID-XXXXXX/cuda.json    {"schema": "rekindle.cuda/1", "processes": [...]}

States are kept as the driver's words, so that asking whether a journal is still needed loads nothing of
`rekindle.cuda`.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from rekindle.errors import FormatError
from rekindle.fields import Fields
from rekindle.files import write_atomically
from rekindle.proc import boot_id

CUDA_JOURNAL = "cuda.json"
SCHEMA = "rekindle.cuda/1"
_JOURNAL_LIMIT_BYTES = 1 << 20
_PROCESSES_LIMIT = 10_000
_STATES = frozenset({"running", "locked", "checkpointed", "failed"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A process as it was found. `began`, in ticks since boot, tells it from another one with the same PID;
    `state` is a word of `cuda-checkpoint --get-state`."""

    pid: int
    began: int
    state: str

    def lives(self) -> bool:
        return began(self.pid) == self.began


def unfinished(journal: Path) -> bool:
    """Tell whether a process of a journal still lives. Only the kernel is asked."""
    return bool(read(journal))


def began(pid: int) -> int | None:
    """Return when a process began, in the kernel's ticks since boot, or None if it has ended."""
    try:
        # The second field is a name in parentheses, and may hold some itself: proc(5).
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def write(journal: Path, found: Collection[Held]) -> None:
    """Write a journal atomically, readable by its owner alone."""
    processes = [{"pid": held.pid, "began": held.began, "state": held.state} for held in found]
    document = {"schema": SCHEMA, "boot": boot_id(), "processes": processes}
    write_atomically(journal, json.dumps(document).encode(), mode=0o600)


def read(journal: Path) -> list[Held]:
    """Return the processes of a journal that still live; none if the file is not a journal of this boot."""
    try:
        fields = Fields.parse(journal.read_bytes(), str(journal), limit_bytes=_JOURNAL_LIMIT_BYTES)
        if fields.text("schema") != SCHEMA or fields.text("boot") != boot_id():
            return []
        found = fields.list_of("processes", _held, at_most=_PROCESSES_LIMIT)
    except (OSError, FormatError):
        return []
    return [held for held in found if held.lives()]


def _held(value: object, where: str) -> Held:
    fields = Fields(value, where)
    state = fields.text("state")
    if state not in _STATES:
        raise FormatError(f"{where}.state is not a state of CUDA: {state[:40]!r}")
    return Held(pid=fields.integer("pid", at_least=1), began=fields.integer("began"), state=state)
