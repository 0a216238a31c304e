# SPDX-License-Identifier: Apache-2.0
"""Redact commands and environments: hide the values of names that mean secrets, and tokens by their form.

`command_secrets` and `environment_secrets` return the hidden values, to search for them elsewhere: see
snapshot/secret_search.py.
"""

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from msgspec import Struct

from rekindle.secrets import HIDDEN, forms

# A PAT is a personal access token, as a word of a name (GITLAB_PAT, but not PATH).
_SECRET = (
    rf"KEY|TOKEN(?!IZER)|CREDENTIAL|AUTH(?!OR(?!I))|COOKIE|{forms.WORDS_OF_PASSWORDS}"
    r"|(?<=[A-Z\d][_.-])PAT(?![A-Z])|(?<![\w.])PAT(?![\w.-])"
)
_NAME = re.compile(_SECRET, re.IGNORECASE)
_WORD = rf"[\w.-]*(?:{_SECRET})[\w.-]*"
# --max-num-batched-tokens and the like are not secrets; MINIO_SECRET_KEY is one.
_COUNTS = r"(?:max|min|num|long)[-_]"
_COUNT = re.compile(_COUNTS, re.IGNORECASE)
_OPTION_WORD = rf"--(?!{_COUNTS}){_WORD}"
# These take no value: the model may follow --return-tokens-as-token-ids.
_FLAG = re.compile(r"--(?:enable|disable|return|allow|skip|include|no)[-_]", re.IGNORECASE)
# In an argument of its own, the value extends to the end; in a shell's command, to the next option or word.
_ARGUMENT = rf"(?s:({_OPTION_WORD}|{_WORD})=(.*))"
_ASSIGNMENT = rf"(?<![\w-])({_OPTION_WORD}|(?!-){_WORD})=(\S*)"
_OPTION_IN_TEXT = rf"(({_OPTION_WORD})\s+)((?!--)(?:(?!\s--).)+)"
# user:password, whose password may contain characters that it should not; or only a name or token.
_USER_INFO = re.compile(r"(?<=://)(?:[^\s/@]*:\S*|[^\s/@]+)@")
_PASSWORD = re.compile(r"(?<=://)[^\s/@:]*:([^\s/@]+)@")
_LOOSE_PASSWORD = re.compile(r"(?<=://)[^\s/@:]*:(?!\d{1,5}/)(\S+)@")
_OPTION_NAME = re.compile(r"--[\w.-]{1,80}")
_SHELL_ENDS = re.compile(r"[;&|<>()]")


class Secret(Struct, frozen=True, kw_only=True):
    """A hidden value, with the name of its variable or option.

    `by_name` means that only the name suggests a secret, so it may not be one; a URL's password and a token
    recognized by its form certainly are.
    """

    name: str
    value: str
    by_name: bool


@functools.cache
def _pattern(source: str) -> re.Pattern[str]:
    """Compile a pattern that reads commands: they take milliseconds, and variables do not need them."""
    return re.compile(source, re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Tell whether the name of a variable, option or header means that its value is a secret."""
    return _NAME.search(name) is not None and _COUNT.match(name) is None


def redact_environment(environment: Mapping[str, str], hide: Collection[str] = ()) -> dict[str, str]:
    """Return an environment without secret variables; hide credentials in URLs, tokens, and `hide`."""
    return {
        name: _redact_text(value, hide)
        for name, value in sorted(environment.items())
        if not is_secret_name(name)
    }


def redact_command(argv: Sequence[str], hide: Collection[str] = ()) -> list[str]:
    """Return a command with the values of secret options and variables hidden, and tokens, and `hide`.

    An option may take several values, as vLLM's --api-key does, so everything up to the next option is
    hidden.
    """
    return _read_command(argv, hide, [])


def holds_secret(name: str, value: str) -> bool:
    """Tell whether a variable holds a secret: by its name, the form of a token or the syntax of a URL."""
    return any(
        forms.is_secret_value(name if secret.by_name else "PASSWORD", secret.value)
        for secret in environment_secrets({name: value})
    )


def environment_secrets(environment: Mapping[str, str]) -> list[Secret]:
    """Return the values that are secrets by their name, the form of a token or the syntax of a URL."""
    found = []
    for name, value in environment.items():
        if is_secret_name(name):
            found.append(Secret(name=name, value=value, by_name=True))
        found += _by_form(name, value)
    return found


def command_secrets(argv: Sequence[str]) -> list[Secret]:
    """Return the secrets of a command, named after the option or variable, or else `argument`."""
    found: list[Secret] = []
    _read_command(argv, (), found)
    return found


def _read_command(argv: Sequence[str], hide: Collection[str], found: list[Secret]) -> list[str]:
    """Return the redacted command, and append what is hidden to `found`."""
    out: list[str] = []
    hiding = ""
    last = ""
    for word in argv:
        if word.startswith("--"):
            hiding = word if _pattern(_OPTION_WORD).fullmatch(word) and not _FLAG.match(word) else ""
            last = word.partition("=")[0]
        elif hiding:
            found.append(Secret(name=hiding, value=word, by_name=True))
            found += _by_form(hiding, word)
            out.append(HIDDEN)
            continue
        if whole := _pattern(_ARGUMENT).fullmatch(word):
            found += _values(whole[1], whole[2])
            found += _by_form(whole[1], whole[2])
            out.append(f"{whole[1]}={HIDDEN}")
            continue
        name = last if _OPTION_NAME.fullmatch(last) else "argument"
        found += _by_form(name, word)
        for each in _pattern(_ASSIGNMENT).finditer(word):
            found += _values(each[1], each[2])
        shown = _pattern(_ASSIGNMENT).sub(rf"\1={HIDDEN}", word)
        for each in _pattern(_OPTION_IN_TEXT).finditer(shown):
            found += [Secret(name=each[2], value=value, by_name=True) for value in _shell_words(each[3])]
        shown = _pattern(_OPTION_IN_TEXT).sub(rf"\1{HIDDEN}", shown)
        out.append(_redact_text(shown, hide))
    return out


def _values(name: str, text: str) -> Iterator[Secret]:
    """Yield a value and its first word, since a shell's command may continue after it."""
    yield Secret(name=name, value=text, by_name=True)
    if words := _shell_words(text):
        yield Secret(name=name, value=words[0], by_name=True)


def _by_form(name: str, text: str) -> Iterator[Secret]:
    """Yield the tokens and the passwords of URLs in a text."""
    for value in (*forms.tokens_in(text), *url_passwords(text)):
        yield Secret(name=name, value=value, by_name=False)


def _shell_words(text: str) -> list[str]:
    """Return the words that a shell splits a text into, up to the first operator."""
    import shlex

    try:
        words = shlex.split(text)
    except ValueError:  # an open quote
        words = [word.strip("\"'") for word in text.split()]
    out = []
    for word in words:
        end = _SHELL_ENDS.search(word)
        if kept := word[: end.start()] if end else word:
            out.append(kept)
        if end:
            break
    return [word for word in out if HIDDEN not in word]


def url_passwords(text: str) -> list[str]:
    """Return the passwords of URLs, both percent-encoded and decoded."""
    if "://" not in text:
        return []
    from urllib.parse import unquote

    found = _PASSWORD.findall(text) or _LOOSE_PASSWORD.findall(text)
    return [each for password in found for each in {password, unquote(password)}]


def _redact_text(text: str, hide: Collection[str]) -> str:
    text = _USER_INFO.sub(f"{HIDDEN}@", text)
    for value in sorted(hide, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return forms.hide_tokens(text)
