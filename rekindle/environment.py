# SPDX-License-Identifier: Apache-2.0
"""The part of the server's environment that a record keeps: enough to compare a variable, not to read it.

docs/adr/0026-environment.md says why. For each variable, except noise and the places of kernel caches:

    chooses kernels      its value, in the record's `environment`: a start on the kernel cache needs it
    read by the engine   a salted digest of 128 bits: a difference forbids to restore the process
    any other            a salted digest of 16 bits: it tells a difference, but fits many values
    secret               nothing: it was set
"""

import contextlib
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated

from msgspec import Meta, Struct

from rekindle.documents import whole
from rekindle.engine import Engine
from rekindle.engine.variables import is_noise, names_a_cache

SECRET = ""
"""The mark of a variable of which nothing but its name is recorded."""
KEY_VARIABLES = frozenset({"COSIGN_PASSWORD", "SIGSTORE_ID_TOKEN"})
"""Variables that give access to keys with which images are signed. No server gets them."""
FILE_KEY_VARIABLE = "REKINDLE_FILE_KEY"
"""Holds the key to the digests of secret files. Only the shell at the root of a server's processes has it."""
_LIMIT = 100_000
_SALT_BYTES = 16
_DIGITS, _SHORT_DIGITS = 32, 4
_Salt = Annotated[str, Meta(pattern=whole("[0-9a-f]{32}"))]
_Mark = Annotated[str, Meta(pattern=whole("[0-9a-f]{0,32}"))]


class RecordedVariables(Struct, frozen=True, kw_only=True):
    """The variables that were set when the server started, without their values.

    A mark is the beginning of a salted digest, or empty for a secret. `withheld` are variables that the
    server did not get although they may have been set.
    """

    salt: _Salt
    marks: Annotated[Mapping[str, _Mark], Meta(max_length=_LIMIT)]
    withheld: Annotated[tuple[str, ...], Meta(max_length=_LIMIT)] = ()

    def is_same(self, name: str, value: str) -> bool | None:
        """Return whether a variable had this value; None if nothing of its value is recorded."""
        mark = self.marks[name]
        return None if mark == SECRET else _digest(self.salt, name, value)[: len(mark)] == mark


def file_key(environment: Mapping[str, str]) -> bytes:
    """Return the key to the digests of secret files that a process was started with; b"" if none."""
    with contextlib.suppress(ValueError):
        key = bytes.fromhex(environment.get(FILE_KEY_VARIABLE, ""))
        return key if len(key) <= hashlib.blake2b.MAX_KEY_SIZE else b""
    return b""


def describe_environment(
    environment: Mapping[str, str],
    engine: Engine,
    hide: Collection[str],
    withheld: Collection[str],
    command: Sequence[str] = (),
) -> tuple[dict[str, str], RecordedVariables]:
    """Return what a record keeps of an environment: values, and names without values.

    The values are those of variables that choose kernels, unless they hold a secret or a text of `hide`.
    Those whose values a shell puts into the command count like the engine's.
    """
    from rekindle.command_line import variables_in
    from rekindle.secrets.redact import (
        holds_secret,
        redact_environment,
    )  # a restore does not need its patterns

    in_command = variables_in(command)
    chosen = {name: value for name, value in environment.items() if engine.replays(name)}
    redacted = redact_environment(chosen, hide)
    plain = {name: value for name, value in redacted.items() if value == chosen[name]}
    salt = os.urandom(_SALT_BYTES).hex()
    marks = {}
    for name, value in sorted(environment.items()):
        if name in plain:
            continue
        if name not in in_command and (is_noise(name, value) or names_a_cache(name)):
            continue
        if holds_secret(name, value):
            marks[name] = SECRET
        else:
            is_setting = name in in_command or engine.reads(name)
            digits = _DIGITS if is_setting else _SHORT_DIGITS
            marks[name] = _digest(salt, name, value)[:digits]
    return plain, RecordedVariables(salt=salt, marks=marks, withheld=tuple(sorted(withheld)))


def _digest(salt: str, name: str, value: str) -> str:
    content = f"{name}={value}".encode(errors="surrogateescape")
    return hashlib.blake2b(content, key=bytes.fromhex(salt), digest_size=_DIGITS // 2).hexdigest()
