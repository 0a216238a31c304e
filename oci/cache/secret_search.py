# SPDX-License-Identifier: Apache-2.0
"""Search the files of a kernel cache for credentials before they are packed. Values are never shown.

vLLM writes the environment that its cache key depends on to `cache_key_factors.json`. Versions before 0.32
write its API key, too. Other compilers may write anything, so all texts are searched for tokens by their
form.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath

from oci.cache.inventory import json_object
from rekindle.errors import SecretError
from rekindle.fields import JSON
from rekindle.secrets.forms import find_token, is_secret_value
from rekindle.secrets.redact import is_secret_name, redact_environment

SEARCHED_BYTES = 8 << 20  # per file; texts are smaller
_SNIFFED_BYTES = 8192
_FACTORS = "cache_key_factors.json"
_HINT = "compile again in an environment without it, or pass it to the server in a file"


def refuse_secrets(path: PurePosixPath, content: bytes) -> None:
    """Raise SecretError, with file and key, if the first bytes of a file hold a credential."""
    if path.name == _FACTORS and (document := json_object(content)) is not None:
        for key, value in _texts(document, ""):
            if _is_secret(key, value):
                raise SecretError(f"{path} in the kernel cache holds the value of {key:.80}", hint=_HINT)
    if b"\0" in content[:_SNIFFED_BYTES]:
        return
    if found := find_token(content):
        form, position = found
        line = content.count(b"\n", 0, position) + 1
        raise SecretError(f"{path} in the kernel cache holds {form.title}, in line {line}", hint=_HINT)


def _is_secret(key: str, value: str) -> bool:
    if not is_secret_value(key, value):
        return False
    if any(is_secret_name(part) for part in key.split(".")):
        return True
    # user:password@ in a URL
    return redact_environment({"URL": value}) != {"URL": value}


def _texts(value: JSON, key: str) -> Iterator[tuple[str, str]]:
    """Yield every text of a document with its path of keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
