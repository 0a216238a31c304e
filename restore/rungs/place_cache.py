# SPDX-License-Identifier: Apache-2.0
"""Prepare a start on a recorded kernel cache: the server's environment, and the cache in its place.

The server gets the environment of today. Only variables that choose kernels, and so are part of the cache's
keys, are taken from the record, where they are not set here.
"""

import contextlib
import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.engine import Engine, caches
from rekindle.engine.caches import VARIABLES, CacheKind, environment_for, is_within, path_below
from rekindle.engine.choose import from_record
from rekindle.errors import CapabilityError, UsageError
from rekindle.files import try_lock
from rekindle.record import Record
from rekindle.secrets import HIDDEN
from rekindle.secrets.redact import redact_command
from restore.decide import match_environment, match_process
from restore.decide.decision import Decision
from restore.decide.difference import Difference
from restore.decide.plan import Step
from restore.decide.rules import reason_for
from restore.decide.source import Source
from restore.rungs.run import Run

if TYPE_CHECKING:
    from oci.cache.inventory import StoredRoot

_REASONS_LIMIT = 50
_LOCK_SECONDS = 10.0


def environment(
    record: Record, engine: Engine, own: Mapping[str, str]
) -> tuple[dict[str, str], list[Difference]]:
    """Return the server's environment: our own, and the recorded variables that choose kernels.

    Only those are taken that are not set here; they are returned as differences, too. `engine` is the
    recorded one.
    """
    found, replayed = dict(own), []
    for name, value in sorted(record.environment.items()):
        if name not in own and HIDDEN not in value and engine.replays(name):
            found[name] = value
            replayed.append(Difference("cache-replayed", name, _shown(value), "not set"))
    return found, replayed[:_REASONS_LIMIT]


def differences(
    record: Record, engine: Engine, environment: Mapping[str, str], command: Sequence[str]
) -> list[Difference]:
    """Return what differs from the recorded start and may change the cache keys that a server looks up."""
    found = [
        Difference("cache-environment", name, was, here)
        for name, was, here in match_environment.cache_key_changes(record, engine, environment)
    ]
    was_options, options = (
        match_process.plain_command(record.command),
        match_process.plain_command(redact_command(command)),
    )
    if was_options != options:
        found.append(Difference("cache-environment", "command", " ".join(was_options), " ".join(options)))
    return found[:_REASONS_LIMIT]


def place(
    run: Run, decision: Decision, step: Step, stack: contextlib.ExitStack
) -> tuple[dict[str, str], Mapping[str, Path]]:
    """Extract the kernel cache where the server will look for it.

    Returns the server's environment, and the directory of each root by its name.
    """
    source, home, options = decision.source, decision.home, run.options
    assert source is not None
    assert home is not None
    record, roots = source.image.value.record, source.roots(step)
    engine = from_record(record.engine.name, record.endpoint, record.engine.options)
    found, replayed = environment(record, engine, os.environ)
    changed = differences(record, engine, found, decision.facts.command or ())
    run.report.reasons += [reason_for(each) for each in (*replayed, *changed)]
    where, variables = places(roots, os.environ, options.cache_dir)
    with run.report.phase("extract"):
        try:
            extract(run, source, where, stack)
        except CapabilityError as error:
            if options.cache_dir is not None:
                raise
            directory = home.root / "caches" / source.read_kernels().value.manifest.digest.hex
            run.report.say(f"{error.message}: extracting the kernel cache to {directory} instead")
            where, variables = places(roots, {}, directory)
            _keep_in_use(directory, stack)
            extract(run, source, where, stack)
    return {**found, **variables}, where


def _keep_in_use(directory: Path, stack: contextlib.ExitStack) -> None:
    """Lock a directory of $REKINDLE_HOME/caches, and note that it is used now, for `rekindle prune`.

    The lock is held while this process serves, or until the rung fails.
    """
    directory.parent.mkdir(mode=0o700, exist_ok=True)
    lock = directory.with_name(f"{directory.name}.lock")
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    stack.push(lambda kind, *_: os.close(fd) if kind is not None else None)
    try_lock(fd, shared=True, timeout=_LOCK_SECONDS)
    os.utime(fd)


def extract(run: Run, source: Source, where: Mapping[str, Path], stack: contextlib.ExitStack) -> None:
    """Extract each root of the kernel cache to its directory in `where`.

    Pushes onto `stack` what removes the files again if the rung fails. Raises CapabilityError for a
    directory that cannot be written to.
    """
    from oci.cache import extract as extraction

    above = {directory for path in where.values() for directory in path.parents}
    made = sorted((each for each in above if not os.access(each, os.F_OK)), reverse=True)
    limits = source.image.value.limits
    with run.listener.progress(source.tally):
        try:
            done = extraction.extract(source.read_kernels(), where, limits=limits, own=os.environ)
        except UsageError as error:
            raise CapabilityError(
                error.message, cause=error.cause, hint="choose another directory with --cache-dir DIR"
            ) from None

    def undo(kind: object, *_: object) -> None:
        if kind is not None:
            done.undo()
            for directory in made:  # the inner ones first
                with contextlib.suppress(OSError):
                    directory.rmdir()

    stack.push(undo)
    run.report.bytes.written = (run.report.bytes.written or 0) + done.written_bytes


def places(
    roots: Sequence["StoredRoot"], own: Mapping[str, str], directory: Path | None = None
) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the directory for each root of a cache, by its name, and the variables that point there.

    That is the recorded directory, since some caches contain their own path. A variable in `own` overrides
    it, unless its directory lies within another root's. If several roots are of one kind, the variable
    applies to the one that is named after the kind. With `directory`, all roots go below it.
    """
    found: dict[str, Path] = {}
    variables: dict[str, str] = {}
    placed: set[CacheKind] = set()
    for root in sorted(roots, key=lambda root: root.name != root.kind):
        path = Path(posixpath.normpath(_place(root, {} if root.kind in placed else own, directory)))
        if any(_nested(path, other) for other in found.values()):
            path = Path(root.recorded)
        found[root.name] = path
        placed.add(root.kind)
        variables = environment_for(root.kind, str(path)) | variables
    return found, variables


def _place(root: "StoredRoot", own: Mapping[str, str], directory: Path | None) -> Path:
    if directory is not None:
        return path_below(root.kind, directory / root.name)
    if own.get(VARIABLES[root.kind]) and root.kind is not CacheKind.TORCH_EXTENSIONS:
        return Path(caches.path_of(root.kind, own))
    return Path(root.recorded)


def _nested(path: Path, other: Path) -> bool:
    return is_within(str(path), str(other)) or is_within(str(other), str(path))


def _shown(value: str) -> str:
    return value[:200] or "empty"
