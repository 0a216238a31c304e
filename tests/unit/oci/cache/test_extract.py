# SPDX-License-Identifier: Apache-2.0
"""Extraction: a ladder of hostile archives, none of which may leave a trace, and what a good one becomes."""

import contextlib
import gzip
import io
import json
import os
import struct
import tarfile
import threading
import unicodedata
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci import media_types
from oci.cache import extract as extraction
from oci.cache import image as cache_image
from oci.cache import pack, staging
from oci.cache.extract import Extraction
from oci.cache.image import CacheImage
from oci.cache.tar_reader import LayerReader
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.trust.verifier import dangerously_skip
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.engine.caches import CacheKind, CacheRoot
from rekindle.errors import FormatError, IntegrityError, Interrupted, NotFoundError, SpaceError, UsageError
from rekindle.files import try_lock
from tests.samples.cache import (
    CREATED,
    KEY,
    MTIME_NS,
    PREFIX,
    archive,
    directory,
    header,
    image,
    tree,
    triton,
    vllm,
    write,
)
from tests.samples.gauges import Unseekable, memory_peak, writable_up_to

LIMITS = Limits()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.create(tmp_path / "layout")


def packed(layout: Layout, *roots: CacheRoot) -> CacheImage:
    return cache_image.load(layout, pack.pack(roots, layout, created=CREATED), LIMITS)


def extract(image: CacheImage, to: Path | dict[str, Path] | None, **options: Any) -> Extraction:
    verified = dangerously_skip(image)
    return extraction.extract(verified, to, limits=options.pop("limits", LIMITS), **options)


def file(name: str, content: bytes = b"content", **fields: Any) -> bytes:
    return header(f"{PREFIX}/{name}", content, **fields)


# What becomes of a good one


def test_a_cache_comes_back_as_it_was(layout: Layout, tmp_path: Path) -> None:
    root = vllm(tmp_path / "v")
    write(tmp_path / "v/torch_compile_cache/0123456789/tool.so", bytes(3 << 20), mode=0o755)
    inner = tmp_path / "v/torch_compile_cache/0123456789"
    os.utime(inner, ns=(MTIME_NS, MTIME_NS))
    before = tree(tmp_path / "v")
    done = extract(packed(layout, root), tmp_path / "out")
    del before["gpu_p2p_access_cache_for_0,1.json"]
    assert tree(tmp_path / "out/vllm") == before
    assert (tmp_path / "out/vllm" / inner.relative_to(tmp_path / "v")).stat().st_mtime_ns == MTIME_NS
    assert done.environment == {"VLLM_CACHE_ROOT": str(tmp_path / "out/vllm")}
    assert done.written_bytes == sum(len(content) for _, _, content in before.values())
    assert os.listdir(tmp_path / "out") == ["vllm"]


def test_a_mixed_cache_becomes_a_directory_for_each_kind(layout: Layout, tmp_path: Path) -> None:
    write(tmp_path / "f/.cache/flashinfer/0.2.5/90/x.so")
    flashinfer = CacheRoot(kind=CacheKind.FLASHINFER, path=tmp_path / "f/.cache/flashinfer", recorded="/f")
    roots = (vllm(tmp_path / "v"), triton(tmp_path / "t"), triton(tmp_path / "t2"), flashinfer)
    out = tmp_path / "deep/er"
    done = extract(packed(layout, *roots), out)
    assert sorted(os.listdir(out)) == ["flashinfer", "triton", "triton-2", "vllm"]
    assert done.environment == {
        "FLASHINFER_WORKSPACE_BASE": str(out / "flashinfer"),
        "TRITON_CACHE_DIR": str(out / "triton"),
        "VLLM_CACHE_ROOT": str(out / "vllm"),
    }
    assert (out / "flashinfer/.cache/flashinfer/0.2.5/90/x.so").exists()


def test_only_the_kinds_that_are_asked_for(layout: Layout, tmp_path: Path) -> None:
    mixed = packed(layout, vllm(tmp_path / "v"), triton(tmp_path / "t"))
    done = extract(mixed, tmp_path / "out", kinds=[CacheKind.TRITON])
    assert os.listdir(tmp_path / "out") == ["triton"]
    assert done.environment == {"TRITON_CACHE_DIR": str(tmp_path / "out/triton")}
    with pytest.raises(NotFoundError):
        extract(mixed, tmp_path / "out", kinds=[CacheKind.CUDA])


def test_groups_of_triton_name_their_files_at_the_new_place(layout: Layout, tmp_path: Path) -> None:
    extract(packed(layout, triton(tmp_path / "t", recorded="/somewhere/else")), tmp_path / "out")
    group = tmp_path / "out/triton" / KEY / "__grp__add.json"
    children = json.loads(group.read_bytes())["child_paths"]
    assert children["add.cubin"] == str(tmp_path / "out/triton" / KEY / "add.cubin")
    assert all(Path(child).exists() for child in children.values())
    assert group.stat().st_mtime_ns == MTIME_NS


@pytest.mark.parametrize(
    "group", [b"no json", b"[]", b'{"child_paths": 1}', b'{"child_paths": {"../x": "/y"}}', b"[" * 100_000]
)
def test_a_group_that_makes_no_sense_stays_as_it_is(layout: Layout, tmp_path: Path, group: bytes) -> None:
    write(tmp_path / "t/K/__grp__x.json", group)
    root = CacheRoot(kind=CacheKind.TRITON, path=tmp_path / "t", recorded="/else")
    extract(packed(layout, root), tmp_path / "out")
    assert (
        "x"
        not in (tmp_path / "out/triton/K/__grp__x.json")
        .read_text()
        .replace("../x", "")
        .replace('"child_paths"', "")
        or group == b"no json"
    )


def test_a_cache_goes_to_where_it_was_recorded(layout: Layout, tmp_path: Path) -> None:
    there = tmp_path / "home/.triton/cache"
    stored = packed(layout, triton(tmp_path / "t", recorded=str(there)))
    before = tree(tmp_path / "t")
    done = extract(stored, None)
    assert tree(there) == before  # groups and all: the paths in them are true again
    assert done.environment == {"TRITON_CACHE_DIR": str(there)}
    again = extract(stored, None)
    assert (again.roots[0].files, again.written_bytes, again.roots[0].kept) == (0, 0, ())


@pytest.mark.parametrize(
    "recorded", ["/etc/cron.d", "/usr/lib/python3", "/root/.ssh", "/root/.config/x", "/dev", "/proc/self"]
)
def test_no_cache_goes_to_where_the_system_keeps_its_files(
    layout: Layout, tmp_path: Path, recorded: str
) -> None:
    stored = packed(layout, triton(tmp_path / "t", recorded=recorded))
    with pytest.raises(UsageError, match="does not write"):
        extract(stored, None)
    extract(stored, tmp_path / "out")


UNUSUAL = [
    *("/home/alice", "/home/vllm", "/root", "/root/.cache", "/home/vllm/.cache", "/opt/app", "/tmp/triton"),
    *(
        "/var/lib/kubelet",
        "/root/.triton",
        "/srv/www",
        "/var/cache/apt",
        "/root/.cache/pip",
        "/root/.cache/vllm",
    ),
]


@pytest.mark.parametrize("recorded", UNUSUAL)
def test_no_cache_goes_to_a_recorded_place_that_does_not_look_like_its_own(
    layout: Layout, tmp_path: Path, recorded: str
) -> None:
    """A signer who is trusted for kernels must not write a login's files."""
    stored = packed(layout, triton(tmp_path / "t", recorded=recorded))
    with pytest.raises(UsageError, match="does not write unasked") as error:
        extract(stored, None)
    assert "--to DIR" in error.value.hint
    assert "TRITON_CACHE_DIR" in error.value.hint
    assert extract(stored, tmp_path / "out").roots[0].files == 6


def test_a_recorded_place_that_the_environment_names_is_the_users_choice(
    layout: Layout, tmp_path: Path
) -> None:
    there = tmp_path / "kernels"
    stored = packed(layout, triton(tmp_path / "t", recorded=str(there)))
    for own in ({}, {"TRITON_CACHE_DIR": str(tmp_path / "others")}, {"VLLM_CACHE_ROOT": str(there)}):
        with pytest.raises(UsageError):
            extract(stored, None, own=own)
        with pytest.raises(UsageError):
            extract(stored, {"triton": there}, own=own)
    assert extract(stored, None, own={"TRITON_CACHE_DIR": f"{there}/"}).roots[0].path == there


ELSEWHERE = [
    *(
        ".bashrc",
        ".profile",
        ".zshenv",
        ".login",
        ".ssh/authorized_keys",
        "authorized_keys",
        ".rhosts",
        ".netrc",
    ),
    *(
        ".config/systemd/user/x",
        "x.service",
        "x.service.d/y",
        "X.TIMER",
        "x.path",
        "x.desktop",
        ".git/hooks/x",
    ),
    *("crontab", "cron.d/x", "cron.hourly/x", "sudoers.d/x", "profile.d/x.sh", "ld.so.preload", "rc.local"),
    *(
        "sitecustomize.py",
        "usercustomize.py",
        "x.pth",
        ".local/lib/x",
        ".gdbinit",
        ".vimrc",
        ".pam_environment",
    ),
    *(".curlrc", ".psqlrc", ".tmux.conf", ".emacs.d/x", ".ipython/x", ".cargo/x", ".my.cnf", ".Xauthority"),
    *(".azure/x", ".netrc", ".zshrc", ".kshrc", "x.target.wants/y"),
]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_no_file_has_a_name_that_others_run_whatever_the_signature(
    layout: Layout, tmp_path: Path, name: str
) -> None:
    parents = [
        directory(f"{PREFIX}/{each}") for each in ("K", *reversed(PurePosixPath(f"K/{name}").parents[:-2]))
    ]
    stored = image(layout, archive(*parents, file(f"K/{name}")), files=1, size=7)
    with pytest.raises(FormatError, match="logins, cron, systemd or tools"):
        extract(stored, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_such_a_name_is_not_packed_either(layout: Layout, tmp_path: Path, name: str) -> None:
    root = triton(tmp_path / "t")
    write(tmp_path / "t" / name)
    said: list[str] = []
    pack.pack([root], layout, created=CREATED, say=said.append)
    assert "logins, cron, systemd or tools" in "\n".join(said)
    assert extract(packed(layout, root), tmp_path / "out").roots[0].files == 6


def test_files_of_real_caches_have_other_names(layout: Layout, tmp_path: Path) -> None:
    names = (
        "modelinfos/vllm-model_executor-models-llama-LlamaForCausalLM.json index x.lock x.best_config local "
        "torch_compile_cache/ab/rank_0_0/x.py 0.2.5/90/cached_ops/norm/build.ninja .ninja_deps .lock config "
        "0.2.5/90/cached_ops/norm/.ninja_log kernel.sm90.abc/kernel.cubin profile service cache.sqlite"
    )
    for name in names.split():
        write(tmp_path / "c" / name)
    root = CacheRoot(kind=CacheKind.CUDA, path=tmp_path / "c", recorded="/c")
    assert extract(packed(layout, root), tmp_path / "out").roots[0].files == len(names.split())


@pytest.mark.parametrize("name", ["bin", "ssh", "triton-x", "triton2", "vllm"])
def test_a_cache_is_named_after_its_kind(layout: Layout, tmp_path: Path, name: str) -> None:
    """`--to DIR` must not write to `DIR/bin`."""
    with pytest.raises(FormatError):
        image(layout, GOOD, files=1, size=7, prefix=f"io.rekindle.cache/{name}")


def test_a_link_does_not_lead_a_recorded_cache_to_the_systems_files(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to("/etc")
    with pytest.raises(UsageError, match=r"rekindle does not write$"):
        extract(packed(layout, triton(tmp_path / "t", recorded=str(tmp_path / "cache/triton"))), None)


def test_two_caches_do_not_go_into_one_another(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "vllm-cache").symlink_to(tmp_path / "triton-cache")
    for second in ("triton-cache/vllm", "vllm-cache"):
        roots = [
            triton(tmp_path / "t", recorded=str(tmp_path / "triton-cache")),
            vllm(tmp_path / "v", recorded=str(tmp_path / second)),
        ]
        with pytest.raises(UsageError, match="destinations of two kernel caches"):
            extract(packed(layout, *roots), None)


# What is there already


def test_what_is_there_is_added_to_and_not_replaced(layout: Layout, tmp_path: Path) -> None:
    stored = packed(layout, triton(tmp_path / "t"))
    there = tmp_path / "out/triton"
    write(there / KEY / "add.cubin", b"my own")
    write(there / "OTHER/add.cubin", b"my own")
    done = extract(stored, tmp_path / "out")
    (root,) = done.roots
    assert root.kept == (KEY,)
    assert root.files == 3  # the other entry, and of this one nothing
    assert (there / KEY / "add.cubin").read_bytes() == b"my own"
    assert os.listdir(there / KEY) == ["add.cubin"]
    assert (there / "OTHER/add.cubin").exists()
    done = extract(stored, tmp_path / "out", overwrite=True)
    assert done.roots[0].kept == ()
    assert (there / KEY / "add.cubin").read_bytes() != b"my own"
    assert not [name for name in os.listdir(tmp_path / "out") if name.startswith(".")]


def test_what_is_missing_of_an_entry_is_added(layout: Layout, tmp_path: Path) -> None:
    stored = packed(layout, triton(tmp_path / "t"))
    extract(stored, tmp_path / "out")
    before = tree(tmp_path / "out")
    (tmp_path / "out/triton" / KEY / "add.cubin").unlink()
    assert extract(stored, tmp_path / "out").roots[0].files == 1
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_links_in_what_is_there_are_not_followed(layout: Layout, tmp_path: Path, overwrite: bool) -> None:
    stored = packed(layout, triton(tmp_path / "t"))
    there, victim = tmp_path / "out/triton", tmp_path / "victim"
    there.mkdir(parents=True)
    victim.mkdir()
    (there / KEY).symlink_to(victim)
    done = extract(stored, tmp_path / "out", overwrite=overwrite)
    assert done.roots[0].kept == (KEY,)
    assert os.listdir(victim) == []


def test_cudas_cache_is_one_thing(layout: Layout, tmp_path: Path) -> None:
    write(tmp_path / "c/index", b"theirs")
    write(tmp_path / "c/0/x")
    stored = packed(layout, CacheRoot(kind=CacheKind.CUDA, path=tmp_path / "c", recorded="/c"))
    write(tmp_path / "out/cuda/index", b"mine")
    assert extract(stored, tmp_path / "out").roots[0].kept == (".",)
    assert os.listdir(tmp_path / "out/cuda") == ["index"]


def test_a_cache_goes_into_a_volume_of_its_own(layout: Layout, tmp_path: Path, monkeypatch: Any) -> None:
    there = tmp_path / "volume"
    there.mkdir()
    stored = packed(layout, triton(tmp_path / "t", recorded=str(there)))
    with monkeypatch.context() as patch:
        patch.setattr(staging, "is_mount", lambda path: path == there)
        patch.setenv("TRITON_CACHE_DIR", str(there))
        assert extract(stored, None, own=os.environ).roots[0].files == 6
    assert tree(there) == tree(tmp_path / "t")
    assert not [name for name in os.listdir(there) if name.startswith(".")]


def test_a_place_that_cannot_be_is_said(layout: Layout, tmp_path: Path) -> None:
    stored = packed(layout, triton(tmp_path / "t"))
    write(tmp_path / "a-file")
    with pytest.raises(UsageError):
        extract(stored, tmp_path / "a-file")
    write(tmp_path / "out/triton")
    with pytest.raises(UsageError):
        extract(stored, tmp_path / "out")


# Hostile archives


def sparse() -> bytes:
    info = tarfile.TarInfo(f"{PREFIX}/sparse")
    info.type = tarfile.GNUTYPE_SPARSE
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(records: bytes, *, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header("././@PaxHeader", records, kind=kind)


def record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length += 1
    return str(length).encode() + body


def forged(size: bytes) -> bytes:
    """A file whose header says any size."""
    block = bytearray(file("x", b""))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


LONG = "n" * 256
HOSTILE: dict[str, bytes] = {
    "absolute": archive(header("/etc/passwd", b"content")),
    "parent": archive(file("../../../escape")),
    "parent of the prefix": archive(header("../escape", b"content")),
    "dot": archive(file("./x")),
    "empty part": archive(file("a//b")),
    "trailing slash": archive(header(f"{PREFIX}/x/", b"content")),
    "no name": archive(header("", b"content")),
    "outside the cache": archive(header("io.rekindle.cache/cuda/x", b"content")),
    "beside the cache": archive(header("etc/passwd", b"content")),
    "prefix of a name": archive(header(f"{PREFIX}2/x", b"content")),
    "the cache is a file": archive(header(PREFIX, b"content"), tops=["io.rekindle.cache"]),
    "no directory": archive(file("a/b")),
    "below a file": archive(file("a"), file("a/b")),
    "symbolic link": archive(file("x", b"", kind=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "link to a directory": archive(
        file("x", b"", kind=tarfile.SYMTYPE, linkname="/tmp"),
        file("x/y"),
    ),
    "hard link": archive(file("x", b"", kind=tarfile.LNKTYPE, linkname="/etc/passwd")),
    "device": archive(file("x", b"", kind=tarfile.CHRTYPE)),
    "block device": archive(file("x", b"", kind=tarfile.BLKTYPE)),
    "fifo": archive(file("x", b"", kind=tarfile.FIFOTYPE)),
    "contiguous": archive(file("x", b"content", kind=tarfile.CONTTYPE)),
    "unknown type": archive(file("x", b"content", kind=b"Q")),
    "sparse": archive(sparse()),
    "pax sparse": archive(pax(record("GNU.sparse.map", "0,1") + record("size", "7")), file("x")),
    "pax global header": archive(pax(record("path", f"{PREFIX}/y"), kind=tarfile.XGLTYPE), file("x")),
    "pax link": archive(pax(record("linkpath", "/etc/passwd")), file("x")),
    "pax path out": archive(pax(record("path", "../../escape")), file("x")),
    "pax absolute path": archive(pax(record("path", "/escape")), file("x")),
    "pax size lies": archive(pax(record("size", "100000000")), file("x")),
    "pax negative size": archive(pax(record("size", "-1")), file("x")),
    "pax time": archive(pax(record("mtime", "yesterday")), file("x")),
    "pax twice": archive(pax(record("mtime", "1") * 2), file("x")),
    "pax length lies": archive(pax(b"99 path=x\n"), file("x")),
    "pax no length": archive(pax(b"path=x\n"), file("x")),
    "pax empty": archive(pax(b""), file("x")),
    "pax not UTF-8": archive(pax(b"10 path=\xff\n"), file("x")),
    "pax alone": archive(pax(record("mtime", "1"))),
    "pax huge": archive(pax(record("path", "x" * (70 << 10))), file("x")),
    "gnu long name": archive(
        header("././@LongLink", b"x" * 200 + b"\0", kind=tarfile.GNUTYPE_LONGNAME), file("x")
    ),
    "duplicate": archive(file("x"), file("x")),
    "duplicate directory": archive(directory(f"{PREFIX}/d"), directory(f"{PREFIX}/d"), file("x")),
    "case": archive(file("name"), file("NAME")),
    "case of a directory": archive(directory(f"{PREFIX}/d"), directory(f"{PREFIX}/D"), file("D/x")),
    "sharp s": archive(file("stra\u00dfe"), file("STRASSE")),
    "composition": archive(
        file(unicodedata.normalize("NFC", "\u00e9")), file(unicodedata.normalize("NFD", "\u00e9"))
    ),
    "line feed": archive(file("a\nb")),
    "escape sequence": archive(file("a\x1b[2Jb")),
    "bidirectional": archive(file("a\u202eb")),
    "not UTF-8": archive(file("a\udcffb")),
    "whiteout": archive(file(".wh.x")),
    "opaque whiteout": archive(file(".wh..wh..opq")),
    "long name": archive(file(LONG)),
    "long path": archive(*(directory(f"{PREFIX}/{'/'.join(['d' * 200] * n)}") for n in range(1, 12))),
    "deep path": archive(*(directory(f"{PREFIX}/{'/'.join(['d'] * n)}") for n in range(1, 70))),
    "directory with content": archive(header(f"{PREFIX}/d", b"content", kind=tarfile.DIRTYPE)),
    "negative size": archive(forged(b"\xff" * 12)),
    "huge size": archive(forged(b"\x80" + b"\x7f" * 11)),
    "size that is no number": archive(forged(b"zzzzzzzzzzz\0")),
    "bad checksum": archive(file("x").replace(b"ustar", b"uztar", 1)),
    "more than said": archive(file("x"), file("y")),
    "larger than said": archive(file("x", b"content and more")),
    "less than said": archive(),
    "smaller than said": archive(file("x", b"short")),
    "no end": archive(file("x"), end=b""),
    "one block of an end": archive(file("x"), end=bytes(512)),
    "lone zero block": archive(file("x"), end=bytes(512) + file("y") + bytes(1024)),
    "after the end": archive(file("x"), end=bytes(1024) + b"garbage"),
    "a member after the end": archive(file("x"), end=bytes(1024) + file("y")),
    "between files": archive(file("x").replace(b"content\0", b"content!", 1)),
    "cut in a header": archive(file("x"))[:1700],
    "cut in a file": archive(file("x"))[: 1024 + 512 + 3],
    "empty": b"",
    "not a tar": b"x" * 2000,
}


def traces(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.rglob("*"))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_leaves_no_trace(layout: Layout, tmp_path: Path, name: str) -> None:
    stored = image(layout, HOSTILE[name], files=1, size=7)
    before = traces(tmp_path)
    with pytest.raises(FormatError):
        extract(stored, tmp_path / "out")
    assert traces(tmp_path) == before
    assert not Path("/escape").exists()


def test_the_frame_of_the_hostile_archives_is_sound(layout: Layout, tmp_path: Path) -> None:
    raw = archive(directory(f"{PREFIX}/d"), file("d/x", mode=0o6755), end=bytes(10240))
    done = extract(image(layout, raw, files=1, size=7), tmp_path / "out")
    assert done.written_bytes == 7
    assert (tmp_path / "out/triton/d/x").stat().st_mode & 0o7777 == 0o755


def test_nobody_else_may_change_what_was_extracted(layout: Layout, tmp_path: Path) -> None:
    raw = archive(
        header(f"{PREFIX}/d", kind=tarfile.DIRTYPE, mode=0o7777),
        header(f"{PREFIX}/d/e", kind=tarfile.DIRTYPE, mode=0),
        file("d/e/x", mode=0o7777),
        file("d/y", mode=0o666),
    )
    (tmp_path / "into/triton/d").mkdir(parents=True)
    write(tmp_path / "into/triton/other")
    for to in (tmp_path / "out", tmp_path / "into"):
        extract(image(layout, raw, files=2, size=14), to)
        modes = [(to / "triton/d" / name).stat().st_mode & 0o7777 for name in ("e", "e/x", "y")]
        assert modes == [0o700, 0o755, 0o644]
    assert (tmp_path / "out/triton/d").stat().st_mode & 0o7777 == 0o755


def test_directories_without_files_are_not_made(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = extraction._Tree.make_directory

    def make(self: Any, path: PurePosixPath) -> None:
        made.append(str(path))
        real(self, path)

    monkeypatch.setattr(extraction._Tree, "make_directory", make)
    many = [directory(f"{PREFIX}/{number}") for number in range(1000)]
    deep = [directory(f"{PREFIX}/7/{name}") for name in ("a", "a/b", "c")]
    raw = archive(*many, *deep, file("7/a/b/x"))
    extract(image(layout, raw, files=1, size=7), tmp_path / "out")
    assert made == ["7", "7/a", "7/a/b"]
    assert os.listdir(tmp_path / "out/triton") == ["7"]


def test_times_and_names_may_come_from_a_pax_header(layout: Layout, tmp_path: Path) -> None:
    records = record("path", f"{PREFIX}/" + "y" * 150) + record("mtime", "17.5") + record("uid", "7")
    raw = archive(pax(records), file("x"))
    extract(image(layout, raw, files=1, size=7), tmp_path / "out")
    assert (tmp_path / "out/triton" / ("y" * 150)).stat().st_mtime_ns == 17_500_000_000


GOOD = archive(file("x"))
BLOBS: dict[str, bytes] = {
    "second gzip member": gzip.compress(GOOD) + gzip.compress(GOOD),
    "empty second member": gzip.compress(GOOD) + gzip.compress(b""),
    "bytes after gzip": gzip.compress(GOOD) + b"garbage",
    "zeros after gzip": gzip.compress(GOOD) + bytes(8),
    "no gzip": GOOD,
    "empty": b"",
    "cut": gzip.compress(GOOD)[:-6],
    "cut early": gzip.compress(GOOD)[:30],
    "bad crc": gzip.compress(GOOD)[:-8] + bytes(4) + struct.pack("<I", len(GOOD)),
    "zlib": zlib.compress(GOOD),
}


@pytest.mark.parametrize("name", BLOBS)
def test_a_hostile_compression_leaves_no_trace(layout: Layout, tmp_path: Path, name: str) -> None:
    stored = image(layout, GOOD, files=1, size=7, blob=BLOBS[name])
    before = traces(tmp_path)
    with pytest.raises(FormatError):
        extract(stored, tmp_path / "out")
    assert traces(tmp_path) == before


def test_a_bomb_is_stopped(layout: Layout, tmp_path: Path) -> None:
    raw = archive(file("x", bytes(40 << 20)))
    stored = image(layout, raw, files=1, size=40 << 20)

    class Small(Limits, frozen=True):
        def expanded_bytes(self, stored_bytes: int) -> int:
            return 1 << 20

    before = traces(tmp_path)
    with pytest.raises(FormatError, match="larger than the limits"):
        extract(stored, tmp_path / "out", limits=Small())
    liar = image(layout, raw, files=1, size=7)
    with pytest.raises(FormatError):
        extract(liar, tmp_path / "out", limits=Small())
    assert set(traces(tmp_path)) - set(before) == {
        path for path in traces(tmp_path) if "/blobs/" in path and path not in before
    }


def test_too_many_files_are_refused(layout: Layout, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(extraction, "FILES_LIMIT", 3)
    many = archive(*(directory(f"{PREFIX}/d{number}") for number in range(5)), file("x"))
    for stored in (
        image(layout, GOOD, files=4, size=7),
        image(layout, many, files=1, size=7),
    ):
        with pytest.raises(FormatError):
            extract(stored, tmp_path / "out")


def damage(layout: Layout, layer: Descriptor, at: int = -20) -> None:
    path = layout.root / "blobs/sha256" / layer.digest.hex
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0, 3, 40, -20, -6, -1])
def test_other_bytes_than_those_of_the_digest_are_never_seen(layout: Layout, tmp_path: Path, at: int) -> None:
    stored = packed(layout, triton(tmp_path / "t"), vllm(tmp_path / "v"))
    damage(layout, stored.layers[0], at)
    before = traces(tmp_path)
    with pytest.raises(IntegrityError):
        extract(stored, tmp_path / "out")
    assert traces(tmp_path) == before  # nor anything of the other layer


def test_an_archive_with_another_diff_id_is_never_seen(layout: Layout, tmp_path: Path) -> None:
    stored = image(layout, GOOD, files=1, size=7, diff_id=Digest.of_bytes(b""))
    with pytest.raises(IntegrityError, match="diff_id"):
        extract(stored, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Elsewhere:
    """Blobs of a registry: bad bytes first, then, when they are no longer trusted, others."""

    def __init__(self, layout: Layout, *answers: bytes) -> None:
        self.layout, self.answers, self.cancelled = layout, list(answers), 0

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        return self.layout.read(descriptor, limit_bytes=limit_bytes)

    def open_blob(self, descriptor: Descriptor) -> io.RawIOBase:
        return Unseekable(self.answers.pop(0), 700)

    def cancel(self) -> None:
        self.cancelled += 1

    def fall_back_to_origin(self) -> bool:
        return bool(self.answers)


def test_a_mirror_that_lies_is_asked_no_more(layout: Layout, tmp_path: Path) -> None:
    good = gzip.compress(GOOD, 1, mtime=0)
    stored = image(layout, GOOD, files=1, size=7)
    for bad in (good + b"x", good[:-1] + b"x", b"x" * len(good)):
        blobs = Elsewhere(layout, bad, good)
        lied_to = CacheImage(
            **{name: getattr(stored, name) for name in CacheImage.__struct_fields__} | {"blobs": blobs}
        )
        extract(lied_to, tmp_path / "out", overwrite=True)
        assert blobs.answers == []
    for bad in (good + b"x", good[:-1], b""):
        blobs = Elsewhere(layout, bad)
        lied_to = CacheImage(
            **{name: getattr(stored, name) for name in CacheImage.__struct_fields__} | {"blobs": blobs}
        )
        with pytest.raises((IntegrityError, FormatError)):
            extract(lied_to, tmp_path / "other")
        assert blobs.cancelled
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("error", [Interrupted(15), KeyboardInterrupt(), OSError(5, "broken")])
def test_nothing_is_left_of_what_was_interrupted(
    layout: Layout, tmp_path: Path, monkeypatch: Any, error: BaseException
) -> None:
    stored = packed(layout, triton(tmp_path / "t"), vllm(tmp_path / "v"))

    def broken(*_: object) -> None:
        raise error

    before = traces(tmp_path)
    for step in ("_read_layer", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(extraction, step, broken)
            with pytest.raises(type(error)):
                extract(stored, tmp_path / "deep/out")
        assert traces(tmp_path) == before


def test_what_a_killed_extraction_left_is_removed_by_the_next(layout: Layout, tmp_path: Path) -> None:
    stored = packed(layout, triton(tmp_path / "t"))
    left, used = (tmp_path / f"out/.triton.rekindle-{name}" for name in ("left", "used"))
    write(left / "KEY/x")
    write(used / "KEY/x")
    fd = os.open(used, os.O_RDONLY)
    assert try_lock(fd)
    extract(stored, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [used.name, "triton"]
    os.close(fd)


def test_a_full_disk_is_said(layout: Layout, tmp_path: Path, monkeypatch: Any) -> None:
    stored = packed(layout, triton(tmp_path / "t"))

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(extraction._Tree, "write_file", full)
    with pytest.raises(SpaceError):
        extract(stored, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_short_writes_are_gone_on_with(layout: Layout, tmp_path: Path) -> None:
    write(tmp_path / "c/x", bytes(range(256)) * 8192)
    stored = packed(layout, CacheRoot(kind=CacheKind.CUDA, path=tmp_path / "c", recorded="/c"))
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with writable_up_to(1 << 20), pytest.raises(OSError, match="too large"):
        extract(stored, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_extractions_at_once_give_one_whole_cache(layout: Layout, tmp_path: Path) -> None:
    stored = packed(layout, triton(tmp_path / "t"))
    errors: list[BaseException] = []

    def run() -> None:
        try:
            extract(stored, tmp_path / "out")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(tree(tmp_path / "out/triton")) == 6
    assert os.listdir(tmp_path / "out") == ["triton"]


def test_extracting_takes_little_memory(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with open(tmp_path / "c/x", "wb") as big:
        for _ in range(60):
            big.write(os.urandom(1 << 20))
    stored = packed(layout, CacheRoot(kind=CacheKind.CUDA, path=tmp_path / "c", recorded="/c"))
    with memory_peak() as peak:
        extract(stored, tmp_path / "out")
    assert peak[0] < 30 << 20


# Anything


class OneBlob:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        return self.content

    def open_blob(self, descriptor: Descriptor) -> io.RawIOBase:
        return Unseekable(self.content, 100)

    def referrers(self, digest: Digest, *, artifact_type: str = "") -> list[Descriptor]:
        return []

    def cancel(self) -> None:
        pass

    def fall_back_to_origin(self) -> bool:
        return False


def read_all(blob: bytes) -> None:
    descriptor = Descriptor(
        media_type=media_types.TAR_GZIP_LAYER, digest=Digest.of_bytes(blob), size=len(blob)
    )
    reader = LayerReader(OneBlob(blob), descriptor, limit_bytes=1 << 20)
    for member in reader.members():
        if not member.is_directory:
            for _ in reader.content(member.size):
                pass
    reader.finish(Digest.of_bytes(b""))


@given(st.binary(max_size=2000), st.booleans())
def test_any_bytes_are_a_layer_or_an_error(content: bytes, compressed: bool) -> None:
    with contextlib.suppress(FormatError, IntegrityError):
        read_all(gzip.compress(content) if compressed else content)


@given(
    st.sampled_from(sorted(HOSTILE)),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_any_damage_to_an_archive_is_an_error_or_none(name: str, flips: list[tuple[int, int]]) -> None:
    raw = bytearray(HOSTILE[name])
    for at, value in flips:
        if at < len(raw):
            raw[at] = value
    with contextlib.suppress(FormatError, IntegrityError):
        read_all(gzip.compress(bytes(raw), 1))


@given(st.binary(max_size=120))
def test_any_pax_header_is_one_or_an_error(records: bytes) -> None:
    with contextlib.suppress(FormatError, IntegrityError):
        read_all(gzip.compress(archive(pax(records), file("x")), 1))
