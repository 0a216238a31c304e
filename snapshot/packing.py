# SPDX-License-Identifier: Apache-2.0
"""Pack the memory of a dump in the order in which a restore needs it, once that is known."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from oci import dump_layers
from oci.blocks import Span
from oci.descriptor import Descriptor
from oci.image import Image
from oci.layout import Layout
from rekindle.cell.touch_recorder import Touch, TouchRecorder
from rekindle.record import Record, numbered


def described(record: Record, packed: Sequence[dump_layers.PackedLayer]) -> Record:
    """Return the record with the blocks of the layers that were packed."""
    blocks = tuple(each.blocks for each in packed if each.blocks is not None)
    return msgspec.structs.replace(record, dump=msgspec.structs.replace(record.dump, blocks=blocks))


@contextlib.contextmanager
def recording(record: Record, dump: Path) -> Iterator[TouchRecorder | None]:
    """Show the memory files of a dump so that what is touched is recorded; None where that cannot be had.

    Not for servers with GPUs: it is not known whether drivers take such memory.
    """
    recorder = None
    if record.dump.memory and not record.process.cuda_pids:
        with contextlib.suppress(OSError):
            recorder = TouchRecorder([dump / each.path for each in record.dump.memory])
    with recorder or contextlib.nullcontext():
        yield recorder


def packed_again(
    image: Image, record: Record, dump: Path, staging: Layout, touches: Sequence[Touch]
) -> tuple[Record, Sequence[Descriptor]]:
    """Pack the memory of an image again, in the order of the touches, from the dump that was proved.

    What is packed is read again and compared. A delta keeps the layers that it shares with its base.
    """
    if not touches or record.dump.base is not None:
        return record, image.layers
    memory = [
        msgspec.structs.replace(file, number=number)
        for number, file in numbered(record.dump.files).items()
        if file.path.parts[0] == "memory"
    ]
    numbers = {file.path.name: number for file in memory if (number := file.number) is not None}
    sizes = {file.path.name: file.size for file in memory}
    order = [
        Span(numbers[name], offset, min(offset + length, sizes[name])) for name, offset, length in touches
    ]
    packed = dump_layers.pack_layers(
        dump,
        memory,
        staging,
        workers=dump_layers.workers(),
        order=order,
        total_bytes=record.dump.stored_bytes,
    )
    layers = [layer for layer in image.layers if not layer.is_memory]
    return described(record, packed), [*layers, *(each.descriptor for each in packed)]
