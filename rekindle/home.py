# SPDX-License-Identifier: Apache-2.0
"""`$REKINDLE_HOME`: where everything lies that rekindle keeps.

    $REKINDLE_HOME/                 (default: $XDG_DATA_HOME/rekindle, ~/.local/share/rekindle)
        store/                      the local store, an OCI image layout
        dumps/HEX/                  dumps ready to restore, by the digest of their manifest
        run/VERB-PID-XXXXXX/        what one running command works with; locked itself while that lives
        logs/                       logs of commands that failed, the newest twenty
        tools/                      what was compiled here, and what was found out about this node
        machine.key machine.pub     made at the first snapshot: signs what is made here, for the local store
        policy.toml                 whom we trust, if the user wrote one
        seen.json                   the newest that was restored of each tag
        lock                        held for a moment, while a work directory is made or looked at

A command that is killed leaves its work directory behind, unlocked; the next command removes it. But where
the journal in it (`cuda.json`) tells of processes that live and may be locked out of their GPUs, that stays,
for `rekindle doctor --repair`.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from rekindle.errors import RekindleError, UsageError
from rekindle.files import locked, remove_tree, try_lock
from rekindle.journal import CUDA_JOURNAL, unfinished
from rekindle.os_errors import naming_full_disk

_LOGS_KEPT = 20
_STALE_SECONDS = 3600.0


class Home:
    """The directory, made on first use and private to its owner."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = root / "store"
        self.dumps = root / "dumps"
        self.run = root / "run"
        self.tools = root / "tools"
        self.logs = root / "logs"
        with naming_full_disk(root):
            _make_private(root)
            for directory in (root, self.store, self.dumps, self.run, self.tools, self.logs):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def policy(self) -> Path:
        return self.root / "policy.toml"

    @classmethod
    def from_environment(cls) -> "Home":
        """Raises UsageError if the directory cannot be made."""
        home = os.environ.get("REKINDLE_HOME")
        root = Path(home or "~/.local/share/rekindle")
        try:
            if not home:
                data = os.environ.get("XDG_DATA_HOME")
                root = Path(data, "rekindle") if data else root.expanduser()
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The kernel and CRIU speak of files by their real paths.
            root = root.resolve()
            if root.is_relative_to("/dev/shm"):  # noqa: S108
                raise UsageError(
                    f"{root} cannot be used",
                    cause="a cell has a /dev/shm of its own, in which it is not to be seen",
                    hint="set REKINDLE_HOME to a directory on a disk, or on another tmpfs",
                )
            return cls(root)
        except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home directory
            raise UsageError(
                f"{root} cannot be used", cause=str(error), hint="set REKINDLE_HOME to a directory of yours"
            ) from error

    @contextlib.contextmanager
    def work(self, verb: str) -> Iterator[Path]:
        """A private directory for one command, removed at the end, however the command ends."""
        with contextlib.ExitStack() as stack:
            with locked(self.root / "lock"), naming_full_disk(self.root):
                directory = self.run / f"{verb}-{os.getpid()}-{os.urandom(4).hex()}"
                directory.mkdir(mode=0o700)
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                try_lock(fd)
                stack.callback(_remove_if_possible, directory)
            try:
                yield directory
            except RekindleError as error:
                self._keep_log(error, directory)
                raise

    @contextlib.contextmanager
    def abandoned(self) -> Iterator[list[Path]]:
        """The work directories of commands that are no more; nobody else is at them within the context."""
        found: list[Path] = []
        with contextlib.ExitStack() as stack:
            with locked(self.root / "lock"):
                for directory in self.run.iterdir():
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                        stack.callback(os.close, fd)
                        if try_lock(fd):
                            found.append(directory)
            yield found

    def sweep(self) -> list[Path]:
        """Removes the work directories of commands that are no more, and returns them; without those of which
        a journal is still needed."""
        for path in self.tools.glob(".*"):  # staged by a writer that was killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
        # Gigabytes, maybe: nobody has to wait for that, and who comes now finds them locked.
        with self.abandoned() as found:
            return [directory for directory in found if _remove_if_possible(directory)]

    def _keep_log(self, error: RekindleError, directory: Path) -> None:
        """Saves the log that an error names from the removal of its directory."""
        if error.log is None or not error.log.is_relative_to(directory):
            return
        kept = self.logs / f"{directory.name}-{error.log.name}"
        try:
            kept.write_bytes(error.log.read_bytes())
        except OSError:  # not there, or no room: the error itself matters more
            error.log = None
            return
        error.log = kept
        with contextlib.suppress(OSError):  # another command may be at it, too
            self._drop_old_logs()

    def _drop_old_logs(self) -> None:
        by_age = sorted(self.logs.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in by_age[:-_LOGS_KEPT]:
            path.unlink(missing_ok=True)


def _make_private(root: Path) -> None:
    """Sees to it that nobody else can change what we will run. Raises UsageError for somebody else's."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = root.stat()
    if status.st_uid != os.geteuid():
        raise UsageError(
            f"{root} belongs to another user",
            cause=f"its owner is {status.st_uid}, and we are {os.geteuid()}",
            hint="set REKINDLE_HOME to a directory of yours",
        )
    if status.st_mode & 0o077:
        root.chmod(0o700)


def _remove_if_possible(directory: Path) -> bool:
    """A directory that cannot be removed now is left to the next sweep: the command's result stands.

    False if a journal in it is needed: that stays, and all else goes.
    """
    needed = unfinished(directory / CUDA_JOURNAL)
    with contextlib.suppress(OSError):
        if not needed:
            remove_tree(directory)
            return True
        for entry in directory.iterdir():
            if entry.name != CUDA_JOURNAL:
                remove_tree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    return not needed
