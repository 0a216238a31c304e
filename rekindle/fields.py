# SPDX-License-Identifier: Apache-2.0
"""Read foreign JSON and TOML field by field into typed values."""

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from rekindle.errors import FormatError

T = TypeVar("T")

JSON = Any
"""A result of json.loads, which must be checked field by field before any other use."""


class Fields:
    """A JSON object, read field by field. Every getter raises FormatError, which names the field."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{where} is not a JSON object")
        self._value: dict[str, Any] = value
        self._where = where

    @classmethod
    def parse(cls, content: bytes, where: str, *, limit_bytes: int) -> "Fields":
        """Parse a JSON document. Raises FormatError if it is malformed or longer than `limit_bytes`."""
        return cls._parse(json.loads, "JSON", content, where, limit_bytes)

    @classmethod
    def parse_toml(cls, content: bytes, where: str, *, limit_bytes: int) -> "Fields":
        """Parse a TOML document, as `parse` does."""
        import tomllib

        return cls._parse(lambda text: tomllib.loads(text.decode()), "TOML", content, where, limit_bytes)

    @classmethod
    def _parse(
        cls, load: Callable[[bytes], object], form: str, content: bytes, where: str, limit_bytes: int
    ) -> "Fields":
        if len(content) > limit_bytes:
            raise FormatError(f"{where} is longer than {limit_bytes} bytes")
        try:
            value = load(content)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where} is not {form}", cause=str(error)) from None
        return cls(value, where)

    def text(self, name: str, default: str | None = None) -> str:
        value = self._value.get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "text")
        return value

    def integer(self, name: str, *, at_least: int = 0, at_most: int = 1 << 62) -> int:
        value = self._value.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= at_most:
            raise self._wrong(name, f"an integer from {at_least} to {at_most}")
        return value

    def boolean(self, name: str, *, default: bool) -> bool:
        value = self._value.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def inner(self, name: str) -> "Fields":
        return Fields(self._value.get(name), f"{self._where}.{name}")

    def as_json(self) -> dict[str, Any]:
        """Return the object itself."""
        return self._value

    def only(self, known: Collection[str]) -> None:
        """Reject unknown names, so that misspelled ones are noticed."""
        if unknown := sorted(set(self._value) - set(known)):
            raise FormatError(
                f"{self._where} has no {unknown[0]!r}", cause=f"it may have {', '.join(sorted(known))}"
            )

    def json(self, name: str) -> Any:
        """Return a value of any type."""
        if name not in self._value:
            raise self._wrong(name, "a value")
        return self._value[name]

    def list_of(self, name: str, parse: Callable[[object, str], T], *, at_most: int) -> list[T]:
        """Return a list of `parse(item, where)` for each item."""
        value = self._value.get(name)
        if not isinstance(value, list) or len(value) > at_most:
            raise self._wrong(name, f"a list of at most {at_most}")
        return [parse(item, f"{self._where}.{name}[{index}]") for index, item in enumerate(value)]

    def texts(self, name: str, *, at_most: int = 100_000) -> list[str]:
        return self.list_of(name, text_item, at_most=at_most)

    def has(self, name: str) -> bool:
        return name in self._value

    def text_map(self, name: str, default: Mapping[str, str] | None = None) -> dict[str, str]:
        value = self._value.get(name, default)
        if not isinstance(value, dict) or not all(isinstance(part, str) for part in value.values()):
            raise self._wrong(name, "an object of texts")
        return value

    def _wrong(self, name: str, wanted: str) -> FormatError:
        here = "missing" if name not in self._value else f"{self._value[name]!r:.80}"
        return FormatError(f"{self._where}.{name} is not {wanted}", cause=here)


def text_item(value: object, where: str) -> str:
    """Return an item of a list that must be text. Raises FormatError."""
    if not isinstance(value, str):
        raise FormatError(f"{where} is not text", cause=f"{value!r:.80}")
    return value
