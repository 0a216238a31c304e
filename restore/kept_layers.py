# SPDX-License-Identifier: Apache-2.0
"""Keep the layers of a dump that were unpacked before a restore was given up, for the next one.

    dumps/HEX.part/
        criu/  memory/  shm/    the tree; what no complete layer has written is a hole
        ready.json              as of a complete dump, so that it is removed to make room like one
        layers.json             {LAYER: {NUMBER of a file: [[start, end], ...]}}: what each layer has written

Only layers that match their digest are kept, and used only if the metadata of no file has changed since, and
in the same boot, as with complete dumps.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from oci.dump_layers import Unpacked
from rekindle.files import remove_tree
from rekindle.record import StoredFile

LAYERS = "layers.json"


def take(part: Path, staged: Path, is_intact: Callable[[Path], bool]) -> Unpacked:
    """Move what is kept to `staged`, which must not exist yet, and return which layers it holds."""
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        part.rename(staged)
        if is_intact(staged):
            content = json.loads((staged / LAYERS).read_bytes())
            (staged / LAYERS).unlink()
            return Unpacked({layer: _ranges(files) for layer, files in content.items()})
    with contextlib.suppress(FileNotFoundError):
        remove_tree(staged)
    return Unpacked()


def keep(
    part: Path,
    staged: Path,
    unpacked: Unpacked,
    files: Sequence[StoredFile],
    mark_ready: Callable[[Path, int], None],
) -> None:
    """Move a tree whose unpacking was given up to where the next restore finds it, if that helps."""
    with contextlib.suppress(OSError):
        if unpacked.complete and unpacked.drop_begun(files, staged):
            (staged / LAYERS).write_text(json.dumps(unpacked.complete))
            mark_ready(staged, unpacked.bytes)
            staged.rename(part)


def _ranges(files: dict[str, list[list[int]]]) -> dict[int, list[tuple[int, int]]]:
    return {int(number): [(start, end) for start, end in each] for number, each in files.items()}
