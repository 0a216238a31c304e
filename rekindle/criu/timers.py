# SPDX-License-Identifier: Apache-2.0
"""Start the timers of a dump again that had expired, and whose expiry no process had read.

    files.img   file_entry: timerfd_entry = 12 {ticks = 5, vsec = 7, vnsec = 8, isec = 9, insec = 10}

Until it is read, the OS kernel does not start a periodic timer again (fs/timerfd.c), and shows that no time
is left. CRIU 4.2.1 sets what it saw, and so stops the timer for ever.
"""

from pathlib import Path

from rekindle.criu.image_files import FILES_MAGIC, read_messages, write_messages
from rekindle.criu.protobuf import Field, content, encode_fields, integer, read_fields

_TIMER = 12
_LEFT_S, _LEFT_NS, _EVERY_S, _EVERY_NS = 7, 8, 9, 10


def rearm(dump: Path) -> int:
    """Let every expired periodic timer expire again after one period, in place; return their number."""
    path = dump / "files.img"
    rearmed = 0
    messages = []
    for message in read_messages(path, FILES_MAGIC):
        fields = read_fields(message, path)
        if timer := content(fields, _TIMER):
            inner = read_fields(timer, path)
            left, every = (
                [integer(inner, number, path, default=0) for number in pair]
                for pair in ((_LEFT_S, _LEFT_NS), (_EVERY_S, _EVERY_NS))
            )
            if not any(left) and any(every):
                rearmed += 1
                new: list[Field] = [each for each in inner if each[0] not in {_LEFT_S, _LEFT_NS}]
                new += [(_LEFT_S, 0, every[0]), (_LEFT_NS, 0, every[1])]
                fields = [
                    (number, kind, encode_fields(new) if number == _TIMER else value)
                    for number, kind, value in fields
                ]
                message = encode_fields(fields)
        messages.append(message)
    if rearmed:
        write_messages(path, FILES_MAGIC, messages)
    return rearmed
