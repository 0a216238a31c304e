# SPDX-License-Identifier: Apache-2.0
"""A dump that is kept ready is taken only as it was when its digests matched; else it is made again."""

import contextlib
import io
import itertools
import json
import os
import shutil
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import zstandard
from msgspec import structs

from oci import dump_layers
from oci import image as images
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.trust import verifier
from oci.trust.verifier import Verified
from rekindle import dump_tree, files
from rekindle.digest import Digest
from rekindle.errors import BusyError, IntegrityError, RegistryError, SpaceError, UsageError
from rekindle.home import Home
from rekindle.record import StoredMemory, numbered
from rekindle.report import Report
from restore import dumps
from tests.samples.record import RECORD, holding

PAGES = os.urandom(4096) * 5


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def make(place: Path, pages: bytes = PAGES) -> images.Image:
    """A small dump with all that a dump may have, as an image."""
    dump = place / "dump"
    for directory in ("criu", "shm/deep/deeper"):
        (dump / directory).mkdir(parents=True)
    (dump / "criu/pages-1.img").write_bytes(pages)
    (dump / "criu/core-1.img").write_bytes(b"core")
    (dump / "shm/deep/segment").write_bytes(b"hello")
    os.link(dump / "shm/deep/segment", dump / "shm/again")
    (dump / "shm/link").symlink_to("deep/segment")
    os.mkfifo(dump / "shm/fifo")
    layout = Layout.create(place / "layout")
    record = holding(RECORD, dump_tree.scan(dump))
    return images.build(layout, record, dump_layers.pack(dump, record.dump.files, layout, workers=1))


@pytest.fixture
def image(tmp_path: Path) -> images.Image:
    return make(tmp_path)


def use(home: Home, image: images.Image, *, paranoid: bool = False) -> bool:
    """Makes the dump ready, and looks at it; says whether it was unpacked."""
    verified: Verified[images.Image] = verifier.dangerously_skip(image)
    report = Report(verb="restore")
    with home.work("restore") as work, dumps.ready(home, work, verified, report, paranoid=paranoid) as dump:
        assert (dump / "criu/pages-1.img").read_bytes() == PAGES
        assert (dump / "shm/deep/segment").read_bytes() == b"hello"
        assert (dump / "shm/link").readlink() == Path("deep/segment")
        assert (dump / "shm/again").stat().st_ino == (dump / "shm/deep/segment").stat().st_ino
        status = dump.lstat()
        assert stat.S_ISDIR(status.st_mode)
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, os.geteuid())
        assert {path.name for path in dump.iterdir()} == {"criu", "shm", "ready.json"}
        assert len(list((dump / "criu").iterdir())) == 2
    return "unpack" in {phase.name for phase in report.phases}


def place_of(home: Home, image: images.Image) -> Path:
    return home.dumps / image.process.digest.hex


def test_a_dump_is_unpacked_once(home: Home, image: images.Image) -> None:
    assert use(home, image)
    assert not use(home, image)
    assert not use(home, image), "being used changes nothing of it"


def test_who_is_paranoid_unpacks_it_each_time(home: Home, image: images.Image) -> None:
    for _ in range(2):
        assert use(home, image, paranoid=True)
    assert not use(home, image)


def rewrites(path: Path) -> None:
    content, before = path.read_bytes(), path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaces(path: Path) -> None:
    """With its equal, by rename, as an editor does."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.chmod(stat.S_IMODE(before.st_mode))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


def hides_a_write(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + 1)
        file.truncate(path.stat().st_size - 1)


def moves_behind_a_link(path: Path) -> None:
    there = path.parents[1] / f"stolen-{path.name}"
    path.rename(there)
    path.symlink_to(there)


def makes_a_file_of(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"x")


def comes_and_goes(path: Path) -> None:
    path.write_bytes(b"x")
    path.unlink()


def leads_elsewhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def becomes_a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a file that is written as it was": ("criu/pages-1.img", rewrites),
    "a file that is replaced by its equal": ("criu/pages-1.img", replaces),
    "a file that is longer for a moment": ("criu/pages-1.img", hides_a_write),
    "another mode": ("criu/core-1.img", lambda path: path.chmod(0o666)),
    "another mode of a directory": ("shm/deep", lambda path: path.chmod(0o777)),
    "another time": ("criu/core-1.img", lambda path: os.utime(path, (1, 1))),
    "another length": ("criu/core-1.img", lambda path: os.truncate(path, 3)),
    "a file that is gone": ("criu/core-1.img", Path.unlink),
    "a file that came": ("criu/netns-1.img", lambda path: path.write_bytes(b"x")),
    "a file that came in a deep place": ("shm/deep/deeper/x", lambda path: path.write_bytes(b"x")),
    "a file that came and went": ("criu/x", comes_and_goes),
    "one more hard link": ("criu/core-1.img", lambda path: os.link(path, path.parents[2] / ".link")),
    "a file behind a link": ("criu/core-1.img", moves_behind_a_link),
    "a directory behind a link": ("criu", moves_behind_a_link),
    "a deep directory behind a link": ("shm/deep", moves_behind_a_link),
    "a link that leads elsewhere": ("shm/link", leads_elsewhere),
    "a pipe that is a file": ("shm/fifo", makes_a_file_of),
    "a directory that is gone": ("shm", shutil.rmtree),
    "no seal": ("ready.json", Path.unlink),
    "an empty seal": ("ready.json", lambda path: path.write_bytes(b"")),
    "a seal that is a list": ("ready.json", lambda path: path.write_bytes(b"[]")),
    "a seal without end": ("ready.json", lambda path: path.write_bytes(b"[" * 100_000)),
    "a seal of infinite bytes": (
        "ready.json",
        lambda path: path.write_bytes(b'{"boot": "", "bytes": 1e999, "seal": ""}'),
    ),
    "a seal that is a directory": ("ready.json", becomes_a_directory),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(home: Home, image: images.Image, change: str) -> None:
    assert use(home, image)
    name, act = CHANGES[change]
    act(place_of(home, image) / name)
    with contextlib.suppress(FileNotFoundError):
        (home.dumps / ".link").unlink()
    assert use(home, image)
    assert not use(home, image)


@pytest.mark.parametrize("field", ["boot", "seal"])
def test_of_another_boot_or_with_another_seal_it_is_unpacked_anew(
    home: Home, image: images.Image, field: str
) -> None:
    assert use(home, image)
    path = place_of(home, image) / "ready.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: "0" * 64}))
    assert use(home, image)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777, 0o1700, 0o500])
def test_a_dump_that_others_can_enter_is_unpacked_anew(home: Home, image: images.Image, mode: int) -> None:
    assert use(home, image)
    place_of(home, image).chmod(mode)
    assert use(home, image)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("name", ["", "criu", "criu/core-1.img", "shm/link"])
def test_a_dump_of_another_s_is_unpacked_anew(home: Home, image: images.Image, name: str) -> None:
    assert use(home, image)
    os.chown(place_of(home, image) / name, 65534, -1, follow_symlinks=False)
    assert use(home, image)
    os.chown(place_of(home, image) / name, -1, 65534, follow_symlinks=False)
    assert use(home, image) is bool(name), "the group of a directory that is for its owner alone is nothing"


def test_a_copy_of_a_dump_is_not_that_dump(home: Home, image: images.Image) -> None:
    assert use(home, image)
    place = place_of(home, image)
    shutil.copytree(place, place.with_name("copy"), symlinks=True, copy_function=shutil.copy2, ignore=_pipes)
    shutil.rmtree(place)
    place.with_name("copy").rename(place)
    assert use(home, image)


def _pipes(_: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "fifo"]


def test_where_a_link_leads_nothing_is_used_or_removed(
    home: Home, image: images.Image, tmp_path: Path
) -> None:
    assert use(home, image)
    place = place_of(home, image)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert use(home, image)
    assert (tmp_path / "elsewhere/criu/pages-1.img").read_bytes() == PAGES
    shutil.rmtree(place)
    place.symlink_to(tmp_path / "nowhere")
    assert use(home, image)
    shutil.rmtree(place)
    place.write_bytes(b"a file")
    assert use(home, image)


def test_what_does_not_belong_among_the_dumps_goes(home: Home, image: images.Image, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (home.dumps / "link").symlink_to(tmp_path / "precious")
    (home.dumps / "dangling").symlink_to(tmp_path / "nowhere")
    (home.dumps / "file").write_bytes(b"")
    assert use(home, image)
    left = {path.name for path in home.dumps.iterdir() if path.suffix != ".lock"}
    assert left == {image.process.digest.hex}
    assert (tmp_path / "precious").exists()


def test_other_bytes_leave_nothing(home: Home, image: images.Image, tmp_path: Path) -> None:
    blobs = tmp_path / "layout/blobs/sha256"
    path = blobs / max(image.layers, key=lambda layer: layer.size).digest.hex
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError):
        use(home, image)
    assert not place_of(home, image).exists()
    assert not list(home.run.iterdir())


def test_a_dump_of_other_bytes_is_another_dump(home: Home, image: images.Image, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = make(tmp_path / "other", os.urandom(4096))
    assert other.process.digest != image.process.digest
    assert use(home, image)
    with pytest.raises(AssertionError):
        use(home, other)
    assert not use(home, image)


@pytest.mark.parametrize(("text", "expected"), [("", 64 << 30), ("1", 1 << 30), ("0.5", 1 << 29), ("0", 0)])
def test_the_limit_is_in_gib(monkeypatch: pytest.MonkeyPatch, text: str, expected: int) -> None:
    monkeypatch.setenv("REKINDLE_DUMPS_LIMIT", text)
    assert dumps.limit_bytes() == expected


@pytest.mark.parametrize("text", ["much", "inf", "nan", "1 GiB"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("REKINDLE_DUMPS_LIMIT", text)
    with pytest.raises(UsageError):
        dumps.limit_bytes()


def lying(image: images.Image, size: int, *, stored_bytes: int) -> images.Image:
    """An image whose record gives its pages a size."""
    files = [
        structs.replace(file, size=size) if file.path.name == "pages-1.img" else file
        for file in image.record.dump.files
    ]
    record = holding(image.record, files, stored_bytes=stored_bytes)
    process = structs.replace(image.process, digest=Digest.of_bytes(b"another"))
    return structs.replace(image, record=record, process=process)


@pytest.mark.parametrize("stored_bytes", [0, 1 << 20, 1 << 61])
def test_a_lie_about_its_size_costs_no_other_dump(
    home: Home, image: images.Image, monkeypatch: pytest.MonkeyPatch, stored_bytes: int
) -> None:
    assert use(home, image)
    monkeypatch.setattr(dumps, "_unpack", lambda *_, **__: pytest.fail("there is no need to come this far"))
    with pytest.raises((SpaceError, pytest.fail.Exception)):
        use(home, lying(image, 1 << 61, stored_bytes=stored_bytes))
    monkeypatch.undo()
    assert not use(home, image)


def test_what_the_disk_could_never_hold_is_refused(
    home: Home, image: images.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dumps, "disk_bytes", lambda _: 4096)
    with pytest.raises(SpaceError, match="unpacked"):
        use(home, image)


def test_a_dump_that_never_stays_as_it_was_is_unpacked_twice_at_most(
    home: Home, image: images.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = []
    real = dumps._unpack

    def unpack(*args: Any, **options: Any) -> None:
        unpacked.append(args)
        real(*args, **options)

    monkeypatch.setattr(dumps, "_unpack", unpack)
    monkeypatch.setattr(dumps, "_is_ready", lambda *_: False)
    with pytest.raises(BusyError, match="changed or removed"):
        use(home, image)
    assert len(unpacked) == 2
    assert not list(home.run.iterdir())


# What was unpacked before a restore was given up


class Breaking:
    """Blobs of which those of one role give other bytes, what `end` makes of theirs, and then fail."""

    def __init__(self, image: images.Image, role: str, end: Callable[[bytes], bytes]) -> None:
        self._blobs, self._role, self._end = image.blobs, role, end
        self.read_roles: list[str] = []

    def open_blob(self, layer: Descriptor) -> Any:
        role = layer.annotations["vnd.rekindle.role"]
        self.read_roles.append(role)
        stream = self._blobs.open_blob(layer)
        if role != self._role:
            return stream
        with stream as opened:
            return contextlib.closing(Ending(self._end(opened.read())))

    def cancel(self) -> None:
        pass

    def fall_back_to_origin(self) -> bool:
        return False


class Ending(io.RawIOBase):
    """Some bytes, and then the end of a connection, or of all patience."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._content.readinto(buffer)
        if not count:
            raise RegistryError("the connection has ended")
        return count


def piece_at(offset: int, length: int, *, file: str, image: images.Image) -> bytes:
    """Bytes that no layer has, for a file of a dump."""
    numbers = {str(each.path): number for number, each in numbered(image.record.dump.files).items()}
    frame = zstandard.compress(b"!" * length)
    return struct.pack("<IIIIQQ", 0x184D2A5E, 24, numbers[file], len(frame), offset, length) + frame


def given_up(
    home: Home, image: images.Image, monkeypatch: pytest.MonkeyPatch, end: Callable[[bytes], bytes]
) -> None:
    """A restore that ends within the last layer."""
    monkeypatch.setattr(dump_layers, "workers", lambda: 1)
    with pytest.raises(RegistryError, match="has ended"):
        use(home, structs.replace(image, blobs=Breaking(image, "shm", end)))
    assert not place_of(home, image).exists()


def roles_read(home: Home, image: images.Image, **options: Any) -> list[str]:
    """The roles of the layers that are read to make a dump ready."""
    blobs = Breaking(image, "", bytes)
    assert use(home, structs.replace(image, blobs=blobs), **options)
    return blobs.read_roles


@pytest.mark.parametrize("length", [0, 40])
def test_what_was_unpacked_before_a_restore_was_given_up_is_kept(
    home: Home, image: images.Image, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    given_up(home, image, monkeypatch, lambda content: content[:length])
    assert dumps.kept_layers(home, image) == {str(layer.digest) for layer in image.layers[:2]}
    assert roles_read(home, image) == ["shm"]
    assert not dumps.kept_layers(home, image)
    assert not use(home, image)


def test_bytes_that_nothing_has_verified_are_not_kept(
    home: Home, image: images.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`use` compares the files with what they were."""
    given_up(home, image, monkeypatch, lambda _: piece_at(1, 3, file="shm/deep/segment", image=image))
    (part,) = home.dumps.glob("*.part")
    assert (part / "shm/deep/segment").read_bytes() == bytes(5)
    assert roles_read(home, image) == ["shm"]


def test_nothing_is_kept_if_unverified_bytes_were_written_over_verified_ones(
    home: Home, image: images.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up(home, image, monkeypatch, lambda _: piece_at(8000, 2, file="criu/pages-1.img", image=image))
    assert not list(home.dumps.glob("*.part"))
    assert roles_read(home, image) == ["metadata", "pages", "shm"]


@pytest.mark.parametrize("name", ["criu/pages-1.img", "layers.json", "ready.json"])
def test_what_is_kept_is_not_used_once_it_was_changed(
    home: Home, image: images.Image, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    given_up(home, image, monkeypatch, lambda _: b"")
    (part,) = home.dumps.glob("*.part")
    (part / name).write_bytes(b"x" * 20480)
    assert not dumps.kept_layers(home, image)
    assert roles_read(home, image) == ["metadata", "pages", "shm"]
    assert not list(home.dumps.glob("*.part"))


def test_who_is_paranoid_uses_nothing_that_was_kept(
    home: Home, image: images.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up(home, image, monkeypatch, lambda _: b"")
    assert roles_read(home, image, paranoid=True) == ["metadata", "pages", "shm"]


def test_what_is_kept_is_removed_to_make_room(
    home: Home, image: images.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up(home, image, monkeypatch, lambda _: b"")
    monkeypatch.setenv("REKINDLE_DUMPS_LIMIT", "0")
    other = make(tmp_path / "other")
    assert use(
        home, structs.replace(other, process=structs.replace(other.process, digest=Digest.of_bytes(b"")))
    )
    assert not list(home.dumps.glob("*.part"))


# Memory files of another dump


@pytest.fixture
def pair(tmp_path: Path) -> tuple[images.Image, images.Image]:
    """An image with a memory file, and its delta, whose files have other positions."""
    found: list[images.Image] = []
    layout = Layout.create(tmp_path / "layout")
    for name, others in (("base", ["core-1.img"]), ("delta", ["aaa.img", "core-1.img", "core-2.img"])):
        dump = tmp_path / name
        dump.mkdir(mode=0o700)
        for directory in ("criu", "memory", "shm"):
            (dump / directory).mkdir()
        for other in others:
            (dump / "criu" / other).write_bytes(name.encode())
        (dump / "memory/7").write_bytes(PAGES)
        files = dump_tree.scan(dump)
        base = found[0] if found else None
        if base is not None:
            number = next(
                n for n, file in enumerate(base.record.dump.files) if file.path.parts[0] == "memory"
            )
            free = itertools.count(number + 1)
            files = [
                structs.replace(file, number=number if file.path.parts[0] == "memory" else next(free))
                for file in files
            ]
        own = [file for file in files if base is None or file.path.parts[0] != "memory"]
        memory = [
            StoredMemory(path=PurePosixPath("memory/7"), data_bytes=len(PAGES), ranges=[(0, len(PAGES))])
        ]
        record = holding(RECORD, files, memory=memory, base=base.index.digest if base else None)
        layers = dump_layers.pack(dump, own, layout, workers=1)
        layers += [layer for layer in base.layers if layer.is_memory] if base else []
        found.append(images.build(layout, record, layers))
    return found[0], found[1]


@contextlib.contextmanager
def used(home: Home, image: images.Image, *, paranoid: bool = False) -> Iterator[Path]:
    verified: Verified[images.Image] = verifier.dangerously_skip(image)
    report = Report(verb="restore")
    with home.work("restore") as work, dumps.ready(home, work, verified, report, paranoid=paranoid) as dump:
        assert (dump / "memory/7").read_bytes() == PAGES
        yield dump


@pytest.mark.parametrize("first", [0, 1])
def test_memory_files_are_there_once(home: Home, pair: tuple[images.Image, images.Image], first: int) -> None:
    """Whichever of the two comes first."""
    lender, borrower = pair[first], pair[1 - first]
    with used(home, lender):
        pass
    assert dumps.has_memory(home, borrower)
    with used(home, borrower) as dump:
        assert (dump / "memory").readlink() == place_of(home, lender) / "memory"
        name = b"base" if first else b"delta"
        assert (dump / "criu/core-1.img").read_bytes() == name
    with used(home, borrower) as again:
        assert again == dump


def test_a_dump_that_lends_its_memory_files_is_not_evicted(
    home: Home, pair: tuple[images.Image, images.Image], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, delta = pair
    other = make(tmp_path / "other")
    monkeypatch.setenv("REKINDLE_DUMPS_LIMIT", "0")
    with used(home, base), used(home, delta):
        pass
    with used(home, delta):
        assert use(home, other)
        assert (place_of(home, base) / "memory/7").exists()
    assert not use(home, other)
    assert not place_of(home, base).exists()
    assert not place_of(home, delta).exists()


@pytest.mark.parametrize("change", [rewrites, replaces, hides_a_write])
def test_memory_files_that_have_changed_are_not_lent(
    home: Home, pair: tuple[images.Image, images.Image], change: Callable[[Path], object]
) -> None:
    base, delta = pair
    with used(home, base):
        pass
    with used(home, delta) as dump:
        assert (dump / "memory").is_symlink()
    change(place_of(home, base) / "memory/7")
    assert not dumps.is_ready(home, delta)
    with used(home, delta) as dump:
        assert not (dump / "memory").is_symlink()


def test_who_is_paranoid_borrows_nothing(home: Home, pair: tuple[images.Image, images.Image]) -> None:
    base, delta = pair
    with used(home, base):
        pass
    with used(home, delta, paranoid=True) as dump:
        assert not (dump / "memory").is_symlink()


def test_a_dump_that_was_just_packed_can_be_kept(
    home: Home, pair: tuple[images.Image, images.Image], tmp_path: Path
) -> None:
    dumps.adopt(home, pair[0], tmp_path / "base")
    assert dumps.is_ready(home, pair[0])
    assert not (tmp_path / "base").exists()
    with used(home, pair[1]) as dump:
        assert (dump / "memory").is_symlink()


def test_who_found_no_dump_does_not_wait_for_the_servers_of_those_that_were_quicker(
    home: Home, image: images.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server locks its dump as long as it runs, shared; to unpack one, it is locked alone."""
    verified: Verified[images.Image] = verifier.dangerously_skip(image)
    saw_none, is_served = threading.Event(), threading.Event()
    real = files.locked

    @contextlib.contextmanager
    def locked(path: Path, *, shared: bool = False, timeout: float = 60.0) -> Iterator[None]:
        if threading.current_thread() is slow and not shared:
            saw_none.set()
            assert is_served.wait(20)
        with real(path, shared=shared, timeout=timeout):
            yield

    monkeypatch.setattr("restore.dumps.locked", locked)
    slow = threading.Thread(target=use, args=[home, image])
    slow.start()
    assert saw_none.wait(20)
    with home.work("restore") as work, dumps.ready(home, work, verified, Report(verb="restore")):
        is_served.set()
        slow.join(20)
        assert not slow.is_alive()
