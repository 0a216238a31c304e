# SPDX-License-Identifier: Apache-2.0
"""Dump a replica again, with only the pages that it has written since it was restored.

All other pages of a replica that maps a dump's memory files are still in these files. So its own dump is
small, and quick to make and to restore, as long as the files exist.

    criu/       CRIU's images, without the pages that were not written
    shm/        the cell's /dev/shm
    memory      a link to the memory files of the dump that it builds on

The output of a restored server is a file, pipe or terminal outside the cell. CRIU treats it as external, and
gets another one at the next restore.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from rekindle import criu
from rekindle.cell import MEMORY_PLACE, Cell, memory, processes
from rekindle.criu import Criu, zero_pages
from rekindle.criu.memory_files import mapped_ranges
from rekindle.criu.seccomp import drop_filter
from rekindle.errors import NotDumpableError
from rekindle.files import copy_sparse_tree
from rekindle.os_errors import naming_full_disk
from rekindle.record import Record
from restore.options import Output
from restore.rungs.memory import join_ranges

_OWN_DIRECTORY = Path(MEMORY_PLACE).parts[3]
"""The cell's own directory in /dev/shm."""


class Delta(Struct, frozen=True, kw_only=True):
    """A dump of a replica in `directory`, in the format that `restore.rungs.process.restore` reads.

    `record` is that of the base, updated to the replica's state. `bytes` is the space that it takes on disk,
    with /dev/shm. The base's memory files must exist as long as the delta does.
    """

    directory: Path
    record: Record
    bytes: int


def dump_replica(
    cell: Cell, record: Record, base: Path, directory: Path, *, tool: Criu, output: Output
) -> Delta:
    """Dump a replica that maps the memory files of the ready dump `base`, and end it.

    Creates `directory`. `output` is the one that the replica was restored with. Raises NotDumpableError for
    an output that CRIU cannot restore, DumpError; the replica keeps running then.
    """
    names = {fd: _name_of_output(cell, fd) for fd in (output.stdout, output.stderr)}
    directory.mkdir(mode=0o700)
    for top in ("criu", "shm"):
        (directory / top).mkdir(mode=0o700)
    with naming_full_disk(directory):
        external = [name for name in dict.fromkeys(names.values()) if name.startswith(("file[", "tty["))]
        criu.dump(tool, cell, record.process.root_pid, directory / "criu", external=external)
        clocks = cell.clocks()
        copy_sparse_tree(cell.root / "dev/shm", directory / "shm", without={_OWN_DIRECTORY})
    for leftover in ("dump.log", "criu.out"):
        (directory / "criu" / leftover).unlink(missing_ok=True)
    drop_filter(directory / "criu", memory.FILTER)
    zero_pages.drop(directory / "criu")
    (directory / "memory").symlink_to(base / "memory")
    mapped = mapped_ranges(directory / "criu")
    memory_now = [
        msgspec.structs.replace(each, ranges=join_ranges(mapped.get(each.path.name, [])))
        for each in record.dump.memory
    ]
    process = msgspec.structs.replace(
        record.process,
        monotonic_ns=clocks.monotonic_ns,
        boottime_ns=clocks.boottime_ns,
        stdout=names[output.stdout],
        stderr=names[output.stderr],
    )
    return Delta(
        directory=directory,
        record=msgspec.structs.replace(
            record, process=process, dump=msgspec.structs.replace(record.dump, memory=memory_now)
        ),
        bytes=sum(_sizes(directory)),
    )


def _name_of_output(cell: Cell, ours: int) -> str:
    """Return CRIU's name for a descriptor that the replica got from us (criu(8), --external)."""
    wanted = os.fstat(ours)
    for pid in processes.host_pids(cell):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                status = entry.stat()
                info = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text()
            except OSError:
                continue
            same_device = stat.S_ISCHR(wanted.st_mode) and status.st_rdev == wanted.st_rdev
            if not os.path.samestat(status, wanted) and not same_device:
                continue
            if same_device and not os.isatty(ours):
                return str(entry.readlink())
            if stat.S_ISFIFO(status.st_mode):
                return f"pipe:[{status.st_ino}]"
            mount = re.search(r"^mnt_id:\s*(\d+)$", info, re.MULTILINE)
            if os.isatty(ours):
                return f"tty[{status.st_rdev:x}:{status.st_dev:x}]"
            if mount is not None and stat.S_ISREG(status.st_mode):
                return f"file[{int(mount[1]):x}:{status.st_ino:x}]"
            raise NotDumpableError(
                f"the server's output is {entry.readlink()}, which CRIU cannot restore",
                hint="restore the server with its output in a file or a pipe",
            )
    return "/dev/null"  # the replica has closed it


def _sizes(directory: Path) -> Iterator[int]:
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path.stat().st_blocks * 512
