# SPDX-License-Identifier: Apache-2.0
"""The local store and other OCI image layouts: which one an image is in, and what is swept out of them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from oci.layout import Layout
from oci.reference import LayoutReference
from rekindle import criu
from rekindle.errors import UsageError
from rekindle.home import Home
from rekindle.os_errors import FORBIDDEN, FULL


def open_home() -> Home:
    """$REKINDLE_HOME, after what a killed command left there has been removed."""
    home = Home.from_environment()
    sweep(home)
    return home


def sweep(home: Home) -> list[Path]:
    """Removes what killed commands left; returns their work directories."""
    try:
        removed = home.sweep()
        if removed:
            criu.remove_leftovers()
        store = Layout(home.store)
        store.drop_forgotten()
        if store.has_garbage():
            store.collect_garbage()
    except OSError as error:
        if error.errno not in FORBIDDEN:
            raise
        return []  # somebody else's home, or a read-only one: its owner's commands will do it
    return removed


def layout_of(image: LayoutReference, home: Home, *, create: bool = False) -> Layout:
    """The layout that an image is in. Raises UsageError for a directory that is none, or cannot be one."""
    if image.directory is None:
        return Layout.create(home.store)
    if create:
        try:
            layout = Layout.create(image.directory)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise UsageError(
                f"{image.directory} cannot be used as an OCI image layout", cause=str(error)
            ) from None
        if not os.access(image.directory, os.W_OK | os.X_OK):
            raise UsageError(
                f"{image.directory} cannot be used as an OCI image layout", cause="it may not be written to"
            )
        return layout
    if not (image.directory / "oci-layout").exists():
        raise UsageError(f"{image.directory} is no OCI image layout")
    return Layout(image.directory)


@contextlib.contextmanager
def collecting(layout: Layout, target: LayoutReference) -> Iterator[None]:
    """Removes what an image that is replaced within leaves behind in the local store. A directory of the
    user's may hold what others put there: it is left as it is."""
    if target.directory is not None:
        yield
        return
    layout.expect_garbage()
    try:
        yield
        layout.collect_garbage()
    except BaseException:  # also one that came in the middle of the collection
        layout.collect_garbage()
        raise
