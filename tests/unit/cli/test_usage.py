# SPDX-License-Identifier: Apache-2.0
"""Command lines with mistakes in them: what is wrong with them is told."""

import pytest

from cli import restore, snapshot


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tiny", "vllm", "serve", "model"], "put `--` before the server's command: rekindle … -- vllm …"),
        (["tiny", "--rung", "proces"], "invalid choice 'proces' (choose from process, neutral, cache, cold)"),
        (["tiny", "--requre", "process"], "unrecognized arguments: --requre process"),
    ],
)
def test_a_mistake_in_a_restore(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        restore.main(words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert told in said
    assert ("hint:" in said) == ("vllm" in words)


def test_a_mistake_in_a_snapshot(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        snapshot.main(["tiny", "--network", "hots", "--", "vllm"])
    assert "invalid choice 'hots' (choose from private, host)" in capsys.readouterr().err
