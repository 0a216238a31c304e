# SPDX-License-Identifier: Apache-2.0
"""A kernel cache as an image: what MCV finds in it, what the inventory says, and what is refused."""

import contextlib
import json
import os
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs

from oci import media_types
from oci.cache import image as cache_image
from oci.cache import inventory, pack
from oci.cache.image import CacheImage
from oci.cache.inventory import Entry, Inventory, Target
from oci.cache.names import Names
from oci.cache.secret_search import refuse_secrets
from oci.descriptor import Descriptor
from oci.layout import Layout
from rekindle import documents
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.engine.caches import CacheKind, CacheRoot
from rekindle.errors import FormatError, IntegrityError, NotFoundError, SecretError, UsageError
from rekindle.secrets.redact import is_secret_name
from tests.samples.cache import CREATED, HIP_KEY, KEY, MTIME_NS, Inflated, triton, vllm, write
from tests.samples.gauges import memory_peak

CUDA = Target(backend="cuda", arch="90", warp_size=32)
HIP = Target(backend="hip", arch="gfx942", warp_size=64)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.create(tmp_path / "layout")


def packed(layout: Layout, *roots: CacheRoot, **options: Any) -> CacheImage:
    descriptor = pack.pack(roots, layout, created=CREATED, **options)
    return cache_image.load(layout, descriptor, Limits())


def names(layout: Layout, image: CacheImage, layer: int) -> list[str]:
    with tarfile.open(fileobj=Inflated(layout, image.layers[layer])) as tar:
        return tar.getnames()


def member(layout: Layout, image: CacheImage, layer: int, name: str) -> Any:
    with tarfile.open(fileobj=Inflated(layout, image.layers[layer])) as tar:
        file = tar.extractfile(name)
        assert file is not None
        return json.loads(file.read())


def test_a_cache_of_triton_is_as_mcv_reads_it(layout: Layout, tmp_path: Path) -> None:
    image = packed(layout, triton(tmp_path / "t"))
    size = sum(path.stat().st_size for path in (tmp_path / "t").rglob("*") if path.is_file())
    assert image.labels == {
        "cache.triton.image/entry-count": "2",
        "cache.triton.image/cache-size-bytes": str(size),
        "cache.triton.image/summary": json.dumps(
            {"targets": [documents.to_json(CUDA), documents.to_json(HIP)]}, separators=(",", ":")
        ),
    }
    assert f"io.triton.cache/{KEY}/add.cubin" in names(layout, image, 0)
    manifest = member(layout, image, 0, "io.triton.manifest/manifest.json")
    assert {"hash", "backend", "arch", "warp_size", "num_warps", "num_stages"} == set(manifest["triton"][0])
    assert {kernel["arch"] for kernel in manifest["triton"]} == {"90", "gfx942"}


def test_the_image_is_an_ordinary_one(layout: Layout, tmp_path: Path) -> None:
    descriptor = pack.pack([triton(tmp_path / "t")], layout, created=CREATED, architecture="aarch64")
    assert descriptor.media_type == media_types.MANIFEST
    assert descriptor.annotations == {"vnd.rekindle.role": "cache"}
    assert not descriptor.artifact_type
    manifest = json.loads(layout.read(descriptor, limit_bytes=1 << 20))
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert "artifactType" not in manifest
    (layer,) = manifest["layers"]
    assert layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip"
    assert layer["annotations"] == {"org.opencontainers.image.title": "triton.tar.gz"}
    image = cache_image.load(layout, descriptor, Limits())
    config = json.loads(layout.read(image.config, limit_bytes=1 << 20))
    assert (config["architecture"], config["os"], config["created"]) == ("arm64", "linux", CREATED)
    assert len(config["history"]) == len(config["rootfs"]["diff_ids"]) == 1
    raw = Inflated(layout, image.layers[0]).getvalue()
    assert config["rootfs"]["diff_ids"] == [Digest.of_bytes(raw)]


def test_files_keep_mode_and_time_and_lose_their_owner(layout: Layout, tmp_path: Path) -> None:
    root = triton(tmp_path / "t")
    write(tmp_path / "t" / KEY / "tool.so", mode=0o4755)
    image = packed(layout, root)
    with tarfile.open(fileobj=Inflated(layout, image.layers[0])) as tar:
        info = tar.getmember(f"io.triton.cache/{KEY}/tool.so")
    assert (info.mode, info.uid, info.gid, info.uname, info.gname) == (0o755, 0, 0, "", "")
    assert info.pax_headers["mtime"] == f"{MTIME_NS // 10**9}.{MTIME_NS % 10**9:09}"


def test_equal_trees_give_equal_images_on_any_number_of_cores(tmp_path: Path) -> None:
    digests = set()
    for number in range(3):
        root = triton(tmp_path / f"t{number}", recorded="/cache")
        write(tmp_path / f"t{number}" / KEY / "large.bin", bytes(range(256)) * 20_000)
        for path in (tmp_path / f"t{number}").rglob("*"):
            os.utime(path, ns=(MTIME_NS, MTIME_NS))
        layout = Layout.create(tmp_path / f"layout{number}")
        digests.add(pack.pack([root], layout, created=CREATED, workers=number + 1).digest)
    assert len(digests) == 1


def test_a_cache_of_vllm_is_as_mcv_and_kserve_read_it(layout: Layout, tmp_path: Path) -> None:
    image = packed(layout, vllm(tmp_path / "v", recorded="/tmp/vllm"), targets=[CUDA])
    below = tmp_path / "v/torch_compile_cache"
    size = sum(path.stat().st_size for path in below.rglob("*") if path.is_file())
    assert image.labels == {
        "cache.vllm.image/entry-count": "1",
        "cache.vllm.image/format": "binary",
        "cache.vllm.image/cache-size-bytes": str(size),  # without modelinfos, which MCV does not extract
        "cache.vllm.image/summary": '{"targets":[{"backend":"cuda","arch":"90","warp_size":32}]}',
        "io.kserve.km/framework": "vllm",
        "io.kserve.km/cache-type": "torch-compile",
        "io.kserve.km/cache-root-env": "VLLM_CACHE_ROOT=/tmp/vllm",
        "io.kserve.km/cache-mount-subpath": "torch_compile_cache",
        "io.kserve.km/cache-hash": "0123456789",
    }
    found = names(layout, image, 0)
    assert "io.vllm.cache/modelinfos/llama.json" in found
    assert not any("gpu_p2p" in name for name in found)
    (entry,) = member(layout, image, 0, "io.vllm.manifest/manifest.json")["vllm"]
    assert (entry["vllmHash"], entry["cacheFormat"]) == ("0123456789", "binary")
    (binary,) = entry["binary"]
    assert binary["artifact_count"] == len(binary["artifact_names"]) == 2
    assert (binary["target_device"], binary["cache_save_format"]) == ("cuda", "binary")
    assert "env" not in binary


def test_an_aot_cache_is_named_as_such(layout: Layout, tmp_path: Path) -> None:
    write(tmp_path / "v/torch_compile_cache/torch_aot_compile/ab12/rank_0_0/model", bytes(500))
    image = packed(layout, CacheRoot(kind=CacheKind.VLLM, path=tmp_path / "v", recorded="/v"))
    assert image.labels["cache.vllm.image/format"] == "aot_compile"
    assert image.labels["io.kserve.km/cache-mount-subpath"] == "torch_compile_cache/torch_aot_compile"
    (entry,) = member(layout, image, 0, "io.vllm.manifest/manifest.json")["vllm"]
    assert entry["aot_compile"] == [
        {"hash": "ab12", "rank": "rank_0_0", "model_file": "model", "file_size": 500}
    ]


def test_a_mixed_cache_is_one_of_vllm_with_trees_to_mount(layout: Layout, tmp_path: Path) -> None:
    write(tmp_path / "fi/.cache/flashinfer/0.2.5/90/cached_ops/x.so")
    flashinfer = CacheRoot(
        kind=CacheKind.FLASHINFER, path=tmp_path / "fi/.cache/flashinfer", recorded="/h/.cache/flashinfer"
    )
    image = packed(layout, vllm(tmp_path / "v"), triton(tmp_path / "t", recorded="/t"), flashinfer)
    assert [root.prefix for root in image.inventory.roots] == [
        "io.vllm.cache/triton",
        "io.vllm.cache/flashinfer",
        "io.vllm.cache",
    ]
    # MCV would take the image for one of Triton's if it had such a label.
    assert not [name for name in image.labels if name.startswith("cache.triton")]
    assert json.loads(image.labels["io.kserve.km/cache-mounts"]) == [
        {"subPath": "triton", "absPath": "/t", "env": "TRITON_CACHE_DIR", "requiresWritable": True},
        {"subPath": "flashinfer", "absPath": "/h/.cache/flashinfer", "requiresWritable": True},
    ]
    assert image.labels["io.kserve.km/split-cache-capture"] == "true"
    # MCVs of old read the last layer only.
    assert "io.vllm.manifest/manifest.json" in names(layout, image, 2)
    assert image.inventory.targets == [CUDA, HIP]


def test_what_mcv_has_no_form_for_lies_where_it_does_not_look(layout: Layout, tmp_path: Path) -> None:
    write(tmp_path / "c/index")
    cuda = CacheRoot(kind=CacheKind.CUDA, path=tmp_path / "c", recorded="/c")
    image = packed(layout, triton(tmp_path / "t"), triton(tmp_path / "t2"), cuda)
    assert [root.prefix for root in image.inventory.roots] == [
        "io.rekindle.cache/triton-2",
        "io.rekindle.cache/cuda",
        "io.triton.cache",
    ]
    assert packed(layout, cuda).labels == {}


def test_a_vllm_that_compiled_nothing_is_nothing_for_mcv(layout: Layout, tmp_path: Path) -> None:
    write(tmp_path / "v/modelinfos/llama.json", "{}")
    root = CacheRoot(kind=CacheKind.VLLM, path=tmp_path / "v", recorded="/v")
    image = packed(layout, root, triton(tmp_path / "t"))
    assert [each.prefix for each in image.inventory.roots] == ["io.rekindle.cache/vllm", "io.triton.cache"]
    assert "cache.triton.image/summary" in image.labels
    assert packed(layout, root).labels == {}


def test_a_directory_of_vllms_own_is_not_taken_for_another_cache(layout: Layout, tmp_path: Path) -> None:
    root = vllm(tmp_path / "v")
    write(tmp_path / "v/triton/notes")
    image = packed(layout, root, triton(tmp_path / "t"))
    assert image.inventory.roots[0].prefix == "io.vllm.cache/triton-2"


def test_the_inventory_names_entries_and_what_they_are_for(layout: Layout, tmp_path: Path) -> None:
    write(tmp_path / "x/py311_cu129/ext/ext.so")
    extension = CacheRoot(
        kind=CacheKind.TORCH_EXTENSIONS, path=tmp_path / "x/py311_cu129", recorded="/x/py311_cu129"
    )
    write(tmp_path / "f/0.2.5/80_90a/cached_ops/x.so")
    flashinfer = CacheRoot(kind=CacheKind.FLASHINFER, path=tmp_path / "f", recorded="/f")
    image = packed(layout, triton(tmp_path / "t"), extension, flashinfer)
    by_kind = {root.kind: root for root in image.inventory.roots}
    first, second = by_kind[CacheKind.TRITON].entries
    assert (first.key, first.targets, first.versions, first.files) == (KEY, [CUDA], {"triton": "3.9.0"}, 3)
    assert (second.key, second.targets) == (HIP_KEY, [HIP])
    (entry,) = by_kind[CacheKind.TORCH_EXTENSIONS].entries
    assert (entry.key, entry.versions) == ("ext", {"cuda": "12.9", "python": "3.11"})
    (entry,) = by_kind[CacheKind.FLASHINFER].entries
    assert (entry.key, entry.versions) == ("0.2.5/80_90a", {"flashinfer": "0.2.5"})
    assert [target.arch for target in entry.targets] == ["80", "90a"]


def test_an_entrys_digest_is_over_its_files(layout: Layout, tmp_path: Path) -> None:
    write(tmp_path / "c/a", b"one")
    write(tmp_path / "c/b", b"two")
    root = CacheRoot(kind=CacheKind.CUDA, path=tmp_path / "c", recorded="/c")
    (entry,) = packed(layout, root).inventory.roots[0].entries
    assert entry.digest == Digest.of_bytes(b"a\x003\x00one" + b"b\x003\x00two")


def test_an_inventory_does_not_grow_without_bound(layout: Layout, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(pack, "ENTRIES_LIMIT", 1)
    image = packed(layout, triton(tmp_path / "t"))
    assert [entry.key for entry in image.inventory.roots[0].entries] == ["*", "*"]
    assert image.inventory.targets == [CUDA, HIP]
    monkeypatch.setattr(pack, "ENTRIES_LIMIT", 1000)
    monkeypatch.setattr(pack, "_CONFIG_LIMIT_BYTES", 10)
    assert {entry.key for entry in packed(layout, triton(tmp_path / "t")).inventory.roots[0].entries} == {"*"}


def test_links_and_odd_names_are_left_out_and_told(layout: Layout, tmp_path: Path) -> None:
    root = triton(tmp_path / "t")
    (tmp_path / "t/link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "t/fifo")
    write(tmp_path / "t/.wh.gone")
    write(tmp_path / "t/new\nline")
    write(tmp_path / "t/Add")
    write(tmp_path / "t/add")
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/t/\xff")))
    told: list[str] = []
    found = names(layout, packed(layout, root, say=told.append), 0)
    assert len(told) == 6
    assert not [n for n in found if n.endswith(("link", "fifo", ".wh.gone", "line", "/add"))]
    assert "io.triton.cache/Add" in found


def test_nothing_to_pack_is_said(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "t/inner").mkdir(parents=True)
    with pytest.raises(UsageError):
        packed(layout, CacheRoot(kind=CacheKind.TRITON, path=tmp_path / "t", recorded="/t"))


def test_a_file_that_shrinks_meanwhile_is_refused(layout: Layout, tmp_path: Path, monkeypatch: Any) -> None:
    write(tmp_path / "c/a", bytes(3 << 20))
    monkeypatch.setattr(pack, "SEARCHED_BYTES", 1 << 20)
    monkeypatch.setattr(pack, "refuse_secrets", lambda *_: os.truncate(tmp_path / "c/a", 2 << 20))
    with pytest.raises(IntegrityError, match="changed"):
        packed(layout, CacheRoot(kind=CacheKind.CUDA, path=tmp_path / "c", recorded="/c"))
    assert not list((layout.root / "blobs/sha256").iterdir())


def test_packing_takes_little_memory(layout: Layout, tmp_path: Path) -> None:
    with open(tmp_path / "big", "wb") as file:
        for _ in range(60):
            file.write(os.urandom(1 << 20))
    (tmp_path / "c").mkdir()
    (tmp_path / "big").rename(tmp_path / "c/big")
    with memory_peak() as peak:
        packed(layout, CacheRoot(kind=CacheKind.CUDA, path=tmp_path / "c", recorded="/c"))
    assert peak[0] < 45 << 20


# Secrets


@pytest.mark.parametrize(
    "factors",
    [
        {"VLLM_API_KEY": "hunter2"},
        {"VLLM_API_KEY": ["hunter2"]},
        {"HF_TOKEN": "hunter2"},
        {"deep": {"password": {"is": "hunter2"}}},
        {"VLLM_REGISTRY": "https://ada:hunter2@example.com/"},
    ],
)
def test_a_secret_in_the_keys_factors_is_refused_by_name(
    layout: Layout, tmp_path: Path, factors: dict[str, Any]
) -> None:
    with pytest.raises(SecretError) as raised:
        packed(layout, vllm(tmp_path / "v", **factors))
    text = f"{raised.value.message} {raised.value.cause} {raised.value.hint}"
    assert "cache_key_factors.json" in text
    assert "hunter2" not in text
    assert next(iter(factors)) in text


def test_what_only_sounds_like_a_secret_is_none(layout: Layout, tmp_path: Path) -> None:
    packed(
        layout,
        vllm(
            tmp_path / "v",
            VLLM_API_KEY=None,
            OTHER_KEY="",
            VLLM_USE_FASTOKENS=False,
            VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD=1024,
            VLLM_TOKEN_COUNT="17",
            VLLM_AUTH="None",
            URL="https://example.com/a:b@c",
        ),
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x = 'hf_" + "a1B2" * 9 + "'", "Hugging Face"),
        ("token: ghp_" + "a1B2" * 9, "GitHub"),
        ("AKIA" + "A1B2" * 4, "AWS"),
        ("key=sk-proj-" + "a1B2" * 9, "API key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "private key"),
        ("-----BEGIN PRIVATE KEY-----", "private key"),
    ],
)
def test_a_token_is_known_by_its_form(text: str, named: str) -> None:
    with pytest.raises(SecretError, match=named) as raised:
        refuse_secrets(PurePosixPath("ab/kernel.py"), f"# first\n{text}\n".encode())
    assert "ab/kernel.py" in raised.value.message
    assert "line 2" in raised.value.message
    assert "a1B2" not in raised.value.message


@pytest.mark.parametrize(
    "content",
    [
        f"/root/.triton/cache/{KEY}/add.json AKIA{KEY[:48]}".encode(),
        b"task-sk-1 mask-scheduler-1234567890123456789012 sk-",
        b"hf_modeling_llama_attention_forward_with_cache",
        b"\0ELF" + b"hf_" + b"a1B2" * 9,
        b"sk-this-is-a-long-hyphenated-identifier",
        b"-----BEGIN PUBLIC KEY-----",
    ],
)
def test_hashes_names_and_binaries_are_no_tokens(content: bytes) -> None:
    refuse_secrets(PurePosixPath("kernel.py"), content)


# Reading


def test_what_was_written_is_read(layout: Layout, tmp_path: Path) -> None:
    image = packed(layout, vllm(tmp_path / "v"), triton(tmp_path / "t"))
    assert Inventory.from_json(json.loads(json.dumps(image.inventory.to_json()))) == image.inventory
    assert image.size_bytes == image.manifest.size + image.config.size + sum(x.size for x in image.layers)


def test_the_cache_of_a_snapshot_is_found_in_its_index(layout: Layout, tmp_path: Path) -> None:
    own = pack.pack([triton(tmp_path / "t")], layout, created=CREATED)
    other = structs.replace(own, annotations={})

    def index(*manifests: Descriptor) -> Descriptor:
        document = {"schemaVersion": 2, "manifests": [each.to_json() for each in manifests]}
        return layout.put(json.dumps(document).encode(), media_types.INDEX)

    assert cache_image.find(layout, index(other, own), Limits()) == own
    assert cache_image.find(layout, own, Limits()) == own
    with pytest.raises(NotFoundError):
        cache_image.find(layout, index(other), Limits())
    with pytest.raises(FormatError):
        cache_image.find(layout, index(own, own), Limits())


def spoiled(layout: Layout, tmp_path: Path, *path: Any, value: Any) -> Descriptor:
    """An image whose config differs in one place."""
    descriptor = pack.pack([triton(tmp_path / "t")], layout, created=CREATED)
    manifest = json.loads(layout.read(descriptor, limit_bytes=1 << 20))
    config = json.loads(layout.read(Descriptor.from_json(manifest["config"], "config"), limit_bytes=1 << 20))
    document = {"manifest": manifest, "config": config}
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    stored = layout.put(json.dumps(document["config"]).encode(), media_types.IMAGE_CONFIG)
    if path[:2] != ("manifest", "config"):
        manifest["config"] = stored.to_json()
    return layout.put(json.dumps(document["manifest"]).encode(), media_types.MANIFEST)


ROOT = ("config", inventory.FIELD, "roots", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("manifest", "config", "mediaType"), "application/json"),
        (("manifest", "layers", 0, "mediaType"), "application/vnd.oci.image.layer.v1.tar+zstd"),
        (("manifest", "layers"), []),
        (("manifest", "layers"), [1]),
        (("config", "rootfs", "diff_ids"), []),
        (("config", "rootfs", "diff_ids", 0), "md5:1"),
        (("config", "rootfs"), 1),
        (("config", "architecture"), KeyError),
        (("config", "config", "Labels"), {"a": 1}),
        (("config", "config", "Labels"), {str(i): "" for i in range(1001)}),
        (("config", inventory.FIELD, "schema"), "rekindle.inventory/2"),
        (("config", inventory.FIELD, "roots"), {}),
        ((*ROOT, "kind"), "coffee"),
        ((*ROOT, "layer"), 1),
        ((*ROOT, "layer"), -1),
        ((*ROOT, "prefix"), "etc"),
        ((*ROOT, "prefix"), "io.vllm.cache/../x"),
        ((*ROOT, "prefix"), "io.rekindle.cache"),
        ((*ROOT, "recorded"), "relative"),
        ((*ROOT, "recorded"), "/"),
        ((*ROOT, "recorded"), "/a/../b"),
        ((*ROOT, "recorded"), "//a"),
        ((*ROOT, "recorded"), "/a\n"),
        ((*ROOT, "recorded"), "/a\ud800"),
        ((*ROOT, "recorded"), "/" + "a" * 3000),
        ((*ROOT, "files"), True),
        ((*ROOT, "bytes"), -1),
        ((*ROOT, "entries", 0, "digest"), "sha256:"),
        ((*ROOT, "entries", 0, "key"), "k" * 256),
        ((*ROOT, "entries", 0, "targets"), [{"backend": "cuda", "arch": 90, "warp_size": 32}]),
        ((*ROOT, "entries", 0, "versions"), {str(i): "" for i in range(20)}),
        ((*ROOT, "entries"), [1]),
    ],
)
def test_a_malformed_image_is_refused(
    layout: Layout, tmp_path: Path, path: tuple[Any, ...], value: Any
) -> None:
    with pytest.raises(FormatError):
        cache_image.load(layout, spoiled(layout, tmp_path, *path, value=value), Limits())


def test_without_its_inventory_an_image_is_what_mcv_would_take_it_for(layout: Layout, tmp_path: Path) -> None:
    image = cache_image.load(
        layout, spoiled(layout, tmp_path, "config", inventory.FIELD, value=KeyError), Limits()
    )
    assert (image.counted, image.inventory.made_by) == (False, "MCV")


@pytest.mark.parametrize("field", ["layer", "prefix", "recorded"])
def test_two_roots_do_not_share_a_place(layout: Layout, tmp_path: Path, field: str) -> None:
    image = packed(layout, triton(tmp_path / "t"), vllm(tmp_path / "v"))
    document = image.inventory.to_json()
    document["roots"][0][field] = document["roots"][1][field]
    with pytest.raises(FormatError):
        Inventory.from_json(document)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON, where=st.sampled_from(["", "roots", "0", "entries", "first", "key", "targets", "prefix"]))
def test_any_json_is_an_inventory_or_an_error(value: Any, where: str) -> None:
    entry = {"key": "k", "targets": [documents.to_json(CUDA)], "versions": {}, "files": 1, "bytes": 1}
    entry["digest"] = Digest.of_bytes(b"")
    root = {"kind": "cuda", "recorded": "/c", "prefix": "io.rekindle.cache/cuda", "layer": 0}
    root |= {"files": 1, "bytes": 1, "entries": [entry]}
    document: Any = {"schema": inventory.SCHEMA, "made_by": "x", "roots": [root]}
    if where == "":
        document = value
    elif where == "roots":
        document["roots"] = value
    elif where == "0":
        document["roots"] = [value]
    elif where == "entries":
        root["entries"] = value
    elif where == "first":
        root["entries"] = [value]
    elif where == "prefix":
        root["prefix"] = value
    else:
        entry[where] = value
    with contextlib.suppress(FormatError):
        Inventory.from_json(document)


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value, ensure_ascii=False).encode()))
@example(b'{"0": {"TOKEN": "0a"}}')
@example(b'["://:0@"]')
def test_any_file_can_be_in_a_cache(content: bytes) -> None:
    metadata = inventory.Metadata()
    metadata.look_at_json(PurePosixPath("cache_key_factors.json"), content)
    try:
        refuse_secrets(PurePosixPath("cache_key_factors.json"), content)
    except SecretError:  # Hypothesis draws from the words of our own code, so now and then it makes one
        text = content.decode(errors="replace")
        assert is_secret_name(text) or "://" in text


@given(st.sampled_from(list(CacheKind)), st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=6))
def test_any_path_has_an_entry(kind: CacheKind, parts: list[str]) -> None:
    path = PurePosixPath(*(part.replace("/", "_") for part in parts))
    assert inventory.entry_key(kind, path) != ""


def test_an_entry_is_what_is_looked_up_by_one_key() -> None:
    for kind, path, key in (
        (CacheKind.VLLM, "torch_compile_cache/h/rank_0_0/backbone/x", "torch_compile_cache/h"),
        (
            CacheKind.VLLM,
            "torch_compile_cache/torch_aot_compile/h/x",
            "torch_compile_cache/torch_aot_compile/h",
        ),
        (CacheKind.VLLM, "modelinfos/x.json", "modelinfos"),
        (CacheKind.TRITON, "K/x", "K"),
        (CacheKind.INDUCTOR, "triton/0/K/x", "triton/0/K"),
        (CacheKind.INDUCTOR, "ab/x.py", "."),
        (CacheKind.DEEP_GEMM, "cache/kernel.x/k.cubin", "cache/kernel.x"),
        (CacheKind.CUDA, "0/1/x", "."),
    ):
        assert inventory.entry_key(kind, PurePosixPath(path)) == key


def test_many_entries_are_summed_up_by_what_they_are_for() -> None:
    def entry(number: int, *targets: Target) -> Entry:
        digest = Digest.of_bytes(str(number).encode())
        return Entry(key=str(number), targets=targets, versions={}, files=2, bytes=10, digest=digest)

    entries = [entry(1, CUDA), entry(2, HIP), entry(3, CUDA)]
    assert inventory.bounded(entries, 3) == entries
    first, second = inventory.bounded(entries, 2)
    assert (first.key, first.files, first.bytes, first.targets) == ("*", 4, 20, (CUDA,))
    assert second.files == 2


@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4))
def test_names_never_break_the_rules(parts: list[str]) -> None:
    path = PurePosixPath("/".join(parts))
    if not Names().problem(path):
        assert not path.is_absolute()
        assert ".." not in path.parts
        assert str(path).isprintable()
