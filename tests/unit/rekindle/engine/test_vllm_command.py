# SPDX-License-Identifier: Apache-2.0
"""vLLM's command is read as vLLM reads it: behind wrappers, abbreviated, and from its config file."""

import shlex
from pathlib import Path

import pytest

from rekindle.engine.choose import for_command
from rekindle.engine.vllm import VllmEngine
from rekindle.engine.vllm_command import is_server, read, without_api_key
from rekindle.errors import UsageError
from rekindle.node import packages

MODULE = "vllm.entrypoints.openai.api_server"


@pytest.mark.parametrize(
    ("command", "port", "model"),
    [
        ("bash -c 'vllm serve m --port 8001'", 8001, "m"),
        ("sh -c 'exec vllm serve m --port $PORT'", 8002, "m"),
        ("env X=y vllm serve m", 8000, "m"),
        ("numactl -N 0 vllm serve m --port=8001", 8001, "m"),
        ("taskset -c 0 nice -n 5 vllm serve m", 8000, "m"),
        ("uv run vllm serve m", 8000, "m"),
        ("tini -- vllm serve m", 8000, "m"),
        ("dumb-init vllm serve m", 8000, "m"),
        (f"python -m {MODULE} --model m --port 8001", 8001, "m"),
        (f"python -m {MODULE} --mo x --model m", 8000, "m"),
        ("python -m vllm.entrypoints.cli.main serve m", 8000, "m"),
        ("python3 -u -X dev -m vllm serve m", 8000, "m"),
        ("python /usr/lib/vllm/entrypoints/openai/api_server.py --model m", 8000, "m"),
        ("tini -- bash -lc 'cd /app && HF_HOME=/x exec vllm serve m --po 8001'", 8001, "m"),
        ("vllm serve --port 8001 --model m", 8001, "m"),
        ("vllm serve --model=m --served_model_name n --por=8001", 8001, "m"),
    ],
)
def test_a_server_is_recognised_as_people_write_it(command: str, port: int, model: str) -> None:
    words = shlex.split(command)
    engine = for_command(words, environment={"PORT": "8002"})
    assert isinstance(engine, VllmEngine)
    assert engine.endpoint.port == port
    assert engine.model(words) == (model, "main")
    assert is_server(words)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("bash -c 'vllm serve m | tee log'", "a pipe"),
        ("sh -c 'source /venv/bin/activate; vllm serve m'", "`source` runs before it"),
        ("numactl --strange vllm serve m", "--strange"),
    ],
)
def test_what_is_not_recognised_is_named_with_the_remedy(command: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        for_command(shlex.split(command))
    assert why in caught.value.cause
    assert "vllm serve MODEL" in caught.value.hint


@pytest.mark.parametrize(
    "options", ["--ssl_keyfile /k", "--ssl-certfile=/c", "--ssl-k /k", "--uds /s", "--ud=/s", "--grpc"]
)
def test_what_is_not_supported_is_refused_however_it_is_written(options: str) -> None:
    for command in (f"vllm serve m {options}", f"sh -c 'vllm serve m {options}'"):
        with pytest.raises(UsageError, match="is not supported"):
            for_command(shlex.split(command))


def test_another_option_that_begins_alike_is_another() -> None:
    engine = for_command(shlex.split("vllm serve m --port-range 7 --api-server-count 2 --model-impl x"))
    assert isinstance(engine, VllmEngine)
    assert engine.endpoint.port == 8000
    assert not engine.api_keys
    assert engine.model(["vllm", "serve", "m", "--model-impl", "x"]) == ("m", "main")


@pytest.mark.parametrize(
    ("options", "variable", "keys"),
    [
        ("", "", ()),
        ("", "v", ("v",)),
        ("--api-key a", "v", ("a",)),
        ("--api-key a b --port 1", "", ("a", "b")),
        ("--api_key=a", "v", ("a",)),
        ("--api-k a", "", ("a",)),
        ("--api-key a --api-key b", "", ("b",)),
        ("--api-key ''", "v", ()),
        ("--api-key=-a", "", ("-a",)),
        ("--api-key a ''", "", ("a",)),
    ],
)
def test_keys_are_those_that_vllm_would_take(options: str, variable: str, keys: tuple[str, ...]) -> None:
    found = read(shlex.split(f"vllm serve m {options}"), {"VLLM_API_KEY": variable})
    assert found
    assert found.api_keys() == keys


def test_a_key_of_the_command_itself_counts() -> None:
    for text in ("env VLLM_API_KEY=k vllm serve m", "sh -c 'VLLM_API_KEY=k exec vllm serve m'"):
        found = read(shlex.split(text), {"VLLM_API_KEY": "outer"})
        assert found
        assert found.api_keys() == ("k",)
    found = read(shlex.split("env -u VLLM_API_KEY vllm serve m"), {"VLLM_API_KEY": "outer"})
    assert found
    assert found.api_keys() == ()


def config(place: Path, text: str) -> list[str]:
    (place / "c.yaml").write_text(text)
    return ["vllm", "serve", "--config", str(place / "c.yaml")]


def test_a_config_file_is_read_and_the_command_line_wins(tmp_path: Path) -> None:
    words = config(
        tmp_path, "model: m\nport: 8001\nhost: 127.0.0.1\napi_key: [a, b]\nx: {a: [1]}\nenforce-eager: true\n"
    )
    engine = for_command(words)
    assert isinstance(engine, VllmEngine)
    assert (engine.endpoint.host, engine.endpoint.port) == ("127.0.0.1", 8001)
    assert engine.api_keys == ("a", "b")
    assert engine.model(words) == ("m", "main")
    other = for_command([*words, "--port", "9", "--api-key", "c"])
    assert isinstance(other, VllmEngine)
    assert other.endpoint.port == 9
    assert other.api_keys == ("c",)
    assert engine.model(["vllm", "serve", "n", *words[2:]]) == ("n", "main")


def test_a_config_file_in_one_word_is_ignored_as_by_vllm(tmp_path: Path) -> None:
    words = config(tmp_path, "port: 8001\n")
    engine = for_command(["vllm", "serve", "m", f"--config={words[-1]}"])
    assert engine.endpoint.port == 8000


def test_a_config_file_is_found_from_the_shells_directory(tmp_path: Path) -> None:
    config(tmp_path, "port: 8001\n")
    words = ["sh", "-c", f"cd {tmp_path} && vllm serve m --config c.yaml"]
    assert for_command(words).endpoint.port == 8001


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "a: [", "key: &a [*a]\nx: !!python/object:os.system {}", "a: " + "b" * (1 << 20)]
)
def test_a_bad_config_file_is_refused_without_its_text(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match="--config") as caught:
        for_command(config(tmp_path, text))
    assert "bbb" not in caught.value.cause
    assert "python" not in caught.value.cause


@pytest.mark.parametrize("name", ["c.json", "missing.yaml"])
def test_a_config_file_that_vllm_would_not_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(UsageError, match="--config"):
        for_command(["vllm", "serve", "m", "--config", str(tmp_path / name)])


def test_keys_are_left_out_of_comparisons() -> None:
    for text in ("vllm serve m --api-key a b --x y", "vllm serve m --api_key=a --x y", "vllm serve m --x y"):
        assert without_api_key(text.split()) == ["vllm", "serve", "m", "--x", "y"]
    assert without_api_key(["other", "--api-key", "a"]) == ["other", "--api-key", "a"]


def test_the_packages_of_a_wrapped_command_are_found(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib/python3.12/site-packages/vllm-9.9.dist-info").mkdir(parents=True)
    (tmp_path / "bin/python").write_bytes(b"\x7fELF")
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.12.1\n")
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
    for words in (["python", "x.py"], ["sh", "-c", "exec python x.py"], ["nice", "python", "x.py"]):
        assert packages.versions(words, environment).get("vllm") == "9.9"
