# SPDX-License-Identifier: Apache-2.0
"""A CUDA driver for every command that gets its environment, and processes that hold CUDA.

Its two backends, libcuda.so.1 and cuda-checkpoint, lead to the same states. cuda_engine.py says what it does,
and what `describe` takes.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes import cuda_engine

UUID = "GPU-00000090-5ca1-ab1e-0000-000000000000"  # the first of tests.fakes.nodes.H200
_CODES = cuda_engine.CODES
_STATES = Path("/dev/shm")


def claim(mib: int = 0, *, uuids: Sequence[str] = (UUID,), pid: int = 0) -> Path:
    """Makes this process, or another one beside it that has the restore thread, one that holds CUDA.

    Returns the file that says so, to be removed at the end. Nothing is allocated.
    """
    if not pid:
        cuda_engine.begin_restore_thread()
        pid = os.getpid()
    path = _STATES / f"fake-cuda-{pid}"
    content = {"state": "running", "device_bytes": mib << 20, "uuids": list(uuids)}
    staged = path.with_name(f".{path.name}")
    staged.write_text(json.dumps(content))
    staged.rename(path)
    return path


@dataclass(frozen=True, slots=True)
class Event:
    """The beginning or the end of a step, in the order in which they were."""

    event: str
    step: str
    pid: int
    backend: str
    time: float
    code: int | None = None
    before: str | None = None
    after: str | None = None
    fault: int | None = None
    visible: str | None = None


@dataclass(frozen=True, slots=True)
class FakeCuda:
    """Both backends in a directory. It needs a C compiler."""

    place: Path

    def __post_init__(self) -> None:
        compiler = next(name for name in ("cc", "gcc", "clang") if shutil.which(name))
        source = Path(__file__).with_suffix(".c")
        codes = ", ".join(f'{{{code}, "{name}", "{text}"}}' for code, (name, text) in _CODES.items())
        for name, flags in (("new", []), ("old", ["-DOLD"])):
            (self.place / name).mkdir()
            library = self.place / name / "libcuda.so.1"
            subprocess.run(
                [
                    *(compiler, "-pthread"),
                    *("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused", "-fPIC"),
                    *("-shared", f"-Wl,-soname,{library.name}", "-o", str(library), *flags),
                    *(f'-DPYTHON="{sys.executable}"', f'-DENGINE="{cuda_engine.__file__}"'),
                    *(f"-DCODES={codes}", str(source)),
                ],
                check=True,
                timeout=60,
            )
        (self.place / "lib").mkdir()
        (self.place / "bin").mkdir()
        self.describe()

    @property
    def environment(self) -> dict[str, str]:
        """What a process must be started with. Nothing of it is read anew but what `describe` writes."""
        libraries = [str(self.place / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            "LD_LIBRARY_PATH": ":".join(path for path in libraries if path),
            "PATH": f"{self.place / 'bin'}:{os.environ['PATH']}",
            "FAKE_CUDA": str(self.place / "driver"),
        }

    def describe(
        self, *, driver: str = "580.65.06", library: bool = True, utility: bool = True, **facts: Any
    ) -> None:
        """From now on the driver is this one, for every call; `library` and `utility` are the backends."""
        _replace(self.place / "driver", json.dumps({"driver": driver, **facts}))
        # Without a library, an empty file: the loader looks no further, even where this machine has one.
        which = "new" if int(driver.partition(".")[0]) >= 570 else "old"
        content = (self.place / which / "libcuda.so.1").read_bytes() if library else b""
        _replace(self.place / "lib/libcuda.so.1", content)
        tool = self.place / "bin/cuda-checkpoint"
        if utility:
            engine = Path(cuda_engine.__file__).read_text()
            _replace(tool, f"#!{sys.executable} -IS\n{engine}", mode=0o755)
        else:
            tool.unlink(missing_ok=True)

    def log(self) -> list[Event]:
        """What was called so far."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.place / "driver.log").read_text().splitlines()
            return [Event(**json.loads(line)) for line in lines]
        return []

    def forget(self) -> None:
        """Begins the log anew."""
        (self.place / "driver.log").unlink(missing_ok=True)

    def wait_for(self, step: str, event: str = "begin", *, count: int = 1, seconds: float = 20) -> None:
        """Waits until a step has begun, or ended, so many times."""
        deadline = time.monotonic() + seconds
        while sum(each.step == step and each.event == event for each in self.log()) < count:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.005)

    def state(self, pid: int) -> str:
        """What a process is in; empty if it holds no CUDA."""
        return str((cuda_engine.read_state(pid) or {}).get("state", ""))

    def held(self, pid: int) -> dict[str, Any]:
        return dict(cuda_engine.read_state(pid) or {})

    @contextlib.contextmanager
    def processes(
        self, count: int, *, uuids: Sequence[str] = (UUID,), idle: bool = False
    ) -> Iterator[list[int]]:
        """Processes that hold CUDA and do nothing; they are gone afterwards, and so are their states.

        Those that are idle have called cuInit and have no context.
        """
        argv = [sys.executable, "-IS", cuda_engine.__file__, "--process"]
        with contextlib.ExitStack() as stack:
            started = []
            for _ in range(count):
                process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
                stack.callback(_end, process, _STATES / f"fake-cuda-{process.pid}")
                started.append(process)
            for process in started:
                assert process.stdout
                assert process.stdout.readline() == b"ready\n"
                if not idle:
                    claim(1, uuids=uuids, pid=process.pid)
            yield [process.pid for process in started]

    def put(self, pid: int, state: str) -> None:
        """Makes the state of a process another one, past all laws."""
        cuda_engine.write_state(pid, {**self.held(pid), "state": state})


def _end(process: "subprocess.Popen[bytes]", state: Path) -> None:
    process.kill()
    process.wait()
    if process.stdout:
        process.stdout.close()
    state.unlink(missing_ok=True)  # last: a call that is under way could write it anew


def _replace(path: Path, content: str | bytes, *, mode: int = 0o644) -> None:
    """Staged, since who reads it may be at it now."""
    staged = path.with_name(f"{path.name}.staged")
    staged.write_bytes(content.encode() if isinstance(content, str) else content)
    staged.chmod(mode)
    staged.replace(path)


def ordered(events: Sequence[Event], *, before: str, after: str) -> bool:
    """Whether every `before` had ended when the first `after` began."""
    ends = [each.time for each in events if each.step == before and each.event == "end"]
    begins = [each.time for each in events if each.step == after and each.event == "begin"]
    return bool(ends) and bool(begins) and max(ends) <= min(begins)
