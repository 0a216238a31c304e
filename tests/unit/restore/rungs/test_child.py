# SPDX-License-Identifier: Apache-2.0
"""A server beside us: its output is what it wrote, it ends with us, and it leaves nothing behind."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from rekindle.errors import UsageError
from restore.rungs import child
from restore.rungs.child import ChildServer
from tests.conftest import wait_for

Start = Callable[..., ChildServer]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Neither threads nor descriptors outlive a server."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    wait_for(lambda: threading.active_count() == 1, 5)
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def out(tmp_path: Path) -> Iterator[BinaryIO]:
    with open(tmp_path / "out", "w+b") as file:
        yield file


def started(
    argv: Sequence[str], stdout: BinaryIO, stderr: BinaryIO | None = None, **more: Any
) -> ChildServer:
    options = {"environment": dict(os.environ), "directory": Path("/"), "listen": False, **more}
    return ChildServer(argv, stdout=stdout.fileno(), stderr=(stderr or stdout).fileno(), **options)


def python(program: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", program]


def ended(server: ChildServer) -> int:
    """Its status, once it has ended."""
    assert select.select([server], [], [], 20)[0], "it does not end"
    status = server.status()
    assert status is not None
    return status


def content(file: BinaryIO) -> bytes:
    return Path(str(file.name)).read_bytes()


def runs(pid: int) -> bool:
    """Whether a process is there, and not only its remains."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


# Output.

ALTERNATES = """
import os
for number in range(2000):
    os.write(1 + number % 2, b"%d\\x00\\xff\\r\\n" % number)
"""
ALTERNATED = b"".join(b"%d\x00\xff\r\n" % number for number in range(2000))


@pytest.mark.parametrize("listen", [True, False])
def test_output_to_one_place_keeps_its_order(out: BinaryIO, listen: bool) -> None:
    with started(python(ALTERNATES), out, listen=listen) as server:
        assert ended(server) == 0
    assert content(out) == ALTERNATED
    assert server.first_output == (ALTERNATED.decode(errors="replace") if listen else "")


@pytest.mark.parametrize("listen", [True, False])
def test_output_to_two_places_goes_to_each(out: BinaryIO, tmp_path: Path, listen: bool) -> None:
    with open(tmp_path / "err", "wb") as err, started(python(ALTERNATES), out, err, listen=listen) as server:
        assert ended(server) == 0
    for file, first in ((out, 0), (err, 1)):
        assert content(file) == b"".join(b"%d\x00\xff\r\n" % number for number in range(first, 2000, 2))
    assert len(server.first_output) == (len(ALTERNATED.decode(errors="replace")) if listen else 0)


def test_output_comes_while_the_server_runs(out: BinaryIO) -> None:
    program = "import os, time; os.write(2, b'ready\\n'); time.sleep(600)"
    with started(python(program), out, listen=True) as server:
        wait_for(lambda: server.first_output == "ready\n", 10)
        assert content(out) == b"ready\n"
        assert server.status() is None


def test_of_much_output_the_beginning_is_kept_and_all_is_passed_on(out: BinaryIO) -> None:
    program = "import os\nfor _ in range(96): os.write(1, b'x' * 65536)\nos.write(1, b'end')"
    with started(python(program), out, listen=True) as server:
        assert ended(server) == 0
    assert content(out) == b"x" * (96 << 16) + b"end"
    assert child._KEPT_BYTES <= len(server.first_output) < child._KEPT_BYTES + (1 << 17)
    assert set(server.first_output) == {"x"}


def test_when_nobody_reads_the_output_the_server_is_told_so() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb", buffering=0) as pipe:
        os.close(reader)
        program = "import os\nwhile True: os.write(1, b'x' * 1000)"  # Python does not die of SIGPIPE
        with started(python(program), pipe, listen=True) as server:
            assert ended(server) != 0
            assert "x" in server.first_output


# Its end.


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ("pass", 0),
        ("raise SystemExit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", 137),
        ("import os; os.kill(os.getpid(), 15)", 143),
    ],
)
def test_a_status_is_as_the_shell_counts(out: BinaryIO, program: str, wanted: int) -> None:
    with started(python(program), out) as server:
        assert ended(server) == wanted
        assert server.status() == wanted
        server.signal(signal.SIGTERM)  # to nobody, and to nobody else


def test_signals_reach_it(out: BinaryIO) -> None:
    program = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
os.write(1, b"ready")
signal.sigwait([signal.SIGUSR1])
raise SystemExit(5)
"""
    with started(python(program), out) as server:
        wait_for(lambda: content(out) == b"ready", 10)
        server.signal(signal.SIGUSR1)
        assert ended(server) == 5


FAMILY = """
import os, time
children = [os.fork() for _ in range(2)]
if all(children):
    os.write(1, " ".join(map(str, [os.getpid(), *children])).encode() + b"\\n")
time.sleep(600)
"""


@pytest.mark.parametrize("listen", [True, False])
def test_it_ends_with_all_of_its_group(out: BinaryIO, listen: bool) -> None:
    with started(python(FAMILY), out, listen=listen) as server:
        wait_for(lambda: content(out).endswith(b"\n"), 10)
        pids = [int(word) for word in content(out).split()]
        assert pids[0] == server.child()
        assert all(map(runs, pids))
    wait_for(lambda: not any(map(runs, pids)), 5)


def test_what_outlives_its_leader_ends_too(out: BinaryIO) -> None:
    program = """
import os, time
if pid := os.fork():
    os.write(1, b"%d" % pid)
    os._exit(3)
time.sleep(600)
"""
    with started(python(program), out, listen=True) as server:
        assert ended(server) == 3
        wait_for(lambda: content(out), 5)
        child = int(content(out))
        assert runs(child)
    wait_for(lambda: not runs(child), 5)


def test_what_has_left_its_session_ends_too_and_holds_nobody_up(out: BinaryIO) -> None:
    program = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(1, b"%d" % os.getpid())
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""
    with started(python(program), out, listen=True):
        wait_for(lambda: content(out), 10)
        pid = int(content(out))
        assert runs(pid)
        began = time.monotonic()
    assert time.monotonic() - began < 4
    assert not runs(pid)


def test_output_to_what_does_not_block_is_passed_on_whole() -> None:
    """As the standard output is if it is shared with a program that works so."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    program = "import os\nfor _ in range(32): os.write(1, b'x' * 65536)"
    with (
        os.fdopen(reader, "rb") as theirs,
        os.fdopen(writer, "wb", buffering=0) as ours,
        started(python(program), ours, listen=True) as server,
    ):
        time.sleep(0.2)  # it is full by then
        assert len(theirs.read(32 << 16)) == 32 << 16
        assert ended(server) == 0


DIES = """
import os, signal, sys
from pathlib import Path
from restore.rungs.child import ChildServer
server = ChildServer([sys.executable, "-c", "import time; time.sleep(600)"], environment=dict(os.environ),
                 directory=Path("/"), stdout=2, stderr=2, listen=sys.argv[1] == "True")
print(server.child(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("listen", [True, False])
def test_it_dies_with_us(listen: bool) -> None:
    command = [sys.executable, "-c", DIES, str(listen)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: not runs(int(done.stdout)), 5)


# What cannot be started.


def test_a_command_that_is_none(out: BinaryIO, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("no interpreter is named here")
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    commands = ["no-such-command", "/no/such/command", str(tmp_path), str(plain), str(script)]
    for command in commands:
        for listen in (True, False):
            with pytest.raises(UsageError, match="cannot start") as caught:
                started([command, "--port", "1"], out, listen=listen)
            assert command in caught.value.message
            assert caught.value.cause
    assert content(out) == b""


def test_a_command_is_looked_for_where_its_environment_says(out: BinaryIO, tmp_path: Path) -> None:
    program = tmp_path / "bin/serve"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$0 $1 $VALUE $(pwd)"\n')
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:/usr/bin:/bin", "VALUE": "five"}
    with started(["serve", "a b"], out, environment=environment, directory=tmp_path) as server:
        assert ended(server) == 0
    assert content(out) == f"{program} a b five {tmp_path}\n".encode()
    with pytest.raises(UsageError):
        started(["serve"], out)


def test_a_directory_that_is_not_there_is_named(out: BinaryIO) -> None:
    with pytest.raises(UsageError) as caught:
        started(python("pass"), out, directory=Path("/no/such/directory"))
    assert "/no/such/directory" in caught.value.cause


def test_it_is_reached_over_our_network(out: BinaryIO) -> None:
    with started(python("import time; time.sleep(600)"), out) as server:
        with server.socket(socket.AF_INET) as sock:
            assert sock.family is socket.AF_INET
        began = time.monotonic()
    assert time.monotonic() - began < 5, "nobody has to wait for a server that ends when it is told to"
