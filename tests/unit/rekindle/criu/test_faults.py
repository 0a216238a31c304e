# SPDX-License-Identifier: Apache-2.0
"""Which versions of CRIU have which faults."""

import pytest

from rekindle.criu import faults


@pytest.mark.parametrize(
    ("version", "faulty"),
    [
        ("3.17.1", True),
        ("4.2.1", True),
        ("4.3", False),
        ("4.10", False),
        ("5.0-rc1", False),
        ("unknown", True),
    ],
)
def test_a_fault_ends_with_the_version_that_is_right(version: str, faulty: bool) -> None:
    assert (faults.WATCH_ON_OVERLAYFS in faults.of(version)) == faulty
