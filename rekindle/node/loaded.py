# SPDX-License-Identifier: Apache-2.0
"""Describe what a server has loaded from the disk: the code, the files, and the packages beside them.

A restored process continues with what it read at its start, whatever is on the disk now. The record keeps
what a start would read again, by content: times and inodes differ between copies of one container image.

Paths are as the command names them: relative ones start at the working directory, and links that the command
names are not resolved, so that another target is another file.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from rekindle.documents import Count

_FILES_LIMIT = 100_000
_DIRECTORIES_LIMIT = 1000
_ENTRIES_LIMIT = 50_000
_PATH = Annotated[str, Meta(pattern=r"^[^\x00\ud800-\udc7f\udd00-\udfff]+$", max_length=4095)]
_DISTRIBUTION = re.compile(r"([0-9A-Za-z][0-9A-Za-z._-]*?)-([0-9][^-]*)(?:-py3[^-]*)?\.(?:dist|egg)-info")
# importlib.machinery.all_suffixes() of every CPython: `.py`, `.pyc`, `.so`, `.abi3.so`, `.cpython-311-….so`.
_MODULE = re.compile(r"[^.]+\.(?:py|pyc|(?:[0-9A-Za-z_-]+\.)?so)")
# Python runs these at its start, wherever on its search path they are: the documentation of `site`.
_STARTERS = {"sitecustomize", "usercustomize"}


class LoadedKind(StrEnum):
    """The role of a file: named by the command or a variable, a model's, code too large to list, or other."""

    NAMED = "named"
    MODEL = "model"
    CODE = "code"
    OTHER = "other"


class LoadedFile(Struct, frozen=True, kw_only=True):
    """A file that a server has read. `identity` is `sha256:HEX`, or `sampled:HEX` for a large file."""

    path: _PATH
    size: Count
    identity: str
    kind: LoadedKind = LoadedKind.OTHER


class CodeDirectory(Struct, frozen=True, kw_only=True):
    """A directory that a server has loaded code from, for example one on Python's search path.

    `files` are its loaded files with the first 16 digits of their sha256. `distributions` are the names and
    versions of the packages that are installed in it; the server has modules of those in `used`. `entries`
    are the names in it that Python runs at its start, or finds when it looks for a loaded module.
    """

    path: _PATH
    files: Annotated[Mapping[str, str], Meta(max_length=_FILES_LIMIT)] = {}
    distributions: Mapping[str, str] = {}
    used: tuple[str, ...] = ()
    entries: tuple[str, ...] = ()


class Loaded(Struct, frozen=True, kw_only=True):
    """The files and packages that a server has loaded. Older records have nothing.

    `search_path` are the directories of `code` in which the command finds installed packages.
    """

    search_path: Annotated[tuple[_PATH, ...], Meta(max_length=_DIRECTORIES_LIMIT)] = ()
    code: Annotated[tuple[CodeDirectory, ...], Meta(max_length=_DIRECTORIES_LIMIT)] = ()
    files: Annotated[tuple[LoadedFile, ...], Meta(max_length=_FILES_LIMIT)] = ()

    def modules(self) -> frozenset[str]:
        """Return the names of the loaded top-level modules."""
        names = {path.partition("/")[0] for each in self.code for path in each.files}  # thousands of paths
        return frozenset(map(module, names))


def module(path: str) -> str:
    """Return the top-level module that a file belongs to, by its path in a directory of the search path."""
    return path.partition("/")[0].partition(".")[0]


def listing(directory: str, modules: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Return the distributions in a directory by name, and its entries that matter to a start.

    Those are `.pth` files, `sitecustomize`, and what Python could find in place of a loaded module: files
    with a suffix of modules, and directories. A broken upgrade can leave several versions of one
    distribution; all are named. Raises OSError.
    """
    distributions: dict[str, str] = {}
    entries = []
    for entry in _entries(directory):
        name = entry.name
        if match := _DISTRIBUTION.fullmatch(name):
            known = normalized(match[1])
            others = {match[2], *distributions.get(known, match[2]).split(", ")}
            distributions[known] = ", ".join(sorted(others))
        elif name.endswith(".pth"):
            entries.append(name)
        else:
            top = name.partition(".")[0]
            if (top in modules or top in _STARTERS) and _can_be_imported(entry):
                entries.append(name)
    return distributions, sorted(entries)


def _can_be_imported(entry: "os.DirEntry[str]") -> bool:
    """Tell whether Python can import something by this name. A directory may become a package at any time."""
    try:
        is_directory = entry.is_dir()
    except OSError:  # a link to where this user may not look
        return True
    return entry.name != "__pycache__" if is_directory else _MODULE.fullmatch(entry.name) is not None


def normalized(name: str) -> str:
    """Return the name of a distribution as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _entries(directory: str) -> Iterator["os.DirEntry[str]"]:
    with os.scandir(directory or ".") as entries:
        for number, entry in enumerate(entries):
            if number == _ENTRIES_LIMIT:
                return
            yield entry
