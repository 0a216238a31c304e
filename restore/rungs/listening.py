# SPDX-License-Identifier: Apache-2.0
"""Tell whether a server that answers at an address is the one that we started, and not somebody else's."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rekindle.cell.processes import address
from rekindle.engine import Endpoint
from rekindle.proc import children

_OURSELVES = Path("/proc/self")
# Their servers are processes of a daemon or of another machine.
_STARTERS = {
    b"docker",
    b"podman",
    b"nerdctl",
    b"ctr",
    b"crictl",
    b"kubectl",
    b"systemd-run",
    b"machinectl",
    b"ssh",
}


def is_held_by_our_server(endpoint: Endpoint) -> bool:
    """Tell whether a process below us listens at an address, or may let another one listen there for it.

    The answer is also yes where it cannot be known. Processes that lost their parent are below us: we are
    their subreaper.
    """
    wanted = _listening(endpoint.port)
    if not wanted:
        return True
    below_us = list(_descendants(_OURSELVES))
    for pid in below_us:
        process = Path(f"/proc/{pid}")
        try:
            if (process / "comm").read_bytes().strip() in _STARTERS or wanted & _sockets(process):
                return True
        except FileNotFoundError:  # it has ended
            continue
        except OSError:
            return True
    return not below_us  # an OS kernel without CONFIG_PROC_CHILDREN


def _listening(port: int) -> set[str]:
    """Return the links of the sockets that listen on a port."""
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_OURSELVES / "net" / name).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and address(fields[1])[1] == port:
                    found.add(f"socket:[{fields[9]}]")
    return found


def _descendants(process: Path) -> Iterator[int]:
    for pid in children(process):
        yield pid
        yield from _descendants(Path(f"/proc/{pid}"))


def _sockets(process: Path) -> set[str]:
    found = set()
    for descriptor in os.listdir(process / "fd"):  # noqa: PTH208 - names only
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(process / "fd" / descriptor))  # noqa: PTH115 - as text
    return found
