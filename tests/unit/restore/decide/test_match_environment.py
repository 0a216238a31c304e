# SPDX-License-Identifier: Apache-2.0
"""Which variables of today forbid to restore a process, which are told, and what a record tells of them."""

import json
import os
import random
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from rekindle.engine import Endpoint, Engine
from rekindle.engine.caches import VARIABLES
from rekindle.engine.http import HttpEngine
from rekindle.engine.variables import is_noise, names_a_cache
from rekindle.engine.vllm import VllmEngine
from rekindle.environment import SECRET, describe_environment
from rekindle.record import Record
from rekindle.report import Rung
from rekindle.secrets.redact import redact_command
from restore.decide.match_environment import RestoredStart, compare, compare_restored
from restore.decide.match_process import same_command
from restore.decide.rules import RULES, Strictness, reason_for
from tests.samples.record import RECORD

HERE = Endpoint(host="127.0.0.1", port=8000)
VLLM, HTTP = VllmEngine(endpoint=HERE), HttpEngine(endpoint=HERE, options={})
KEY = "Zq8-vixen-41-Lark"


@pytest.fixture(autouse=True)
def _the_same_salts_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 65,536 changed values, a mark of 16 bits fits one."""
    monkeypatch.setattr(os, "urandom", random.Random(4).randbytes)


def recorded(environment: Mapping[str, str], engine: Engine = VLLM, withheld: Sequence[str] = ()) -> Record:
    """What `snapshot` records of the environment that it was given."""
    given = {**engine.environment(), **environment}
    values, variables = describe_environment(given, engine, (), withheld)
    return structs.replace(RECORD, environment=values, variables=variables)


def found(was: Mapping[str, str], today: Mapping[str, str], engine: Engine = VLLM) -> list[tuple[str, str]]:
    return [(each.code, each.field) for each in compare(recorded(was, engine), engine, today, [])]


SAME = ["1", "", "a value of two lines\nwith = signs", "schön", "\udcff", KEY]


@pytest.mark.parametrize("value", SAME)
@pytest.mark.parametrize("name", ["VLLM_USE_V1", "HF_HOME", "MOOD", "odd.name", "ключ"])
def test_what_is_as_it_was_is_no_difference(name: str, value: str) -> None:
    assert found({name: value}, {name: value}) == []


# By what a name says: with the engine for vLLM, and with that for any HTTP server.
KINDS = {
    **dict.fromkeys(["VLLM_USE_V1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "S3_ENDPOINT_URL"], ("hard", "told")),
    **dict.fromkeys(["SGLANG_X", "OLLAMA_HOST", "LLAMA_ARG_CTX_SIZE"], ("told", "hard")),
    **dict.fromkeys(["HF_HOME", "HF_HUB_OFFLINE", "TORCH_LOGS", "TORCHINDUCTOR_FREEZING"], ("hard", "hard")),
    **dict.fromkeys(["CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "OMP_NUM_THREADS", "MKL_X"], ("hard", "hard")),
    **dict.fromkeys(["LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHASHSEED"], ("hard", "hard")),
    **dict.fromkeys(["TZ", "LANG", "HTTP_PROXY", "HOME", "PATH", "PYTHONUNBUFFERED"], ("told", "told")),
    **dict.fromkeys(["VLLM_HOST_IP", "VLLM_PORT", "DB_PORT", "DB_HOST", "PORT"], ("told", "told")),
    **dict.fromkeys(["VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TRITON_HOME"], ("noise", "noise")),
    **dict.fromkeys(["POD_IP", "KUBERNETES_PORT", "HOSTNAME", "_", "SHLVL", "TMPDIR"], ("noise", "noise")),
    **dict.fromkeys(["X_SERVICE_HOST", "X_SERVICE_PORT", "X_SERVICE_PORT_HTTP"], ("noise", "noise")),
    **dict.fromkeys(["X_PORT_80_TCP", "X_PORT_80_UDP_ADDR", "VLLM_PORT_80_TCP_PROTO"], ("noise", "noise")),
    **dict.fromkeys(["REKINDLE_HOME", "SSH_CLIENT", "NOTIFY_SOCKET"], ("noise", "noise")),
}
CODES = {"hard": ["environment"], "told": ["environment-other"], "noise": []}


@pytest.mark.parametrize(("name", "kinds"), KINDS.items(), ids=KINDS)
def test_a_variable_counts_by_its_name(name: str, kinds: tuple[str, str]) -> None:
    for engine, kind in zip((VLLM, HTTP), kinds, strict=True):
        for was, today in (({}, {name: "x"}), ({name: "x"}, {}), ({name: "x"}, {name: "y"})):
            assert [code for code, _ in found(was, today, engine)] == CODES[kind], (engine.name, was, today)
    assert RULES["environment"].hard
    assert not RULES["environment-other"].hard


def test_the_trace_of_a_start_is_no_difference() -> None:
    assert found({"TRACEPARENT": "00-1-2-01"}, {"TRACEPARENT": "00-3-4-01", "TRACESTATE": "a=b"}) == []


def test_a_port_of_a_service_is_a_url() -> None:
    assert is_noise("HORSE_PORT", "tcp://10.0.0.7:80")
    assert not is_noise("HORSE_PORT", "80")
    assert found({}, {"HORSE_PORT": "udp://10.0.0.7:80"}) == []


def test_the_places_of_all_caches_are_known() -> None:
    assert all(names_a_cache(name) for name in VARIABLES.values())


SECRETS = [
    ("STABLE_API_KEY", KEY),
    ("DB_PASS", KEY),
    ("HALTER", "glpat-q3W5eR7tY9uI1oP2aS4d"),
    ("DATABASE_URL", f"postgres://me:{KEY}@db"),
    ("HF_ENDPOINT", f"https://me:{KEY}@mirror"),
]


@pytest.mark.parametrize(("name", "value"), SECRETS)
def test_a_secret_that_is_there_on_one_side_alone_is_hard(name: str, value: str) -> None:
    (difference,) = compare(recorded({}), VLLM, {name: value}, [])
    assert (difference.code, difference.recorded, difference.here) == ("environment-secret", "not set", "set")
    (difference,) = compare(recorded({name: value}), VLLM, {}, [])
    assert (difference.code, difference.recorded, difference.here) == ("environment-secret", "set", "not set")
    assert reason_for(difference).hard
    assert reason_for(difference).rung is Rung.PROCESS


@pytest.mark.parametrize(("name", "value"), SECRETS)
def test_a_secret_on_both_sides_is_compared_once_the_process_is_there(name: str, value: str) -> None:
    record = recorded({name: value})
    assert [each.code for each in compare(record, VLLM, {name: value}, [])] == ["secret-unknown"]
    same = RestoredStart(argv=[], environment={name: value, "OTHER": "x"})
    assert compare_restored(record, VLLM, {name: value}, [], same) == []
    for had in ({name: f"{value}2"}, {}):
        other = RestoredStart(argv=[], environment=had)
        (difference,) = compare_restored(record, VLLM, {name: value}, [], other)
        assert (difference.code, difference.field) == ("environment-secret", name)
        assert KEY not in str(difference)


@pytest.mark.parametrize("value", ["", "EMPTY", "true", "/run/secrets/token"])
def test_a_value_that_is_no_secret_is_compared_as_any_other(value: str) -> None:
    assert found({"HF_TOKEN_PATH": value}, {"HF_TOKEN_PATH": value}) == []
    assert found({"HF_TOKEN_PATH": value}, {"HF_TOKEN_PATH": "/x/file"}) == [("environment", "HF_TOKEN_PATH")]


OPTIONS = [
    (["s", "--api-key", KEY], ["s", "--api-key", KEY], True),
    (["s", "--api-key", KEY], ["s", "--api-key", "other"], False),
    (["s", f"--db-pass={KEY}"], ["s", f"--db-pass={KEY}"], True),
    (["s", f"--db-pass={KEY}"], ["s", "--db-pass=other"], False),
    (["s", "--api-key", "a", KEY], ["s", "--api-key", "a", "b"], False),
    (["s", f"http://me:{KEY}@h"], ["s", "http://me:other@h"], False),
    (["sh", "-c", f"A_KEY={KEY} s"], ["sh", "-c", "A_KEY=other s"], False),
]


@pytest.mark.parametrize(("was", "today", "same"), OPTIONS)
def test_secret_options_are_compared_with_what_the_process_was_started_with(
    was: list[str], today: list[str], same: bool
) -> None:
    """The recorded command hides both."""
    record = structs.replace(RECORD, command=redact_command(was))
    start = RestoredStart(argv=["/bin/sh", "-c", '"$@"; exit $?', "sh", *was], environment={})
    assert same_command(record.command, today)
    differences = compare_restored(record, HTTP, {}, today, start)
    assert {each.code for each in differences} == (set() if same else {"command"})
    assert {each.code for each in compare(record, HTTP, {}, today)} == {"secret-unknown"}


def test_what_rekindle_sets_itself_is_no_difference() -> None:
    assert found({}, {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}) == []
    assert found({"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}, {}) == []
    assert found({}, {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}) == [
        ("environment", "VLLM_WORKER_MULTIPROC_METHOD")
    ]


def test_what_was_withheld_from_the_server_is_no_difference() -> None:
    record = recorded({}, withheld=["COSIGN_PASSWORD"])
    assert compare(record, VLLM, {"COSIGN_PASSWORD": KEY}, []) == []


class Enforcing(VllmEngine):
    """An engine whose key of today is enforced outside of the server."""

    def enforced(self) -> frozenset[str]:
        return frozenset({"VLLM_API_KEY", "--api-key"})


@pytest.mark.parametrize("was", [{}, {"VLLM_API_KEY": KEY}])
@pytest.mark.parametrize("today", [{}, {"VLLM_API_KEY": f"{KEY}2"}])
def test_what_is_enforced_is_no_difference(was: dict[str, str], today: dict[str, str]) -> None:
    engine = Enforcing(endpoint=HERE)
    record = recorded(was, engine)
    command = ["vllm", "serve", "m", "--api-key", "x", "y", "--port", "1"]
    assert compare(record, engine, today, command) == []
    start = RestoredStart(argv=["sh", "vllm", "serve", "m"], environment=was)
    assert compare_restored(record, engine, today, command, start) == []
    assert same_command(["vllm", "serve", "m", "--port", "8000"], command, engine.enforced())
    assert same_command(
        ["vllm", "serve", "m", "--api-key=REDACTED"], ["vllm", "serve", "m"], engine.enforced()
    )
    assert not same_command(["vllm", "serve", "m"], command)
    assert not same_command(["vllm", "serve", "m", "--dtype", "half"], command, engine.enforced())


def test_an_image_that_does_not_tell_what_was_set_is_not_compared() -> None:
    assert compare(RECORD, HTTP, {"VLLM_API_KEY": KEY, "OMP_NUM_THREADS": "1"}, []) == []


def test_many_differences_do_not_flood_the_report() -> None:
    many = {f"STALL_{number}": "x" for number in range(1000)}
    assert len(found({}, {**many, "VLLM_X": "1"})) == 51
    assert found({}, {**many, "VLLM_X": "1"})[0] == ("environment", "VLLM_X")


@pytest.mark.parametrize("code", ["environment", "environment-secret", "environment-other"])
def test_a_pattern_of_the_policy_makes_a_difference_soft(code: str) -> None:
    rules = Strictness(hard=frozenset({"environment-other"}), variables=frozenset({"HF_*", "TZ"}))
    for name, hard in (("HF_HOME", False), ("TZ", False), ("VLLM_X", True), ("TZDIR", True)):
        difference = compare(recorded({}), VLLM, {name: "x"}, [])[0]
        reason = reason_for(structs.replace(difference, code=code))
        assert rules.apply(reason).hard is hard


# What the record tells


def test_the_marks_of_one_value_differ_between_snapshots_and_names() -> None:
    marks = [recorded({"HF_A": "x", "HF_B": "x"}).variables for _ in range(2)]
    assert len({mark for each in marks if each for name, mark in each.marks.items() if name[:3] == "HF_"}) > 3


def test_a_short_mark_fits_many_values() -> None:
    """So it confirms no guess: of 200,000 words, some three fit besides the right one."""
    variables = recorded({"LOGIN": "hunter2"}).variables
    assert variables is not None
    assert len(variables.marks["LOGIN"]) == 4
    assert variables.is_same("LOGIN", "hunter2")
    fits = sum(variables.is_same("LOGIN", f"word-{number}") is True for number in range(200_000))
    assert 0 < fits < 30


@given(
    st.dictionaries(
        st.sampled_from(["VLLM_API_KEY", "HF_HOME", "MOOD", "OMP_X", "DB_PASS", "TZ", "S3_X", "TORCH_LOGS"]),
        st.text("abcdefghij", min_size=12, max_size=20),
    )
)
def test_a_record_holds_no_value_that_chooses_no_kernel(environment: dict[str, str]) -> None:
    record = recorded(environment)
    text = json.dumps(json.loads(record.to_bytes()))
    assert not [value for value in environment.values() if value in text]
    assert record.variables is not None
    assert {*record.variables.marks, *record.environment} >= environment.keys()
    assert Record.parse(record.to_bytes()).variables == record.variables


def test_a_value_that_chooses_kernels_is_recorded_unless_it_is_secret() -> None:
    record = recorded({"VLLM_USE_V1": "1", "TRITON_X": f"http://me:{KEY}@h", "TRITON_KEY": KEY})
    assert record.environment == {"VLLM_USE_V1": "1"}
    assert record.variables is not None
    assert record.variables.marks["TRITON_X"] == record.variables.marks["TRITON_KEY"] == SECRET
