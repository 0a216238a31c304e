# SPDX-License-Identifier: Apache-2.0
"""What commands have done is counted once each, whoever else counts, and whoever is killed meanwhile."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rekindle import history
from rekindle.errors import BusyError, RekindleError, SpaceError, TrustError
from rekindle.files import locked
from rekindle.home import Home
from rekindle.report import CacheUse, ImageName, Outcome, Pause, Reason, Report, Rung


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def report(verb: str = "restore", outcome: Outcome = Outcome.RESTORED, **facts: Any) -> dict[str, Any]:
    made = Report(verb=verb, outcome=outcome, **facts)
    with made.phase("decide"):
        pass
    return made.to_json()


def failed(verb: str, error: RekindleError) -> dict[str, Any]:
    made = Report(verb=verb)
    made.fail(error)
    return made.to_json()


def counted(home: Home, name: str) -> dict[tuple[str, ...], int]:
    return {each.labels: each.value for each in history.read_totals(home).counts if each.name == name}


def test_restores_are_counted_by_rung_and_reason(home: Home) -> None:
    reason = Reason(rung=Rung.PROCESS, code="kernel", field="kernel", recorded="1", here="2", hard=True)
    history.add(home, report(), at=1.0)
    history.add(home, report(), at=2.0, wakes=True)
    history.add(home, report(outcome=Outcome.CACHE, reasons=[reason]), at=3.0)
    assert counted(home, "restores") == {("restored", "process"): 2, ("cache", "process"): 1}
    assert counted(home, "reasons") == {("process", "kernel", "true"): 1}
    assert counted(home, "wakes") == {("restored",): 1}
    assert counted(home, "commands") == {("restore", "restored"): 2, ("restore", "cache"): 1}


def test_other_commands_are_no_restores(home: Home) -> None:
    history.add(home, report("snapshot", Outcome.SAVED, pause=Pause(seconds=0.3)), at=1.0)
    assert counted(home, "restores") == {}
    assert counted(home, "commands") == {("snapshot", "saved"): 1}
    (pause,) = [each for each in history.read_totals(home).times if each.name == "pause_seconds"]
    assert (sum(pause.counts), pause.sum_seconds) == (1, 0.3)


def test_a_refused_image_is_told_from_other_failures(home: Home) -> None:
    history.add(home, failed("restore", TrustError("no signature")), at=1.0)
    history.add(home, failed("pull", SpaceError("full")), at=1.0)
    assert counted(home, "verification_failures") == {("restore", "trust"): 1}
    assert counted(home, "errors") == {("restore", "trust"): 1, ("pull", "space"): 1}


def test_bytes_and_cache_entries_are_summed(home: Home) -> None:
    cache = CacheUse(
        verdict="partial",
        entries=6,
        used=4,
        used_entries=[],
        made=2,
        made_entries=[],
        made_files=3,
        made_bytes=10,
        made_seconds=0.1,
        complete=True,
        loaded=0,
        loaded_seconds=0,
        compiled=0,
        compiled_seconds=0,
    )
    for _ in range(2):
        made = report(outcome=Outcome.CACHE, cache=cache)
        made["bytes"] = {"fetched": 5, "written": 7}
        history.add(home, made, at=1.0)
    assert counted(home, "bytes") == {("restore", "fetched"): 10, ("restore", "written"): 14}
    assert counted(home, "kernel_cache_starts") == {("partial",): 2}
    assert counted(home, "kernel_cache_entries") == {("used",): 8, ("compiled",): 4}


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0.0, 0), (0.01, 0), (0.0100001, 1), (300.0, 13), (300.1, 14), (1e9, 14)]
)
def test_a_time_is_in_the_first_bucket_that_is_not_below_it(seconds: float, bucket: int) -> None:
    totals = history.Totals()
    totals.time("phase_seconds", "restore", "x", seconds=seconds)
    assert [index for index, count in enumerate(totals.times[0].counts) if count] == [bucket]


def test_every_count_has_the_labels_that_it_is_said_to_have(home: Home) -> None:
    history.add(home, report(image=ImageName(reference="x"), first_token_seconds=0.4), at=1.0, wakes=True)
    history.add(home, failed("restore", TrustError("no")), at=1.0)
    totals = history.read_totals(home)
    assert all(len(each.labels) == len(history.COUNTED[each.name]) for each in totals.counts)
    assert all(len(each.labels) == len(history.TIMED[each.name]) for each in totals.times)


def test_the_newest_fifty_reports_are_kept(home: Home) -> None:
    for number in range(53):
        history.add(home, report("pull" if number % 2 else "restore", pid=number), at=float(number))
    kept = history.newest(home, 100)
    assert [each.at for each in kept] == [float(number) for number in range(52, 2, -1)]
    assert [each.report["pid"] for each in history.newest(home, 3, "pull")] == [51, 49, 47]
    assert sum(counted(home, "commands").values()) == 53


def test_nobody_else_may_read_it(home: Home) -> None:
    history.add(home, report(), at=1.0)
    files = [path for path in home.history.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"times":[{"name":"x","labels":[],"counts":[1]}]}'])
def test_torn_totals_begin_anew(home: Home, content: bytes) -> None:
    history.add(home, report(), at=1.0)
    (home.history / "totals.json").write_bytes(content)
    assert history.read_totals(home).counts == []
    history.add(home, report(), at=2.0)
    assert counted(home, "restores") == {("restored", "process"): 1}


def test_a_torn_report_is_left_out(home: Home) -> None:
    history.add(home, report(), at=1.0)
    history.add(home, report(), at=2.0)
    max((home.history / "reports").iterdir()).write_bytes(b"")
    assert [each.at for each in history.newest(home, 9)] == [1.0]


def test_who_holds_the_lock_for_long_stops_nobody(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_LOCK_SECONDS", 0.1)
    history.add(home, report(), at=1.0)
    with locked(home.history / "lock"), pytest.raises(BusyError):
        history.add(home, report(), at=2.0)


def _add_many(root: Path, count: int) -> None:
    for _ in range(count):
        history.add(Home(root), report(), at=time.time())


def test_many_that_add_at_once_lose_nothing(home: Home) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add_many, args=[home.root, 25]) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert counted(home, "restores") == {("restored", "process"): 100}


def test_one_that_is_killed_while_it_adds_leaves_what_was_there(home: Home) -> None:
    history.add(home, report(), at=1.0)
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            _add_many(home.root, 10_000)
            os._exit(0)
        before = counted(home, "restores")[("restored", "process")]
        while counted(home, "restores")[("restored", "process")] < before + 3:
            pass
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        assert counted(home, "restores")[("restored", "process")] >= before + 3
    history.add(home, report(), at=2.0)
    total = counted(home, "restores")[("restored", "process")]
    assert min(total, 50) - 5 <= len(history.newest(home, 100)) <= 50, "one report per kill may be lost"
