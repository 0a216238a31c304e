# SPDX-License-Identifier: Apache-2.0
"""What the Makefile's targets ask of whoever runs them."""

import subprocess

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("target", ["check", "docs"])
def test_linting_and_the_docs_need_nothing_that_only_root_can_install(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "pip install" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("hack/get-")]
