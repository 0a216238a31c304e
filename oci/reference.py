# SPDX-License-Identifier: Apache-2.0
"""The names that users give images."""

import re
from dataclasses import dataclass
from pathlib import Path

from rekindle.errors import UsageError

# OCI distribution specification 1.1, "Pulling manifests".
_NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """An image in an OCI layout: that in `directory`, or the local store if that is None.

    `tag` is what the layout's index calls it: `name:tag` in the store, the tag alone in a directory.
    """

    text: str
    directory: Path | None
    tag: str

    def __str__(self) -> str:
        return self.text


def parse(text: str) -> Reference:
    """`name[:tag]` or `oci:DIR[:tag]`. Raises UsageError for anything else."""
    if text.startswith("oci:"):
        directory, _, tag = text.removeprefix("oci:").partition(":")
        tag = tag or "latest"
        if not directory or not _TAG.fullmatch(tag):
            raise UsageError(f"{text} is not of the form oci:DIR[:TAG]")
        return Reference(text=text, directory=Path(directory).absolute(), tag=tag)
    name, colon, tag = text.partition(":")
    first = text.partition("/")[0]
    if "/" in text and ("." in first or ":" in first or first == "localhost"):
        raise UsageError(
            f"{text} names a registry, and this version of rekindle has none",
            hint="use a name in the local store (name:tag) or an OCI layout (oci:DIR:tag)",
        )
    if not _NAME.fullmatch(name) or (colon and not _TAG.fullmatch(tag)):
        raise UsageError(
            f"{text!r} is no image name",
            hint="write name[:tag], in lower case: letters, digits and single . _ - / between them",
        )
    return Reference(text=text, directory=None, tag=f"{name}:{tag or 'latest'}")
