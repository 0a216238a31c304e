# SPDX-License-Identifier: Apache-2.0
"""The kernel caches of LLM servers: their kinds, their paths, and the files in them that must stay behind.

"Kernel" means GPU kernel here. The paths are those of Triton 3.9 (`triton/knobs.py`), torch 2.13
(`_inductor/runtime/cache_dir_utils.py`, `utils/cpp_extension.py`), vLLM 0.32 (`envs.py`,
`utils/deep_gemm.py`), FlashInfer (`jit/env.py`), DeepGEMM (`csrc/jit/compiler.hpp`) and the CUDA
programming guide:

    kind               variable                     without it
    vllm               VLLM_CACHE_ROOT              $XDG_CACHE_HOME/vllm, ~/.cache/vllm
    triton             TRITON_CACHE_DIR             $TRITON_HOME/.triton/cache, ~/.triton/cache
    inductor           TORCHINDUCTOR_CACHE_DIR      $TMPDIR/torchinductor_USER, /tmp/torchinductor_USER
    flashinfer         FLASHINFER_WORKSPACE_BASE    ~; the cache is .cache/flashinfer below it
    deep-gemm          DG_JIT_CACHE_DIR             ~/.deep_gemm
    torch-extensions   TORCH_EXTENSIONS_DIR         a directory per Python and CUDA below
                                                    $XDG_CACHE_HOME/torch_extensions
    cuda               CUDA_CACHE_PATH              ~/.nv/ComputeCache

Model files are never part of a cache: downloading what is in HF_HOME is not our task.
"""

import os
import posixpath
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path, PurePosixPath

from msgspec import Struct


class CacheKind(StrEnum):
    """A kind of kernel cache, in the order of listings."""

    VLLM = "vllm"
    TRITON = "triton"
    INDUCTOR = "inductor"
    FLASHINFER = "flashinfer"
    DEEP_GEMM = "deep-gemm"
    TORCH_EXTENSIONS = "torch-extensions"
    CUDA = "cuda"


VARIABLES: Mapping[CacheKind, str] = {
    CacheKind.VLLM: "VLLM_CACHE_ROOT",
    CacheKind.TRITON: "TRITON_CACHE_DIR",
    CacheKind.INDUCTOR: "TORCHINDUCTOR_CACHE_DIR",
    CacheKind.FLASHINFER: "FLASHINFER_WORKSPACE_BASE",
    CacheKind.DEEP_GEMM: "DG_JIT_CACHE_DIR",
    CacheKind.TORCH_EXTENSIONS: "TORCH_EXTENSIONS_DIR",
    CacheKind.CUDA: "CUDA_CACHE_PATH",
}

# What the last names of a path call each kind.
_WORDS: Mapping[CacheKind, str] = {
    CacheKind.VLLM: "vllm",
    CacheKind.TRITON: "triton",
    CacheKind.INDUCTOR: "inductor",
    CacheKind.FLASHINFER: "flashinfer",
    CacheKind.DEEP_GEMM: "deep[-_]?gemm",
    CacheKind.TORCH_EXTENSIONS: "torch[-_]?extensions",
    CacheKind.CUDA: r"cuda|\.nv/|computecache",
}
# Those of the defaults that do not have "cache" in their path.
_WITHOUT_CACHE = re.compile(r".*/(torchinductor_[^/]+|\.deep_gemm|torch_extensions(/py3[^/]*)?)", re.DOTALL)

# FlashInfer's variable names the directory above the cache.
_BELOW_FLASHINFER_BASE = ".cache/flashinfer"

# Directories beside the kernels below VLLM_CACHE_ROOT, or below a parent that was given instead.
_VLLM_LEFT_OUT = {
    "assets",  # images and audio for tests
    "media_cache",  # uploads of users
    "huggingface",
    "hub",
    "modelscope",
    "startup_plan",  # the memory sizes of this node
    "dummy_cache",  # written to and never read
}
_P2P = re.compile(r"gpu_p2p_access_cache_for_.*\.json")  # the pairs of GPUs on this node with peer access
_MODEL_FILE = re.compile(r".*\.(safetensors|gguf)|pytorch_model.*\.bin")
_TEMPORARY = re.compile(r"tmp\.pid_\d+_.*|\..+\.rekindle-[0-9a-f]+")  # of Triton, and of `rekindle extract`


class CacheRoot(Struct, frozen=True, kw_only=True):
    """A cache: the path at which we can read it, and the absolute path at which the server sees it."""

    kind: CacheKind
    path: Path
    recorded: str


def path_of(kind: CacheKind, environment: Mapping[str, str]) -> str:
    """Return the absolute path of a cache for a process with this environment; it need not exist.

    For torch-extensions without its variable, it is the parent of one directory per Python and CUDA.
    """
    given = environment.get(VARIABLES[kind], "")
    home = environment.get("HOME") or _home()
    caches = environment.get("XDG_CACHE_HOME") or posixpath.join(home, ".cache")
    match kind:
        case CacheKind.VLLM:
            path = given or posixpath.join(caches, "vllm")
        case CacheKind.TRITON:
            path = given or posixpath.join(environment.get("TRITON_HOME") or home, ".triton", "cache")
        case CacheKind.INDUCTOR:
            path = given or posixpath.join(_temporary(environment), f"torchinductor_{_user(environment)}")
        case CacheKind.FLASHINFER:
            path = posixpath.join(given or home, _BELOW_FLASHINFER_BASE)
        case CacheKind.DEEP_GEMM:
            path = given or posixpath.join(home, ".deep_gemm")
        case CacheKind.TORCH_EXTENSIONS:
            path = given or posixpath.join(caches, "torch_extensions")
        case CacheKind.CUDA:
            path = given or posixpath.join(home, ".nv", "ComputeCache")
    if path == "~" or path.startswith("~/"):
        path = home + path[1:]
    return posixpath.normpath(posixpath.join(environment.get("PWD") or "/", path))


def is_usual_place(kind: CacheKind, path: str) -> bool:
    """Tell whether an absolute path looks like that of such a cache, on any node.

    It is one without a variable, or one that names the kind at its end and calls it a cache, such as
    `/root/.cache/vllm`, `/data/kernel-cache/triton` and `/vllm-cache`, but not `/home/vllm` or `/tmp/triton`.
    """
    parts = PurePosixPath(path).parts[1:]
    if not parts or parts[-1] == ".cache":
        return False
    end = "/" + "/".join(parts[-2:]).casefold()
    if re.search(_WORDS[kind], end) is None:
        return False
    return "cache" in "/".join(parts[-3:]).casefold() or _WITHOUT_CACHE.fullmatch(end) is not None


def environment_for(kind: CacheKind, root: str) -> dict[str, str]:
    """Return the variables that make a server use a cache at an absolute path; {} if none can."""
    if kind is CacheKind.FLASHINFER:
        base = root.removesuffix("/" + _BELOW_FLASHINFER_BASE)
        return {VARIABLES[kind]: base} if base and base != root else {}
    return {VARIABLES[kind]: root}


def path_below(kind: CacheKind, directory: Path) -> Path:
    """Return the path of a cache in its own directory such that `environment_for` can name it."""
    return directory / _BELOW_FLASHINFER_BASE if kind is CacheKind.FLASHINFER else directory


def is_within(path: str, directory: str) -> bool:
    """Tell whether a normalized path is a directory's or below it. Does not resolve links."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def is_left_out(kind: CacheKind, path: PurePosixPath) -> bool:
    """Tell whether to leave out a file or directory, given its path within the cache.

    Left out is what is private to this node or user, half-written, a model, or useless elsewhere.
    """
    name = path.name
    if _MODEL_FILE.fullmatch(name) or _TEMPORARY.fullmatch(name):
        return True
    match kind:
        case CacheKind.VLLM:
            return len(path.parts) == 1 and (name in _VLLM_LEFT_OUT or _P2P.fullmatch(name) is not None)
        case CacheKind.INDUCTOR:
            # 150 MB of precompiled C++ headers; without them, the compiler uses the plain header beside them.
            return name.endswith(".gch") or "locks" in path.parts
        case CacheKind.TORCH_EXTENSIONS:
            # torch waits until this file is gone, and the process that would remove it does not exist here.
            return name == "lock"
        case _:
            return False


def _temporary(environment: Mapping[str, str]) -> str:
    """Return the directory for temporary files, as Python's tempfile does."""
    return next((environment[name] for name in ("TMPDIR", "TEMP", "TMP") if environment.get(name)), "/tmp")  # noqa: S108


def _user(environment: Mapping[str, str]) -> str:
    """Return the user's name as Python's getpass does, as a file name as torch makes it."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        if environment.get(name):
            return re.sub(r'[\\/:*?"<>|]', "_", environment[name])
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid_{os.geteuid()}"


def _home() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return "/"
