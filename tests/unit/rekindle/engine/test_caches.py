# SPDX-License-Identifier: Apache-2.0
"""Where kernel caches lie, how they are found and recognised, and what of them does not travel."""

from pathlib import Path, PurePosixPath

import pytest

from rekindle.engine import find_caches
from rekindle.engine.caches import (
    VARIABLES,
    CacheKind,
    environment_for,
    is_left_out,
    is_usual_place,
    is_within,
    path_below,
    path_of,
)
from tests.samples.cache import KEY, triton, vllm, write

HOME = {"HOME": "/home/ada", "USER": "ada"}


@pytest.mark.parametrize(
    ("kind", "environment", "path"),
    [
        (CacheKind.VLLM, {}, "/home/ada/.cache/vllm"),
        (CacheKind.VLLM, {"XDG_CACHE_HOME": "/x"}, "/x/vllm"),
        (CacheKind.VLLM, {"VLLM_CACHE_ROOT": "~/v"}, "/home/ada/v"),
        (CacheKind.TRITON, {}, "/home/ada/.triton/cache"),
        (CacheKind.TRITON, {"TRITON_HOME": "/t"}, "/t/.triton/cache"),
        (CacheKind.TRITON, {"TRITON_CACHE_DIR": "/c/", "TRITON_HOME": "/t"}, "/c"),
        (CacheKind.INDUCTOR, {}, "/tmp/torchinductor_ada"),
        (CacheKind.INDUCTOR, {"TMPDIR": "/t", "LOGNAME": "a:b"}, "/t/torchinductor_a_b"),
        (CacheKind.INDUCTOR, {"TORCHINDUCTOR_CACHE_DIR": "i", "PWD": "/srv"}, "/srv/i"),
        (CacheKind.FLASHINFER, {}, "/home/ada/.cache/flashinfer"),
        (CacheKind.FLASHINFER, {"FLASHINFER_WORKSPACE_BASE": "/f"}, "/f/.cache/flashinfer"),
        (CacheKind.DEEP_GEMM, {}, "/home/ada/.deep_gemm"),
        (CacheKind.TORCH_EXTENSIONS, {}, "/home/ada/.cache/torch_extensions"),
        (CacheKind.CUDA, {}, "/home/ada/.nv/ComputeCache"),
        (CacheKind.CUDA, {"CUDA_CACHE_PATH": "/a/../n"}, "/n"),
    ],
)
def test_a_cache_lies_where_its_framework_puts_it(
    kind: CacheKind, environment: dict[str, str], path: str
) -> None:
    assert path_of(kind, HOME | environment) == path


@pytest.mark.parametrize("kind", CacheKind)
def test_the_variables_lead_to_the_place_that_they_are_for(kind: CacheKind) -> None:
    root = path_below(kind, Path("/caches") / kind)
    environment = environment_for(kind, str(root))
    assert set(environment) == {VARIABLES[kind]}
    assert path_of(kind, HOME | environment) == str(root)


def test_no_variable_leads_to_a_flashinfer_cache_elsewhere() -> None:
    assert environment_for(CacheKind.FLASHINFER, "/f/cached") == {}


@pytest.mark.parametrize(
    ("kind", "path", "left_out"),
    [
        (CacheKind.VLLM, "gpu_p2p_access_cache_for_0,1.json", True),
        (CacheKind.VLLM, "assets", True),
        (CacheKind.VLLM, "torch_compile_cache/assets", False),
        (CacheKind.VLLM, "torch_compile_cache/h/model.safetensors", True),
        (CacheKind.TRITON, f"{KEY}/tmp.pid_7_0f", True),
        (CacheKind.TRITON, f"{KEY}/add.cubin", False),
        (CacheKind.TRITON, ".cache.rekindle-0f0f", True),
        (CacheKind.INDUCTOR, "precompiled_headers/x.h.gch", True),
        (CacheKind.TORCH_EXTENSIONS, "ext/lock", True),
        (CacheKind.FLASHINFER, "0.2.5/90/cached_ops/lock", False),
    ],
)
def test_what_is_of_one_node_only_does_not_travel(kind: CacheKind, path: str, left_out: bool) -> None:
    assert is_left_out(kind, PurePosixPath(path)) is left_out


@pytest.mark.parametrize(
    ("path", "directory", "within"),
    [
        ("/a", "/a", True),
        ("/a/b/c", "/a", True),
        ("/a/b", "/a/", True),
        ("/a", "/", True),
        ("/ab", "/a", False),
        ("/a", "/a/b", False),
    ],
)
def test_a_path_is_within_a_directory_by_whole_names(path: str, directory: str, within: bool) -> None:
    assert is_within(path, directory) is within


def test_caches_are_found_by_the_environment(tmp_path: Path) -> None:
    triton(tmp_path / "t")
    vllm(tmp_path / "v")
    (tmp_path / "empty").mkdir()
    environment = HOME | {"HOME": str(tmp_path / "home")}
    environment |= {"TRITON_CACHE_DIR": "/in/t", "VLLM_CACHE_ROOT": "/in/v", "CUDA_CACHE_PATH": "/in/empty"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = "/in/none"
    roots = find_caches.find(environment, [], lambda path: tmp_path / path.removeprefix("/in/"))
    assert [(root.kind, root.recorded) for root in roots] == [
        (CacheKind.VLLM, "/in/v"),
        (CacheKind.TRITON, "/in/t"),
    ]
    assert [root.path for root in roots] == [tmp_path / "v", tmp_path / "t"]


@pytest.mark.parametrize(
    ("kind", "root", "path"),
    [
        (CacheKind.TRITON, "somewhere", f"{KEY}/add.so"),
        (CacheKind.TRITON, ".triton/cache", "old-key/add.so"),
        (CacheKind.INDUCTOR, "tmp/torchinductor_root", "ab/cab.so"),
        (CacheKind.INDUCTOR, "tmp/torchinductor_root", f"triton/0/{KEY}/x.so"),
        (CacheKind.VLLM, "v", "torch_compile_cache/h/rank_0_0/inductor_cache/ab/cab.so"),
        (CacheKind.FLASHINFER, "h/.cache/flashinfer", "0.2.5/90/cached_ops/x/x.so"),
        (CacheKind.TORCH_EXTENSIONS, "h/torch_extensions/py311_cu129", "x/x.so"),
        (CacheKind.DEEP_GEMM, "h/.deep_gemm", "cache/kernel.x.1/kernel.cubin"),
        (CacheKind.CUDA, "h/.nv/ComputeCache", "0/1/x"),
    ],
)
def test_caches_are_found_by_what_is_mapped(tmp_path: Path, kind: CacheKind, root: str, path: str) -> None:
    file = write(tmp_path / root / path)
    (only,) = find_caches.find(
        {"HOME": str(tmp_path / "nobody"), "TMPDIR": "/nowhere"}, [f"{file} (deleted)", "socket:[1]"], Path
    )
    assert (only.kind, only.recorded) == (kind, str(tmp_path / root))


def test_a_cache_within_another_is_no_second_one(tmp_path: Path) -> None:
    vllm(tmp_path / "v")
    inner = write(tmp_path / "v/torch_compile_cache/h/rank_0_0/triton_cache" / KEY / "x.so")
    environment = {"HOME": "/nobody", "TMPDIR": "/nowhere", "VLLM_CACHE_ROOT": str(tmp_path / "v")}
    environment["TRITON_CACHE_DIR"] = str(inner.parent.parent)
    (only,) = find_caches.find(environment, [str(inner)], Path)
    assert only.kind is CacheKind.VLLM


def test_models_are_no_cache_of_kernels(tmp_path: Path) -> None:
    write(tmp_path / "cache/huggingface/hub/model")
    write(tmp_path / "cache/torch_compile_cache/h/x")
    environment = {"HOME": "/nobody", "TMPDIR": "/nowhere", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert find_caches.find(environment | {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}, [], Path) == []
    (tmp_path / "hub").mkdir()
    triton(tmp_path / "hub/t")
    environment = {"HOME": "/nobody", "TMPDIR": "/nowhere", "HF_HOME": str(tmp_path / "hub")}
    assert find_caches.find(environment | {"TRITON_CACHE_DIR": str(tmp_path / "hub/t")}, [], Path) == []


def test_torch_extensions_are_one_cache_for_each_python(tmp_path: Path) -> None:
    for build in ("py311_cu129", "py312_cpu"):
        write(tmp_path / "torch_extensions" / build / "x/x.so")
    environment = {"HOME": "/nobody", "TMPDIR": "/nowhere", "XDG_CACHE_HOME": str(tmp_path)}
    assert [root.path.name for root in find_caches.find(environment, [], Path)] == [
        "py311_cu129",
        "py312_cpu",
    ]


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (CacheKind.VLLM, "torch_compile_cache/h/x"),
        (CacheKind.VLLM, "modelinfos/x.json"),
        (CacheKind.TRITON, f"{KEY}/add.json"),
        (CacheKind.TRITON, "short/__grp__add.json"),
        (CacheKind.INDUCTOR, "fxgraph/ab/x"),
        (CacheKind.FLASHINFER, "0.2.5/90/cached_ops/x.so"),
        (CacheKind.FLASHINFER, "75_80_90/generated/x.cu"),
        (CacheKind.DEEP_GEMM, "cache/kernel.x.1/kernel.cubin"),
        (CacheKind.TORCH_EXTENSIONS, "x/build.ninja"),
        (None, "holiday/picture.png"),
    ],
)
def test_a_directory_is_recognised_by_what_is_in_it(
    tmp_path: Path, kind: CacheKind | None, path: str
) -> None:
    write(tmp_path / path)
    assert find_caches.recognise(tmp_path) is kind


def test_a_cache_of_cuda_is_recognised_by_its_index(tmp_path: Path) -> None:
    write(tmp_path / "index")
    write(tmp_path / "a/b/c")
    assert find_caches.recognise(tmp_path) is CacheKind.CUDA


def test_several_caches_below_a_directory(tmp_path: Path) -> None:
    triton(tmp_path / "anything")
    vllm(tmp_path / "vllm")
    write(tmp_path / "cuda-2/blob")
    write(tmp_path / "flashinfer/.cache/flashinfer/0.2/90/x")
    write(tmp_path / "else/picture.png")
    assert {(root.kind, root.recorded) for root in find_caches.find_below(tmp_path)} == {
        (CacheKind.TRITON, str(tmp_path / "anything")),
        (CacheKind.VLLM, str(tmp_path / "vllm")),
        (CacheKind.CUDA, str(tmp_path / "cuda-2")),
        (CacheKind.FLASHINFER, str(tmp_path / "flashinfer/.cache/flashinfer")),
    }
    assert find_caches.find_below(tmp_path / "else") == []
    found = find_caches.find_below(tmp_path / "else", CacheKind.CUDA)
    assert [root.kind for root in found] == [CacheKind.CUDA]


USUAL: dict[CacheKind, list[str]] = {
    CacheKind.VLLM: [
        "/root/.cache/vllm",
        "/vllm-cache",
        "/data/vLLM/cache",
        "/mnt/cache/vllm",
        "/a/vllm_cache/x",
    ],
    CacheKind.TRITON: ["/home/a/.triton/cache", "/data/kernel-cache/triton", "/tmp/triton_cache"],
    CacheKind.INDUCTOR: [
        "/tmp/torchinductor_root",
        "/dev/shm/tmp/torchinductor_uid_7",
        "/root/.cache/inductor",
    ],
    CacheKind.FLASHINFER: ["/root/.cache/flashinfer", "/base/.cache/flashinfer"],
    CacheKind.DEEP_GEMM: ["/root/.deep_gemm", "/root/.cache/deep-gemm", "/cache/deepgemm"],
    CacheKind.TORCH_EXTENSIONS: [
        "/root/.cache/torch_extensions/py312_cu129",
        "/a/torch_extensions/py312_cpu",
    ],
    CacheKind.CUDA: ["/root/.nv/ComputeCache", "/data/cuda-cache"],
}


@pytest.mark.parametrize("kind", CacheKind)
def test_a_place_tells_its_kind(kind: CacheKind) -> None:
    assert is_usual_place(kind, path_of(kind, {"HOME": "/home/alice"}))
    for path in USUAL[kind]:
        assert is_usual_place(kind, path), path
    others = [path for other in CacheKind if other is not kind for path in USUAL[other]]
    for path in (
        *others,
        "/",
        "/home/vllm",
        "/home/vllm/.cache",
        "/opt/triton",
        "/root/.nv",
        "/root/.triton",
    ):
        assert not is_usual_place(kind, path), path
