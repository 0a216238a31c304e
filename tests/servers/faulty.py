# SPDX-License-Identifier: Apache-2.0
"""rekindle with a fault: `faulty.py FAULT… -- PROGRAM -m rekindle WORDS…`, as a prefix of its command line.

A fault is MODULE:NAME=WHAT, for a function, or a method as CLASS.NAME:

    fails ERROR         it raises an error of rekindle.errors
    breaks              it raises what nobody expects
    refused PATH        the system refuses it a file
    hangs               it takes for ever
    pauses FILE S       it makes a file, and waits so long before it begins
    pauses-after FILE S the same, once it has done its work

With `once ` before it, the first call alone has the fault.
"""

import errno
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def pause(seconds: float) -> None:
    """Sleep in short pieces: a signal between the interpreter's last look and a sleep waits for its end."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.05))


def with_fault(real: Callable[..., Any], what: str, *parts: str) -> Callable[..., Any]:
    left = [1] if what == "once" else [1 << 30]
    if what == "once":
        what, *rest = parts
        parts = tuple(rest)

    def faulty(*args: Any, **options: Any) -> Any:
        if not left[0]:
            return real(*args, **options)
        left[0] -= 1
        match what, *parts:
            case "fails", name:
                raise getattr(importlib.import_module("rekindle.errors"), name)(
                    "made to fail", cause="a test"
                )
            case ("breaks",):
                raise ValueError("made to break")
            case "refused", path:
                raise OSError(errno.EROFS, "Read-only file system", path)
            case ("hangs",):
                pause(1000)
            case "pauses", file, seconds:
                Path(file).touch()
                pause(float(seconds))
            case "pauses-after", file, seconds:
                result = real(*args, **options)
                Path(file).touch()
                pause(float(seconds))
                return result
            case _:
                raise AssertionError(what)
        return real(*args, **options)

    return faulty


def main() -> None:
    sys.path[0] = str(Path(__file__).parents[2])
    at = sys.argv.index("--")
    for fault in sys.argv[1:at]:
        target, _, what = fault.partition("=")
        module, _, name = target.partition(":")
        owner: Any = importlib.import_module(module)
        *classes, name = name.split(".")
        for each in classes:
            owner = getattr(owner, each)
        setattr(owner, name, with_fault(getattr(owner, name), *what.split()))
    sys.argv = ["rekindle", *sys.argv[at + 4 :]]  # after the name of the interpreter and -m rekindle
    from rekindle.__main__ import run

    run()


if __name__ == "__main__":
    main()
