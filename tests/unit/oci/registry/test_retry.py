# SPDX-License-Identifier: Apache-2.0
"""What is attempted again, and when it is given up: in the small, and at the first contact with a host."""

import errno
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs

from oci.layout import Layout
from oci.registry.retry import TryAgainError, pause_seconds, with_retries
from rekindle.config import RetryPolicy, TransferSettings
from rekindle.errors import RegistryError
from tests.samples.registry import SETTINGS, Sample, access_to, assert_all_there, pull, said, within
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.misbehaviour import ANYTHING
from tests.servers.registry.relay import Relay
from tests.servers.registry.simulator import Registry

POLICY = RetryPolicy(attempts=4, longest_wait_seconds=10, first_pause_seconds=1)
OSErrors = list[OSError | None]


class Attempts:
    """An attempt that fails as it is told to, one error after the other; None is the end."""

    def __init__(self, errors: OSErrors) -> None:
        self._errors = iter(errors)
        self.count = 0
        self.pauses: list[float] = []

    def __call__(self) -> str:
        self.count += 1
        if (error := next(self._errors)) is not None:
            raise error
        return "done"


def retried(attempts: Attempts, **options: Callable[..., object]) -> str:
    return with_retries(attempts, POLICY, pause=attempts.pauses.append, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_what_fails_less_often_than_the_policy_says_succeeds(failures: int) -> None:
    attempts = Attempts([*[ConnectionResetError()] * failures, None])
    assert retried(attempts) == "done"
    assert (attempts.count, len(attempts.pauses)) == (failures + 1, failures)
    for pause, least in zip(attempts.pauses, (0.5, 1, 2), strict=False):
        assert least <= pause <= 2 * least


def test_the_last_error_comes_out_as_it_is() -> None:
    attempts = Attempts([OSError(), OSError(), OSError(), TimeoutError("the last")])
    with pytest.raises(TimeoutError, match="the last"):
        retried(attempts)
    assert (attempts.count, len(attempts.pauses)) == (4, 3)


def test_other_errors_end_it() -> None:
    with pytest.raises(RegistryError):
        with_retries(lambda: raising(RegistryError("no")), POLICY, pause=never)
    with pytest.raises(RegistryError, match="closed"):
        with_retries(Attempts([OSError()]), POLICY, pause=lambda _: raising(RegistryError("closed")))


def raising(error: Exception) -> str:
    raise error


def never(_: float) -> None:
    raise AssertionError


def test_a_final_error_is_not_waited_for() -> None:
    attempts = Attempts([ConnectionRefusedError()])
    with pytest.raises(ConnectionRefusedError):
        retried(attempts, is_final=lambda error: isinstance(error, ConnectionRefusedError))
    assert attempts.pauses == []


def test_attempts_that_bring_something_do_not_count() -> None:
    brought = iter(range(0, 20 << 20, 1 << 20))
    attempts = Attempts([*[ConnectionResetError()] * 15, None])
    assert retried(attempts, progress=lambda: next(brought)) == "done"
    drips = iter(range(0, 100, 1))
    with pytest.raises(ConnectionResetError):
        retried(Attempts([ConnectionResetError()] * 15), progress=lambda: next(drips))


def test_a_registry_is_left_the_time_that_it_asks_for() -> None:
    again = TryAgainError(RegistryError("busy", cause="503"), wait_seconds=7.5)
    attempts = Attempts([again, None])
    assert retried(attempts) == "done"
    assert attempts.pauses == [7.5]
    assert str(again) == "503"
    assert pause_seconds(POLICY, 1, 0.1) >= 0.5
    assert pause_seconds(POLICY, 30) == pause_seconds(POLICY, 1, 1e9) == POLICY.longest_wait_seconds


# The first contact.

NAME = "registry.test"


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Callable[[OSErrors], list[float]]:
    """A name service that fails as it is told to, and then knows that NAME is this machine."""
    real = socket.getaddrinfo

    def install(errors: OSErrors) -> list[float]:
        left = iter(errors)
        asked: list[float] = []

        def resolve(host: str, *args: object, **options: object) -> object:
            if host != NAME:
                return real(host, *args, **options)  # type: ignore[arg-type]
            asked.append(time.monotonic())
            if error := next(left, None):
                raise error
            return real("127.0.0.1", *args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        return asked

    return install


def again() -> OSError:
    return socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def pull_by_name(port: int, target: Layout, settings: TransferSettings) -> None:
    access = structs.replace(access_to(settings=settings), plain_http=True)
    pull(f"{NAME}:{port}/a/b:1", target, access)


def test_a_name_service_that_is_not_up_yet_is_waited_for(
    resolver: Callable[[OSErrors], list[float]], sample: Sample, tmp_path: Path
) -> None:
    asked = resolver([again(), again()])
    target = Layout.create(tmp_path)
    with Registry() as registry:
        sample.serve(registry)
        pull_by_name(int(registry.host.rpartition(":")[2]), target, SETTINGS)
    assert_all_there(target, sample.root, sample)
    assert asked[1] - asked[0] >= 0.1
    assert asked[2] - asked[1] >= 0.2


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), 1),
        (socket.gaierror(socket.EAI_FAIL, "Non-recoverable failure"), 1),
        (OSError(errno.EMFILE, "Too many open files"), 1),
    ],
)
def test_which_failures_of_the_name_service_pass(
    error: OSError, times: int, resolver: Callable[[OSErrors], list[float]], tmp_path: Path
) -> None:
    asked = resolver([error] * 20)
    with within(2), pytest.raises(RegistryError, match="cannot be reached") as raised:
        pull_by_name(1, Layout.create(tmp_path), SETTINGS)
    assert len(asked) == times
    assert str(error.strerror) in said(raised.value)


def test_a_name_service_is_waited_for_as_long_as_two_connects_may_take(
    resolver: Callable[[OSErrors], list[float]], sample: Sample, tmp_path: Path
) -> None:
    """However many attempts a transfer gets: those would be over before a container's DNS is up."""
    settings = structs.replace(SETTINGS, connect_seconds=1.0)
    asked = resolver([again()] * 1000)
    with pytest.raises(RegistryError, match="cannot be reached"):
        pull_by_name(1, Layout.create(tmp_path), settings)
    assert len(asked) > settings.retry.attempts
    assert asked[-1] - asked[0] >= 2 * 1.0 - settings.retry.longest_wait_seconds


def test_a_name_service_that_takes_long_is_not_asked_for_ever(
    resolver: Callable[[OSErrors], list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = resolver([again()] * 20)
    quick = socket.getaddrinfo

    def slow(*args: object, **options: object) -> object:
        time.sleep(0.3)
        return quick(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with within(2), pytest.raises(RegistryError):
        pull_by_name(1, Layout.create(tmp_path), structs.replace(SETTINGS, connect_seconds=0.25))
    assert len(asked) == 2


def test_a_host_that_takes_no_connection_at_first_is_tried_again(sample: Sample, tmp_path: Path) -> None:
    target = Layout.create(tmp_path)
    with Registry() as registry:
        sample.serve(registry)
        relay = Relay(registry.host, backlog=0)
        crowd = [socket.socket() for _ in range(4)]  # who fills its queue
        for sock in crowd:
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", relay.port))
        time.sleep(0.05)

        def make_room() -> None:
            for sock in crowd:
                sock.close()
            relay.start()

        timer = threading.Timer(1.05, make_room)  # between two attempts
        timer.start()
        try:
            began = time.monotonic()
            pull(f"127.0.0.1:{relay.port}/a/b:1", target, access_to())
            assert time.monotonic() - began > 1
        finally:
            timer.join()
            relay.close()
    assert_all_there(target, sample.root, sample)


def test_a_host_that_is_silent_at_first_contact_is_not_asked_again(sample: Sample, tmp_path: Path) -> None:
    """It took the connection: it is there, and it fails. A wrong port is like that, too."""
    with Registry(misbehave=[wrong.stalls(ANYTHING, after_bytes=-1)]) as registry:
        sample.serve(registry)
        with within(1), pytest.raises(RegistryError, match="in time"):
            pull(f"{registry.host}/a/b:1", Layout.create(tmp_path), access_to())
        assert len(registry.requests) == 1
