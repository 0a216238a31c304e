# SPDX-License-Identifier: Apache-2.0
"""What the tests at close range share."""

from collections.abc import Iterator

import pytest

from oci.registry.transport import Connections
from tests.samples.registry import CLOSE_SETTINGS, CONTEXTS


@pytest.fixture
def connections() -> Iterator[Connections]:
    """A pool of connections that is closed at the end."""
    pool = Connections(CLOSE_SETTINGS, CONTEXTS)
    yield pool
    pool.close()
