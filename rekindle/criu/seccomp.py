# SPDX-License-Identifier: Apache-2.0
"""Remove the cell's own seccomp filter from a dump.

    seccomp.img   seccomp_entry: repeated seccomp_filter {bytes filter = 1; uint32 prev = 2; uint32 flags = 3}

Threads refer to the last filter of their chain by its position, and `prev` to the previous one (CRIU's
images/seccomp.proto).
"""

from pathlib import Path

from rekindle.criu.image_files import read_messages, write_messages
from rekindle.criu.protobuf import Field, content, encode_fields, integer, read_fields

SECCOMP_MAGIC = 0x64413049

_FILTER, _PREV = 1, 2
_ALLOW = bytes.fromhex("060000000000ff7f")  # BPF_RET | BPF_K, SECCOMP_RET_ALLOW


def drop_filter(dump: Path, beginning: bytes) -> int:
    """Remove every filter whose BPF program starts with `beginning`, in place; return their number.

    Positions must not change, since threads refer to them, so each is replaced by the previous filter of its
    chain, or by one that allows everything.
    """
    path = dump / "seccomp.img"
    if not path.exists():  # no process has a filter
        return 0
    dropped = 0
    messages = []
    for message in read_messages(path, SECCOMP_MAGIC):
        filters: list[list[Field]] = []
        for number, wire_type, value in read_fields(message, path):
            assert (number, wire_type) == (1, 2)
            assert isinstance(value, bytes)
            fields = read_fields(value, path)
            if (content(fields, _FILTER) or b"").startswith(beginning):
                dropped += 1
                before = integer(fields, _PREV, path, default=-1)
                fields = filters[before] if 0 <= before < len(filters) else [(_FILTER, 2, _ALLOW)]
            filters.append(fields)
        messages.append(encode_fields([(1, 2, encode_fields(fields)) for fields in filters]))
    write_messages(path, SECCOMP_MAGIC, messages)
    return dropped
