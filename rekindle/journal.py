# SPDX-License-Identifier: Apache-2.0
"""The journal of a CUDA session: the states to which a killed command's processes must be brought back.

    $REKINDLE_HOME/run/VERB-PID-XXXXXX/cuda.json    {"schema": "rekindle.cuda/1", "processes": [...]}

States are kept as strings, so that `unfinished` imports nothing of `rekindle.cuda`.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from rekindle.errors import FormatError
from rekindle.fields import Fields
from rekindle.files import write_atomically
from rekindle.proc import boot_id

CUDA_JOURNAL = "cuda.json"
SCHEMA = "rekindle.cuda/1"
_JOURNAL_LIMIT_BYTES = 1 << 20
_PROCESSES_LIMIT = 10_000
_STATES = frozenset({"running", "locked", "checkpointed", "failed"})


class FoundProcess(NamedTuple):
    """A process as it was found.

    `start_ticks` is its start in clock ticks since boot, which tells it from another one with the same PID.
    `state` is as `cuda-checkpoint --get-state` prints it.
    """

    pid: int
    start_ticks: int
    state: str

    def is_alive(self) -> bool:
        return start_ticks(self.pid) == self.start_ticks


def unfinished(journal: Path) -> bool:
    """Tell whether a process of a journal still lives. Asks only the OS kernel, not the driver."""
    return bool(read(journal))


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, or None if it has ended."""
    try:
        # The second field is a name in parentheses, which may contain parentheses itself: proc(5).
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def write(journal: Path, found: Collection[FoundProcess]) -> None:
    """Write a journal atomically, with mode 0600."""
    processes = [{"pid": entry.pid, "began": entry.start_ticks, "state": entry.state} for entry in found]
    document = {"schema": SCHEMA, "boot": boot_id(), "processes": processes}
    write_atomically(journal, json.dumps(document).encode(), mode=0o600)


def read(journal: Path) -> list[FoundProcess]:
    """Return the processes of a journal that still live; none if the file is not a journal of this boot."""
    try:
        fields = Fields.parse(journal.read_bytes(), str(journal), limit_bytes=_JOURNAL_LIMIT_BYTES)
        if fields.text("schema") != SCHEMA or fields.text("boot") != boot_id():
            return []
        found = fields.list_of("processes", _entry, at_most=_PROCESSES_LIMIT)
    except (OSError, FormatError):
        return []
    return [entry for entry in found if entry.is_alive()]


def _entry(value: object, where: str) -> FoundProcess:
    fields = Fields(value, where)
    state = fields.text("state")
    if state not in _STATES:
        raise FormatError(f"{where}.state is not a state of CUDA: {state[:40]!r}")
    return FoundProcess(
        pid=fields.integer("pid", at_least=1), start_ticks=fields.integer("began"), state=state
    )
