# SPDX-License-Identifier: Apache-2.0
"""Measure when the last byte of an image has come that was restored before all of it was here."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rekindle.errors import RestoreError

_LONGEST_SECONDS = 600.0
_POLL_SECONDS = 0.05


def await_dump(home: Path, document: dict[str, Any]) -> None:
    """Wait until a home has an ordinary dump, and note in the report of its restore when that was."""
    began = time.monotonic()
    while not list(home.glob("dumps/*/ready.json")):
        if time.monotonic() - began > _LONGEST_SECONDS:
            raise RestoreError(f"not all of the image came within {_LONGEST_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)
    last = document["seconds"] + time.monotonic() - began
    document["lazy"] = {**(document["lazy"] or {}), "last_byte_seconds": last}


def last_bytes(reports: Sequence[dict[str, Any]]) -> list[float]:
    """Return the times of the last bytes, as far as they were measured."""
    found = [(report.get("lazy") or {}).get("last_byte_seconds") for report in reports]
    return [seconds for seconds in found if seconds is not None]
