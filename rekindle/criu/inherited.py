# SPDX-License-Identifier: Apache-2.0
"""Take out of a dump what its processes inherited, so that they inherit it again where they are restored.

CRIU saves limits, oom_score_adj, priorities and the umask, and sets them again. But a server that is started
has those of the place where it starts. What the server set itself is in the record, except for the umask,
which nobody else can set.

    criu/core-PID.img   without task_core_entry's rlimits and oom_score_adj, and thread_core_entry's
                        sched_nice, sched_policy and sched_prio
    criu/fs-PID.img     without the umask, if it is that of the root of the process tree
"""

from pathlib import Path

from rekindle.criu.image_files import read_messages, write_messages
from rekindle.criu.protobuf import Field, encode_fields, read_fields

CORE_MAGIC = 0x55053847
FS_MAGIC = 0x51403912

# CRIU's images/core.proto and fs.proto, by field number.
_TASK, _THREAD = 3, 5
_RLIMITS, _OOM_SCORE_ADJ = 8, 14
_SCHEDULING = {3, 4, 5}
_UMASK = 3
_BYTES = 2  # a wire type


def drop(criu: Path, root: int) -> None:
    """Remove what was inherited from a dump whose root is this process, in place. Raises FormatError.

    Not atomic: an interruption destroys the dump.
    """
    for path in sorted(criu.glob("core-*.img")):
        messages = [_without_inherited(message, path) for message in read_messages(path, CORE_MAGIC)]
        write_messages(path, CORE_MAGIC, messages)
    inherited = _umask(criu / f"fs-{root}.img")
    for path in sorted(criu.glob("fs-*.img")):
        if _umask(path) == inherited:
            fields = [read_fields(message, path) for message in read_messages(path, FS_MAGIC)]
            kept = [encode_fields([field for field in each if field[0] != _UMASK]) for each in fields]
            write_messages(path, FS_MAGIC, kept)


def _without_inherited(message: bytes, path: Path) -> bytes:
    found: list[Field] = []
    for number, wire_type, value in read_fields(message, path):
        if number == _TASK and isinstance(value, bytes):
            kept = [each for each in read_fields(value, path) if each[0] not in {_RLIMITS, _OOM_SCORE_ADJ}]
            # An empty list, since CRIU takes a missing one for that of an old dump, and asks for a file.
            value = encode_fields([*kept, (_RLIMITS, _BYTES, b"")])
        elif number == _THREAD and isinstance(value, bytes):
            value = encode_fields([each for each in read_fields(value, path) if each[0] not in _SCHEDULING])
        found.append((number, wire_type, value))
    return encode_fields(found)


def _umask(path: Path) -> bytes | int | None:
    fields = [field for message in read_messages(path, FS_MAGIC) for field in read_fields(message, path)]
    return next((value for number, _, value in fields if number == _UMASK), None)
