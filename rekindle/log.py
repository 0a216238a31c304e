# SPDX-License-Identifier: Apache-2.0
"""The lines that commands write to standard error: text, or a JSON object each.

$REKINDLE_LOG_FORMAT chooses: `json`, or `text`, which any other value means as well. An object has `time`,
`level` (`info`, `warning` or `error`), `message` and `pid`; that of an error also what docs/errors.md says.
What the server writes is passed on as it is.
"""

import contextlib
import os
import sys

from rekindle.fields import JSON
from rekindle.text import printable

_WARNING = "WARNING: "


def is_json() -> bool:
    """Tell whether lines are to be JSON."""
    return os.environ.get("REKINDLE_LOG_FORMAT") == "json"


def write(text: str) -> None:
    """Write a line for people, or an object with it. Never raises OSError: a reader may be gone."""
    with contextlib.suppress(OSError):
        if not is_json():
            print(printable(f"rekindle: {text}"), file=sys.stderr, flush=True)
        elif text.startswith(_WARNING):
            _write_object("warning", text.removeprefix(_WARNING))
        else:
            _write_object("info", text)


def write_error(message: str, **more: JSON) -> None:
    """Write that something has failed; an object has what else is known about it. Never raises OSError."""
    with contextlib.suppress(OSError):
        if is_json():
            _write_object("error", message, **more)
        else:
            print(printable(f"rekindle: error: {message}"), file=sys.stderr, flush=True)


def _write_object(level: str, message: str, **more: JSON) -> None:
    import json  # a start without it is faster
    from datetime import UTC, datetime

    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    found = {"time": now, "level": level, "message": message, "pid": os.getpid(), **more}
    print(json.dumps(found), file=sys.stderr, flush=True)
