# SPDX-License-Identifier: Apache-2.0
"""What descriptors say of an image's parts."""

import pytest

from oci.descriptor import platform_of


@pytest.mark.parametrize(
    ("machine", "architecture"), [("x86_64", "amd64"), ("aarch64", "arm64"), ("riscv64", "riscv64")]
)
def test_a_platform_has_the_names_of_the_specification(machine: str, architecture: str) -> None:
    assert platform_of(machine) == {"architecture": architecture, "os": "linux"}
