# SPDX-License-Identifier: Apache-2.0
"""The configuration file: what it says is taken, and a word that it does not know is an error."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.config import Config, Limits, RegistrySettings, RetryPolicy, TransferSettings
from rekindle.errors import FormatError, UsageError

FULL = b"""
[limits]
manifest_bytes = 1
record_bytes = 2
layers = 3
expansion_ratio = 4

[transfer]
jobs = 5
connect_seconds = 6
stall_seconds = 7
attempts = 8
longest_wait_seconds = 9

[registry."registry.example.com:5000"]
mirrors = ["http://127.0.0.1:30020", "https://b"]
plain_http = false
ca_file = "/etc/ssl/our-ca.pem"
cert_file = "/etc/ssl/node.pem"
key_file = "/etc/ssl/node-key.pem"

[registry.localhost]
plain_http = true
"""


@pytest.fixture(autouse=True)
def no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REKINDLE_CONFIG", raising=False)


def test_all_that_it_may_say() -> None:
    config = Config.parse(FULL)
    assert config.limits == Limits(manifest_bytes=1, record_bytes=2, layers=3, expansion_ratio=4)
    assert config.transfer == TransferSettings(
        jobs=5, connect_seconds=6, stall_seconds=7, retry=RetryPolicy(attempts=8, longest_wait_seconds=9)
    )
    assert config.registry("registry.example.com:5000") == RegistrySettings(
        mirrors=("http://127.0.0.1:30020", "https://b"),
        plain_http=False,
        ca_file=Path("/etc/ssl/our-ca.pem"),
        cert_file=Path("/etc/ssl/node.pem"),
        key_file=Path("/etc/ssl/node-key.pem"),
    )
    assert config.registry("localhost").plain_http is True
    assert config.registry("registry.example.com") == RegistrySettings()


def test_what_it_does_not_say_stays_as_it_is() -> None:
    config = Config.parse(b"[transfer]\njobs = 1\n[registry.a]\n")
    assert config.transfer == TransferSettings(jobs=1)
    assert config.limits == Limits()
    assert config.registry("a").plain_http is None
    assert Config.parse(b"") == Config()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"[limit]\n", "limit"),
        (b"[limits]\nlayer = 1\n", "layer"),
        (b"[transfer]\nmirrors = []\n", "mirrors"),
        (b'[registry.a]\nmirror = "http://b"\n', "mirror"),
        (b"[limits]\nlayers = 0\n", "layers"),
        (b"[limits]\nlayers = -1\n", "layers"),
        (b"[limits]\nlayers = true\n", "layers"),
        (b'[limits]\nlayers = "1"\n', "layers"),
        (b"[limits]\nlayers = 1.5\n", "layers"),
        (b"[transfer]\njobs = 0\n", "jobs"),
        (b"limits = 1\n", "limits"),
        (b"registry = []\n", "registry"),
        (b"[registry]\na = 1\n", "registry.a"),
        (b'[registry.a]\nplain_http = "yes"\n', "plain_http"),
        (b"[registry.a]\nca_file = 1\n", "ca_file"),
        (b'[registry.a]\nmirrors = "http://b"\n', "mirrors"),
        (b"[registry.a]\nmirrors = [1]\n", "mirrors"),
        (b"[registry.a]\nmirrors = [%s]\n" % (b'"http://b",' * 17), "mirrors"),
        (b"[limits\n", "TOML"),
        (b"\xff", "TOML"),
        (b"#" * (1 << 20) + b"#", "longer"),
    ],
)
def test_what_it_must_not_say(content: bytes, word: str) -> None:
    with pytest.raises(FormatError) as raised:
        Config.parse(content)
    assert word in f"{raised.value.message} {raised.value.cause}"


def test_an_unknown_word_comes_with_those_that_are_known() -> None:
    with pytest.raises(FormatError) as raised:
        Config.parse(b"[transfer]\nstall_second = 1\n")
    assert "stall_seconds" in raised.value.cause


def test_without_a_file_there_are_defaults(tmp_path: Path) -> None:
    assert Config.read(tmp_path) == Config()


def test_a_file_in_the_home_and_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.toml").write_text("[transfer]\njobs = 1\n")
    assert Config.read(tmp_path).transfer.jobs == 1
    (tmp_path / "other").write_text("[transfer]\njobs = 2\n")
    monkeypatch.setenv("REKINDLE_CONFIG", str(tmp_path / "other"))
    assert Config.read(tmp_path).transfer.jobs == 2


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.toml").write_text("[transfer]\njob = 1\n")
    with pytest.raises(UsageError) as raised:
        Config.read(tmp_path)
    assert str(tmp_path / "config.toml") in raised.value.message
    assert "job" in raised.value.cause
    monkeypatch.setenv("REKINDLE_CONFIG", str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="cannot read"):
        Config.read(tmp_path)
    monkeypatch.setenv("REKINDLE_CONFIG", str(tmp_path))
    with pytest.raises(UsageError, match="cannot read"):
        Config.read(tmp_path)


def test_a_gigabyte_is_no_bomb() -> None:
    assert Limits().expanded_bytes(1) == 1 << 30
    assert Limits().expanded_bytes(1 << 30) == 200 << 30
    assert Limits(expansion_ratio=2).expanded_bytes(1 << 30) == 2 << 30


WORDS = st.sampled_from(
    [
        *"=[]\"'.,{}#\n 019-",
        "limits",
        "layers",
        "transfer",
        "jobs",
        "registry",
        "mirrors",
        "plain_http",
        "true",
    ]
)


@given(st.one_of(st.binary(max_size=200), st.lists(WORDS, max_size=40).map(lambda w: "".join(w).encode())))
def test_any_bytes_are_a_configuration_or_a_format_error(content: bytes) -> None:
    try:
        config = Config.parse(content)
    except FormatError:
        return
    assert min(config.transfer.jobs, config.transfer.retry.attempts, config.limits.layers) >= 1


def test_a_file_that_is_nested_without_end_is_no_configuration() -> None:
    with pytest.raises(FormatError):
        Config.parse(b"a = " + b"[" * 50_000)
