# SPDX-License-Identifier: Apache-2.0
"""What is read and what is made in a cache is seen, however fast."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rekindle.engine.caches import CacheKind
from restore.rungs import observe
from restore.rungs.observe import CacheWatch, Made, Observed, ObservedRoot
from tests.conftest import wait_for
from tests.samples.cache import write
from tests.samples.watching import TRITON, end, keys, only, python, triton_puts

pytestmark = pytest.mark.usefixtures("nothing_outlives_a_watch")


def test_what_another_process_opens_is_used(cache: Path) -> None:
    with CacheWatch([(TRITON, cache)]) as watch:
        assert keys(watch.observed()) == (set(), set())
        subprocess.run(["cat", cache / "OLD" / "k.json"], check=True, capture_output=True)
        assert keys(watch.observed()) == ({"OLD"}, set())
        assert watch.observed() == watch.observed()
    seen = watch.observed()
    assert seen == Observed(
        roots=(ObservedRoot(kind=TRITON, path=cache, used=frozenset({"OLD"}), made={}),),
        made_seconds=0.0,
        complete=True,
    )


def test_a_look_is_no_use(cache: Path) -> None:
    with CacheWatch([(TRITON, cache)]) as watch:
        for path in cache.rglob("*"):
            path.stat()
            os.utime(path)
    assert keys(watch.observed()) == (set(), set())


def test_a_file_that_is_written_in_place_is_neither_used_nor_new(cache: Path) -> None:
    with CacheWatch([(TRITON, cache)]) as watch:
        for _ in range(3):
            with open(cache / "OLD" / "k.json", "a") as file:
                file.write("more")
            (cache / "OLD" / "k.json").write_bytes(b"other")
    assert keys(watch.observed()) == (set(), set())


def test_new_files_are_counted_by_entry(cache: Path) -> None:
    with CacheWatch([(TRITON, cache)]) as watch:
        write(cache / "NEW" / "a", b"12345")
        write(cache / "NEW" / "b", b"123")
        time.sleep(0.05)
        write(cache / "OTHER" / "a", b"1")
        write(cache / "loose", b"12")
    seen = watch.observed()
    assert only(seen).made == {
        "NEW": Made(files=2, bytes=8),
        "OTHER": Made(files=1, bytes=1),
        ".": Made(files=1, bytes=2),
    }
    assert not only(seen).used
    assert 0.04 < seen.made_seconds < 30
    assert seen.complete


def test_what_is_new_is_not_used(cache: Path) -> None:
    with CacheWatch([(TRITON, cache)]) as watch:
        write(cache / "NEW" / "a").read_bytes()
        write(cache / "OLD" / "a").read_bytes()
        watch.observed()
        (cache / "NEW" / "a").read_bytes()
    assert keys(watch.observed()) == (set(), {"NEW", "OLD"})


def test_an_entry_that_was_read_and_made_anew_is_both(cache: Path) -> None:
    with CacheWatch([(TRITON, cache)]) as watch:
        (cache / "OLD" / "__grp__k.json").read_bytes()
        triton_puts(cache / "OLD", "k.cubin")  # in the place of the one that is there
        triton_puts(cache / "NEW", "k.cubin", b"12")
    seen = watch.observed()
    assert only(seen).made == {"OLD": Made(files=1, bytes=6), "NEW": Made(files=1, bytes=2)}
    assert only(seen).used == {"OLD"}


def test_a_file_that_is_removed_and_written_again_is_new(cache: Path) -> None:
    with CacheWatch([(TRITON, cache)]) as watch:
        (cache / "OLD" / "k.json").unlink()
        write(cache / "OLD" / "k.json")
    assert keys(watch.observed()) == (set(), {"OLD"})


def test_what_is_gone_again_was_not_made(cache: Path, tmp_path: Path) -> None:
    with CacheWatch([(TRITON, cache)]) as watch:
        write(cache / "OLD" / "temporary").unlink()
        write(cache / "NEW" / "away").rename(tmp_path / "elsewhere")
        write(cache / "OLD" / "draft").rename(cache / "OLD" / "final")
        write(cache / "GONE" / "deep" / "file")
        watch.observed()
        shutil.rmtree(cache / "GONE")
        (cache / "OLD" / "k.json").unlink()
    assert only(watch.observed()).made == {"OLD": Made(files=1, bytes=7)}
    assert watch.observed().made_seconds == 0.0


def test_what_is_no_plain_file_does_not_count(cache: Path) -> None:
    with CacheWatch([(TRITON, cache)]) as watch:
        os.mkfifo(cache / "OLD" / "pipe")
        (cache / "OLD" / "link").symlink_to("k.json")
        (cache / "AWAY").symlink_to("OLD")
        (cache / "EMPTY").mkdir()
    assert keys(watch.observed()) == (set(), set())


@pytest.mark.parametrize(
    ("kind", "path", "counts"),
    [
        (CacheKind.INDUCTOR, "locks/x.lock", False),
        (CacheKind.INDUCTOR, "ab/header.h.gch", False),
        (CacheKind.INDUCTOR, "ab/cab.py", True),
        (CacheKind.TORCH_EXTENSIONS, "ext/lock", False),
        (CacheKind.VLLM, "startup_plan/plan.json", False),
        (CacheKind.VLLM, "torch_compile_cache/0123/rank_0_0/backbone/a", True),
        (CacheKind.TRITON, "KEY/tmp.pid_1_2/file", False),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_locks_and_temporary_files_never_count(
    tmp_path: Path, kind: CacheKind, path: str, *, counts: bool, there: bool
) -> None:
    if there:
        write(tmp_path / "cache" / path)
    with CacheWatch([(kind, tmp_path / "cache")]) as watch:
        (tmp_path / "cache" / path).read_bytes() if there else write(tmp_path / "cache" / path)
    root = only(watch.observed())
    assert bool(root.used) is (there and counts)
    assert bool(root.made) is (counts and not there)


def test_many_processes_read_and_write_at_once(tmp_path: Path) -> None:
    for number in range(400):
        write(tmp_path / "cache" / f"OLD{number}" / "k.cubin")
    program = """if True:
        import os, pathlib, sys
        root, worker = pathlib.Path(sys.argv[1]), int(sys.argv[2])
        for number in range(0, 400, 2):
            (root / f"OLD{number}" / "k.cubin").read_bytes()
            if number % 8 == worker:
                entry = root / f"NEW{number}"
                temporary = entry / "tmp.pid_1_a"
                temporary.mkdir(parents=True)
                (temporary / "k.cubin").write_bytes(b"12345")
                os.replace(temporary / "k.cubin", entry / "k.cubin")
                temporary.rmdir()
    """
    with CacheWatch([(TRITON, tmp_path / "cache")]) as watch:
        workers = [python(program, tmp_path / "cache", str(number)) for number in range(8)]
        for worker in workers:
            worker.communicate(timeout=60)
            assert worker.returncode == 0
        seen = watch.observed()
    assert seen.complete
    assert only(seen).used == {f"OLD{number}" for number in range(0, 400, 2)}
    made = {f"NEW{number}": Made(files=1, bytes=5) for number in range(0, 400, 2)}
    assert only(seen).made == made


def test_directories_that_are_made_and_filled_at_once_lose_nothing(cache: Path) -> None:
    program = "for i in $(seq 200); do mkdir -p N$i/b/c && echo x >N$i/b/c/file && echo y >N$i/top; done"
    with CacheWatch([(TRITON, cache)]) as watch:
        subprocess.run(["sh", "-c", program], cwd=cache, check=True)
        seen = watch.observed()
    assert only(seen).made == {f"N{number}": Made(files=2, bytes=4) for number in range(1, 201)}
    assert seen.complete


def test_directories_that_are_moved_into_place_lose_nothing(cache: Path, tmp_path: Path) -> None:
    program = """for i in $(seq 200); do
        mkdir -p .tmp$i/b && echo x >.tmp$i/b/file && mv .tmp$i N$i && echo y >N$i/b/late
        mkdir -p ../out/b && echo x >../out/b/file && mv ../out M$i
    done"""
    with CacheWatch([(TRITON, cache)]) as watch:
        subprocess.run(["sh", "-c", program], cwd=cache, check=True)
        seen = watch.observed()
    made = {f"N{number}": Made(files=2, bytes=4) for number in range(1, 201)}
    assert only(seen).made == made | {f"M{number}": Made(files=1, bytes=2) for number in range(1, 201)}


def test_directories_that_are_removed_and_made_again_are_new(cache: Path) -> None:
    with CacheWatch([(TRITON, cache)]) as watch:
        for number in range(50):
            shutil.rmtree(cache / "OLD")
            write(cache / "OLD" / "k.json", b"x" * number)
            if number % 10 == 0:
                watch.observed()
        (cache / "OLD" / "k.json").read_bytes()
        watch.observed()
        assert len(watch._watched) == 3  # the cache, and its two entries
    assert only(watch.observed()).made == {"OLD": Made(files=1, bytes=49)}
    assert not only(watch.observed()).used


@pytest.mark.parametrize("listed_at_once", [1, 256])
def test_directories_that_come_while_the_watch_begins_are_seen_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed_at_once: int
) -> None:
    monkeypatch.setattr(observe, "_LISTED_AT_ONCE", listed_at_once)
    for number in range(1000):
        write(tmp_path / "cache" / f"OLD{number}" / "k.json")
    program = """if True:
        import itertools, pathlib, sys
        for number in itertools.count():
            entry = pathlib.Path(sys.argv[1], f"NEW{number}", "deep")
            entry.mkdir(parents=True)
            (entry / "k.json").write_bytes(b"1")
            (pathlib.Path(sys.argv[1]) / f"OLD{number % 1000}" / f"{number}").write_bytes(b"1")
            if number == 0:
                print("go", flush=True)
    """
    worker = python(program, tmp_path / "cache")
    assert worker.stdout is not None
    assert worker.stdout.read(3) == b"go\n"
    with CacheWatch([(TRITON, tmp_path / "cache")]) as watch:
        time.sleep(0.2)
        end(worker)
        files = sum(path.is_file() for path in (tmp_path / "cache").rglob("*"))
    made = sum(made.files for made in only(watch.observed()).made.values())
    unfinished = 1  # it was killed between making a file and closing it, which both count as new or neither
    assert made > 0
    assert files - unfinished <= made + len(watch._trees[0].before) <= files
    assert not watch._trees[0].new.keys() & watch._trees[0].before.keys()


def test_a_cache_that_is_not_there_yet(tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("a/b/c/cache", "a/b/d/cache", "near")]
    with CacheWatch([(TRITON, root) for root in roots]) as watch:
        assert [root.made for root in watch.observed().roots] == [{}, {}, {}]
        subprocess.run(
            "mkdir -p a/b/c/cache/K && echo x >a/b/c/cache/K/f", shell=True, cwd=tmp_path, check=True
        )
        write(roots[1] / "K" / "f")
        write(roots[2] / "K" / "f")
        write(tmp_path / "a" / "b" / "beside" / "K" / "f")
    assert [root.made.keys() for root in watch.observed().roots] == [{"K"}, {"K"}, {"K"}]
    assert watch.observed().complete


def test_a_cache_that_comes_all_the_way_at_once_is_never_missed(tmp_path: Path) -> None:
    roots = [tmp_path / f"{number}" / "x" / "y" / "cache" for number in range(100)]
    with CacheWatch([(TRITON, root) for root in roots]) as watch:
        program = "for i in $(seq 0 99); do mkdir -p $i/x/y/cache/K && echo x >$i/x/y/cache/K/f; done"
        subprocess.run(["sh", "-c", program], cwd=tmp_path, check=True)
    assert [root.made for root in watch.observed().roots] == [{"K": Made(files=1, bytes=2)}] * 100


def test_a_cache_whose_way_comes_while_the_watch_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = observe._inotify_add_watch

    def late(fd: int, directory: bytes, mask: int) -> int:
        if directory == os.fsencode(tmp_path):  # what is below was not there
            (tmp_path / "a" / "b").mkdir(parents=True, exist_ok=True)
        return real(fd, directory, mask)

    monkeypatch.setattr(observe, "_inotify_add_watch", late)
    with CacheWatch([(TRITON, tmp_path / "a" / "b" / "c" / "cache")]) as watch:
        write(tmp_path / "a" / "b" / "c" / "cache" / "K" / "f")
    assert keys(watch.observed()) == (set(), {"K"})


@pytest.mark.parametrize("away", [shutil.rmtree, lambda path: path.rename(f"{path}.away")])
@pytest.mark.parametrize("what", ["a/b/cache", "a/b", "a/b without a cache in it"])
def test_a_cache_that_is_removed_and_made_again(
    tmp_path: Path, what: str, away: Callable[[Path], object]
) -> None:
    cache = tmp_path / "a" / "b" / "cache"
    write(cache / "OLD" / "k")
    with CacheWatch([(TRITON, cache)]) as watch:
        if " " in what:
            away(cache)
            watch.observed()
        away(tmp_path / what.partition(" ")[0])
        write(cache / "NEW" / "k")
        watch.observed()
        shutil.rmtree(cache)
        write(cache / "NEWER" / "k")
    assert keys(watch.observed()) == (set(), {"NEWER"})
    assert watch.observed().complete


def test_what_comes_beside_a_cache_changes_nothing(cache: Path) -> None:
    with CacheWatch([(TRITON, cache)]) as watch:
        for name in ("x", cache.parent.name, "cache.bak"):
            write(cache.parent / name / "cache" / "KEY" / "k")
        (cache / "OLD" / "k.json").read_bytes()
    assert keys(watch.observed()) == ({"OLD"}, set())


def test_a_cache_that_is_a_link(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("cache")
    (cache / "LINK").symlink_to(tmp_path / "outside")
    write(tmp_path / "outside" / "k")
    with CacheWatch([(TRITON, tmp_path / "link")]) as watch:
        (tmp_path / "link" / "OLD" / "k.json").read_bytes()
        (cache / "LINK" / "k").read_bytes()
        write(cache / "LINK" / "new")
    assert only(watch.observed()).path == tmp_path / "link"
    assert keys(watch.observed()) == ({"OLD"}, set())


def test_caches_within_caches(tmp_path: Path) -> None:
    outer = tmp_path / "vllm"
    inner = outer / "torch_compile_cache" / "0123" / "inductor_cache"
    write(inner / "ab" / "old.py")
    roots = [(CacheKind.VLLM, outer), (CacheKind.INDUCTOR, inner), (CacheKind.INDUCTOR, inner)]
    with CacheWatch(roots) as watch:
        (inner / "ab" / "old.py").read_bytes()
        write(inner / "cd" / "new.py")
    seen = watch.observed()
    assert [set(root.used) for root in seen.roots] == [{"torch_compile_cache/0123"}, {"."}, {"."}]
    assert [set(root.made) for root in seen.roots] == [{"torch_compile_cache/0123"}, {"."}, {"."}]


def test_names_are_bytes(cache: Path) -> None:
    odd = cache / os.fsdecode(b"\xff\xfe\n") / os.fsdecode(b"k\x80")
    write(odd)
    new = os.fsdecode(b"\xc3\x28")
    with CacheWatch([(TRITON, cache)]) as watch:
        odd.read_bytes()
        write(cache / new / "k")
        write(cache / "LONG" / ("x" * 255))
    assert keys(watch.observed()) == ({odd.parent.name}, {new, "LONG"})
    with CacheWatch([(TRITON, odd.parent)]) as watch:
        odd.read_bytes()
    assert keys(watch.observed()) == ({"."}, set())


def test_a_file_that_is_opened_very_often_costs_nothing(cache: Path) -> None:
    with CacheWatch([(TRITON, cache)]) as watch:
        for _ in range(100_000):
            os.close(os.open(cache / "OLD" / "k.json", os.O_RDONLY))
    assert keys(watch.observed()) == ({"OLD"}, set())
    assert watch.observed().complete


def test_files_that_come_and_go_are_forgotten(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "_PRUNE_AT", 10)
    with CacheWatch([(TRITON, cache)]) as watch:
        watch._trees[0].prune_at = 10
        for number in range(1000):
            write(cache / "OLD" / f"{number}").unlink()
        for number in range(30):
            write(cache / "OLD" / f"stays-{number}")
        wait_for(lambda: 30 <= len(watch._trees[0].new) <= 60, 10)
    assert only(watch.observed()).made["OLD"].files == 30


def test_it_brings_nothing_heavy() -> None:
    heavy = {
        "zstandard",
        "http.client",
        "ssl",
        "asyncio",
        "subprocess",
        "tempfile",
        "concurrent.futures",
        "email",
    }
    program = "import sys, restore.rungs.observe; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not heavy & set(done.stdout.split())
