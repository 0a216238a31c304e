# SPDX-License-Identifier: Apache-2.0
"""What must not get into a record: values whose names say that they are secrets.

Names and not values are looked at, so this is no search for secrets.
"""

import re
from collections.abc import Mapping, Sequence

HIDDEN = "REDACTED"

_WORD = r"[\w.-]*(?:KEY|TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH|COOKIE)[\w.-]*"
_NAME = re.compile(_WORD, re.IGNORECASE)
# Not --max-num-batched-tokens and its like.
_COUNT = re.compile(r"max|min|num|long", re.IGNORECASE)
_OPTION_WORD = rf"--(?!max|min|num|long){_WORD}"
_OPTION = re.compile(_OPTION_WORD, re.IGNORECASE)
# A whole argument is a value to its end; in a shell's command, up to the next option or word.
_ARGUMENT = re.compile(rf"({_OPTION_WORD}|{_WORD})=.*", re.IGNORECASE | re.DOTALL)
_ASSIGNMENT = re.compile(rf"(?<![\w-])({_OPTION_WORD}|(?!-){_WORD})=\S*", re.IGNORECASE)
_OPTION_IN_TEXT = re.compile(rf"({_OPTION_WORD}\s+)(?!--)(?:(?!\s--).)+", re.IGNORECASE)
# user:password, in which a password may hold what it should not; or a name or token alone.
_USER_INFO = re.compile(r"(?<=://)(?:[^\s/@]*:\S*|[^\s/@]+)@")


def sounds_secret(name: str) -> bool:
    """Whether a name says that its value is a secret."""
    return _NAME.search(name) is not None and _COUNT.match(name) is None


def redact_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without such variables, and without user and password in URLs."""
    return {
        name: _USER_INFO.sub(f"{HIDDEN}@", value)
        for name, value in sorted(environment.items())
        if not sounds_secret(name)
    }


def redact_command(argv: Sequence[str]) -> list[str]:
    """The command with the values of such options and variables replaced.

    An option may take many values (vLLM's --api-key does), so all go up to the next option.
    """
    out: list[str] = []
    hiding = False
    for word in argv:
        if word.startswith("--"):
            hiding = _OPTION.fullmatch(word) is not None
        elif hiding:
            out.append(HIDDEN)
            continue
        if whole := _ARGUMENT.fullmatch(word):
            out.append(f"{whole[1]}={HIDDEN}")
            continue
        shown = _ASSIGNMENT.sub(rf"\1={HIDDEN}", word)
        shown = _OPTION_IN_TEXT.sub(rf"\1{HIDDEN}", shown)
        out.append(_USER_INFO.sub(f"{HIDDEN}@", shown))
    return out
