# SPDX-License-Identifier: Apache-2.0
"""Make the root of a dumped process tree the leader of a session.

CRIU restores a session or a process group only with its leader. That of a server that was started from a
shell is outside of the tree; in the copy, the root takes its place.

    criu/pstree.img     pstree_entry: pid, ppid, pgid, sid, threads
"""

from pathlib import Path

from rekindle.criu.image_files import read_messages, write_messages
from rekindle.criu.protobuf import encode_fields, integer, read_fields

PSTREE_MAGIC = 0x50273030
_PID, _GROUP, _SESSION = 1, 3, 4


def lead(criu: Path, root: int) -> None:
    """Replace leaders that are not in the dump by its root, in place. Raises FormatError."""
    path = criu / "pstree.img"
    entries = [read_fields(message, path) for message in read_messages(path, PSTREE_MAGIC)]
    inside = {integer(fields, _PID, path) for fields in entries}
    written = []
    for fields in entries:
        is_root = integer(fields, _PID, path) == root
        written.append(
            encode_fields(
                [
                    (number, wire_type, root)
                    if number in {_GROUP, _SESSION} and (is_root or value not in inside)
                    else (number, wire_type, value)
                    for number, wire_type, value in fields
                ]
            )
        )
    write_messages(path, PSTREE_MAGIC, written)
