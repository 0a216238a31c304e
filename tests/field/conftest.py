# SPDX-License-Identifier: Apache-2.0
"""Servers of the field run on a machine of their own, as the integration tests do."""

import pytest

from tests.conftest import PREFIX, need

FIELD = PREFIX / "field"


@pytest.fixture(autouse=True, scope="session")
def _own_machine(own_machine: None) -> None:
    """Before any other fixture starts something."""


@pytest.fixture(autouse=True)
def _installed() -> None:
    need(
        (FIELD / "accelerate/.complete").exists(),
        "the servers of the field",
        "run hack/get-field-servers as root",
    )
