# SPDX-License-Identifier: Apache-2.0
"""Whether this node can run a snapshot's process: a pure comparison, field by field."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rekindle.errors import MismatchError
from rekindle.fingerprint import Fingerprint
from rekindle.record import MappedFile, Record
from rekindle.report import Reason, Rung

_SHOWN = 12


def match(record: Record, node: Fingerprint, size_of: Callable[[str], int | None]) -> list[Reason]:
    """The fields that differ; `size_of` gives the size of a file here, None if there is none."""
    return [
        *_equal("architecture", record.node.architecture, node.architecture, hard=True),
        *_equal("page-size", record.node.page_bytes, node.page_bytes, hard=True),
        *_features(record.node, node),
        *_equal("kernel", record.node.kernel, node.kernel, hard=False),
        *(reason for file in record.mapped_files for reason in _file(file, size_of(file.path))),
    ]


def require(record: Record, reasons: Sequence[Reason]) -> None:
    """Raises MismatchError if a hard field differs."""
    hard = [reason for reason in reasons if reason.hard]
    if not hard:
        return
    shown = "\n".join(str(reason) for reason in hard[:_SHOWN])
    more = f"\nand {len(hard) - _SHOWN} more" if len(hard) > _SHOWN else ""
    raise MismatchError(
        "this node cannot run the snapshot's process",
        cause=shown + more,
        hint=f"it was made on {record.node.cpu_model}; make a snapshot on a node like this one",
    )


def size_here(path: str) -> int | None:
    """The size of a file of this node in bytes; None if there is no such file."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return None


def _equal(name: str, recorded: object, here: object, *, hard: bool) -> list[Reason]:
    if recorded == here:
        return []
    return [
        Reason(rung=Rung.PROCESS, code=name, field=name, recorded=str(recorded), here=str(here), hard=hard)
    ]


def _features(recorded: Fingerprint, here: Fingerprint) -> list[Reason]:
    """More features than recorded do no harm: the process asked once, at its start."""
    missing = recorded.cpu_features - here.cpu_features
    if not missing:
        return []
    return [
        Reason(
            rung=Rung.PROCESS,
            code="cpu-feature",
            field="processor features",
            recorded=" ".join(sorted(missing)),
            here=f"missing on {here.cpu_model}",
            hard=True,
        )
    ]


def _file(file: MappedFile, size: int | None) -> list[Reason]:
    if size == file.size:
        return []
    return [
        Reason(
            rung=Rung.PROCESS,
            code="rootfs-file",
            field=file.path,
            recorded=f"{file.size} bytes",
            here="missing" if size is None else f"{size} bytes",
            hard=True,
        )
    ]
