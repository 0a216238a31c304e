# SPDX-License-Identifier: Apache-2.0
import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from rekindle import replicas
from rekindle.errors import CapabilityError, Interrupted, NotFoundError, OracleError, UsageError
from rekindle.home import Home
from rekindle.replicas import ProcessIdentity, Registration, ReplicaState, register
from rekindle.report import Rung
from rekindle.stop import _signal


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def ready(registration: Registration) -> None:
    registration.ready(rung=Rung.PROCESS, digest="", endpoint="", cell_init=None)


def state(home: Home, name: str) -> ReplicaState:
    return replicas.find(home, name).state


def test_an_entry_follows_its_replica(home: Home) -> None:
    with register(home, "web", "tiny") as registration:
        assert state(home, "web") is ReplicaState.STARTING
        registration.ready(rung=Rung.CACHE, digest="sha256:0", endpoint="h:1", cell_init=os.getpid())
        found = replicas.running(home, "web")
        assert (found.status.rung, found.status.endpoint) == (Rung.CACHE, "h:1")
        assert found.status.cell == found.status.serving == ProcessIdentity.of(os.getpid())
        registration.stopping()
        assert state(home, "web") is ReplicaState.STOPPING
        registration.end(4)
        assert not replicas.find(home, "web").runs
    assert (state(home, "web"), replicas.find(home, "web").exit_status) == (ReplicaState.ENDED, 4)
    with pytest.raises(NotFoundError, match="has ended"):
        replicas.running(home, "web")


def test_one_whose_lock_is_free_was_killed(home: Home) -> None:
    registration = register(home, "web", "tiny")
    ready(registration)
    os.close(registration.fileno())  # as the OS kernel does
    found = replicas.find(home, "web")
    assert (found.state, found.exit_status) == (ReplicaState.KILLED, 137)
    with register(home, "web", "tiny"):
        assert state(home, "web") is ReplicaState.STARTING


def test_a_name_is_taken_while_its_replica_runs(home: Home) -> None:
    with register(home, "web", "tiny"), pytest.raises(UsageError, match="there is a replica 'web'"):
        register(home, "web", "tiny")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-f", "x" * 64, "a\n", "ä"])
def test_a_name_is_a_plain_word(home: Home, name: str) -> None:
    with pytest.raises(UsageError, match="invalid name"):
        register(home, name, "tiny")
    with pytest.raises(NotFoundError):
        replicas.find(home, name)


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("tiny", "tiny-1"),
        ("registry.example.com:5000/models/tiny:1@sha256:00", "tiny-1"),
        ("oci:/some/where:1", "where-1"),
        ("oci:.", "replica-1"),
    ],
)
def test_it_is_named_after_its_image(home: Home, image: str, name: str) -> None:
    with register(home, None, image) as registration:
        assert registration.name == name
        with register(home, None, image) as second:
            assert second.name == name[:-1] + "2"


@pytest.mark.parametrize(
    ("error", "status"), [(Interrupted(15), 143), (OracleError("wrong"), 35), (ValueError(), 1)]
)
def test_what_ends_it_gives_its_status(home: Home, error: BaseException, status: int) -> None:
    with contextlib.suppress(type(error)), register(home, "web", "tiny", detached=True):
        raise error
    assert replicas.find(home, "web").exit_status == status


def test_one_in_the_foreground_that_never_was_ready_leaves_nothing(home: Home) -> None:
    with contextlib.suppress(ValueError), register(home, "web", "tiny"):
        raise ValueError
    assert not list(home.replicas.iterdir())


def test_the_newest_that_have_ended_are_kept(home: Home) -> None:
    with register(home, "runs", "tiny"):
        for number in range(25):
            with register(home, f"r{number}", "tiny") as registration:
                ready(registration)
                registration.end(0)
        replicas.sweep(home)
        names = [each.name for each in replicas.found(home)]
    assert names == ["runs", *(f"r{number}" for number in range(5, 25))]


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b'{"schema": "x", "replica": {}}'])
def test_a_torn_entry_is_none(home: Home, content: bytes) -> None:
    with register(home, "web", "tiny") as registration:
        ready(registration)
        registration.end(0)
    (home.replicas / "web" / "status.json").write_bytes(content)
    assert replicas.found(home) == []
    with register(home, "web", "tiny"):
        pass


def test_a_pid_that_is_another_process_by_now_is_not_signalled(
    home: Home, sleeper: "subprocess.Popen[bytes]"
) -> None:
    own = ProcessIdentity.of(sleeper.pid)
    fd = own.open()
    assert fd is not None
    os.close(fd)
    others = [
        msgspec.structs.replace(own, started_ticks=own.started_ticks - 1),
        msgspec.structs.replace(own, boot="another"),
    ]
    with register(home, "web", "tiny") as registration:
        for other in others:
            assert other.open() is None
            registration.update(serving=other)
            _signal(replicas.find(home, "web"), signal.SIGKILL)
        registration.update(serving=msgspec.structs.replace(own, namespace="pid:[1]"))
        with pytest.raises(CapabilityError, match="another PID namespace"):
            _signal(replicas.find(home, "web"), signal.SIGKILL)
        assert sleeper.poll() is None
        registration.update(serving=own)
        _signal(replicas.find(home, "web"), signal.SIGKILL)
        assert sleeper.wait(5) == -signal.SIGKILL
    assert own.open() is None


def test_to_wait_ends_with_time(home: Home) -> None:
    with register(home, "web", "tiny") as registration:
        replica = replicas.find(home, "web")
        assert not replicas.wait(replica, 0.01)
        registration.end(0)
        assert replicas.wait(replica, 0.01)
