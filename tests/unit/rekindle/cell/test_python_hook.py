# SPDX-License-Identifier: Apache-2.0
"""The hook in a Python process, without a cell."""

import ctypes
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import pytest

from rekindle.cell import hook, python_hook
from rekindle.cell.init import TGKILL
from tests.conftest import wait_for
from tests.fakes import nodes
from tests.fakes.nvml import FakeNvml

libc = ctypes.CDLL(None, use_errno=True)


class Process:
    """A Python process with the hook, which evaluates what it is sent."""

    all: ClassVar[list["Process"]] = []
    LOOP = "import sys\nfor line in sys.stdin: print(repr(eval(line)), flush=True)"

    def __init__(
        self,
        place: Path,
        prelude: str = "",
        path: str = "",
        *flags: str,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        ours = str(place / "rekindle" / "python")
        self.place, self.said = place / "rekindle", ""
        self.running = subprocess.Popen(
            [sys.executable, *flags, "-c", f"{prelude}\n{self.LOOP}"],
            env={**os.environ, **environment, "PYTHONPATH": f"{ours}:{path}" if path else ours},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.all.append(self)
        self.ask("0")

    def ask(self, expression: str) -> Any:
        assert self.running.stdin is not None
        assert self.running.stdout is not None
        self.running.stdin.write(f"{expression}\n")
        self.running.stdin.flush()
        return eval(self.running.stdout.readline())

    def hooks(self, pid: int = 0) -> dict[int, str]:
        tasks = Path(f"/proc/{pid or self.running.pid}/task")
        names = {int(path.parent.name): path.read_text().strip() for path in tasks.glob("*/comm")}
        return {thread: name for thread, name in names.items() if name.startswith("rekindle")}

    def call(self, phase: str, token: str, pid: int = 0) -> str:
        (self.place / "request").write_text(f"{phase} {token}\n")
        ((thread, before),) = self.hooks(pid).items()
        libc.syscall(TGKILL[platform.machine()], pid or self.running.pid, thread, python_hook.SIGNAL)
        wait_for(lambda: self.hooks(pid)[thread] != before, 10)
        return self.hooks(pid)[thread]

    def end(self) -> str:
        """Lets it end; returns what it has said on standard error."""
        if self in self.all:
            self.all.remove(self)
            self.said = self.running.communicate(timeout=10)[1]
        return self.said


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(hook, "DIRECTORY", Path("/rekindle"))
    hook.renew_generation(tmp_path)
    hook.install(tmp_path, hook.Reseed.UNSEEDED)
    yield tmp_path
    for process in [*Process.all]:
        process.end()


def test_one_thread_waits_and_holds_nothing(place: Path) -> None:
    process = Process(place)
    assert process.ask("len(__import__('os').listdir('/proc/self/fd'))") == 4, "and the one that lists them"
    assert len(process.hooks()) == 1
    assert process.ask("'threading' in sys.modules or 'random' in sys.modules") is False
    assert process.call("after-restore", "abcdef") == "rekindle abcdef"
    assert process.call("before-snapshot", "123456") == "rekindle 123456"
    assert process.ask("len(__import__('os').listdir('/proc/self/fd'))") == 4
    assert process.end() == ""


@pytest.mark.parametrize(
    ("seed", "kept"),
    [
        ("", False),
        ("random.seed()", False),
        ("random.seed(os.urandom(16))", False),
        ("random.seed(time.time())", False),
        ("random.seed(time.time_ns())", False),
        ("random.seed(42); random.seed()", False),
        ("random.seed(42)", True),
        ("random.seed(a=42)", True),
        ("random.seed('a text')", True),
    ],
)
def test_only_a_seed_that_is_always_the_same_is_kept(place: Path, seed: str, kept: bool) -> None:
    process = Process(place, f"import os, random, time\n{seed}")
    state = "random.getstate()"
    before = process.ask(state)
    process.call("after-restore", "abcdef")
    assert (process.ask(state) == before) is kept
    (process.place / "reseed").write_text("all\n")
    process.call("after-restore", "fedcba")
    assert process.ask(state) != before


def test_a_forked_process_has_a_hook_of_its_own(place: Path) -> None:
    process = Process(place, "import os, random, time\nchild = os.fork()\nif not child: time.sleep(60)")
    child = process.ask("child")
    wait_for(lambda: process.hooks(child), 10)
    assert process.call("after-restore", "abcdef", child) == "rekindle abcdef"
    process.ask("os.kill(child, 9)")


def test_a_process_that_may_not_name_its_threads_by_file(place: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    place.chmod(0o755)
    process = Process(place, "import ctypes, os\nos.setresuid(65534, 65534, 65534)")
    for parent in place.parents:
        if not parent.stat().st_mode & 1:
            pytest.skip(f"others have no access to {parent}")
    assert process.call("before-snapshot", "abcdef") == "rekindle abcdef"


def test_a_callback_that_fails_is_shown_and_the_hook_lives_on(place: Path) -> None:
    register = "import rekindle_hook\nrekindle_hook.register_after_restore(lambda: 1 / 0)"
    process = Process(place, register)
    assert process.call("after-restore", "abcdef") == "rekindle!abcdef"
    assert process.call("before-snapshot", "fedcba") == "rekindle fedcba"
    assert "ZeroDivisionError" in process.end()


@pytest.mark.parametrize(
    ("own", "says"), [("", ""), ("import missing", "No module named 'missing'"), ("1 / 0", "ZeroDivision")]
)
def test_an_own_sitecustomize_is_run_as_before(place: Path, tmp_path: Path, own: str, says: str) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text(f"import sys; sys.own = 1\n{own}")
    process = Process(place, "", str(tmp_path / "own"))
    assert process.ask("sys.own") == 1
    assert len(process.hooks()) == 1
    if not says:
        assert process.ask("sys.modules['sitecustomize'].__file__") == str(tmp_path / "own/sitecustomize.py")
    said = process.end()
    assert ("Error in sitecustomize" in said) is bool(says)


def test_nvml_is_shut_down_however_often_it_was_initialized(place: Path, tmp_path: Path) -> None:
    """And random numbers are left alone where nothing is to be reseeded."""
    (tmp_path / "nvml").mkdir()
    nvml = FakeNvml(tmp_path / "nvml")
    nvml.describe(nodes.H100)
    (place / "rekindle/reseed").write_text("none\n")
    load = "import ctypes, os, random\nnvml = ctypes.CDLL('libnvidia-ml.so.1')\n"
    process = Process(place, f"{load}for _ in range(3): nvml.nvmlInit_v2()", environment=nvml.environment)
    descriptors = "len(os.listdir('/proc/self/fd'))"
    count = "nvml.nvmlDeviceGetCount_v2(ctypes.byref(ctypes.c_uint()))"
    held = process.ask(descriptors)
    assert process.ask(count) == 0
    assert process.call("shut-down-nvml", "abcdef") == "rekindle abcdef"
    assert process.ask(count) == 1  # NVML_ERROR_UNINITIALIZED
    assert process.ask(descriptors) == held - 1
    assert process.ask("hasattr(random.seed, '__wrapped__')") is False
    assert process.ask("nvml.nvmlInit_v2()") == 0
    without = Process(place)
    assert without.call("shut-down-nvml", "fedcba") == "rekindle fedcba"
    assert without.end() == ""


def test_numpy_is_reseeded_unless_the_program_has_seeded_it(place: Path, tmp_path: Path) -> None:
    """With a stand-in: numpy is no dependency."""
    (tmp_path / "own" / "numpy" / "random").mkdir(parents=True)
    (tmp_path / "own" / "numpy" / "__init__.py").write_text("")
    stand_in = "seeds = []\ndef seed(seed=None): seeds.append(seed)"
    (tmp_path / "own" / "numpy" / "random" / "__init__.py").write_text(stand_in)
    for first, after in (("None", [None, None]), ("7", [7])):
        process = Process(place, f"import numpy.random\nnumpy.random.seed({first})", str(tmp_path / "own"))
        process.call("after-restore", os.urandom(3).hex())
        assert process.ask("numpy.random.seeds") == after
        process.end()


def test_every_openssl_is_asked_for_new_entropy(place: Path) -> None:
    process = Process(place, "import ssl, rekindle_hook, _ctypes, os")
    process.ask("[setattr(rekindle_hook, 'calls', []), setattr(_ctypes, 'real', _ctypes.call_function)]")
    note = "lambda at, values: [rekindle_hook.calls.append(len(values[0])), _ctypes.real(at, values)]"
    process.ask(f"setattr(_ctypes, 'call_function', {note})")
    process.call("after-restore", "abcdef")
    linked = process.ask("any('/libcrypto' in line for line in open('/proc/self/maps'))")
    assert process.ask("rekindle_hook.calls") == ([64] if linked else [])


def test_the_start_costs_next_to_nothing(place: Path) -> None:
    """Its modules are built into Python: it brings no others."""
    loaded = "import sys, json; print(json.dumps(sorted(sys.modules)))"
    with_hook = {**os.environ, "PYTHONPATH": str(place / "rekindle" / "python")}
    found = [
        set(json.loads(subprocess.run([sys.executable, "-c", loaded], env=env, capture_output=True).stdout))
        for env in ({**os.environ}, with_hook)
    ]
    assert found[1] - found[0] <= {"rekindle_hook", "sitecustomize", "_signal"}
