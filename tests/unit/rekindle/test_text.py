# SPDX-License-Identifier: Apache-2.0
"""Foreign text does nothing to a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.text import printable


@pytest.mark.parametrize("text", ["", "plain", "é中☃", "a\tb\nc", "\\x1b", "'\""])
def test_text_stays_as_it_is(text: str) -> None:
    assert printable(text, lines=True) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J", "\\x1b[2J"),
        ("a\rb", "a\\rb"),
        ("\0", "\\x00"),
        ("\x9b1m", "\\x9b1m"),
        ("\u202e", "\\u202e"),
        ("\u2028", "\\u2028"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_control_characters_are_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_any_text_can_be_printed(text: str) -> None:
    shown = printable(text)
    assert all(character.isprintable() or character in "\n\t" for character in shown)
    shown.encode()
    assert printable(shown) == shown
