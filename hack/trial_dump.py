# SPDX-License-Identifier: Apache-2.0
"""Make the dump in rekindle/criu/trial_dump.py anew: `python -m hack.trial_dump`. Needs root and x86-64."""

import sys
import tempfile
import time
from pathlib import Path

from rekindle import criu
from rekindle.cell import Cell, Command, Network
from rekindle.criu import inherited, search, trial_dump
from rekindle.criu.image_files import read_messages, write_messages
from rekindle.criu.inherited import CORE_MAGIC
from rekindle.criu.protobuf import Field, encode_fields, read_fields
from rekindle.home import Home

# The extended registers in CRIU's images/core.proto and core-x86.proto: thread_info.fpregs.xsave.
_XSAVE = (2, 3, 13)
_SECONDS = 20.0
_LINE = 100


def main() -> int:
    tool = search.find(Home.from_environment())
    with tempfile.TemporaryDirectory() as name, Cell() as cell:
        directory = Path(name)
        cell.enter(Network.PRIVATE)
        path = cell.root / trial_dump.PLACE
        path.write_bytes(trial_dump.program())
        path.chmod(0o755)
        command = Command(argv=[f"/{trial_dump.PLACE}"], env={}, cwd=Path("/"), files={}, workload=True)
        pid = cell.spawn(command)
        assert pid == trial_dump.PID
        time.sleep(0.1)  # until it pauses
        criu.dump(tool, cell, pid, directory, timeout=_SECONDS)
        (directory / "timens-0.img").unlink()
        inherited.drop(directory, pid)
        _drop_extended_registers(directory / f"core-{pid}.img")
        text = trial_dump.pack(directory)
    lines = "\n".join(f'    "{text[at : at + _LINE]}"' for at in range(0, len(text), _LINE))
    module = Path(trial_dump.__file__)
    before, _, rest = module.read_text().partition("_FILES = (\n")
    after = rest.partition("\n)\n")[2]
    module.write_text(f"{before}_FILES = (\n{lines}\n)\n{after}")
    return 0


def _drop_extended_registers(path: Path) -> None:
    messages = [
        encode_fields(_without(read_fields(each, path), path, *_XSAVE))
        for each in read_messages(path, CORE_MAGIC)
    ]
    write_messages(path, CORE_MAGIC, messages)


def _without(fields: list[Field], path: Path, number: int, *within: int) -> list[Field]:
    """Return fields without the one that these numbers lead to."""
    if not within:
        return [field for field in fields if field[0] != number]
    return [
        (each, kind, encode_fields(_without(read_fields(value, path), path, *within)))
        if each == number and isinstance(value, bytes)
        else (each, kind, value)
        for each, kind, value in fields
    ]


if __name__ == "__main__":
    sys.exit(main())
