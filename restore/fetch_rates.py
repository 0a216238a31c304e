# SPDX-License-Identifier: Apache-2.0
"""Remember how fast registries and the disk were, to know whether a dump can be there in time.

    tools/fetch-rates.json      {HOST: [bytes per second, time]}, for an hour; HOST is "/" for unpacking

A network may be busy for a while, and a fetch that is not begun measures nothing. So after an hour, a
registry is again taken to be as fast as others.
"""

import contextlib
import json
import time
from collections.abc import Iterator

from oci.progress import Tally
from oci.reference import Reference, RegistryReference
from rekindle.files import write_atomically
from rekindle.home import Home

_NAME = "fetch-rates.json"
_UNPACKING = "/"  # no host has that name
_KEPT_SECONDS = 3600.0
# Less says more about the first bytes than about the rest.
_LEAST_BYTES, _LEAST_SECONDS = 1 << 20, 2.0


def known(home: Home, reference: Reference) -> float | None:
    """Return the bytes per second at which a registry gave the last large fetch; None if that is unknown."""
    if not isinstance(reference, RegistryReference):
        return None
    rate, _ = _read(home).get(reference.host, (None, 0.0))
    return rate


def known_unpacking(home: Home) -> float | None:
    """Return the bytes per second at which the last large dump from a local image was unpacked, if known."""
    return _read(home).get(_UNPACKING, (None, 0.0))[0]


@contextlib.contextmanager
def measured(home: Home, reference: Reference, tally: Tally) -> Iterator[None]:
    """Remember how fast what is fetched within the context comes, also if it is given up."""
    began, before = time.monotonic(), tally.fetched_bytes
    try:
        yield
    finally:
        if isinstance(reference, RegistryReference):
            seconds, fetched = time.monotonic() - began, tally.fetched_bytes - before
            if seconds >= _LEAST_SECONDS and (fetched >= _LEAST_BYTES or seconds > 10 * _LEAST_SECONDS):
                _remember(home, reference.host, fetched / seconds)


@contextlib.contextmanager
def measured_unpacking(home: Home, size: int) -> Iterator[None]:
    """Remember how fast `size` bytes are unpacked within the context, or at most, if it is given up."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds = time.monotonic() - began
        if seconds >= _LEAST_SECONDS and size >= _LEAST_BYTES:
            _remember(home, _UNPACKING, size / seconds)


def _remember(home: Home, name: str, rate: float) -> None:
    content = {**_read(home), name: (rate, time.time())}
    with contextlib.suppress(OSError):
        write_atomically(home.tools / _NAME, json.dumps(content).encode())


def _read(home: Home) -> dict[str, tuple[float, float]]:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        found = json.loads((home.tools / _NAME).read_bytes()).items()
        return {
            str(host): (max(1.0, float(rate)), float(at))
            for host, (rate, at) in found
            if 0 <= time.time() - at < _KEPT_SECONDS
        }
    return {}
