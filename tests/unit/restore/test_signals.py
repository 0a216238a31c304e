# SPDX-License-Identifier: Apache-2.0
"""A signal breaks work off, once, and nothing else: what is cleaned up, is cleaned up to the end."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from rekindle.errors import Interrupted
from restore.signals import DeadlinePassed, Signals

# pytest-timeout's usual way is the timer that is under test.
pytestmark = pytest.mark.timeout(method="thread")

ALL = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCHLD),
)


@pytest.fixture(autouse=True)
def _signals_are_as_they_were() -> Iterator[None]:
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in ALL}
    yield
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.set_wakeup_fd(-1) == -1
    for signum, handler in before.items():
        signal.signal(signum, handler)


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def work(
    signals: Signals, *sent: int, seconds: float | None = None, cleaned_up: threading.Event | None = None
) -> None:
    """Work that is broken off, by the first of the signals or by time, and a clean-up in which the others
    come."""
    with signals.raising(seconds):
        try:
            if seconds is None:
                send(sent[0])
            with contextlib.suppress(Exception):
                time.sleep(5)
            pytest.fail("it went on")
        finally:
            for signum in sent[seconds is None :]:
                send(signum)
            if cleaned_up is not None:
                cleaned_up.set()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_work_is_broken_off(signum: int) -> None:
    with Signals() as signals, pytest.raises(Interrupted) as caught:
        work(signals, signum)
    assert caught.value.signum == signum


def test_outside_of_work_a_signal_is_kept() -> None:
    with Signals() as signals:
        send(signal.SIGTERM)
        with pytest.raises(Interrupted):
            signals.check()
        with pytest.raises(Interrupted):
            work(signals, signal.SIGINT)
        assert signals.take() == [signal.SIGTERM]
        signals.check()
        with signals.raising():
            pass


def test_a_second_signal_does_not_stop_what_follows_the_first() -> None:
    cleaned_up = threading.Event()
    with Signals() as signals, pytest.raises(Interrupted) as caught:
        work(signals, signal.SIGTERM, signal.SIGINT, signal.SIGALRM, cleaned_up=cleaned_up)
    assert cleaned_up.is_set()
    assert caught.value.signum == signal.SIGTERM


def test_a_deadline_passes_once() -> None:
    cleaned_up = threading.Event()
    with Signals() as signals:
        with pytest.raises(DeadlinePassed) as caught:
            work(signals, signal.SIGTERM, signal.SIGALRM, seconds=0.05, cleaned_up=cleaned_up)
        assert cleaned_up.is_set()
        assert caught.value.seconds == 0.05
        with pytest.raises(Interrupted):
            signals.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_python_swallows_comes_again() -> None:
    class Gone:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    def swallows(signals: Signals) -> None:
        with signals.raising():
            Gone()

    with Signals() as signals, pytest.raises(Interrupted):
        swallows(signals)


def test_a_deadline_ends_with_the_work() -> None:
    with Signals() as signals:
        with signals.raising(0.05):
            pass
        time.sleep(0.1)
        with signals.raising():
            time.sleep(0.05)
        with pytest.raises(ValueError), signals.raising(0.05):
            raise ValueError
        time.sleep(0.1)


def test_other_signals_are_kept_for_the_server() -> None:
    with Signals() as signals:
        with signals.raising():
            send(signal.SIGUSR1)
            send(signal.SIGUSR2)
            send(signal.SIGUSR1)
        assert select.select([signals], [], [], 0)[0]
        assert signals.take() == [signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1]
        assert not select.select([signals], [], [], 0)[0]


def test_a_child_that_ends_wakes() -> None:
    with Signals() as signals:
        pid = os.posix_spawn("/bin/true", ["true"], {})
        assert select.select([signals], [], [], 10)[0]
        os.waitpid(pid, 0)
        assert signals.take() == []


def test_who_was_asked_to_end_hears_no_more() -> None:
    with Signals():
        send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_what_was_ignored_stays_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Signals() as signals, signals.raising():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        send(signal.SIGHUP)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(signum) for signum in ALL]
    with Signals():
        assert [signal.getsignal(signum) for signum in ALL] != before
    assert [signal.getsignal(signum) for signum in ALL] == before
