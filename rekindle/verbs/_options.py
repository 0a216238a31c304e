# SPDX-License-Identifier: Apache-2.0
"""What the commands' command lines have in common."""

import argparse
import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oci.descriptor import Blobs, Descriptor
from oci.layout import Layout
from oci.reference import LayoutReference, Reference
from rekindle import criu
from rekindle.config import JOBS_LIMIT, Config, Limits
from rekindle.engine import Endpoint
from rekindle.errors import CapabilityError, Interrupted, RekindleError, UsageError
from rekindle.files import full_disk
from rekindle.home import Home
from rekindle.record import Record
from rekindle.report import Report

if TYPE_CHECKING:
    from oci.progress import Tally
    from oci.registry.repository import Access
    from rekindle.cuda import Door, Search

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_ELSEWHERE = _FORBIDDEN | {errno.ENOTDIR, errno.EISDIR}


@contextlib.contextmanager
def reporting(report: Report, args: argparse.Namespace) -> Iterator[None]:
    """Writes the report when the command fails, too. Raises UsageError, before any work, for a file that it
    cannot be written to."""
    path: Path | None = None
    try:
        _refuse_unwritable(args.report)
        path = args.report
        yield
    except BaseException as error:
        told = from_outside(error) if isinstance(error, OSError) else error
        if isinstance(told, RekindleError):
            report.error = {"code": told.code, "message": told.message}
            report.error |= {"cause": told.cause, "hint": told.hint}
        elif isinstance(error, Interrupted):
            report.error = {"code": "interrupted", "message": f"ended by signal {error.signum}"}
        else:
            report.error = {"code": "bug", "message": repr(error)}
        with contextlib.suppress(OSError):
            report.write(path, to_stdout=False)  # not to one that was refused
        with contextlib.suppress(OSError):
            report.write(None, to_stdout=args.json)
        raise


def _refuse_unwritable(path: Path | None) -> None:
    """Also refuses /dev/null and the like, which the report would replace."""
    if path is None:
        return
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"--report {path} is no regular file")
        path.parent.stat()
    except OSError as error:
        raise UsageError(f"--report {path} cannot be written", cause=str(error)) from None
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"--report {path} cannot be written", cause=f"nor can anything in {path.parent}")


def from_outside(error: OSError) -> RekindleError | None:
    """What the system refuses, as an error of ours; None for what is a bug until somebody shows otherwise."""
    if error.errno in _FULL:
        return full_disk(error.filename or "here", cause=str(error))
    if error.errno in _ELSEWHERE and error.filename:
        return UsageError(f"{error.filename} cannot be used", cause=str(error))
    return None


def require_root() -> None:
    """Raises CapabilityError for anybody but root: cells and CRIU need it."""
    if os.geteuid() != 0:
        raise CapabilityError(
            "this needs root", cause="namespaces and CRIU do", hint="run it with sudo, or as root"
        )


def open_home() -> Home:
    """$REKINDLE_HOME, after what a killed command left there has been removed."""
    home = Home.from_environment()
    sweep(home)
    return home


def cuda_door(home: Home) -> "Callable[[], Door]":
    """What finds the door to CUDA's checkpoints, when it is called."""

    def find() -> "Door":
        from rekindle import cuda

        return cuda.find(home)

    return find


def starting_cuda(record: Record, home: Home) -> "contextlib.AbstractContextManager[Search | None]":
    """The driver, which takes seconds to start, for a record with CUDA state; given up at the end if nobody
    took the door."""
    if not record.process.cuda_pids:
        return contextlib.nullcontext()
    from rekindle.cuda import Search

    return Search(home)


def sweep(home: Home) -> list[Path]:
    """Removes what killed commands left; returns their work directories."""
    try:
        removed = home.sweep()
        if removed:
            criu.remove_leftovers()
        store = Layout(home.store)
        store.drop_forgotten()
        if store.has_garbage():
            store.collect_garbage()
    except OSError as error:
        if error.errno not in _FORBIDDEN:
            raise
        return []  # somebody else's home, or a read-only one: its owner's commands will do it
    return removed


def access(args: argparse.Namespace, home: Home) -> "Access":
    """How this command reaches registries."""
    from oci.progress import Limiter, Tally
    from oci.registry.repository import Access

    config = Config.read(home.root)
    if args.jobs is not None:
        if not 1 <= args.jobs <= JOBS_LIMIT:
            raise UsageError(f"--jobs must be from 1 to {JOBS_LIMIT}")
        patience = dataclasses.replace(config.patience, jobs=args.jobs)
        config = dataclasses.replace(config, patience=patience)
    return Access(
        config=config,
        tally=Tally(),
        limiter=Limiter(args.limit_rate),
        mirrors=tuple(args.mirror),
        plain_http=args.plain_http,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An image that was found: its root's descriptor, where its blobs are, and what counts them."""

    blobs: Blobs
    root: Descriptor
    limits: Limits
    tally: "Tally | None" = None
    tagged: "Callable[[str], Descriptor | None] | None" = None


@contextlib.contextmanager
def source(reference: Reference, home: Home, args: argparse.Namespace) -> Iterator[Source]:
    """Finds an image; within the context its blobs stay where they are. Raises NotFoundError."""
    if isinstance(reference, LayoutReference):
        layout = layout_of(reference, home)
        with layout.reading():
            limits = Config.read(home.root).limits
            yield Source(blobs=layout, root=layout.resolve(reference.tag), limits=limits)
        return
    # A restore from the local store needs no HTTP client, which takes time to import.
    from oci.registry.repository import Repository

    how = access(args, home)
    with Repository(reference, how) as repository:
        yield Source(
            blobs=repository,
            root=repository.resolve(),
            limits=how.config.limits,
            tally=how.tally,
            tagged=repository.tagged,
        )


def progress(tally: "Tally | None", report: Report) -> contextlib.AbstractContextManager[None]:
    """Shows what is fetched, if anything is."""
    if tally is None:
        return contextlib.nullcontext()
    from rekindle.verbs._progress import shown

    return shown(tally, quiet=report.quiet)


def layout_of(image: LayoutReference, home: Home, *, create: bool = False) -> Layout:
    """The layout that an image is in. Raises UsageError for a directory that is none, or cannot be one."""
    if image.directory is None:
        return Layout.create(home.store)
    if create:
        try:
            layout = Layout.create(image.directory)
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise UsageError(
                f"{image.directory} cannot be used as an OCI image layout", cause=str(error)
            ) from None
        if not os.access(image.directory, os.W_OK | os.X_OK):
            raise UsageError(
                f"{image.directory} cannot be used as an OCI image layout", cause="it may not be written to"
            )
        return layout
    if not (image.directory / "oci-layout").exists():
        raise UsageError(f"{image.directory} is no OCI image layout")
    return Layout(image.directory)


@contextlib.contextmanager
def collecting(layout: Layout, target: LayoutReference) -> Iterator[None]:
    """Removes what an image that is replaced within leaves behind in the local store. A directory of the
    user's may hold what others put there: it is left as it is."""
    if target.directory is not None:
        yield
        return
    layout.expect_garbage()
    try:
        yield
        layout.collect_garbage()
    except BaseException:  # also one that came in the middle of the collection
        layout.collect_garbage()
        raise


def parse_endpoint(text: str, default_host: str) -> Endpoint:
    """`PORT`, `HOST:PORT` or `[HOST]:PORT`. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdecimal() or not 0 < int(port) < 65536 or (colon and not host):
        raise UsageError(f"--publish {text} is not of the form [HOST:]PORT")
    return Endpoint(host=host or default_host, port=int(port))
