# SPDX-License-Identifier: Apache-2.0
"""A tag names a whole image or what it named before; nothing in a layout is trusted unread."""

import contextlib
import errno
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from oci import cosign_tags, media_types
from oci import image as images
from oci import layout as layouts
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.listing import TAG_ANNOTATION
from rekindle.digest import Digest
from rekindle.errors import BusyError, FormatError, IntegrityError, NotFoundError, SpaceError
from rekindle.files import locked
from tests.samples.gauges import memory_peak
from tests.samples.record import RECORD


@pytest.fixture
def store(tmp_path: Path) -> Layout:
    return Layout.create(tmp_path / "store")


@pytest.fixture
def work(tmp_path: Path) -> Layout:
    return Layout.create(tmp_path / "work")


def build(layout: Layout, name: str, *, parts: int = 1) -> Descriptor:
    """An image of its own record, and of a layer that all share."""
    layers = [
        put_layer(layout, b"shared"),
        *(put_layer(layout, f"{name} {n}".encode()) for n in range(parts)),
    ]
    return images.build(layout, structs.replace(RECORD, command=[name]), layers).index


def put_layer(layout: Layout, content: bytes) -> Descriptor:
    return layout.put(content, media_types.DUMP_LAYER)


def publish(store: Layout, work: Layout, name: str, tag: str = "x:latest") -> Descriptor:
    descriptor = build(work, name)
    store.publish(work, descriptor, tag)
    return descriptor


def name_of(store: Layout, tag: str = "x:latest") -> str:
    """Which image a tag names, after all of it has been read."""
    image = images.load(store, store.resolve(tag))
    for layer in image.layers:
        store.read(layer, limit_bytes=1000)
    return image.record.command[0]


def blobs(layout: Layout) -> set[str]:
    return {path.name for path in (layout.root / "blobs/sha256").iterdir()}


def raising(error: BaseException) -> Callable[..., None]:
    """A step at which something ends us."""

    def fail(*_: object) -> None:
        raise error

    return fail


def write_index(layout: Layout, value: Any) -> None:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    (layout.root / "index.json").write_bytes(content)


def entry(**changes: object) -> dict[str, object]:
    plain = {"mediaType": media_types.INDEX, "digest": Digest.of_bytes(b""), "size": 0}
    return {**plain, "annotations": {TAG_ANNOTATION: "x:latest"}, **changes}


def test_a_new_layout_is_as_the_specification_says(store: Layout) -> None:
    assert json.loads((store.root / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((store.root / "index.json").read_bytes())
    assert index == {"schemaVersion": 2, "mediaType": media_types.INDEX, "manifests": []}
    assert blobs(store) == set()


def test_creating_a_layout_twice_keeps_what_is_in_it(store: Layout, work: Layout) -> None:
    publish(store, work, "one")
    assert name_of(Layout.create(store.root)) == "one"


def test_a_published_image_is_found(store: Layout, work: Layout) -> None:
    descriptor = publish(store, work, "one")
    found = store.resolve("x:latest")
    assert (found.digest, found.size) == (descriptor.digest, descriptor.size)
    assert found.artifact_type == media_types.SNAPSHOT
    assert name_of(store) == "one"


def test_a_layout_of_others_with_one_image_needs_no_tag(store: Layout, work: Layout) -> None:
    """As `skopeo copy IMAGE oci:DIR` and `crane pull --format=oci` write it."""
    image = publish(store, work, "one")
    untagged = {"mediaType": image.media_type, "digest": image.digest, "size": image.size}
    write_index(store, {"manifests": [untagged]})
    assert store.resolve("latest").digest == image.digest
    for tag in ("x:latest", "1"):
        with pytest.raises(NotFoundError, match=f"no image {tag}") as caught:
            store.resolve(tag)
        assert caught.value.cause.endswith("holds 1 without a tag")
    with pytest.raises(NotFoundError):
        store.untag("latest")
    other = {**untagged, "digest": Digest.of_bytes(b"other")}
    for manifests in (
        [untagged, other],
        [untagged, {**other, "annotations": {TAG_ANNOTATION: "1"}}],
        [{**untagged, "mediaType": "application/octet-stream"}],
    ):
        write_index(store, {"manifests": manifests})
        with pytest.raises(NotFoundError):
            store.resolve("latest")


def test_what_cosign_saves_has_its_signatures(store: Layout, work: Layout) -> None:
    image = publish(store, work, "one")
    plain = {"mediaType": media_types.MANIFEST, "size": 5}
    saved = [{**plain, "digest": image.digest, "annotations": {"kind": "dev.cosignproject.cosign/image"}}]
    for kind in ("sigs", "atts"):
        name = f"dev.cosignproject.cosign/{kind}"
        saved.append({**plain, "digest": Digest.of_bytes(kind.encode()), "annotations": {"kind": name}})
    write_index(store, {"manifests": saved})
    assert store.resolve("latest").digest == image.digest
    for kind, stored in (("sig", b"sigs"), ("att", b"atts"), ("sbom", None)):
        found = store.tagged(cosign_tags.tag_of(image.digest, kind))
        assert (found and found.digest) == (stored and Digest.of_bytes(stored))
        assert store.tagged(cosign_tags.tag_of(Digest.of_bytes(b"another"), kind)) is None


def test_every_blob_is_named_by_its_digest(store: Layout, work: Layout) -> None:
    publish(store, work, "one")
    for path in (store.root / "blobs/sha256").iterdir():
        assert Digest.of_file(path).hex == path.name


def test_tags_do_not_disturb_each_other(store: Layout, work: Layout) -> None:
    publish(store, work, "one", "a:latest")
    publish(store, work, "two", "b:latest")
    publish(store, work, "three", "a:old")
    assert set(store.tags()) == {"a:latest", "b:latest", "a:old"}
    assert [name_of(store, tag) for tag in ("a:latest", "b:latest", "a:old")] == ["one", "two", "three"]


def test_one_image_may_have_two_tags(store: Layout, work: Layout) -> None:
    publish(store, work, "one", "a:latest")
    publish(store, work, "one", "b:latest")
    assert store.resolve("a:latest").digest == store.resolve("b:latest").digest


def test_an_unknown_tag_says_which_there_are(store: Layout, work: Layout) -> None:
    publish(store, work, "one", "a:latest")
    with pytest.raises(NotFoundError) as caught:
        store.resolve("b:latest")
    assert "a:latest" in caught.value.cause


def test_an_empty_directory_holds_no_images(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Layout(tmp_path).tags()


def test_publishing_is_idempotent(store: Layout, work: Layout) -> None:
    publish(store, work, "one")
    before = (blobs(store), (store.root / "index.json").read_bytes())
    publish(store, work, "one")
    assert (blobs(store), (store.root / "index.json").read_bytes()) == before


def test_a_reader_sees_the_old_image_or_the_new(store: Layout, work: Layout) -> None:
    publish(store, work, "0")
    seen: list[str] = []
    failures: list[BaseException] = []
    over = threading.Event()

    def read() -> None:
        try:
            while not over.is_set():
                seen.append(name_of(store))
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 40):
        publish(store, work, str(number))
    over.set()
    reader.join()
    assert not failures
    assert seen == sorted(seen, key=int)
    assert name_of(store) == "39"


@pytest.mark.parametrize("step", ["index", "sync"])
def test_a_crash_before_the_tag_leaves_the_old_image(
    store: Layout, work: Layout, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    publish(store, work, "old")
    before = blobs(store)

    new = build(work, "new")
    with monkeypatch.context() as patch:
        name = "write_atomically" if step == "index" else "sync_directory"
        patch.setattr(layouts, name, raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            store.publish(work, new, "x:latest")
    assert name_of(store) == "old"
    assert blobs(store) > before
    store.collect_garbage()
    assert blobs(store) == before
    assert name_of(store) == "old"


def test_a_crash_before_the_first_tag_leaves_an_empty_store(
    store: Layout, work: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = build(work, "new")
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "write_atomically", raising(OSError(errno.EIO, "x")))
        with pytest.raises(OSError, match="x"):
            store.publish(work, new, "x:latest")
    assert store.tags() == {}
    store.collect_garbage()
    assert blobs(store) == set()


def test_an_interrupted_publication_can_be_made_again(
    store: Layout, work: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = build(work, "new")
    with monkeypatch.context() as patch:
        patch.setattr(layouts, "sync_directory", raising(OSError(errno.EIO, "x")))
        with pytest.raises(OSError, match="x"):
            store.publish(work, new, "x:latest")
    store.publish(work, build(work, "new"), "x:latest")
    assert name_of(store) == "new"


def test_a_full_disk_is_named(store: Layout, work: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    new = build(work, "new")
    monkeypatch.setattr(layouts, "write_atomically", raising(OSError(errno.ENOSPC, "full")))
    with pytest.raises(SpaceError, match=str(store.root)):
        store.publish(work, new, "x:latest")


def test_garbage_goes_and_images_stay(store: Layout, work: Layout) -> None:
    publish(store, work, "old", "a:latest")
    publish(store, work, "kept", "b:latest")
    needed = blobs(store)
    publish(store, work, "new", "a:latest")
    (store.root / "blobs/sha256/.staged-123").write_bytes(b"half")
    (store.root / ".index.json.0a1b").write_bytes(b"half")
    store.put(b"nobody's", media_types.DUMP_LAYER)
    store.collect_garbage()
    assert (name_of(store, "a:latest"), name_of(store, "b:latest")) == ("new", "kept")
    assert len(blobs(store)) == len(needed)
    assert Digest.of_bytes(b"shared").hex in blobs(store)
    assert Digest.of_bytes(b"old 0").hex not in blobs(store)
    assert not (store.root / ".index.json.0a1b").exists()
    store.collect_garbage()
    assert len(blobs(store)) == len(needed)


def test_garbage_stays_while_somebody_reads(store: Layout) -> None:
    garbage = put_layer(store, b"nobody's")
    with store.reading(), store.reading():
        store.collect_garbage()
        assert blobs(store) == {garbage.digest.hex}
    store.collect_garbage()
    assert blobs(store) == set()


def test_publishing_does_not_wait_for_readers(store: Layout, work: Layout) -> None:
    publish(store, work, "one")
    with store.reading():
        publish(store, work, "two")
    assert name_of(store) == "two"


def test_publishers_wait_for_each_other(store: Layout, work: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    new = build(work, "new")
    monkeypatch.setattr(layouts, "_WAIT_SECONDS", 0.05)
    with locked(store.root / ".lock"), pytest.raises(BusyError):
        store.publish(work, new, "x:latest")


def test_a_reader_waits_while_garbage_is_collected(store: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_WAIT_SECONDS", 0.05)
    with locked(store.root / ".reading"), pytest.raises(BusyError), store.reading():
        pytest.fail("it did not wait")


def test_a_layout_that_nobody_may_write_to_can_be_read(store: Layout, work: Layout) -> None:
    publish(store, work, "one")
    (store.root / ".reading").mkdir()  # even root cannot open this for writing
    with store.reading():
        assert name_of(store) == "one"


def test_a_layout_from_another_disk_is_copied(tmp_path: Path, store: Layout) -> None:
    other = Path("/dev/shm") / f"layout-test-{os.getpid()}"
    if not other.parent.is_dir() or other.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk")
    try:
        source = Layout.create(other)
        publish(store, source, "one")
        assert name_of(store) == "one"
        assert not [name for name in blobs(store) if name.startswith(".")]
    finally:
        for path in sorted(other.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        other.rmdir()


def test_staging_that_is_not_finished_leaves_nothing(store: Layout) -> None:
    with contextlib.suppress(RuntimeError), store.staging() as (file, _):
        file.write(b"half a blob")
        raise RuntimeError
    with store.staging() as (file, _):
        file.write(b"never called a blob")
    assert blobs(store) == set()


def test_a_finished_blob_is_whole_and_readable_by_all(store: Layout) -> None:
    content = b"x" * (3 << 20)
    with store.staging() as (file, finish):
        file.write(content)
        finish(Digest.of_bytes(content))
    (name,) = blobs(store)
    path = store.root / "blobs/sha256" / name
    assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_blob_is_read_back(store: Layout) -> None:
    layer = put_layer(store, b"content")
    assert store.read(layer, limit_bytes=7) == b"content"


def test_a_blob_over_the_limit_is_not_read(store: Layout) -> None:
    with pytest.raises(FormatError, match="the limit is"):
        store.read(put_layer(store, b"content"), limit_bytes=6)


@pytest.mark.parametrize("spoiled", [b"", b"conten", b"contenT", b"content and more"])
def test_a_blob_of_other_bytes_is_damage(store: Layout, spoiled: bytes) -> None:
    layer = put_layer(store, b"content")
    (store.root / "blobs/sha256" / layer.digest.hex).write_bytes(spoiled)
    with pytest.raises(IntegrityError, match=layer.digest):
        store.read(layer, limit_bytes=1000)


def test_a_missing_blob_is_damage(store: Layout) -> None:
    layer = put_layer(store, b"content")
    (store.root / "blobs/sha256" / layer.digest.hex).unlink()
    with pytest.raises(IntegrityError, match="missing"):
        store.read(layer, limit_bytes=1000)


def test_publishing_anew_mends_a_damaged_blob(store: Layout, work: Layout) -> None:
    publish(store, work, "one")
    (store.root / "blobs/sha256" / Digest.of_bytes(b"shared").hex).write_bytes(b"")
    publish(store, work, "one")
    assert name_of(store) == "one"


BAD_INDEXES: dict[str, object] = {
    "nothing": b"",
    "nul": b"\0" * 100,
    "half": b'{"schemaVersion": 2, "manifests": [',
    "a list": [],
    "a number": 5,
    "no manifests": {"schemaVersion": 2},
    "manifests that are null": {"manifests": None},
    "manifests that are an object": {"manifests": {}},
    "an entry that is text": {"manifests": ["sha256:00"]},
    "an entry without a digest": {"manifests": [{"mediaType": "x", "size": 0}]},
    "no media type": {"manifests": [{"digest": Digest.of_bytes(b""), "size": 0}]},
    "no size": {"manifests": [{"digest": Digest.of_bytes(b""), "mediaType": "x"}]},
    "a negative size": {"manifests": [entry(size=-1)]},
    "a size that is text": {"manifests": [entry(size="0")]},
    "a size that is true": {"manifests": [entry(size=True)]},
    "a size over 4 EiB": {"manifests": [entry(size=1 << 63)]},
    "a digest of sha512": {"manifests": [entry(digest="sha512:" + "0" * 128)]},
    "a digest of md5": {"manifests": [entry(digest="md5:" + "0" * 32)]},
    "a short digest": {"manifests": [entry(digest="sha256:" + "0" * 63)]},
    "a digest in upper case": {"manifests": [entry(digest="sha256:" + "A" * 64)]},
    "a digest that leads out": {"manifests": [entry(digest="sha256:../../../../etc/passwd")]},
    "a digest with a newline": {"manifests": [entry(digest="sha256:" + "0" * 64 + "\n")]},
    "a digest of other digits": {"manifests": [entry(digest="sha256:" + "\u0660" * 64)]},
    "annotations that are a list": {"manifests": [entry(annotations=[])]},
    "annotations that are null": {"manifests": [entry(annotations=None)]},
    "a tag that is a number": {"manifests": [entry(annotations={TAG_ANNOTATION: 5})]},
    "an artifact type that is a number": {"manifests": [entry(artifactType=5)]},
    "ten thousand and one": {"manifests": [entry()] * 10_001},
    "10 MB of brackets": b"[" * 10_000_000,
    "17 MiB": b'{"manifests": []}' + b" " * (17 << 20),
}


@pytest.mark.parametrize("content", BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_a_malformed_index_is_refused(store: Layout, work: Layout, content: object) -> None:
    write_index(store, content)
    acts: list[Callable[[], object]] = [
        store.tags,
        lambda: store.resolve("x:latest"),
        lambda: store.publish(work, build(work, "new"), "x:latest"),
    ]
    before = (store.root / "index.json").read_bytes()
    for act in acts:
        with pytest.raises(FormatError):
            act()
    assert (store.root / "index.json").read_bytes() == before
    left = blobs(store)
    store.collect_garbage()
    assert blobs(store) == left


def test_a_huge_index_takes_no_memory(store: Layout) -> None:
    os.truncate(store.root / "index.json", 256 << 20)
    with memory_peak() as peak, pytest.raises(FormatError):
        store.tags()
    assert peak[0] < 64 << 20


def test_what_others_wrote_into_an_index_stays(store: Layout, work: Layout) -> None:
    foreign = {
        **entry(annotations={TAG_ANNOTATION: "theirs"}),
        "urls": ["https://example.com"],
        "data": "aGk=",
    }
    foreign["platform"] = {"os": "linux", "os.features": ["x"]}
    before = {"schemaVersion": 2, "annotations": {"a": "b"}, "manifests": [foreign], "new": [1]}
    write_index(store, before)
    publish(store, work, "one")
    publish(store, work, "two")
    after = json.loads((store.root / "index.json").read_bytes())
    assert after["manifests"][0] == foreign
    assert len(after["manifests"]) == 2
    assert {**after, "manifests": [foreign]} == before
    assert set(store.tags()) == {"theirs", "x:latest"}


def test_entries_without_a_tag_are_kept(store: Layout, work: Layout) -> None:
    untagged = build(work, "untagged")
    store.publish(work, untagged, "x:gone")
    write_index(store, {"manifests": [untagged.to_json()]})
    publish(store, work, "one")
    assert set(store.tags()) == {"x:latest"}
    store.collect_garbage()
    assert images.load(store, untagged).record.command == ["untagged"]


@given(
    st.builds(
        Descriptor,
        media_type=st.text(),
        digest=st.binary().map(Digest.of_bytes),
        size=st.integers(0, 1 << 62),
        annotations=st.dictionaries(st.text(), st.text(), max_size=3),
        artifact_type=st.text(),
        platform=st.dictionaries(st.text(), st.text(), max_size=3),
    )
)
def test_a_descriptor_comes_back_as_it_was(descriptor: Descriptor) -> None:
    assert Descriptor.from_json(json.loads(json.dumps(descriptor.to_json())), "here") == descriptor


SPOILS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another artifact type": lambda index: index.update(artifactType="application/vnd.docker.thing"),
    "a newer artifact type": lambda index: index.update(
        artifactType=media_types.SNAPSHOT.replace("v1", "v2")
    ),
    "no artifact type": lambda index: index.pop("artifactType"),
    "no process": lambda index: index.update(manifests=[]),
    "two processes": lambda index: index.update(manifests=index["manifests"] * 2),
    "many manifests": lambda index: index.update(manifests=index["manifests"] * 17),
    "no manifests": lambda index: index.pop("manifests"),
    "a process of another algorithm": lambda index: index["manifests"][0].update(
        digest="sha512:" + "0" * 128
    ),
    "a process of 1 GiB": lambda index: index["manifests"][0].update(size=1 << 30),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_an_index_that_is_no_snapshot_is_refused(
    work: Layout, spoil: Callable[[dict[str, Any]], object]
) -> None:
    document = json.loads(work.read(build(work, "one"), limit_bytes=10_000))
    spoil(document)
    with pytest.raises(FormatError):
        images.load(work, work.put(json.dumps(document).encode(), media_types.INDEX))


MANIFEST_SPOILS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another artifact type": lambda manifest: manifest.update(artifactType=media_types.SNAPSHOT),
    "no config": lambda manifest: manifest.pop("config"),
    "a config that is null": lambda manifest: manifest.update(config=None),
    "a config of another type": lambda manifest: manifest["config"].update(mediaType="text/plain"),
    "a config of 1 GiB": lambda manifest: manifest["config"].update(size=1 << 30),
    "no layers": lambda manifest: manifest.pop("layers"),
    "layers that are an object": lambda manifest: manifest.update(layers={}),
    "a layer of another type": lambda manifest: manifest["layers"][0].update(mediaType="application/x-tar"),
    "a layer without a digest": lambda manifest: manifest["layers"][0].pop("digest"),
    "a thousand and one layers": lambda manifest: manifest.update(layers=manifest["layers"][:1] * 1001),
}


@pytest.mark.parametrize("spoil", MANIFEST_SPOILS.values(), ids=MANIFEST_SPOILS)
def test_a_manifest_that_is_no_process_is_refused(
    work: Layout, spoil: Callable[[dict[str, Any]], object]
) -> None:
    image = images.load(work, build(work, "one"))
    manifest = json.loads(work.read(image.process, limit_bytes=10_000))
    spoil(manifest)
    content = json.dumps(manifest).encode()
    process = work.put(content, media_types.MANIFEST, artifact_type=media_types.PROCESS)
    index = {"artifactType": media_types.SNAPSHOT, "manifests": [process.to_json()]}
    with pytest.raises(FormatError):
        images.load(work, work.put(json.dumps(index).encode(), media_types.INDEX))


@pytest.mark.parametrize("part", ["index", "process", "config"])
def test_a_changed_part_is_damage(work: Layout, part: str) -> None:
    image = images.load(work, build(work, "one"))
    descriptor = getattr(image, part)
    path = work.root / "blobs/sha256" / descriptor.digest.hex
    path.write_bytes(path.read_bytes().replace(b"one", b"two").replace(b"2,", b"3,"))
    with pytest.raises(IntegrityError):
        images.load(work, image.index)


MANIFESTS = {
    "a list": b"[]",
    "a number": b"5",
    "no JSON": b"{",
    "nested too deep": b"[" * 100_000,
    "manifests that are null": b'{"manifests": null}',
    "layers that are a number": b'{"layers": 5}',
    "a config that is a number": b'{"config": 5}',
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_garbage_behind_a_malformed_manifest_is_not_collected(store: Layout, content: bytes) -> None:
    manifest = store.put(content, media_types.MANIFEST)
    write_index(store, {"manifests": [manifest.to_json()]})
    with pytest.raises(FormatError):
        store.reachable([manifest])
    store.collect_garbage()
    assert blobs(store) == {manifest.digest.hex}


def test_garbage_is_not_collected_while_an_image_is_damaged(store: Layout, work: Layout) -> None:
    index = publish(store, work, "one")
    (store.root / "blobs/sha256" / index.digest.hex).unlink()
    before = blobs(store)
    store.collect_garbage()
    assert blobs(store) == before


def test_manifests_that_name_each_other_many_times_are_read_once(store: Layout) -> None:
    inner = store.put(b'{"layers": []}', media_types.MANIFEST)
    outer = inner
    for _ in range(40):
        document = {"manifests": [outer.to_json()] * 4}
        outer = store.put(json.dumps(document).encode(), media_types.INDEX)
    assert len(store.reachable([outer])) == 41


def make_link(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_socket(path: Path) -> None:
    path.unlink()
    os.mknod(path, stat.S_IFSOCK | 0o600)


@pytest.mark.parametrize(
    "plant",
    [make_pipe, make_directory, make_link, make_socket],
    ids=["pipe", "directory", "link", "socket"],
)
@pytest.mark.parametrize("content", [b"", b"content"])
def test_a_blob_is_a_plain_file(store: Layout, plant: Callable[[Path], object], content: bytes) -> None:
    blob = store.put(content, media_types.DUMP_LAYER)
    assert store.has(blob)
    plant(store.root / "blobs/sha256" / blob.digest.hex)
    assert not store.has(blob)
    with pytest.raises(IntegrityError, match="not a regular file"):
        store.open_blob(blob)


def test_what_raised_limits_let_in_is_published_and_found(store: Layout, work: Layout) -> None:
    layer = put_layer(work, b"layer")
    padded = {"annotations": {"filler": "x" * (5 << 20)}}
    document = {"schemaVersion": 2, "mediaType": media_types.MANIFEST, "layers": [layer.to_json()] * 20_000}
    root = work.put(json.dumps(document | padded).encode(), media_types.MANIFEST)
    refers = json.dumps({"schemaVersion": 2, "subject": root.to_json()} | padded).encode()
    attached = work.put(refers, media_types.MANIFEST)
    store.publish(work, root, "x:latest", [attached])
    assert store.reachable([store.resolve("x:latest")]) == {root.digest, layer.digest}
    assert [each.digest for each in store.referrers(root.digest)] == [attached.digest]
    store.collect_garbage()
    assert blobs(store) == {root.digest.hex, layer.digest.hex, attached.digest.hex}
