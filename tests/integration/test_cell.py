# SPDX-License-Identifier: Apache-2.0
"""Each test here holds one thing that a cell does; take that out of the cell and the test fails."""

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rekindle.cell import Cell, Clocks, Command, Network, exit_status, processes
from rekindle.cell import init as cell_init
from rekindle.errors import RekindleError
from tests.conftest import wait_for
from tests.traces import adopting_orphans, descendants

pytestmark = pytest.mark.criu


def run(cell: Cell, program: str, tmp_path: Path, *, workload: bool = True) -> str:
    """Runs a Python program in a cell and returns what it printed."""
    output = tmp_path / f"output-{time.monotonic_ns()}"
    status = cell.run(
        Command(
            argv=[sys.executable, "-I", "-S", "-c", program],
            env=dict(os.environ),
            cwd=Path("/"),
            files={0: Path(os.devnull), 1: output, 2: output},
            workload=workload,
        ),
        timeout=30,
    )
    assert status == 0, output.read_text()
    return output.read_text().strip()


def test_a_workload_gets_pids_above_those_of_init_and_criu(tmp_path: Path) -> None:
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        assert int(run(cell, "import os; print(os.getpid())", tmp_path, workload=False)) < 1000
        pid = int(run(cell, "import os; print(os.getpid())", tmp_path))
        assert pid >= cell_init.FIRST_WORKLOAD_PID


def test_shared_memory_is_the_cells_own(tmp_path: Path) -> None:
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        run(cell, "open('/dev/shm/rekindle-test', 'w').write('x')", tmp_path)
        assert not Path("/dev/shm/rekindle-test").exists()
        assert (cell.root / "dev/shm/rekindle-test").read_text() == "x"


def test_a_workload_gets_no_io_uring(tmp_path: Path) -> None:
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(425, 1, ctypes.create_string_buffer(120)), ctypes.get_errno())
"""
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        assert run(cell, program, tmp_path) == f"-1 {errno.ENOSYS}"


def test_clocks_go_on_from_where_they_are_told(tmp_path: Path) -> None:
    now = Clocks.now()
    for offset in (10**15, -(now.monotonic_ns // 2)):
        wanted = Clocks(monotonic_ns=now.monotonic_ns + offset, boottime_ns=now.boottime_ns + offset)
        with Cell() as cell:
            cell.enter(Network.PRIVATE, wanted)
            program = "import time; print(time.clock_gettime_ns(1), time.clock_gettime_ns(7))"
            monotonic, boottime = map(int, run(cell, program, tmp_path).split())
            assert 0 <= monotonic - wanted.monotonic_ns < 10**10
            assert 0 <= boottime - wanted.boottime_ns < 10**10
            assert 0 <= cell.clocks().monotonic_ns - monotonic < 10**10


def test_criu_finds_its_facts_and_then_what_is_there(tmp_path: Path) -> None:
    """Whoever opens the file sees the directory as it is, from then on."""
    facts = random.randbytes(4096)
    program = f"""
import os
covered = os.stat('/run').st_dev
with open({cell_init.CRIU_FACTS!r}, 'rb') as file:
    facts = os.read(file.fileno(), 5000)
print(facts.hex(), covered, os.stat('/run').st_dev, len(os.listdir('/run')))
"""
    output = tmp_path / "output"
    command = Command(
        argv=[sys.executable, "-I", "-S", "-c", program],
        env={},
        cwd=Path("/"),
        files={0: Path(os.devnull), 1: output, 2: output},
        criu_facts=facts,
    )
    before = os.listdir("/run")
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        assert cell.run(command, timeout=30) == 0, output.read_text()
        shown, covered, then, entries = output.read_text().split()
        assert bytes.fromhex(shown) == facts
        assert covered != then == str(Path("/run").stat().st_dev)
        assert int(entries) == len(before)
        assert (cell.root / "run").stat() == Path("/run").stat()
    assert os.listdir("/run") == before


def test_facts_that_nobody_reads_hold_up_nothing(tmp_path: Path) -> None:
    command = Command(argv=["true"], env={}, cwd=Path("/"), criu_facts=b"facts")
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        assert cell.run(command, timeout=30) == 0
        (waiting,) = processes.host_pids(cell)
    assert not Path(f"/proc/{waiting}").exists()


def test_a_workload_inherits_no_descriptor(tmp_path: Path) -> None:
    stray = os.open("/etc/hostname", os.O_RDONLY)
    os.set_inheritable(stray, True)
    try:
        with Cell() as cell:
            cell.enter(Network.PRIVATE)
            # The listing itself is the fourth.
            assert run(cell, "import os; print(len(os.listdir('/proc/self/fd')))", tmp_path) == "4"
    finally:
        os.close(stray)


def test_memory_layout_is_the_same_at_every_start(tmp_path: Path) -> None:
    program = (
        "print([line.split()[0] for line in open('/proc/self/maps') if 'stack' in line or 'heap' in line])"
    )
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        assert run(cell, program, tmp_path) == run(cell, program, tmp_path)


def test_a_private_network_has_loopback_and_nothing_else(tmp_path: Path) -> None:
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        names = run(cell, "import os; print(sorted(os.listdir('/proc/self/net/dev_snmp6')))", tmp_path)
        assert "lo" in names
        assert "eth0" not in names
        program = "import socket; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1] > 0)"
        assert run(cell, program, tmp_path) == "True"


def test_an_exception_at_any_moment_leaves_us_in_our_own_network() -> None:
    """As a deadline raises it, in the main thread, between any two instructions."""

    class Late(Exception):  # noqa: N818
        pass

    def raise_late(*_: object) -> None:
        raise Late

    ours, moments = os.readlink("/proc/thread-self/ns/net"), random.Random(0)
    before = signal.signal(signal.SIGUSR1, raise_late)
    try:
        with Cell() as cell:
            cell.enter(Network.PRIVATE)
            late = 0
            for _ in range(300):
                # A timer of its own: pytest-timeout has the usual one.
                timer = threading.Timer(
                    moments.uniform(0, 0.002),
                    signal.pthread_kill,
                    (threading.main_thread().ident, signal.SIGUSR1),
                )
                try:
                    timer.start()
                    while True:
                        for family in (socket.AF_INET, socket.AF_INET6):
                            with cell.socket(family) as sock:
                                assert sock.family == family
                                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) == family
                except Late:
                    late += 1
                timer.join()
                assert os.readlink("/proc/thread-self/ns/net") == ours
            assert late == 300
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_threads_get_sockets_of_the_cell_side_by_side(tmp_path: Path) -> None:
    program = """
import socket, time
servers = [
    socket.create_server(("127.0.0.1", 4), backlog=1000),
    socket.create_server(("::1", 6), family=socket.AF_INET6, backlog=1000),
]
time.sleep(1000)
"""
    got: list[str] = []

    def connect(host: str, port: int) -> None:
        for _ in range(50):
            with cell.connect(host, port, 10) as sock:
                got.append(sock.getpeername()[0])

    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        command = Command(argv=[sys.executable, "-I", "-S", "-c", program], env={}, cwd=Path("/"))
        cell.spawn(command)
        wait_for(lambda: len(list(processes.listeners(cell))) == 2, 10)
        targets = [("127.0.0.1", 4), ("::1", 6)] * 4
        threads = [threading.Thread(target=connect, args=target) for target in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(got) == ["127.0.0.1"] * 200 + ["::1"] * 200


def test_there_are_no_sockets_of_a_cell_that_has_ended() -> None:
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        cell.socket(socket.AF_INET).close()
        os.kill(cell.init_pid, signal.SIGKILL)
        with pytest.raises(OSError):
            cell.socket(socket.AF_INET)


def test_the_hosts_network_is_kept_when_asked_for(tmp_path: Path) -> None:
    with Cell() as cell:
        cell.enter(Network.HOST)
        there = run(cell, "import os; print(os.readlink('/proc/self/ns/net'))", tmp_path)
        assert there == str(Path("/proc/self/ns/net").readlink())


def test_what_a_container_shows_of_its_gpus_stays_so(tmp_path: Path) -> None:
    """NVIDIA's runtime mounts over a directory of /proc. Here another directory of /proc stands for it."""
    text = Path(cell_init.__file__).read_text()
    changed = text.replace('NVIDIA = "/proc/driver/nvidia"', 'NVIDIA = "/proc/driver"')
    assert changed != text
    room = tmp_path / "rekindle" / "cell"
    shutil.copytree(Path(cell_init.__file__).parent, room)
    (room / "init.py").write_text(changed)
    program = f"""
import sys
from pathlib import Path
from rekindle.cell import init as cell_init
from rekindle.cell import Cell, Command, Network
cell_init.__file__ = {str(room / "init.py")!r}
with Cell() as cell:
    cell.enter(Network.PRIVATE)
    command = Command(argv=["ls", "/proc/driver"], env={{"PATH": "/bin:/usr/bin"}}, cwd=Path("/"),
                      files={{0: Path("/dev/null"), 1: Path(sys.argv[1]), 2: Path(sys.argv[1])}})
    assert cell.run(command, 30) == 0
"""
    output = tmp_path / "output"
    mounted = 'mount -t tmpfs none /proc/driver && touch /proc/driver/gpus && "$@"'
    for before in (["sh", "-c", mounted, "sh"], []):
        command = ["unshare", "--mount", *before, sys.executable, "-c", program, str(output)]
        subprocess.run(command, check=True, timeout=60)
        assert ("gpus" in output.read_text()) is bool(before)
        output.unlink()


def test_orphans_are_reaped(tmp_path: Path) -> None:
    program = """
import os, time
if os.fork() == 0:
    if os.fork() == 0:
        os._exit(0)
    os._exit(0)
os.wait()
time.sleep(0.2)
print([p for p in os.listdir('/proc') if p.isdecimal() and 'Z (' in open(f'/proc/{p}/status').read()])
"""
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        assert run(cell, program, tmp_path) == "[]"


def test_signals_reach_a_process_of_the_cell(tmp_path: Path) -> None:
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        pid = cell.spawn(Command(argv=["sleep", "100"], env=dict(os.environ), cwd=Path("/")))
        assert cell.wait(pid, 0.05) is None
        cell.signal(pid, signal.SIGTERM)
        status = cell.wait(pid, 10)
        assert status is not None
        assert exit_status(status) == 128 + signal.SIGTERM


def test_a_program_that_is_not_there_exits_with_127() -> None:
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        command = Command(argv=["/no/such/program"], env={}, cwd=Path("/"), files={2: Path(os.devnull)})
        assert cell.run(command, 10) == 127


def test_the_end_of_a_cell_is_the_end_of_all_in_it(tmp_path: Path) -> None:
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        cell.spawn(
            Command(
                argv=["sh", "-c", "sleep 100 & setsid sleep 100 & wait"],
                env=dict(os.environ),
                cwd=Path("/"),
                workload=True,
            )
        )
        time.sleep(0.2)
        assert len(processes.pids(cell)) == 3
        init = cell.init_pid
        namespace = os.readlink(f"/proc/{init}/ns/pid")
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                assert os.readlink(entry / "ns" / "pid") != namespace
            except OSError:
                continue


def test_a_cell_dies_with_the_process_that_made_it(tmp_path: Path) -> None:
    program = f"""
import json, os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from rekindle.cell import Cell, Command, Network
cell = Cell().enter(Network.PRIVATE)
cell.spawn(Command(argv=["sleep", "100"], env=dict(os.environ), cwd=Path("/"), workload=True))
print(json.dumps(cell.init_pid), flush=True)
time.sleep(100)
"""
    with adopting_orphans():
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            init = json.loads(parent.stdout.readline())
            assert init in descendants()
            parent.kill()
        wait_for(lambda: init not in descendants(), 10)


def test_an_ended_cell_says_so() -> None:
    with Cell() as cell:
        cell.enter(Network.PRIVATE)
        os.kill(cell.init_pid, signal.SIGKILL)
        with pytest.raises(RekindleError, match="the cell ended unexpectedly"):
            cell.wait(1001, 5)
