# SPDX-License-Identifier: Apache-2.0
"""Close connections in a dump: a restored process finds that the other end has closed them.

    files.img            inet_sk_entry: a socket that is not connected, and shut down both ways
                         unix_sk_entry: a connection without its other end, as CRIU dumps one that was closed
    tcp-stream-INO.img   removed

Reading from such a socket gives the end of the file, and writing EPIPE.
"""

import socket
import struct
from collections.abc import Collection
from pathlib import Path

from rekindle.criu.image_files import FILES_MAGIC, read_messages, write_messages
from rekindle.criu.protobuf import Field, Value, content, encode_fields, integer, read_fields
from rekindle.errors import FormatError

_INET, _UNIX = 4, 16  # of file_entry
_INET_INO, _PROTOCOL, _INET_STATE, _SOURCE_PORT, _PORT = 2, 5, 6, 7, 8  # of inet_sk_entry
_SOURCE, _DESTINATION, _INET_SHUTDOWN = 11, 12, 19
_UNIX_INO, _UNIX_STATE, _PEER, _UNIX_SHUTDOWN = 2, 4, 8, 12  # of unix_sk_entry
_ESTABLISHED, _CLOSE = 1, 7  # TCP's states, which unix sockets have, too
_BOTH_WAYS = 3  # sk_shutdown
_VARINT, _BYTES = 0, 2  # wire types


def close(dump: Path, unix: Collection[int], *, tcp: bool) -> list[str]:
    """Close connections in a dump, in place: unix sockets by inode, and with `tcp` those that lead out.

    A TCP connection leads out if its other end is not in the dump. Returns their other ends, as HOST:PORT.
    Raises FormatError. Not atomic: an interruption destroys the dump.
    """
    path = dump / "files.img"
    entries = [read_fields(message, path) for message in read_messages(path, FILES_MAGIC)]
    inner = {ends for fields in entries if (ends := _ends(fields, path))}
    closed = []
    written = []
    for fields in entries:
        ends = _ends(fields, path) if tcp else None
        if ends and (ends[1], ends[0]) not in inner:
            inet = read_fields(content(fields, _INET) or b"", path)
            (dump / f"tcp-stream-{integer(inet, _INET_INO, path):x}.img").unlink(missing_ok=True)
            fields = _with(fields, _INET, _without_peer(inet))
            closed.append(_text(*ends[1]))
        elif (entry := content(fields, _UNIX)) is not None:
            sock = read_fields(entry, path)
            if integer(sock, _UNIX_INO, path) in unix:
                for number, value in ((_UNIX_STATE, _ESTABLISHED), (_PEER, 0), (_UNIX_SHUTDOWN, _BOTH_WAYS)):
                    sock = _with(sock, number, value)
                fields = _with(fields, _UNIX, encode_fields(sock))
        written.append(encode_fields(fields))
    write_messages(path, FILES_MAGIC, written)
    return closed


_End = tuple[str, int]


def _ends(fields: list[Field], path: Path) -> tuple[_End, _End] | None:
    """Return both addresses of a TCP connection; None for any other file."""
    entry = content(fields, _INET)
    if entry is None:
        return None
    inet = read_fields(entry, path)
    port = integer(inet, _PORT, path)
    if integer(inet, _PROTOCOL, path) != socket.IPPROTO_TCP or not port:
        return None
    here, there = (_host(inet, number, path) for number in (_SOURCE, _DESTINATION))
    return (here, integer(inet, _SOURCE_PORT, path)), (there, port)


def _host(inet: list[Field], number: int, path: Path) -> str:
    """Return the address in a field that is repeated: its words of 32 bits in the network's order."""
    words = [value for each, _, value in inet if each == number]
    packed = b"".join(struct.pack("=I", word & 0xFFFF_FFFF) for word in words if isinstance(word, int))
    if len(packed) not in {4, 16}:
        raise FormatError(f"{path.name}: an address of {len(packed)} bytes")
    family = socket.AF_INET6 if len(packed) == 16 else socket.AF_INET
    return socket.inet_ntop(family, packed).removeprefix("::ffff:")


def _text(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _without_peer(inet: list[Field]) -> bytes:
    """Return an inet_sk_entry of a socket without addresses that is shut down both ways."""
    new = dict.fromkeys((_SOURCE_PORT, _PORT, _SOURCE, _DESTINATION), 0) | {_INET_STATE: _CLOSE}
    kept = [(number, wire_type, new.get(number, value)) for number, wire_type, value in inet]
    return encode_fields(_with(kept, _INET_SHUTDOWN, _BOTH_WAYS))


def _with(fields: list[Field], number: int, value: Value) -> list[Field]:
    """Return fields with one of them replaced, or added."""
    wire_type = _BYTES if isinstance(value, bytes) else _VARINT
    return [*(each for each in fields if each[0] != number), (number, wire_type, value)]
