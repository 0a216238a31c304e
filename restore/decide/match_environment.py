# SPDX-License-Identifier: Apache-2.0
"""Compare the environment of a snapshot's server with that of a start today. Pure.

A restored server keeps the variables and the options of its own start. What a record does not hold, secrets,
is compared once the process is restored, with what that process itself was started with.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from msgspec import Struct

from rekindle.engine import Engine
from rekindle.engine.variables import is_noise, names_a_cache
from rekindle.environment import SECRET
from rekindle.errors import UsageError
from rekindle.record import Record
from rekindle.secrets import HIDDEN
from restore.decide.difference import Difference

_TOLD_LIMIT = 50
_SHOWN_CHARACTERS = 200
NOT_SET, SET, ANOTHER = "not set", "set", "different"


class RestoredStart(Struct, frozen=True, kw_only=True):
    """The arguments and variables of the root of the restored processes, secrets included: never show it."""

    argv: Sequence[str]
    environment: Mapping[str, str]


def compare(
    record: Record, engine: Engine, today: Mapping[str, str], command: Sequence[str]
) -> list[Difference]:
    """Return the variables that a start today would find other than the snapshot's server did.

    `engine` is the recorded one, `command` the one that the user gave. Images of earlier versions do not
    tell what was set, so no variable is compared with them.
    """
    options = {name for name, _ in _hidden_in(record, command)} - engine.enforced()
    unknown = [Difference("secret-unknown", name, SET, SET) for name in sorted(options)]
    try:
        engine.authorize(record.oracle.request, today)
    except UsageError as error:
        unknown.append(Difference("oracle-variable", "oracle", "", error.message))
    if record.variables is None:
        return unknown
    known, here = record.variables, {**engine.environment(), **today}
    skipped = {*engine.enforced(), *known.withheld}
    found: list[Difference] = []
    told: list[Difference] = []
    for name in sorted(({*here, *known.marks, *record.environment}) - skipped):
        value = here.get(name)
        if is_noise(name, value or "") or _is_same(record, name, value) or names_a_cache(name):
            continue
        different = _difference(record, engine, name, value)
        (told if different.code == "environment-other" else found).append(different)
    return [*found, *unknown, *told[:_TOLD_LIMIT]]


def cache_key_changes(
    record: Record, engine: Engine, environment: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Yield the variables that may change the keys of a cache: each one's name, and what it was and is."""
    marks = record.variables.marks if record.variables else {}
    here = {**engine.environment(), **environment}
    for name in sorted({*record.environment, *marks, *here}):
        value = here.get(name)
        if not engine.in_cache_keys(name) or _is_same(record, name, value):
            continue
        hidden = marks.get(name) == SECRET or HIDDEN in record.environment.get(name, "")
        if not hidden and not _holds_secret(name, value):
            yield name, _recorded(record, name, value), _shown(name, value)


def compare_restored(
    record: Record,
    engine: Engine,
    today: Mapping[str, str],
    command: Sequence[str],
    restored: RestoredStart,
) -> list[Difference]:
    """Return the secrets of today that the restored process was not started with.

    Of variables, those that were set at the snapshot and are set today: of all others, `compare` tells.
    `command` is the one that the user gave.
    """
    marks = record.variables.marks if record.variables else {}
    skipped = engine.enforced()
    found = [
        Difference("environment-secret", name, ANOTHER, SET)
        for name in _unknown(marks, today, skipped)
        if restored.environment.get(name) != today[name]
    ]
    had = _hidden_in(record, restored.argv)
    others = {name for name, value in _hidden_in(record, command) if (name, value) not in had}
    return found + [Difference("command", name, ANOTHER, SET) for name in sorted(others - skipped)]


def _hidden_in(record: Record, command: Sequence[str]) -> set[tuple[str, str]]:
    """Return the names and values of a command's secrets; empty if none is hidden in the recorded command."""
    if not any(HIDDEN in word for word in record.command):
        return set()
    from rekindle.secrets.redact import command_secrets

    return {(secret.name, secret.value) for secret in command_secrets(command)}


def _holds_secret(name: str, value: str | None) -> bool:
    from rekindle.secrets.redact import holds_secret  # its patterns take 8 ms to compile

    return value is not None and holds_secret(name, value)


def _is_same(record: Record, name: str, value: str | None) -> bool:
    if name in record.environment:
        return record.environment[name] == value
    if record.variables is None or name not in record.variables.marks:
        return value is None
    return value is not None and record.variables.is_same(name, value) is True


def _difference(record: Record, engine: Engine, name: str, value: str | None) -> Difference:
    assert record.variables is not None
    was, secret = _recorded(record, name, value), record.variables.marks.get(name) == SECRET
    if secret and value is not None:
        return Difference("secret-unknown", name, SET, SET)
    if secret or _holds_secret(name, value):
        return Difference("environment-secret", name, was, NOT_SET if value is None else SET)
    if engine.reads(name):
        return Difference("environment", name, was, _shown(name, value))
    return Difference("environment-other", name, was, NOT_SET if value is None else SET)


def _recorded(record: Record, name: str, value: str | None) -> str:
    """Describe the recorded value of a variable whose value today is another, or None."""
    if name in record.environment:
        return _shown(name, record.environment[name])
    marks = record.variables.marks if record.variables else {}
    if name not in marks:
        return NOT_SET
    return SET if value is None or marks[name] == SECRET else ANOTHER


def _shown(name: str, value: str | None) -> str:
    if value is None:
        return NOT_SET
    from rekindle.secrets.redact import redact_environment

    return redact_environment({name: value}).get(name, SET)[:_SHOWN_CHARACTERS] or "empty"


def _unknown(marks: Mapping[str, str], today: Mapping[str, str], skipped: Collection[str]) -> Iterator[str]:
    """Yield the variables that are set and of which the record only says that they were."""
    return (name for name, mark in marks.items() if mark == SECRET and name in today and name not in skipped)
