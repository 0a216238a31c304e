#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write what a program and its spawned child see of their surroundings, as JSON: `surroundings.py FILE HOW`.

HOW is the end: a status, `raise`, or `wait` (for a signal). A spawned child ends with status 3.
"""

import atexit
import json
import multiprocessing
import os
import signal
import sys
import time


def seen() -> dict[str, object]:
    return {
        "argv": sys.argv,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": sys.path,
        "name": __name__,
        "umask": os.umask(0o77) | (os.umask(0o77) & 0),
        "descriptors": sorted(each for each in os.listdir("/proc/self/fd") if int(each) < 3),
        "signals": [str(signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "streams": [stream.line_buffering for stream in (sys.stdout, sys.stderr)],
        "daemon": multiprocessing.current_process().daemon,
        "process": multiprocessing.current_process().name,
        "threads": len(os.listdir("/proc/self/task")),
    }


def child(sender: "multiprocessing.connection.Connection", file: str) -> None:
    atexit.register(lambda: open(f"{file}.atexit", "w").close())
    parent = multiprocessing.parent_process()
    assert parent is not None
    found = {**seen(), "is_ours": os.getppid() == parent.pid, "main": sys.modules["__main__"].__name__}
    sender.send(found)
    print("from the child")
    if file.endswith("nested"):
        sender.send(spawned(f"{file}-inner"))
    sys.exit(3)


def spawned(file: str) -> dict[str, object]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, file), name="the child")
    process.start()
    sender.close()
    found = dict(receiver.recv())
    if file.endswith("nested"):
        found["inner"] = receiver.recv()
    process.join(60)
    return {**found, "status": process.exitcode, "atexit": os.path.exists(f"{file}.atexit")}


def main() -> None:
    file, how = sys.argv[1:3]
    os.environ["SET_BY_THE_PROGRAM"] = "1"
    found = {"program": seen(), "child": spawned(f"{file}-nested")}
    with open(f"{file}.part", "w") as output:
        json.dump(found, output)
    os.rename(f"{file}.part", file)
    print("to stdout")
    print("to stderr", file=sys.stderr)
    if how == "wait":
        time.sleep(100)
    if how == "raise":
        raise RuntimeError("as asked")
    sys.exit(int(how))


if __name__ == "__main__":
    main()
