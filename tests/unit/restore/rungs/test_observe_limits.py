# SPDX-License-Identifier: Apache-2.0
"""A watch says what it may have missed, where events are lost or cannot be had; and it always ends."""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from restore.rungs import observe
from restore.rungs.observe import CacheWatch, Made
from tests.conftest import wait_for
from tests.samples.cache import write
from tests.samples.watching import TRITON, end, keys, only, python, triton_puts

pytestmark = pytest.mark.usefixtures("nothing_outlives_a_watch")

QUEUED_EVENTS = 16384


def test_events_that_are_lost_are_said(cache: Path) -> None:
    for number in range(QUEUED_EVENTS + 1000):
        write(cache / "OLD" / f"{number}")
    write(cache / "THIRD" / "k")
    with CacheWatch([(TRITON, cache)]) as watch:
        (cache / "OTHER" / "k.json").read_bytes()
        watch.observed()
        with watch._lock:  # so nobody takes the events
            for number in range(QUEUED_EVENTS + 1000):
                os.close(os.open(cache / "OLD" / f"{number}", os.O_RDONLY))
            write(cache / "NEW" / "deep" / "k", b"123")
            triton_puts(cache / "THIRD", "k", b"1")
        wait_for(lambda: watch._lost, 10)
        (cache / "THIRD" / "k").read_bytes()  # nobody has heard that it is another file
        seen = watch.observed()
        assert not seen.complete
        assert only(seen).used == {"OLD", "OTHER"}
        assert only(seen).made == {"NEW": Made(files=1, bytes=3), "THIRD": Made(files=1, bytes=1)}
        assert 0 <= seen.made_seconds < 30
        write(cache / "NEW" / "deeper" / "k", b"45")
    assert only(watch.observed()).made["NEW"] == Made(files=2, bytes=5)
    assert not watch.observed().complete


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOMEM])
@pytest.mark.parametrize("at_most", [0, 1, 2, 3, 4])
def test_directories_that_cannot_be_watched(
    cache: Path, monkeypatch: pytest.MonkeyPatch, at_most: int, number: int
) -> None:
    real = observe._inotify_add_watch
    watches: set[int] = set()

    def limited(fd: int, directory: bytes, mask: int) -> int:
        if len(watches) >= at_most:
            raise OSError(number, os.strerror(number))
        watches.add(watch := real(fd, directory, mask))
        return watch

    monkeypatch.setattr(observe, "_inotify_add_watch", limited)
    with CacheWatch([(TRITON, cache)]) as watch:
        (cache / "OLD" / "k.json").read_bytes()
        write(cache / "NEW" / "deep" / "k", b"123")
        write(cache / "OTHER" / "new", b"1")
        write(cache.parent / cache.parent.name / "cache" / "K")  # as if it were on the way to the cache
        triton_puts(cache / "OTHER", "k.json", b"1")
        watch.observed()
        write(cache / "NEW" / "deep" / "late", b"4")
    seen = watch.observed()
    assert only(seen).made == {"NEW": Made(files=2, bytes=4), "OTHER": Made(files=2, bytes=2)}
    assert only(seen).used <= {"OLD"}
    assert not seen.complete


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSYS])
def test_without_inotify_there_are_listings(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse() -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(observe, "_inotify_init", refuse)
    with CacheWatch([(TRITON, cache), (TRITON, tmp_path / "later" / "cache")]) as watch:
        (cache / "OLD" / "k.json").read_bytes()
        write(cache / "NEW" / "k", b"123")
        triton_puts(cache / "OTHER", "k.json")
        write(tmp_path / "later" / "cache" / "K" / "k")
        assert threading.active_count() == 1
        time.sleep(0.05)
        write(cache / "NEW" / "l", b"123")
    seen = watch.observed()
    assert seen.roots[0].made == {"NEW": Made(files=2, bytes=6), "OTHER": Made(files=1, bytes=6)}
    assert set(seen.roots[1].made) == {"K"}
    assert not seen.roots[0].used
    assert 0.03 < seen.made_seconds < 30
    assert not seen.complete


def test_without_descriptors_there_are_listings(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "eventfd", refuse)
    with CacheWatch([(TRITON, cache)]) as watch:
        write(cache / "NEW" / "k")
    assert keys(watch.observed()) == (set(), {"NEW"})
    assert not watch.observed().complete


def test_what_is_far_too_large_is_no_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "_FILES_LIMIT", 2)
    with CacheWatch([(TRITON, cache)]) as watch:
        for key in ("OLD", "OTHER"):
            (cache / key / "k.json").read_bytes()
        write(cache / "loose")
        write(cache / "NEW" / "k")
    assert not watch.observed().complete
    assert len(only(watch.observed()).used) == 1
    assert only(watch.observed()).made == {".": Made(files=1, bytes=7)}


def test_a_watch_may_end_as_soon_as_it_begins(cache: Path) -> None:
    for _ in range(200):
        with CacheWatch([(TRITON, cache)]):
            pass


@pytest.fixture
def streaming(cache: Path) -> Iterator[Path]:
    """Processes that read and make files, and directories, without end."""
    program = """if True:
        import itertools, pathlib, shutil, sys
        for number in itertools.count():
            root = pathlib.Path(sys.argv[1])
            (root / "OLD" / "k.json").read_bytes()
            (root / "OTHER" / "k.json").read_bytes()
            (root / f"NEW{sys.argv[2]}-{number % 200}" / "deep").mkdir(parents=True)
            (root / f"NEW{sys.argv[2]}-{number % 200}" / "deep" / "k").write_bytes(b"1")
            if number >= 100:
                shutil.rmtree(root / f"NEW{sys.argv[2]}-{(number - 100) % 200}")
    """
    workers = [python(program, cache, str(number)) for number in range(4)]
    yield cache
    assert [worker.poll() for worker in workers] == [None] * 4
    for worker in workers:
        end(worker)


def test_events_without_end_do_not_keep_anybody_from_asking_or_leaving(streaming: Path) -> None:
    for _ in range(5):
        with CacheWatch([(TRITON, streaming)]) as watch:
            wait_for(lambda: only(watch.observed()).used == {"OLD", "OTHER"}, 60)
            for _ in range(5):
                time.sleep(0.05)
                began = time.monotonic()
                watch.observed()
                assert time.monotonic() - began < 10
            began = time.monotonic()
        assert time.monotonic() - began < 10
        assert only(watch.observed()).used == {"OLD", "OTHER"}
        seen = watch.observed()
        time.sleep(0.05)
        assert watch.observed() == seen  # it is over


def test_an_exception_within_ends_all(streaming: Path) -> None:
    watch = CacheWatch([(TRITON, streaming)])
    with contextlib.suppress(KeyboardInterrupt), watch:
        wait_for(lambda: "OLD" in only(watch.observed()).used, 10)
        raise KeyboardInterrupt
    assert "OLD" in only(watch.observed()).used


def test_an_exception_at_the_begin_ends_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    for where in ("_inotify_init", "_inotify_add_watch"):
        with monkeypatch.context() as patch:
            patch.setattr(observe, where, interrupt)
            with pytest.raises(KeyboardInterrupt), CacheWatch([(TRITON, cache)]):
                pass
    monkeypatch.setattr(threading.Thread, "start", interrupt)
    with pytest.raises(KeyboardInterrupt), CacheWatch([(TRITON, cache)]):
        pass


def test_an_exception_at_the_end_ends_all(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), CacheWatch([(TRITON, cache)]):
        monkeypatch.setattr(CacheWatch, "_observe", interrupt)


def test_directories_may_be_made_without_end(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "_LAST_LISTING_SECONDS", 0.0)
    with CacheWatch([(TRITON, cache)]) as watch, watch._lock:
        write(cache / "NEW" / "k")
        seen = watch._observe()
    assert not seen.complete


def test_a_large_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in range(2000):
        (tmp_path / "cache" / f"KEY{directory}").mkdir(parents=True)
        for file in range(10):
            os.close(os.open(tmp_path / "cache" / f"KEY{directory}" / f"k{file}", os.O_CREAT))
    began = time.perf_counter()
    with CacheWatch([(TRITON, tmp_path / "cache")]) as watch:
        begun = time.perf_counter()
        for path in (tmp_path / "cache").glob("*/k[0-4]"):
            path.read_bytes()
        asked = time.perf_counter()
        seen = watch.observed()
        answered = time.perf_counter()
    with capsys.disabled():
        print(
            f" set up in {(begun - began) * 1000:.0f} ms, asked in {(answered - asked) * 1000:.0f} ms", end=""
        )
    assert len(only(seen).used) == 2000
    assert not only(seen).made
    assert seen.complete


def test_a_watch_does_not_drown_in_its_own_listing(tmp_path: Path) -> None:
    for number in range(QUEUED_EVENTS // 2 + 500):
        (tmp_path / "cache" / f"{number}").mkdir(parents=True)
    with CacheWatch([(TRITON, tmp_path / "cache")]) as watch:
        assert watch.observed().complete
        (tmp_path / "cache").rename(tmp_path / "away")
        (tmp_path / "away").rename(tmp_path / "cache")
    assert watch.observed().complete
