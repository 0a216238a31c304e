# SPDX-License-Identifier: Apache-2.0
"""These tests look at what a command leaves on a machine, so they have one of their own."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_machine(own_machine: None) -> None:
    """Before any other fixture starts something."""
