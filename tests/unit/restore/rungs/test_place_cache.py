# SPDX-License-Identifier: Apache-2.0
"""What a server on a recorded kernel cache finds: its variables, and the cache where they lead."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from msgspec import structs

from oci.cache.inventory import StoredRoot
from rekindle.engine import Endpoint
from rekindle.engine.caches import CacheKind
from rekindle.engine.vllm import VllmEngine
from rekindle.record import Record
from rekindle.report import Rung
from rekindle.secrets import HIDDEN
from restore.decide.rules import RULES
from restore.rungs import place_cache
from restore.rungs.place_cache import differences, places
from tests.samples.record import RECORD

COMMAND = ["vllm", "serve", "m"]
VLLM_ENGINE = VllmEngine(endpoint=Endpoint(host="127.0.0.1", port=8000))


def recorded(command: Sequence[str] = COMMAND, /, **variables: str) -> Record:
    environment = {**VLLM_ENGINE.environment(), **variables}
    return structs.replace(RECORD, environment=environment, command=command)


# The environment.


def environment(record: Record, own: Mapping[str, str]) -> dict[str, str]:
    return place_cache.environment(record, VLLM_ENGINE, own)[0]


def test_what_is_set_here_wins_and_what_chooses_kernels_fills_the_gaps() -> None:
    record = recorded(VLLM_USE_V1="recorded", TRITON_DEBUG="recorded")
    own = {"TRITON_DEBUG": "here", "C": "here"}
    found, replayed = place_cache.environment(record, VLLM_ENGINE, own)
    assert found == {"VLLM_USE_V1": "recorded", "TRITON_DEBUG": "here", "C": "here"}
    (told,) = replayed
    assert (told.code, told.field, told.recorded, told.here) == (
        "cache-replayed",
        "VLLM_USE_V1",
        "recorded",
        "not set",
    )


def test_a_variable_that_is_empty_here_is_set() -> None:
    assert environment(recorded(VLLM_USE_V1="1"), {"VLLM_USE_V1": ""}) == {"VLLM_USE_V1": ""}
    assert environment(recorded(VLLM_USE_V1=""), {}) == {"VLLM_USE_V1": ""}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "HOME",
            "PATH",
            "PWD",
            "USER",
            "TMPDIR",
            "HOSTNAME",
            "LANG",
            "TZ",
            "HTTP_PROXY",
            "LD_PRELOAD",
            "POD_IP",
        ),
        *(
            "CUDA_VISIBLE_DEVICES",
            "OMP_NUM_THREADS",
            "HF_HOME",
            "HF_HUB_OFFLINE",
            "PYTHONPATH",
            "LD_LIBRARY_PATH",
        ),
        *("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TRITON_HOME", "XDG_CACHE_HOME", "REKINDLE_HOME"),
        # They open, limit or load something.
        *("VLLM_API_KEY", "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_PLUGINS"),
        *("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_USE_MODELSCOPE", "VLLM_HOST_IP", "VLLM_LOGGING_LEVEL"),
        *("VLLM_MAX_N_SEQUENCES", "VLLM_WORKER_MULTIPROC_METHOD", "VLLM_SOMETHING_OF_TOMORROW"),
    ],
)
def test_what_does_more_than_to_choose_kernels_is_that_of_today(name: str) -> None:
    """Also from an image of an earlier version, which recorded them."""
    assert environment(recorded(COMMAND, **{name: "recorded"}), {}) == {}


@pytest.mark.parametrize(
    "name",
    ["VLLM_USE_DEEP_GEMM", "VLLM_ROCM_USE_AITER", "TORCHINDUCTOR_FREEZING", "CUDA_HOME", "DG_JIT_DEBUG"],
)
def test_what_chooses_kernels_comes_along(name: str) -> None:
    assert environment(recorded(COMMAND, **{name: "recorded"}), {}) == {name: "recorded"}


def test_what_was_hidden_is_not_set() -> None:
    assert environment(recorded(TRITON_X=f"https://{HIDDEN}@host"), {}) == {}


# What may change the keys of a cache.

DIFFERENCES: dict[str, tuple[dict[str, str], dict[str, str], list[tuple[str, str, str]]]] = {
    "none": ({"VLLM_USE_V1": "1"}, {"VLLM_USE_V1": "1"}, []),
    "another value": ({"VLLM_USE_V1": "1"}, {"VLLM_USE_V1": "0"}, [("VLLM_USE_V1", "1", "0")]),
    "not set": ({"TRITON_DEBUG": "1"}, {}, [("TRITON_DEBUG", "1", "not set")]),
    "set here": ({}, {"TORCHINDUCTOR_FREEZING": "1"}, [("TORCHINDUCTOR_FREEZING", "not set", "1")]),
    "empty here": ({"CUDA_HOME": "/c"}, {"CUDA_HOME": ""}, [("CUDA_HOME", "/c", "empty")]),
    "what no key holds": ({"PATH": "/a", "LANG": "C"}, {"PATH": "/b"}, []),
    "where a cache lies": ({"VLLM_CACHE_ROOT": "/a", "TRITON_CACHE_DIR": "/a"}, {}, []),
    "where a server listens": ({"VLLM_PORT": "1", "VLLM_HOST_IP": "::1"}, {"VLLM_PORT": "2"}, []),
    "a secret": ({}, {"VLLM_API_KEY": "hunter2"}, []),
    "what was hidden": ({"VLLM_MIRROR": f"https://{HIDDEN}@h"}, {"VLLM_MIRROR": "https://a:b@h"}, []),
    "in order": (
        {},
        {"VLLM_B": "1", "FLASHINFER_A": "1"},
        [("FLASHINFER_A", "not set", "1"), ("VLLM_B", "not set", "1")],
    ),
}


@pytest.mark.parametrize(("was", "here", "wanted"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_variables_that_differ(
    was: Mapping[str, str], here: Mapping[str, str], wanted: list[tuple[str, str, str]]
) -> None:
    reasons = differences(recorded(COMMAND, **was), VLLM_ENGINE, here, COMMAND)
    assert [(reason.field, reason.recorded, reason.here) for reason in reasons] == wanted
    assert {reason.code for reason in reasons} <= {"cache-environment"}
    assert (RULES["cache-environment"].rung, RULES["cache-environment"].hard) == (Rung.CACHE, False)


def test_a_command_that_differs_in_more_than_its_address() -> None:
    record = recorded(["vllm", "serve", "m", "--port", "8000"])
    assert (
        differences(record, VLLM_ENGINE, {}, ["/opt/bin/vllm", "serve", "m", "--host=::", "--port=9000"])
        == []
    )
    (reason,) = differences(record, VLLM_ENGINE, {}, ["vllm", "serve", "m", "--api-key", "hunter2hunter2"])
    assert (reason.field, reason.recorded) == ("command", "vllm serve m")
    assert "hunter2" not in reason.here


def test_a_great_environment_does_not_flood_the_report() -> None:
    many = {f"VLLM_{number}": "x" * 5000 for number in range(1000)}
    reasons = differences(recorded(), VLLM_ENGINE, many, COMMAND)
    assert len(reasons) == 50
    assert all(len(reason.here) <= 200 for reason in reasons)


# Where caches go.


def root(kind: CacheKind, recorded: str, name: str = "") -> StoredRoot:
    prefix = f"io.rekindle.cache/{name or kind}"
    return StoredRoot(kind=kind, recorded=recorded, prefix=prefix, layer=0, files=1, bytes=1, entries=[])


VLLM, TRITON = root(CacheKind.VLLM, "/was/vllm"), root(CacheKind.TRITON, "/was/triton")
SECOND = root(CacheKind.TRITON, "/was/second", "triton-2")
FLASHINFER = root(CacheKind.FLASHINFER, "/was/.cache/flashinfer")
EXTENSIONS = root(CacheKind.TORCH_EXTENSIONS, "/was/torch_extensions/py311_cu129")

PLACES: dict[str, tuple[list[StoredRoot], dict[str, str], str, dict[str, str], dict[str, str]]] = {
    "where they were": (
        [VLLM, TRITON],
        {},
        "",
        {"vllm": "/was/vllm", "triton": "/was/triton"},
        {"VLLM_CACHE_ROOT": "/was/vllm", "TRITON_CACHE_DIR": "/was/triton"},
    ),
    "where a variable says": (
        [VLLM, TRITON],
        {"TRITON_CACHE_DIR": "/here//t/"},
        "",
        {"vllm": "/was/vllm", "triton": "/here/t"},
        {"VLLM_CACHE_ROOT": "/was/vllm", "TRITON_CACHE_DIR": "/here/t"},
    ),
    "an empty variable says nothing": (
        [TRITON],
        {"TRITON_CACHE_DIR": ""},
        "",
        {"triton": "/was/triton"},
        {"TRITON_CACHE_DIR": "/was/triton"},
    ),
    "a variable that names what is above": (
        [FLASHINFER],
        {"FLASHINFER_WORKSPACE_BASE": "/here"},
        "",
        {"flashinfer": "/here/.cache/flashinfer"},
        {"FLASHINFER_WORKSPACE_BASE": "/here"},
    ),
    "a variable whose directory holds many": (
        [EXTENSIONS],
        {"TORCH_EXTENSIONS_DIR": "/here"},
        "",
        {"torch-extensions": "/was/torch_extensions/py311_cu129"},
        {"TORCH_EXTENSIONS_DIR": "/was/torch_extensions/py311_cu129"},
    ),
    "two of one kind": (
        [SECOND, TRITON],
        {},
        "",
        {"triton": "/was/triton", "triton-2": "/was/second"},
        {"TRITON_CACHE_DIR": "/was/triton"},
    ),
    "two of one kind, and a variable": (
        [SECOND, TRITON],
        {"TRITON_CACHE_DIR": "/here"},
        "",
        {"triton": "/here", "triton-2": "/was/second"},
        {"TRITON_CACHE_DIR": "/here"},
    ),
    "variables that lead destinations of two kernel caches": (
        [VLLM, TRITON],
        {"VLLM_CACHE_ROOT": "/here", "TRITON_CACHE_DIR": "/here/triton"},
        "",
        {"vllm": "/here", "triton": "/was/triton"},
        {"VLLM_CACHE_ROOT": "/here", "TRITON_CACHE_DIR": "/was/triton"},
    ),
    "variables that lead to one place": (
        [VLLM, TRITON],
        {"VLLM_CACHE_ROOT": "/here", "TRITON_CACHE_DIR": "/here"},
        "",
        {"vllm": "/here", "triton": "/was/triton"},
        {"VLLM_CACHE_ROOT": "/here", "TRITON_CACHE_DIR": "/was/triton"},
    ),
    "below a directory": (
        [VLLM, FLASHINFER, SECOND, TRITON],
        {"TRITON_CACHE_DIR": "/here"},
        "/to",
        {
            "vllm": "/to/vllm",
            "flashinfer": "/to/flashinfer/.cache/flashinfer",
            "triton": "/to/triton",
            "triton-2": "/to/triton-2",
        },
        {
            "VLLM_CACHE_ROOT": "/to/vllm",
            "FLASHINFER_WORKSPACE_BASE": "/to/flashinfer",
            "TRITON_CACHE_DIR": "/to/triton",
        },
    ),
    "nothing": ([], {"TRITON_CACHE_DIR": "/here"}, "", {}, {}),
}


@pytest.mark.parametrize(("roots", "own", "directory", "wanted", "variables"), PLACES.values(), ids=PLACES)
def test_caches_go(
    roots: list[StoredRoot],
    own: dict[str, str],
    directory: str,
    wanted: dict[str, str],
    variables: dict[str, str],
) -> None:
    found, lead = places(roots, own, Path(directory) if directory else None)
    assert {name: str(path) for name, path in found.items()} == wanted
    assert lead == variables
