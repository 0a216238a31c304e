# SPDX-License-Identifier: Apache-2.0
"""Remember what a comparison of files with a record has found, until one of the files changes.

To compare contents takes a fraction of a second, to ask for the status of thousands of files some
milliseconds. A change of a file changes its ctime, which only the OS kernel sets. So a finding is used again
while size, times and inode of every file are the same. It is not kept if a ctime proves nothing. One of the
last moments may be that of a second change, too. And a whole second is no reading of a clock: it was made up
by a file system that stores no ctime (squashfs, erofs, some on networks), or by who made the image of a disk.
The latter do no harm, since every change sets another, if the file system is the same: by its number, where
that is an UUID. A reboot ends everything, since files may lose what was written before a crash.

    $REKINDLE_HOME/compared/KEY.json    a finding; KEY is a digest of what the record says of its files
"""

import array
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rekindle.fields import JSON
from rekindle.proc import boot_id

_KEPT = 256
_WITH_UUID = {"ext2", "ext3", "ext4", "xfs", "f2fs"}
_SECOND_NS = 1_000_000_000
_SETTLED_NS = 2 * _SECOND_NS


class Findings:
    """The findings that are kept in a directory, each about a group of files."""

    def __init__(self, directory: Path | None) -> None:
        """Use a directory, which need not exist; remember nothing if it is None."""
        self._directory = directory

    def find(self, expected: Iterable[str], paths: Sequence[str], compare: Callable[[], JSON]) -> JSON:
        """Return what `compare` finds about the files and directories at some paths.

        `expected` is all that the finding depends on besides the files.
        """
        if self._directory is None:
            return compare()
        began_ns = time.time_ns()
        key = hashlib.sha256("\0".join(expected).encode(errors="surrogateescape")).hexdigest()[:32]
        signature = _signature(paths, began_ns)
        place = self._directory / f"{key}.json"
        if signature:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
                known = json.loads(place.read_bytes())
                if known["signature"] == signature and known["boot"] == boot_id():
                    return known["found"]
        found = compare()
        if signature and signature == _signature(paths, began_ns):
            content = json.dumps({"boot": boot_id(), "signature": signature, "found": found})
            with contextlib.suppress(OSError):
                _write(place, content)
        return found


NOTHING_KNOWN = Findings(None)


def _write(place: Path, content: str) -> None:
    """Replace a file, and remove the oldest beside it. It need not outlive a power failure."""
    place.parent.mkdir(mode=0o700, exist_ok=True)
    staged = place.with_name(f".{place.name}.{os.urandom(6).hex()}")
    staged.write_text(content)
    staged.replace(place)
    kept = sorted(place.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept[_KEPT:]:
        path.unlink(missing_ok=True)


def _signature(paths: Sequence[str], now_ns: int) -> str:
    """Return a digest of the status of files; "" if it does not prove that they have not changed."""
    facts: list[int] = []
    made_up: dict[int, str] = {}  # a path on each device with such times
    settled = now_ns - _SETTLED_NS
    ask = os.stat
    for path in paths:
        try:
            status = ask(path)
        except OSError as error:
            facts.append(error.errno or 0)
            continue
        except ValueError:
            facts.append(-1)
            continue
        changed = status.st_ctime_ns
        if changed > settled:
            return ""
        if not changed % _SECOND_NS:
            made_up.setdefault(status.st_dev, path)
        facts += (status.st_size, status.st_mtime_ns, changed, status.st_ino & 0x7FFFFFFFFFFFFFFF)
    for device, path in made_up.items():
        number = _number(device, path)
        if not number:
            return ""
        facts += (device, number & 0x7FFFFFFFFFFFFFFF)
    return hashlib.sha256(array.array("q", facts).tobytes()).hexdigest()


def _number(device: int, path: str) -> int:
    """Return the number of a file system that stores ctimes and has an UUID; 0 for any other."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, kind = line.partition(" - ")
        if fields.split(" ")[2] == wanted:
            return os.statvfs(path).f_fsid if kind.split(" ")[0] in _WITH_UUID else 0
    return 0
