# SPDX-License-Identifier: Apache-2.0
"""What a server that does not get ready is suspected of, by what it answered to the last."""

import pytest

from snapshot.warm import not_ready_hint

ASKED = "GET http://127.0.0.1:8000/health"


@pytest.mark.parametrize(
    ("outcome", "hint"),
    [
        (f"{ASKED} was answered with status 301", "--ready-url"),
        (f"{ASKED} was answered with status 401", "--ready-url"),
        (f"{ASKED} was answered with status 503", "--ready-timeout"),
        (f"{ASKED}: Connection refused", "compare the address"),
        (f"{ASKED}: Connection reset by peer", "HTTPS"),
        (f"{ASKED}: /health: BadStatusLine ''", "HTTPS"),
        ("", "--ready-timeout"),
    ],
)
def test_the_hint_fits_the_answer(outcome: str, hint: str) -> None:
    assert hint in not_ready_hint(outcome)
