# SPDX-License-Identifier: Apache-2.0
"""Dumps for nodes where memory files cannot be mapped: CRIU's images with all of the memory."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rekindle.files import locked
from rekindle.os_errors import naming_full_disk
from restore.dumps import WAIT_SECONDS, digest_of_metadata


@contextlib.contextmanager
def copied(dump: Path, work: Path) -> Iterator[Path]:
    """Yield a directory with CRIU images of a ready dump that hold all of its memory.

    It is made on first use, and kept in the dump. The caller holds the dump's lock. Raises SpaceError.
    """
    from rekindle.criu.memory_files import copy_back  # most restores map

    target, seal = dump / "copied", dump / "copied.seal"
    with contextlib.suppress(OSError):
        if seal.read_text() == _seal_directory(target):
            yield target
            return
    staged = work / "copied"
    staged.mkdir(mode=0o700)
    with naming_full_disk(work):
        copy_back(dump / "criu", dump / "memory", staged)
    with locked(dump.with_name(f"{dump.name}.copied.lock"), timeout=WAIT_SECONDS):
        if not target.exists():  # if another restore was faster, or something changed it, use ours once
            staged.replace(target)
            seal.write_text(_seal_directory(target))
            staged = target
    yield staged


def _seal_directory(directory: Path) -> str:
    return digest_of_metadata(directory, (".", *sorted(path.name for path in directory.iterdir())))
