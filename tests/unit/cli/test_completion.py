# SPDX-License-Identifier: Apache-2.0
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from cli import completion
from rekindle.__main__ import VERBS

_ASK = """
compopt() { :; }
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_rekindle
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("completion")
    rekindle = place / "rekindle"
    rekindle.write_text("#!/bin/sh\n[ \"$*\" = 'ps --quiet' ] && echo web-1 web-2\n")
    rekindle.chmod(0o755)
    file = place / "rekindle.bash"
    file.write_text(completion._script(completion.commands(), "bash"))
    return file


def complete(script: Path, words: Sequence[str]) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", _ASK, "bash", str(script), "rekindle", *words],
        env={"PATH": f"{script.parent}:/usr/bin:/bin"},
        cwd=script.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    return done.stdout.split()


def test_every_command_is_there(script: Path) -> None:
    assert set(complete(script, [""])) == {*VERBS, "--help", "--version"}
    assert complete(script, ["st"]) == ["stop"]
    for verb in VERBS:
        assert "--help" in complete(script, [verb, "--h"]), verb


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["restore", "tiny", "--rep"], ["--replicas", "--report"]),
        (["restore", "tiny", "--rung", ""], ["process", "neutral", "cache", "cold"]),
        (["restore", "tiny", "--publish", ""], []),
        (["restore", "--report", ""], ["rekindle", "rekindle.bash"]),
        (["restore", "tiny", "--", "vllm", "--ru"], []),
        (["snapshot", "tiny", "--keep"], []),  # it is in no help text either
        (["stop", ""], ["web-1", "web-2"]),
        (["logs", "web-2"], ["web-2"]),
        (["completion", ""], ["bash", "zsh"]),
    ],
)
def test_words_are_completed(script: Path, words: Sequence[str], found: Sequence[str]) -> None:
    assert sorted(complete(script, words)) == sorted(found)


def test_zsh_reads_it(tmp_path: Path) -> None:
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("this test needs zsh")
    file = tmp_path / "rekindle.zsh"
    file.write_text(completion._script(completion.commands(), "zsh"))
    ask = (
        f"autoload -U compinit && compinit -u -d {tmp_path}/dump && source {file} && print $_comps[rekindle]"
    )
    done = subprocess.run(
        [zsh, "-f", "-c", ask], env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert "_rekindle" in done.stdout
