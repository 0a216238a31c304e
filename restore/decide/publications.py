# SPDX-License-Identifier: Apache-2.0
"""The addresses of this host at which clients reach a server: those of `--publish`, or the server's own."""

import re
from collections.abc import Sequence

from msgspec import Struct, structs

from rekindle.cell import Network
from rekindle.engine import Endpoint, parse_endpoint
from rekindle.engine.choose import from_record
from rekindle.errors import UsageError
from rekindle.record import Record

# [HOST:]PORT:SERVERPORT. A host that is a number is none: `9000:8000` are two ports.
_WITH_SERVER_PORT = re.compile(r"(?:(\[[^\[\]]+\]|[^:\[\]]*[^:\[\]0-9][^:\[\]]*):)?([0-9]{1,5}):([0-9]{1,5})")


_PORT_LIMIT = 65535


class Publication(Struct, frozen=True, kw_only=True):
    """An address of this host, and the server's address that it leads to.

    `listens` is None for the main one, which is where the command of the rung listens. If `required` is
    false, the restore goes on if the address cannot be bound.
    """

    at: Endpoint
    listens: Endpoint | None = None
    required: bool = True


def publications(asked: Sequence[str], main: Endpoint | None, record: Record | None) -> list[Publication]:
    """Return what to publish. Raises UsageError.

    `asked` are the values of `--publish`, `main` is where the server will listen, and `record` is that of the
    process that will be restored; None where that is unknown.
    """
    if asked:
        return _asked(asked, main, record)
    found = [Publication(at=main)] if main is not None else []
    if record is not None and record.process.network is Network.PRIVATE:
        found += [
            Publication(at=each, listens=each, required=False)
            for each in _for_clients(record)
            if each not in {record.endpoint, main}
        ]
    return found


def moved(made: Sequence[Publication], index: int) -> tuple[Publication, ...]:
    """Return the publications of the replica with this index, at ports that no replica before it has."""
    ports = [each.at.port for each in made]
    step = index * (max(ports) - min(ports) + 1) if index and ports else 0
    if step and max(ports) + step > _PORT_LIMIT:
        raise UsageError(f"there is no port {max(ports) + step}", hint="--publish a lower one")
    return tuple(
        structs.replace(each, at=structs.replace(each.at, port=each.at.port + step)) for each in made
    )


def further(listeners: Sequence[Endpoint], main: Endpoint) -> list[Publication]:
    """Return what to publish of a server's other addresses, if nothing was asked for: each where it is."""
    return [
        Publication(at=each, listens=each, required=False) for each in listeners if each.port != main.port
    ]


def unpublished(made: Sequence[Publication], record: Record) -> list[Endpoint]:
    """Return the first address of each port of the server that is not to be published."""
    return left_out(made, _for_clients(record), record.endpoint)


def left_out(made: Sequence[Publication], listeners: Sequence[Endpoint], main: Endpoint) -> list[Endpoint]:
    """Return the first address of each port among `listeners` that is not to be published."""
    ports = {(each.listens or main).port for each in made}
    left = {each.port: each for each in reversed(listeners) if each.port not in ports}
    return list(reversed(left.values()))


def _for_clients(record: Record) -> Sequence[Endpoint]:
    """Return where a server listens for clients, rather than for its own processes."""
    if len(record.listeners) < 2:
        return record.listeners
    engine = from_record(record.engine.name, record.endpoint, record.engine.options)
    return [record.endpoint] if engine.serves_one_port else record.listeners


def _asked(asked: Sequence[str], main: Endpoint | None, record: Record | None) -> list[Publication]:
    if main is None:
        raise UsageError(
            "--publish cannot be used: it is unknown where the command listens", hint="add --ready-url URL"
        )
    found: list[Publication] = []
    for text in asked:
        made = _parsed(text, main, record, alone=len(asked) == 1)
        if any(each.at == made.at for each in found):
            raise UsageError(f"--publish names {made.at} twice")
        found.append(made)
    return found


def _parsed(text: str, main: Endpoint, record: Record | None, *, alone: bool) -> Publication:
    """Parse one value of `--publish`.

    A port without one of the server is for the server's port of that number if several values are given and
    it listens there; else for its main one.
    """
    if parts := _WITH_SERVER_PORT.fullmatch(text):
        listens = _listener(int(parts[3]), main, record)
        host = (parts[1] or "").removeprefix("[").removesuffix("]") or (listens or main).host
        return Publication(at=parse_endpoint(parts[2], host), listens=listens)
    at = parse_endpoint(text, "")
    known = [] if alone or record is None else _others(record)
    listens = next((each for each in known if each.port == at.port), None)
    return Publication(at=Endpoint(host=at.host or (listens or main).host, port=at.port), listens=listens)


def _listener(port: int, main: Endpoint, record: Record | None) -> Endpoint | None:
    """Return the server's address with a port; None for its main one."""
    if port == main.port or (record and port == record.endpoint.port):
        return None
    others = _others(record) if record else []
    if record and record.listeners and port not in {each.port for each in others}:
        ports = ", ".join(str(each.port) for each in (main, *others))
        raise UsageError(f"the server does not listen on port {port}", hint=f"it listens on {ports}")
    return next((each for each in others if each.port == port), Endpoint(host=main.host, port=port))


def _others(record: Record) -> list[Endpoint]:
    """Return where the server listens besides its main port."""
    return [each for each in record.listeners if each.port != record.endpoint.port]
