# SPDX-License-Identifier: Apache-2.0
"""A record never holds what is searched for in a dump."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.secrets.forms import is_secret_value
from rekindle.secrets.redact import redact_command, redact_environment
from snapshot.secret_search import KnownSecrets
from tests.samples.tokens import EVERY

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@given(
    st.dictionaries(st.sampled_from(["A_KEY", "URL", "X", "DB_PASSWORD"]), WORDS), st.lists(WORDS, max_size=6)
)
@settings(max_examples=200)
def test_a_record_never_holds_what_is_searched_for(environment: dict[str, str], argv: list[str]) -> None:
    credentials = KnownSecrets.of(environment, argv)
    shown = [
        *redact_command(argv, credentials.values),
        *redact_environment(environment, credentials.values).values(),
    ]
    for value in credentials.values:
        assert not [word for word in shown if value in word.replace("REDACTED", "\0")]


@pytest.mark.parametrize(("name", "token"), EVERY)
def test_a_record_never_holds_a_token(name: str, token: str) -> None:
    core = token[-16:]
    assert core not in str(redact_environment({"X": f"a {token}"}))
    assert core not in str(redact_command(["serve", token, f"--x={token}"]))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("A_KEY", "abc", True),
        ("A_KEY", "123456", False),
        ("A_PASSWORD", "123456", True),
        ("A_PASSWORD", "12", False),
        ("A_KEY", " True ", False),
        ("A_KEY", "/aB3dE5gH7", True),
        ("A_KEY", "/usr/share/no-such-file", False),
        ("A_KEY_FILE", "/aB3dE5gH7", False),
    ],
)
def test_which_values_are_secrets(name: str, value: str, wanted: bool) -> None:
    assert is_secret_value(name, value) is wanted
