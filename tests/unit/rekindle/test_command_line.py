# SPDX-License-Identifier: Apache-2.0
"""A command is unwrapped to its program without running anything, or it is said what cannot be told."""

import shlex
import subprocess

import pytest

from rekindle.command_line import UnclearCommand, unwrap, with_words
from rekindle.shell_text import TEXT_LIMIT_CHARACTERS

VARIABLES = {"M": "model", "ARGS": " --a b  --c ", "EMPTY": "", "HOME": "/home/me", "STAR": "*"}

PLAIN = {
    "vllm serve m": "vllm serve m",
    "env X=y vllm serve m": "vllm serve m",
    "env -i -u A --unset=B -C /tmp X=y vllm serve": "vllm serve",
    "env -S 'X=1 vllm' serve": "vllm serve",
    "nice vllm serve": "vllm serve",
    "nice -n 5 vllm serve": "vllm serve",
    "nice -10 vllm serve": "vllm serve",
    "ionice -c2 -n 7 vllm serve": "vllm serve",
    "taskset 0xf vllm serve": "vllm serve",
    "taskset -c 0-3 vllm serve": "vllm serve",
    "numactl -N 0 vllm serve": "vllm serve",
    "numactl -N0 --membind=0 --localalloc vllm serve": "vllm serve",
    "numactl --cpunodebind 0 -- vllm serve": "vllm serve",
    "tini -- vllm serve": "vllm serve",
    "/usr/bin/tini -s -g vllm serve": "vllm serve",
    "dumb-init -c vllm serve": "vllm serve",
    "uv run vllm serve": "vllm serve",
    "uv run --no-sync --with x -p 3.12 -- vllm serve": "vllm serve",
    "poetry run vllm serve": "vllm serve",
    "conda run -n env --no-capture-output vllm serve": "vllm serve",
    "nohup stdbuf -oL setsid -w vllm serve": "vllm serve",
    "timeout -k 5 1h vllm serve": "vllm serve",
    "gosu me vllm serve": "vllm serve",
    "setpriv --reuid 1000 --clear-groups --nnp --inh-caps=-all vllm serve": "vllm serve",
    "choom -n 500 -- vllm serve": "vllm serve",
    "chrt -f 10 vllm serve": "vllm serve",
    "tini -- env A=1 numactl -N 0 sh -c 'exec vllm serve'": "vllm serve",
    "python -m vllm serve": "python -m vllm serve",
    "somewrapper vllm serve": "somewrapper vllm serve",
    "sh script.sh vllm": "sh script.sh vllm",
    "uv pip install x": "uv pip install x",
}


@pytest.mark.parametrize(("command", "program"), PLAIN.items())
def test_wrappers_are_taken_off(command: str, program: str) -> None:
    assert shlex.join(unwrap(shlex.split(command)).argv) == program


TEXTS = [
    "prog a b",
    "exec prog a",
    "exec prog 'a b' \"c d\" e\\ f",
    'prog "$M" $M ${M} ${M}x "${M}"',
    "prog $ARGS end",
    'prog "$ARGS" $EMPTY "$EMPTY"',
    "prog x$ARGS",
    "prog ${UNSET:-8000} ${EMPTY:-x} ${EMPTY-y} ${M:-z}",
    "X=1 Y='2 3' prog a",
    "export X=1; prog $X",
    "export X=1 && prog $X",
    "X=1; prog $X",
    "set -e; cd /tmp && prog a",
    "prog a # not this",
    "prog a#b",
    "prog a 2>&1",
    "prog a > /dev/null 2>/dev/null b < /dev/null",
    "prog a \\\n  b",
    "\n\nprog a\n",
    "prog ~ ~/x",
    "prog 'it'\\''s' \"a\\\"b\\$c\\d\"",
    "prog --json '{\"a\": [1, 2]}'",
    "prog a;",
    "ulimit -n 100; umask 022; true; : x; prog a",
    "prog a$",
    "prog =x a=b",
]


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_shells_words_are_those_that_the_shell_gives(shell: str, text: str) -> None:
    """`prog` prints its words on another descriptor, since its output may go elsewhere."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as place:
        program, told = Path(place, "prog"), Path(place, "told")
        program.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > {told}\n")
        program.chmod(0o755)
        environment = {**VARIABLES, "PATH": f"{place}:/usr/bin:/bin"}
        subprocess.run([shell, "-c", text], env=environment, check=True, timeout=20)
        words = told.read_bytes().decode().split("\0")[:-1]
    assert list(unwrap([shell, "-c", text], environment).argv) == ["prog", *words]


def test_positional_words_are_given() -> None:
    assert unwrap(["sh", "-c", 'exec "$@"', "sh", "vllm", "serve", "a b"]).argv == ("vllm", "serve", "a b")
    assert unwrap(["sh", "-c", "vllm serve $1 $0", "m", "n"]).argv == ("vllm", "serve", "n", "m")
    assert unwrap(["bash", "-euo", "pipefail", "-lc", "vllm $2", "x", "y", "z"]).argv == ("vllm", "z")


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["sh", "-c", "vllm serve m | tee log"], "a pipe"),
        (["sh", "-c", "vllm serve m || true"], "a pipe"),
        (["sh", "-c", "vllm serve m & wait"], "a background job"),
        (["sh", "-c", "vllm serve $(cat model)"], "the expansion"),
        (["sh", "-c", "vllm serve `cat model`"], "a command substitution"),
        (["sh", "-c", 'vllm serve "`cat model`"'], "a command substitution"),
        (["sh", "-c", "(vllm serve m)"], "a subshell"),
        (["sh", "-c", "if true; then vllm serve m; fi"], "`if` runs before it"),
        (["sh", "-c", "source x && vllm serve m"], "`source` runs before it"),
        (["sh", "-c", ". ./x; vllm serve m"], "`.` runs before it"),
        (["sh", "-c", "vllm serve m; sleep 5"], "`vllm` runs before it"),
        (["sh", "-c", "vllm serve *"], "a pattern"),
        (["sh", "-c", "vllm serve $STAR"], "holds a pattern"),
        (["bash", "-c", "vllm serve {a,b}"], "a brace expansion"),
        (["sh", "-c", "vllm serve 'm"], "an open quote"),
        (["sh", "-c", 'vllm serve "m'], "an open quote"),
        (["sh", "-c", "vllm serve ${M%x}"], "the expansion"),
        (["sh", "-c", "vllm serve <<x"], "a here-document"),
        (["sh", "-c", "vllm serve ~other/x"], "a home directory"),
        (["sh", "-c", ""], "no command"),
        (["sh", "-c", "exec -a x vllm serve m"], "exec"),
        (["sh", "-c", "a" * (TEXT_LIMIT_CHARACTERS + 1)], "too long"),
        (["env", "--odd", "vllm", "serve"], "--odd"),
        (["numactl", "--odd", "vllm", "serve"], "--odd"),
        (["uv", "run", "-m", "vllm", "serve"], "-m"),
        (["nice"], "no command"),
        (["env", "-u"], "-u"),
        (["nice"] * 20 + ["vllm"], "wrappers"),
    ],
    ids=str,
)
def test_what_only_a_shell_knows_is_named(command: list[str], why: str) -> None:
    with pytest.raises(UnclearCommand) as caught:
        unwrap(command, VARIABLES)
    assert why in str(caught.value)


def test_variables_and_the_directory_are_those_of_the_program() -> None:
    words = ["env", "-u", "GONE", "A=1", "sh", "-c", "cd app; export B=2; C=3 cd x && D=4 exec vllm serve"]
    with pytest.raises(UnclearCommand):
        unwrap(words, {"GONE": "x"})
    found = unwrap([*words[:-1], "cd app; export B=2; D=4 exec vllm serve"], {"GONE": "x", "KEPT": "y"})
    assert dict(found.assigned) == {"A": "1", "B": "2", "D": "4"}
    assert dict(found.environment) == {"A": "1", "B": "2", "D": "4", "KEPT": "y"}
    assert found.unset == {"GONE"}
    assert found.directory == "app"
    assert unwrap(["env", "-i", "A=1", "vllm"], {"KEPT": "y"}).environment == {"A": "1"}


def test_what_changes_how_the_program_runs_is_kept() -> None:
    found = unwrap(["tini", "--", "numactl", "-N", "0", "nice", "-n", "5", "vllm", "serve"])
    assert found.wrappers == ("numactl", "-N", "0", "nice", "-n", "5")


@pytest.mark.parametrize(
    ("command", "longer"),
    [
        ("vllm serve m", "vllm serve m --x 'y z'"),
        ("env A=1 nice vllm serve m", "env A=1 nice vllm serve m --x 'y z'"),
        ("sh -c 'exec vllm serve m;'", "sh -c 'exec vllm serve m --x '\"'\"'y z'\"'\"''"),
        ("sh -c 'exec \"$@\"' sh vllm serve m", "sh -c 'exec \"$@\"' sh vllm serve m --x 'y z'"),
    ],
)
def test_words_are_added_to_the_program(command: str, longer: str) -> None:
    assert with_words(shlex.split(command), ["--x", "y z"]) == shlex.split(longer)


def test_no_words_are_added_behind_a_comment() -> None:
    with pytest.raises(UnclearCommand):
        with_words(["sh", "-c", "vllm serve m # plain"], ["--x"])
