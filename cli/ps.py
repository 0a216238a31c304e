# SPDX-License-Identifier: Apache-2.0
"""`rekindle ps`: list the servers that run."""

import argparse
import time
from collections.abc import Sequence

from cli import _arguments, _memory, _report, _table
from rekindle import documents, replicas
from rekindle.fields import JSON
from rekindle.home import Home
from rekindle.replicas import ReplicaEntry

_SCHEMA = "rekindle.replicas/1"
_HEAD = ("NAME", "IMAGE", "RUNG", "ENDPOINT", "AGE", "OWN", "SHARED", "STATE")


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle ps",
        formatter_class=_arguments.Formatter,
        description="List the servers that rekindle runs, with the memory that each has of its own, and "
        "that of mapped files, which replicas of one image share.",
    )
    parser.add_argument(
        "-a", "--all", action="store_true", help="list also the newest twenty that have ended"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("-q", "--quiet", action="store_true", help="print only the names")
    args = parser.parse_args(words)
    found = [
        each for each in replicas.found(Home.from_environment()) if args.all or each.runs or each.can_wake
    ]
    if args.json:
        _report.print_document({"schema": _SCHEMA, "replicas": [_document(each) for each in found]})
    elif args.quiet:
        for each in found:
            print(each.name)
    else:
        _table.print_table([_HEAD, *map(_row, found)])
    return 0


def _document(replica: ReplicaEntry) -> dict[str, JSON]:
    status = documents.to_json(replica.status)
    if not replica.runs and not replica.can_wake:
        status["exit_status"] = replica.exit_status
    own, shared = _memory.of(replica) or (0, 0)
    return {
        **status,
        "state": str(replica.state),
        "age_seconds": round(max(0.0, time.time() - replica.status.created), 3),
        "memory": {"own_bytes": own, "shared_bytes": shared},
        "log": str(replica.log) if replica.log.exists() else None,
    }


def _row(replica: ReplicaEntry) -> tuple[str, ...]:
    status = replica.status
    memory = _memory.of(replica)
    has_ended = not replica.runs and not replica.can_wake
    state = f"{replica.state} ({replica.exit_status})" if has_ended else str(replica.state)
    return (
        status.name,
        status.image or "-",
        str(status.rung or "-"),
        status.endpoint or "-",
        _table.age(time.time() - status.created),
        _table.megabytes(memory[0]) if memory else "-",
        _table.megabytes(memory[1]) if memory else "-",
        state,
    )
