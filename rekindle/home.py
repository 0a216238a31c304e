# SPDX-License-Identifier: Apache-2.0
"""`$REKINDLE_HOME`, the directory of everything that rekindle keeps.

    $REKINDLE_HOME/                 (default: $XDG_DATA_HOME/rekindle, ~/.local/share/rekindle)
        store/                      the local store, an OCI image layout
        dumps/HEX/                  dumps ready to restore, by the digest of their manifest
        run/VERB-PID-XXXXXX/        the work directory of a running command, which locks it while it lives
        replicas/NAME/              a server that runs, or has ended: see rekindle/replicas.py
        ports/HOST-PORT/            a port that replicas share: see restore/serve/shared_port.py
        logs/                       logs of commands that failed, the newest twenty
        compared/                   what comparisons of files with records have found
        history/                    totals and the newest reports of commands: see rekindle/history.py
        tools/                      compiled helpers, and facts about this node
        machine.key machine.pub     created by the first snapshot; signs this machine's images in the store
        policy.toml                 the user's trust policy, if any
        seen.json                   the newest image that was restored of each tag
        lock                        held briefly while a work directory is created or examined

A killed command leaves its work directory behind, unlocked, and the next command removes it. A journal in it
(`cuda.json`) stays while it names live processes, which may be locked out of their GPUs, for
`rekindle doctor --repair`.
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
_ALWAYS_THERE = {"store", "dumps", "run", "tools", "logs"}
_OURS = {*_ALWAYS_THERE, "compared", "history", "replicas", "ports", "caches", "machine.key", "machine.pub"}
_OURS |= {"policy.toml", "config.toml", "seen.json", "lock"}
_OF_FILE_SYSTEMS = {"lost+found"}
_STALE_SECONDS = 3600.0


def expand_user(path: str) -> Path | None:
    """Expand a leading `~`; return None if the user has no home directory, as in many containers."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return None


class Home:
    """The directory, created on first use and private to its owner."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = root / "store"
        self.dumps = root / "dumps"
        self.run = root / "run"
        self.replicas = root / "replicas"
        self.ports = root / "ports"
        self.compared = root / "compared"
        self.tools = root / "tools"
        self.logs = root / "logs"
        self.history = root / "history"  # created when something is added
        with naming_full_disk(root):
            _make_private(root)
            below = (self.store, self.dumps, self.run, self.replicas, self.compared, self.tools, self.logs)
            for directory in (root, *below):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def policy(self) -> Path:
        return self.root / "policy.toml"

    @classmethod
    def from_environment(cls) -> "Home":
        """Return `$REKINDLE_HOME` or its default. Raises UsageError if it cannot be created or used."""
        home = os.environ.get("REKINDLE_HOME")
        root = Path(home or "~/.local/share/rekindle")
        try:
            if not home:
                data = os.environ.get("XDG_DATA_HOME")
                root = Path(data, "rekindle") if data else root.expanduser()
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The OS kernel and CRIU report files by their real paths.
            root = root.resolve()
            if root.is_relative_to("/dev/shm"):  # noqa: S108
                raise UsageError(
                    f"cannot use {root} as REKINDLE_HOME",
                    cause="a cell has its own /dev/shm, in which it is not visible",
                    hint="set REKINDLE_HOME to a directory on a disk or on another tmpfs",
                )
            return cls(root)
        except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home directory
            raise UsageError(
                f"cannot use {root} as REKINDLE_HOME",
                cause=str(error),
                hint="set REKINDLE_HOME to a directory of yours",
            ) from error

    @contextlib.contextmanager
    def work(self, verb: str) -> Iterator[Path]:
        """Create a private directory for one command and remove it at the end, also after an error."""
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
        """Return the work directories of dead processes, locked within the context."""
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
        """Remove the work directories of dead processes; return those removed.

        Keeps journals that are still needed.
        """
        for path in self.tools.glob(".*"):  # staged by a writer that was killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()
        # Removing gigabytes takes a while, so the home is not locked meanwhile; the directories are.
        with self.abandoned() as found:
            return [directory for directory in found if _remove_if_possible(directory)]

    def _keep_log(self, error: RekindleError, directory: Path) -> None:
        """Copy the log that an error names out of the directory that is going to be removed."""
        if error.log is None or not error.log.is_relative_to(directory):
            return
        kept = self.logs / f"{directory.name}-{error.log.name}"
        try:
            kept.write_bytes(error.log.read_bytes())
        except OSError:  # it does not exist, or the disk is full: the error itself matters more
            error.log = None
            return
        error.log = kept
        with contextlib.suppress(OSError):  # another command may be removing them, too
            self._drop_old_logs()

    def _drop_old_logs(self) -> None:
        by_age = sorted(self.logs.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in by_age[:-_LOGS_KEPT]:
            path.unlink(missing_ok=True)


def _make_private(root: Path) -> None:
    """Create the directory and make it private, since we run programs in it.

    Raises UsageError if it belongs to another user, or is used for something else: then it stays as it is.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = root.stat()
    if status.st_uid != os.geteuid():
        raise UsageError(
            f"{root} belongs to another user",
            cause=f"its owner has the UID {status.st_uid}, and ours is {os.geteuid()}",
            hint=f"set REKINDLE_HOME to a directory of yours, such as {root / 'rekindle'}"
            if os.access(root, os.W_OK | os.X_OK)  # a volume of a container, with a group for all
            else "set REKINDLE_HOME to a directory of yours",
        )
    if problem := _other_use(root):
        raise UsageError(
            f"cannot use {root} as REKINDLE_HOME",
            cause=problem,
            hint="set REKINDLE_HOME to a directory that is empty or does not exist yet",
        )
    if status.st_mode & 0o077:
        root.chmod(0o700)


def _other_use(root: Path) -> str:
    """Return what shows that a directory is for something else than rekindle; "" if nothing does."""
    temporary = {"/tmp", "/var/tmp", os.environ.get("TMPDIR") or "/tmp"}  # noqa: S108
    if any(os.path.realpath(each) == str(root) for each in temporary):  # also if it is empty
        return "it is for temporary files of all users"
    names = {path.name for path in root.iterdir()}
    if names >= _ALWAYS_THERE:
        return ""
    others = sorted(names - _OURS - _OF_FILE_SYSTEMS)
    return f"it contains {', '.join(map(repr, others[:3]))}" if others else ""


def _remove_if_possible(directory: Path) -> bool:
    """Remove a work directory, or everything but its journal if that is still needed; then return False.

    Never raises: what cannot be removed now is left to the next sweep.
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
