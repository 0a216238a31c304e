# SPDX-License-Identifier: Apache-2.0
"""Images that MCV made: what their labels tell, and what is extracted of them."""

import json
from pathlib import Path

import pytest

from oci.cache import extract as extraction
from oci.cache import image as cache_image
from oci.cache.image import CacheImage
from oci.cache.inventory import Target
from oci.layout import Layout
from oci.trust.verifier import dangerously_skip
from rekindle.config import Limits
from rekindle.engine.caches import CacheKind
from rekindle.errors import FormatError, UsageError
from tests.samples.cache import KEY, image_of_mcv, tree, triton, vllm, write

LIMITS = Limits()
ROOT_ENV = "io.kserve.km/cache-root-env"
MOUNTS = "io.kserve.km/cache-mounts"


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.create(tmp_path / "layout")


def loaded(layout: Layout, kind: CacheKind, tree: Path, **labels: str) -> CacheImage:
    return cache_image.load(layout, image_of_mcv(layout, kind, tree, **labels), LIMITS)


def test_a_cache_of_triton_that_mcv_packed_comes_out(layout: Layout, tmp_path: Path) -> None:
    triton(tmp_path / "t", recorded="/elsewhere")
    image = loaded(layout, CacheKind.TRITON, tmp_path / "t")
    assert image.inventory.made_by == "MCV"
    assert image.inventory.targets == [Target(backend="cuda", arch="90", warp_size=32)]
    (root,) = image.inventory.roots
    assert root.recorded.endswith("/.triton/cache")
    done = extraction.extract(dangerously_skip(image), tmp_path / "out", limits=LIMITS)
    assert tree(tmp_path / "out/triton").keys() == tree(tmp_path / "t").keys()
    assert (done.roots[0].files, done.written_bytes) == (6, root.bytes)
    assert done.environment == {"TRITON_CACHE_DIR": str(tmp_path / "out/triton")}
    children = json.loads((tmp_path / "out/triton" / KEY / "__grp__add.json").read_text())["child_paths"]
    assert children["add.cubin"] == str(tmp_path / "out/triton" / KEY / "add.cubin")


def test_the_caches_within_one_of_vllm_have_their_variables(layout: Layout, tmp_path: Path) -> None:
    vllm(tmp_path / "v")
    triton(tmp_path / "v/triton")
    write(tmp_path / "v/flashinfer/x.so")
    mounts = [
        {"subPath": "triton", "absPath": "/tmp/triton", "env": "TRITON_CACHE_DIR", "requiresWritable": True},
        {"subPath": "inductor", "absPath": "/tmp/i", "env": "TORCHINDUCTOR_CACHE_DIR"},  # not in the layer
        {"subPath": "flashinfer", "absPath": "/tmp/f"},
        {"subPath": "x", "absPath": "/x", "env": "LD_PRELOAD"},
    ]
    labels = {ROOT_ENV: "VLLM_CACHE_ROOT=/home/kserve/.cache/vllm", MOUNTS: json.dumps(mounts)}
    image = loaded(layout, CacheKind.VLLM, tmp_path / "v", **labels)
    assert image.inventory.roots[0].recorded == "/home/kserve/.cache/vllm"
    done = extraction.extract(dangerously_skip(image), tmp_path / "out", limits=LIMITS)
    assert done.environment == {
        "VLLM_CACHE_ROOT": str(tmp_path / "out/vllm"),
        "TRITON_CACHE_DIR": str(tmp_path / "out/vllm/triton"),
    }
    assert tree(tmp_path / "out/vllm").keys() == tree(tmp_path / "v").keys()


def test_it_goes_to_no_other_places_than_ours(layout: Layout, tmp_path: Path) -> None:
    vllm(tmp_path / "v")
    image = loaded(layout, CacheKind.VLLM, tmp_path / "v", **{ROOT_ENV: "VLLM_CACHE_ROOT=/home/alice"})
    with pytest.raises(UsageError, match="unasked"):
        extraction.extract(dangerously_skip(image), None, limits=LIMITS)
    write(tmp_path / "v/.bashrc")
    image = loaded(layout, CacheKind.VLLM, tmp_path / "v")
    with pytest.raises(FormatError, match="logins"):
        extraction.extract(dangerously_skip(image), tmp_path / "out", limits=LIMITS)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "labels",
    [
        {"cache.vllm.image/cache-size-bytes": "-1"},
        {"cache.vllm.image/cache-size-bytes": "9" * 99},
        {"cache.vllm.image/summary": '{"targets": [1]}'},
        {"cache.vllm.image/summary": '{"targets": [{"backend": "cuda", "arch": 90, "warp_size": -1}]}'},
        {ROOT_ENV: "VLLM_CACHE_ROOT=relative"},
        {ROOT_ENV: "VLLM_CACHE_ROOT=/a/../b"},
        {MOUNTS: "["},
        {MOUNTS: '[{"subPath": "../x", "env": "TRITON_CACHE_DIR"}]'},
        {MOUNTS: '[{"subPath": 1, "env": "TRITON_CACHE_DIR"}]'},
    ],
    ids=str,
)
def test_malformed_labels_are_refused(layout: Layout, tmp_path: Path, labels: dict[str, str]) -> None:
    vllm(tmp_path / "v")
    with pytest.raises(FormatError):
        loaded(layout, CacheKind.VLLM, tmp_path / "v", **labels)


def test_more_than_the_limits_allow_is_refused(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "v/torch_compile_cache/h/x", bytes(3 << 20))

    class Small(Limits, frozen=True):
        def expanded_bytes(self, stored_bytes: int) -> int:
            return 1 << 20

    liar = {"cache.vllm.image/cache-size-bytes": "7"}
    image = loaded(layout, CacheKind.VLLM, tmp_path / "v", **liar)
    with pytest.raises(FormatError):
        extraction.extract(dangerously_skip(image), tmp_path / "out", limits=Small())
    monkeypatch.setattr(extraction, "FILES_LIMIT", 1)
    write(tmp_path / "v/torch_compile_cache/h/y")
    image = loaded(layout, CacheKind.VLLM, tmp_path / "v")
    with pytest.raises(FormatError):
        extraction.extract(dangerously_skip(image), tmp_path / "out", limits=LIMITS)
    assert not (tmp_path / "out").exists()


def test_an_image_of_neither_is_named(layout: Layout, tmp_path: Path) -> None:
    vllm(tmp_path / "v")
    descriptor = image_of_mcv(layout, CacheKind.INDUCTOR, tmp_path / "v")
    with pytest.raises(FormatError, match="by MCV in a single layer"):
        cache_image.load(layout, descriptor, LIMITS)
