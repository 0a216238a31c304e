# SPDX-License-Identifier: Apache-2.0
"""The socket over which other commands act on a server, with a lender that only notes what it is told."""

import os
import selectors
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from rekindle.errors import BusyError, CapabilityError
from rekindle.fields import JSON
from rekindle.replicas import ProcessIdentity, ReplicaEntry, ReplicaState, ReplicaStatus
from rekindle.report import Pause
from restore.borrow import Lender
from restore.serve import control
from restore.serve.control import Control, Loan


class Noted:
    """A loop and a lender at once, which note their calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.busy = [2, 1, 0]
        self._selector = selectors.DefaultSelector()
        self._ours, self._theirs = socket.socketpair()

    def turn(self) -> None:
        for key, _ in self._selector.select(0.05):
            key.data()

    def close(self) -> None:
        self._selector.close()
        self._ours.close()
        self._theirs.close()

    def watch(self, fd: int, readable: Callable[[], object]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, readable)

    def forget(self, fd: int) -> None:
        self._selector.unregister(fd)

    def hold(self) -> int:
        self.calls.append("hold")
        return self.busy.pop(0) if len(self.busy) > 1 else self.busy[0]

    def idle_seconds(self) -> float:
        return 4.0

    def waiting(self) -> int:
        return 5

    def leave_cell(self) -> None:
        self.calls.append("leave cell")

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        self.calls.append("socket")
        return socket.socket(family, socket.SOCK_STREAM)

    def be_still(self) -> None:
        self.calls.append("be still")

    def resume(self) -> None:
        self.calls.append("resume")

    def facts(self) -> Mapping[str, JSON]:
        return {"much": "x" * 500_000}

    def lend(self) -> Loan:
        self.calls.append("lend")
        cell = {"init": os.getpid(), "monotonic_ns": 0, "boottime_ns": 0, "has_network": False}
        return Loan(cell=cell, fds=[1, 2, self._ours.fileno()])

    def take_back(self, exits: Mapping[int, int] | None) -> None:
        self.calls.append(f"take back {exits}")


@pytest.fixture
def noted(tmp_path: Path) -> Iterator[Noted]:
    made, ends = Noted(), threading.Event()

    def turns() -> None:
        while not ends.is_set():
            made.turn()

    directory = tmp_path / ("long" * 40)
    directory.mkdir()
    with Control(directory, made, made):
        thread = threading.Thread(target=turns)
        thread.start()
        yield made
        ends.set()
        thread.join()
    made.close()


@pytest.fixture
def entry(tmp_path: Path) -> ReplicaEntry:
    status = ReplicaStatus(name="web", image="tiny", created=0.0, serving=ProcessIdentity.of(os.getpid()))
    return ReplicaEntry(directory=tmp_path / ("long" * 40), status=status, state=ReplicaState.READY)


def test_a_cell_is_lent_once_nothing_is_in_flight(noted: Noted, entry: ReplicaEntry) -> None:
    pause = Pause()
    with Lender(entry) as lender:
        assert len(lender.facts()["much"]) == 500_000
        assert (lender.idle_seconds(), lender.waiting()) == (4, 5)
        with lender.lent(pause) as (cell, output):
            assert noted.calls == ["leave cell", "lend"], "it serves on"
            with cell.socket(socket.AF_INET) as made:
                assert made.family is socket.AF_INET
            lender.hold(5, pause)
            assert noted.calls[2:] == ["socket", "hold", "hold", "hold", "be still"]
            assert cell.init_pid == os.getpid()
            assert os.fstat(output.stdout) == os.fstat(1)
            cell.note_exits({7: 9})
        assert noted.calls[7:9] == ["take back {7: 9}", "resume"]
    assert pause.in_flight == 0
    assert pause.seconds >= pause.still_seconds > 0


def test_what_takes_longer_than_the_drain_is_counted(noted: Noted, entry: ReplicaEntry) -> None:
    noted.busy, pause = [3], Pause()
    with Lender(entry) as lender, lender.lent(pause):
        lender.hold(0.1, pause)
    assert pause.in_flight == 3


def test_a_failure_returns_the_cell(noted: Noted, entry: ReplicaEntry) -> None:
    with pytest.raises(ZeroDivisionError), Lender(entry) as lender, lender.lent(Pause()):
        raise ZeroDivisionError
    assert [call for call in noted.calls if "take back" in call] == ["take back {}"]
    assert noted.calls[-1] == "resume"


@pytest.mark.parametrize(
    "last", [b'{"op": "lend"}', b"{", b"[]", b'{"op": "return"}', b'{"op": 7, "exits": 1}']
)
def test_who_leaves_or_talks_nonsense_loses_the_cell(noted: Noted, entry: ReplicaEntry, last: bytes) -> None:
    with control.connect(entry.directory) as sock:
        sock.settimeout(5)
        for message in (b'{"op": "hold"}', b'{"op": "lend"}', last):
            sock.send(message)
            sock.recv(control.MESSAGE_BYTES)
    with Lender(entry) as lender:
        lender.facts()  # by then, the first was noticed to be gone
    assert "take back None" in noted.calls
    assert noted.calls.count("resume") >= 1


def test_one_command_is_served_at_a_time(noted: Noted, entry: ReplicaEntry) -> None:
    with Lender(entry) as first:
        first.facts()
        with Lender(entry) as second, pytest.raises(BusyError):
            second.facts()
        first.facts()
    with Lender(entry) as third:
        third.facts()


def test_a_replica_without_a_cell_is_told(tmp_path: Path, entry: ReplicaEntry) -> None:
    entry.directory.mkdir(exist_ok=True)
    with pytest.raises(CapabilityError, match="cannot be acted on"), Lender(entry):
        pass
