# SPDX-License-Identifier: Apache-2.0
"""The shell commands of this checkout fail at the first error."""

from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = [
    path
    for directory in ("hack", ".ci")
    for path in sorted((ROOT / directory).iterdir())
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash\n")
]


def test_there_are_scripts() -> None:
    assert {"demo", "gpu-acceptance", "run"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_begins_with_strict_settings(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert next(line for line in lines if not line.startswith("#")) == "set -Eeuo pipefail"
