# SPDX-License-Identifier: Apache-2.0
"""Dump a replica again, with only the pages that it has written since it was restored.

All other pages of a replica that maps a dump's memory files are still in these files. So its own dump is
small, and quick to make and to restore, as long as the files exist.

    criu/       CRIU's images, without the pages that were not written
    shm/        the cell's /dev/shm
    memory      a link to the memory files of the dump that it builds on

A second dump of the same lineage holds all that was written since the first restore, not since the last. So
deltas do not form chains, and one cannot become larger than the memory itself. Once it would reach half of
the memory files, a complete dump is made instead, with memory files of its own: a restore copies a delta's
pages for each replica, and every further delta would store them again.

The output of a restored server is a file, pipe or terminal outside the cell. In the dump it has the names
that it had in the first one, so that any other can replace it at a restore.
"""

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from oci.image import Image
from rekindle import dump_tree
from rekindle.cell import MEMORY_PLACE, Cell, memory, private, processes
from rekindle.cell.read_settings import read_settings
from rekindle.criu import Criu, connections, inherited, memory_files, timers, zero_pages
from rekindle.criu.frozen import FrozenDump
from rekindle.criu.memory_files import MappedRange
from rekindle.criu.outputs import name_outputs
from rekindle.criu.seccomp import drop_filter
from rekindle.errors import NotDumpableError
from rekindle.files import copy_sparse_tree, remove_tree, size_bytes
from rekindle.os_errors import naming_full_disk
from rekindle.record import Dump, NeededDirectory, Process, Record, StoredFile, numbered
from restore.options import Output
from restore.rungs.memory import join_ranges

_OWN_DIRECTORY = Path(MEMORY_PLACE).parts[3]
"""The cell's own directory in /dev/shm."""

_FLATTENED_SHARE = 0.5


class Delta:
    """A dump of a replica in `directory`, as CRIU wrote it; `finish` makes it what a restore reads."""

    def __init__(
        self,
        frozen: FrozenDump,
        base: Image,
        mapped: Path | None,
        directory: Path,
        *,
        process: Process,
        outputs: Collection[str],
        closed: Mapping[int, str],
    ) -> None:
        self._frozen, self._base, self._mapped, self.directory = frozen, base, mapped, directory
        self._process, self._outputs, self._closed = process, outputs, closed

    @property
    def process(self) -> Process:
        """The record of the processes."""
        return self._process

    def end(self) -> None:
        """Let the replica end when the context is left."""
        self._frozen.end()

    def finish(self, *, complete: bool = False) -> Record:
        """Compact the dump in place, and return its record: the base's, updated to the replica's state.

        With `complete`, the dump gets memory files of its own. If the record names a base, the memory files
        of the base must exist as long as the delta does. The replica may have run on already.
        """
        criu = self.directory / "criu"
        dump_bytes = size_bytes(criu)
        with naming_full_disk(self.directory):
            name_outputs(criu, self._outputs, Path(self._process.stdout), Path(self._process.stderr))
            connections.close(criu, self._closed.keys(), tcp=False)
            drop_filter(criu, memory.FILTER)
            zero_pages.drop(criu)
            inherited.drop(criu, self._process.root_pid)
            timers.rearm(criu)
            dump = _with_memory(self.directory, self._base, self._mapped, dump_bytes, complete=complete)
        return msgspec.structs.replace(self._base.record, process=self._process, dump=dump)

    @property
    def bytes(self) -> int:
        """The space that the dump takes on disk, with /dev/shm."""
        return sum(_sizes(self.directory))


@contextlib.contextmanager
def dumped(
    cell: Cell,
    base: Image,
    mapped: Path | None,
    directory: Path,
    *,
    tool: Criu,
    output: Output,
    private_paths: Sequence[str] = (),
    directories: Sequence[NeededDirectory] = (),
    closed: Mapping[int, str] = MappingProxyType({}),
) -> Iterator[Delta]:
    """Dump a replica, and keep it frozen within the context.

    It then runs on, also after an exception, unless `Delta.end` was called. If CRIU is killed meanwhile, the
    replica ends.

    Creates `directory`. `mapped` is the ready dump of `base` whose memory files the replica maps, None if its
    memory was copied. `output` is the one that it was restored with. `private_paths` and `directories` are
    those of the record, and new ones. `closed` are the unix sockets that are to be closed in the dump, by
    inode, with their names. Raises NotDumpableError for an output that CRIU cannot restore, DumpError.
    """
    known = base.record.process
    names = {_name_of_output(cell, fd) for fd in (output.stdout, output.stderr)}
    directory.mkdir(mode=0o700)
    for top in ("criu", "shm"):
        (directory / top).mkdir(mode=0o700)
    external = sorted(name for name in names if name.startswith(("file[", "tty[")))
    external += [f"unix[{inode}]" for inode in closed]
    with (
        naming_full_disk(directory),
        FrozenDump(
            tool, cell, known.root_pid, directory / "criu", logs=directory, external=external
        ) as frozen,
    ):
        clocks = cell.clocks()
        pids = processes.tree(cell, known.root_pid)
        copy_sparse_tree(cell.root / "dev/shm", directory / "shm", without={_OWN_DIRECTORY})
        new = [path for path in private_paths if path not in known.private]
        kept = private.keep(cell, new, [each.path for each in directories], directory / "shm")
        process = msgspec.structs.replace(
            known,
            tasks=sum(processes.threads(cell, pid) for pid in pids),
            monotonic_ns=clocks.monotonic_ns,
            boottime_ns=clocks.boottime_ns,
            settings=read_settings(cell, known.root_pid),
            private=(*known.private, *kept),
            directories=tuple(directories),
            closed=tuple(sorted(closed.values())),
        )
        yield Delta(frozen, base, mapped, directory, process=process, outputs=names, closed=closed)


def _with_memory(
    directory: Path, base: Image, mapped: Path | None, dump_bytes: int, *, complete: bool
) -> Dump:
    """Provide the dump with memory files, the base's or new ones, and describe it."""
    known = base.record.dump
    criu = directory / "criu"
    if mapped is not None:
        written = sum(path.stat().st_size for path in criu.glob("pages-*.img"))
        share = written / max(1, sum(each.data_bytes for each in known.memory))
        ranges = memory_files.mapped_ranges(criu)
        ambiguous = any(memory_files.are_ambiguous(each) for each in ranges.values())
        if not complete and share < _FLATTENED_SHARE and not ambiguous:
            (directory / "memory").symlink_to((mapped / "memory").resolve())
            return _delta(directory, base, ranges, dump_bytes)
        staged = directory / "staged"
        staged.mkdir(mode=0o700)
        memory_files.copy_back(criu, mapped / "memory", staged)
        remove_tree(criu)
        staged.replace(criu)
        zero_pages.drop(criu)
    memory_files.forget_memory_files(criu)
    (directory / "memory").mkdir(mode=0o700)
    moved = memory_files.move_memory(criu, directory / "memory")
    return Dump(
        dump_bytes=dump_bytes,
        stored_bytes=size_bytes(criu) + sum(each.data_bytes for each in moved),
        files=dump_tree.scan(directory),
        memory=tuple(dump_tree.stored_memory(each) for each in moved),
    )


def _delta(
    directory: Path, base: Image, ranges: Mapping[str, Sequence[MappedRange]], dump_bytes: int
) -> Dump:
    known = base.record.dump
    found = [
        msgspec.structs.replace(
            each,
            ranges=join_ranges((mapped.start, mapped.end) for mapped in ranges.get(each.path.name, ())),
        )
        for each in known.memory
    ]
    return Dump(
        dump_bytes=dump_bytes,
        stored_bytes=size_bytes(directory / "criu") + sum(each.data_bytes for each in found),
        base=known.base or base.index.digest,
        blocks=known.blocks,
        files=_numbered(known.files, dump_tree.scan(directory)),
        memory=found,
    )


def _numbered(base: Sequence[StoredFile], ours: Sequence[StoredFile]) -> list[StoredFile]:
    """Return the files of a delta with numbers: memory files have those that the base's layers use."""
    shared = {file.path: (number, file) for number, file in numbered(base).items() if _is_memory(file)}
    free = itertools.count(1 + max(number for number, _ in shared.values()))
    found = []
    for file in ours:
        number, known = shared[file.path] if _is_memory(file) else (next(free), file)
        found.append(msgspec.structs.replace(known, number=number))
    return found


def _is_memory(file: StoredFile) -> bool:
    return file.path.parts[0] == "memory"


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
