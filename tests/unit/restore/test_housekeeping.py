# SPDX-License-Identifier: Apache-2.0
"""What is kept, what is removed, and that nothing goes which a server uses."""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec import structs

from cli import prune as prune_command
from oci import image as images
from oci import media_types
from oci.layout import Layout
from oci.reference import LayoutReference, parse
from rekindle.errors import BusyError, NotFoundError, UsageError
from rekindle.home import Home
from restore import housekeeping
from restore.housekeeping import KeptKind
from tests.samples.record import RECORD

DAY = 86400.0


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def add_image(home: Home, name: str, *, days: float = 0, shared: bytes = b"shared") -> images.Image:
    layout = Layout.create(home.store)
    layers = [layout.put(content, media_types.DUMP_LAYER) for content in (name.encode() * 1000, shared)]
    image = images.build(layout, structs.replace(RECORD, command=[name]), layers)
    layout.publish(layout, image.index, f"{name}:latest")
    age(home.store / "blobs/sha256" / image.index.digest.hex, days)
    return image


def add_dump(home: Home, image: images.Image, *, days: float = 0, size: int = 1000) -> Path:
    dump = home.dumps / image.process.digest.hex
    dump.mkdir()
    marker = {"boot": "some", "bytes": size, "seal": ""}
    (dump / "ready.json").write_text(json.dumps(marker))
    age(dump / "ready.json", days)
    return dump


def add_cache(home: Home, name: str, *, days: float = 0, size: int = 1000) -> Path:
    cache = home.root / "caches" / name
    (cache / "triton").mkdir(parents=True)
    (cache / "triton/x").write_bytes(bytes(size))
    (cache.with_name(f"{name}.lock")).touch()
    for path in (cache, cache.with_name(f"{name}.lock")):
        age(path, days)
    return cache


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then))


@contextmanager
def used(path: Path) -> Iterator[None]:
    """As a server that was restored uses it."""
    with open(path.with_name(f"{path.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def reference(name: str) -> LayoutReference:
    found = parse(name)
    assert isinstance(found, LayoutReference)
    return found


def test_everything_that_is_kept_is_listed_with_its_last_use(home: Home) -> None:
    assert housekeeping.kept(home) == []
    old, new = add_image(home, "old", days=9), add_image(home, "new", days=1)
    dump, cache = add_dump(home, old, days=0.5), add_cache(home, "ab" * 32, days=3)
    found = housekeeping.kept(home)
    assert [(each.kind, each.name) for each in found] == [
        (KeptKind.IMAGE, "old:latest"),  # its dump was used half a day ago
        (KeptKind.IMAGE, "new:latest"),
        (KeptKind.DUMP, dump.name),
        (KeptKind.CACHE, cache.name),
    ]
    assert found[0].bytes == old.size_bytes + old.index.size
    assert (found[1].digest, found[2].bytes, found[3].bytes) == (new.index.digest, 1000, 1000)
    assert not any(each.in_use for each in found)
    with used(dump):
        assert [each.in_use for each in housekeeping.kept(home)] == [True, False, True, False]


def test_an_image_goes_with_its_blobs_and_its_dump_and_without_those_of_others(home: Home) -> None:
    one, two = add_image(home, "one"), add_image(home, "two")
    dumps = [add_dump(home, one), add_dump(home, two)]
    housekeeping.remove(reference("one"), home)
    left = {path.name for path in (home.store / "blobs/sha256").iterdir()}
    assert left == {digest.hex for digest in Layout(home.store).reachable([two.index])}
    assert [dump.exists() for dump in dumps] == [False, True]
    with pytest.raises(NotFoundError):
        housekeeping.remove(reference("one"), home)


def test_another_tag_keeps_an_image(home: Home) -> None:
    image = add_image(home, "one")
    layout = Layout(home.store)
    layout.publish(layout, image.index, "same:latest")
    dump = add_dump(home, image)
    housekeeping.remove(reference("one"), home)
    assert list(layout.tags()) == ["same:latest"]
    assert dump.exists()
    images.load(layout, layout.resolve("same:latest"))


def test_an_image_that_a_server_uses_is_not_removed(home: Home) -> None:
    image = add_image(home, "one")
    dump = add_dump(home, image)
    with used(dump):
        with pytest.raises(BusyError, match="a server uses one"):
            housekeeping.remove(reference("one"), home)
        housekeeping.remove(reference("one"), home, force=True)
        assert dump.exists(), "the server runs on"
    assert housekeeping.kept(home)[0].kind is KeptKind.DUMP


def test_what_a_server_uses_is_never_pruned(home: Home) -> None:
    image = add_image(home, "one", days=9)
    dump, cache = add_dump(home, image, days=9), add_cache(home, "ab" * 32, days=9)
    with used(dump), used(cache):
        assert housekeeping.prune(home, list(KeptKind)) == []
    assert len(housekeeping.prune(home, list(KeptKind))) == 3
    assert housekeeping.kept(home) == []


def test_only_what_is_old_or_too_much_is_pruned(home: Home) -> None:
    dumps = [add_dump(home, add_image(home, f"n{days}", days=days), days=days) for days in (1, 5, 9)]
    kinds = [KeptKind.DUMP]
    assert housekeeping.prune(home, kinds, older_seconds=10 * DAY) == []
    planned = housekeeping.prune(home, kinds, older_seconds=7 * DAY, dry_run=True)
    assert [each.name for each in planned] == [dumps[2].name]
    assert dumps[2].exists()
    removed = housekeeping.prune(home, kinds, keep_bytes=1500)
    assert [each.name for each in removed] == [dumps[2].name, dumps[1].name]
    assert [dump.exists() for dump in dumps] == [True, False, False]
    assert len(Layout(home.store).tags()) == 3


def test_all_images_are_not_pruned_by_mistake(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REKINDLE_HOME", str(home.root))
    add_image(home, "one", days=9)
    with pytest.raises(UsageError, match="every image"):
        prune_command.main(["--images"])
    assert prune_command.main(["--images", "--older-than", "10d"]) == 0
    assert prune_command.main([]) == 0
    assert list(Layout(home.store).tags()) == ["one:latest"]
    assert prune_command.main(["--images", "--older-than", "8d"]) == 0
    assert not Layout(home.store).tags()
