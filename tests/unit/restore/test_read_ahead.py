# SPDX-License-Identifier: Apache-2.0
"""What a start will read is in memory before it does, in order, within bounds; nothing else is touched."""

import os
import time
from pathlib import Path

import pytest
from msgspec import structs

from rekindle.engine import weights
from rekindle.files import drop_from_page_cache
from rekindle.node.start_reads import StartRead
from restore import read_ahead
from restore.decide.decision import weights_to_reload
from restore.read_ahead import ReadAhead
from tests.samples.page_cache import nearly, on_disk, resident
from tests.samples.record import RECORD

_PAGES = 4096


def reads(path: Path, *names: str, **parts: tuple[tuple[int, int], ...]) -> list[StartRead]:
    return [StartRead(f"{path}/{name}", parts.get(name, ())) for name in names]


def test_files_are_read_whole_or_in_parts(tmp_path: Path) -> None:
    whole, part, other = (on_disk(tmp_path / name, _PAGES) for name in ("whole", "part", "other"))
    with ReadAhead() as reading:
        reading.begin(reads(tmp_path, "whole", "part", part=((4096 * 10, 4096 * 1500), (0, 4096))))
        reading.wait()
        use = reading.use
    assert nearly(whole, range(_PAGES))
    assert {*resident(part)} <= {0, *range(10, 1510)}
    assert len(resident(part)) > 1400
    assert not resident(other)
    assert use is not None
    assert (use.files, use.bytes, use.complete) == (2, (_PAGES + 1501) * 4096, True)


def test_what_is_no_file_is_neither_opened_nor_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("x")
    found = on_disk(tmp_path / "found", 1)
    with ReadAhead() as reading:
        names = ["pipe", "directory", "gone", "empty", "short", "found"]
        reading.begin(reads(tmp_path, *names, short=((4096, 4096), (1 << 61, 1 << 61))))
        reading.wait()
        use = reading.use
    assert resident(found) == [0]
    assert use is not None
    assert (use.files, use.bytes) == (1, 4096)


def test_it_ends_where_the_memory_does(tmp_path: Path) -> None:
    names = ["first", "second", "third"]
    paths = [on_disk(tmp_path / name, 256) for name in names]
    with ReadAhead() as reading:
        reading.begin(reads(tmp_path, *names), limit_bytes=300 * 4096)
        reading.wait()
        use = reading.use
    # Each is taken by a thread of its own: any of them may be the one that there is room for.
    assert sorted(len(resident(path)) for path in paths) == [0, 0, 256]
    assert use is not None
    assert (use.files, use.complete) == (1, False)


def test_half_of_the_available_memory_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "available_bytes", lambda: 4096 * 3)
    two, one = on_disk(tmp_path / "two", 2), on_disk(tmp_path / "one", 1)
    for path, expected in ((two, []), (one, [0])):
        with ReadAhead() as reading:
            reading.begin(reads(tmp_path, path.name))
            reading.wait()
        assert resident(path) == expected


def test_once_stopped_nothing_is_read(tmp_path: Path) -> None:
    path = on_disk(tmp_path / "file", _PAGES)
    with ReadAhead() as reading:
        reading.stop()
        reading.begin(reads(tmp_path, "file"))
        reading.wait()
        assert reading.use is None
    assert not resident(path)


def test_it_begins_once(tmp_path: Path) -> None:
    first, second = on_disk(tmp_path / "first", 1), on_disk(tmp_path / "second", 1)
    with ReadAhead() as reading:
        reading.begin([])
        assert reading.use is None
        reading.begin(reads(tmp_path, "first"))
        reading.begin(reads(tmp_path, "second"))
        reading.wait()
    assert resident(first) == [0]
    assert not resident(second)


def test_files_come_in_their_order(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        file.truncate(5 << 20)
    wanted = reads(tmp_path, "b", "a", "c/d", "e", a=((0, 5 << 20), (6 << 20, 1 << 61)))
    assert list(read_ahead._pieces(wanted)) == [
        (f"{tmp_path}/b", 0, None),
        (f"{tmp_path}/a", 0, 2 << 20),
        (f"{tmp_path}/a", 2 << 20, 2 << 20),
        (f"{tmp_path}/a", 4 << 20, 1 << 20),
        (f"{tmp_path}/c/d", 0, None),
        (f"{tmp_path}/e", 0, None),
    ]


def test_its_threads_give_way_and_no_other_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    take = ReadAhead._next

    def noted(self: ReadAhead) -> object:
        found.append(os.getpriority(os.PRIO_PROCESS, 0))
        return take(self)

    monkeypatch.setattr(ReadAhead, "_next", noted)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    with ReadAhead() as reading:
        reading.begin(reads(tmp_path, "gone"))
        reading.wait()
    assert set(found) == {max(own, 10)}
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_the_time_counts_until_the_last_byte(tmp_path: Path) -> None:
    on_disk(tmp_path / "file", 1)
    with ReadAhead() as reading:
        began = time.monotonic()
        reading.begin(reads(tmp_path, "file"))
        reading.wait()
        took = time.monotonic() - began
        first = reading.use
        assert first is not None
        assert 0 < first.seconds <= took
        assert reading.use == first, "it does not grow afterwards"


def test_a_model_that_the_server_reloads_is_read_in_order(tmp_path: Path) -> None:
    first, second = (on_disk(tmp_path / f"{name}.safetensors", 1024) for name in ("a", "b"))
    (tmp_path / "notes.md").touch()
    engine = structs.replace(RECORD.engine, name="vllm", options={"asleep": 2})
    record = structs.replace(RECORD, engine=engine, weights=weights.identify(str(tmp_path), "", {}))
    drop_from_page_cache(tmp_path)
    wanted = weights_to_reload(record)
    assert [each.path for each in wanted] == [str(first), str(second)]
    with ReadAhead() as reading:
        reading.begin(wanted, limit_bytes=1600 * 4096)
        reading.wait()
    assert len(resident(first)) == 1024
    assert len(resident(second)) == 512, "as far as there is memory"
