# SPDX-License-Identifier: Apache-2.0
"""Documents of our own: types that say what each field may be, checked whole when a document is read.

The types are msgspec's. The JSON schemas in docs/schemas are made from them, and docs/adr/0022-msgspec.md
says why. Foreign documents, of which a few fields matter, are read with `rekindle.fields`.
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
    """Return a pattern for all of a text. `$` alone would let a line feed follow."""
    return rf"^(?:{pattern})$(?!\n)"


Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Nanoseconds = Annotated[int, Meta(ge=-(1 << 62), le=1 << 62)]  # before or after 1970
# The surrogates that os.fsencode takes stand for bytes that are not UTF-8; others are no file's name.
AbsolutePath = Annotated[str, Meta(pattern=whole(r"/[^\x00\ud800-\udc7f\udd00-\udfff]*"))]


def read(value: object, kind: type[T], where: str) -> T:
    """Return a document as a value of a type. Raises FormatError that names the field, below `where`.

    `value` is what JSON or TOML is parsed to. A part of it may be a value of its type already.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_from_text)
    except msgspec.ValidationError as error:
        raise _wrong(str(error), kind, where) from None


def to_json(value: object) -> dict[str, JSON]:
    """Return the document that `read` makes the value of."""
    document = msgspec.to_builtins(value, enc_hook=str)
    assert isinstance(document, dict)
    return document


def canonical_path(text: str) -> PurePosixPath:
    """Return a path that is written in one way only. Raises ValueError for `a//b`, `./a`, `a/`."""
    path = PurePosixPath(text)
    if str(path) != text:
        raise ValueError(f"Expected a path in canonical form, got {text!r:.120}")
    return path


def _from_text(kind: type[T], value: object) -> object:
    """Make a path or digest. What is raised here, msgspec raises with the place."""
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
