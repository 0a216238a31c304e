# SPDX-License-Identifier: Apache-2.0
"""A layout to write to, and a directory to unpack into."""

from pathlib import Path

import pytest

from oci.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.create(tmp_path / "layout")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    root = tmp_path / "target"
    root.mkdir()
    return root
