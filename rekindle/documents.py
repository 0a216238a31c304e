# SPDX-License-Identifier: Apache-2.0
"""Read and write documents of our own formats, whose types define and check every field.

The types are msgspec's, for the reasons in docs/adr/0022-msgspec.md. The JSON schemas in docs/schemas are
generated from them. Foreign documents, of which only a few fields matter, are read with `rekindle.fields`.
"""

import re
from pathlib import PurePath, PurePosixPath
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from rekindle.digest import Digest
from rekindle.errors import FormatError
from rekindle.fields import JSON

T = TypeVar("T")

_PLACE = re.compile(r"(?s)(.*?)(?: - at (?:`key` in )?`\$(.*)`)?")
_MISSING = re.compile(r"Object missing required field `(.*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")


def whole(pattern: str) -> str:
    """Return a pattern that matches only a whole text. `$` alone would also match before a line feed."""
    return rf"^(?:{pattern})$(?!\n)"


Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Nanoseconds = Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)]  # since 1970, negative before
# os.fsencode accepts the surrogates for bytes that are not UTF-8; others are in no file's name.
AbsolutePath = Annotated[str, Meta(pattern=whole(r"/[^\x00\ud800-\udc7f\udd00-\udfff]*"))]


def read(value: object, kind: type[T], where: str) -> T:
    """Convert parsed JSON or TOML to a value of a type.

    Parts of it may have their types already. Raises FormatError, whose message names the field below
    `where`.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_from_text)
    except msgspec.ValidationError as error:
        raise _wrong(str(error), kind, where) from None


def to_json(value: object) -> dict[str, JSON]:
    """Convert a value to a document; the inverse of `read`."""
    document = msgspec.to_builtins(value, enc_hook=str)
    assert isinstance(document, dict)
    return document


def canonical_path(text: str) -> PurePosixPath:
    """Parse a path in canonical form. Raises ValueError for `a//b`, `./a` and `a/`."""
    path = PurePosixPath(text)
    if str(path) != text:
        raise ValueError(f"Expected a path in canonical form, got {text!r:.120}")
    return path


def _from_text(kind: type[T], value: object) -> object:
    """Convert text to a path or digest. msgspec adds the field's name to the errors."""
    if not isinstance(value, str):
        raise TypeError(f"Expected `str`, got `{type(value).__name__}`")
    if issubclass(kind, Digest):
        return kind.parse(value)
    if kind is PurePosixPath:
        return canonical_path(value)
    assert issubclass(kind, PurePath)
    return kind(value)


def _wrong(text: str, kind: type, where: str) -> FormatError:
    found = _PLACE.fullmatch(text)
    assert found
    what, place = found[1], found[2] or ""
    if missing := _MISSING.fullmatch(what):
        return FormatError(f"{where}{place}.{missing[1]} is missing")
    if unknown := _UNKNOWN.fullmatch(what):
        known = sorted(getattr(kind, "__struct_encode_fields__", ())) if not place else ()
        cause = f"it may have {', '.join(known)}" if known else ""
        return FormatError(f"{where}{place} has no {unknown[1]!r}", cause=cause)
    hint = "use a newer rekindle" if what.startswith("Invalid enum value") else ""
    return FormatError(f"{where}{place} is not valid", cause=what, hint=hint)
