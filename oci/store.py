# SPDX-License-Identifier: Apache-2.0
"""The local store and other OCI image layouts: open them, and remove what is no longer needed."""

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
    """Open $REKINDLE_HOME, and remove what killed commands left there."""
    home = Home.from_environment()
    sweep(home)
    return home


def sweep(home: Home) -> list[Path]:
    """Remove what killed commands left in the home; return the work directories that were removed."""
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
        return []  # read-only, or another user's home: the commands of its owner will do it
    return removed


def layout_of(image: LayoutReference, home: Home, *, create: bool = False) -> Layout:
    """Open the layout of an image, or create it. Raises UsageError if the directory is not a layout."""
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
                f"{image.directory} cannot be used as an OCI image layout", cause="it is not writable"
            )
        return layout
    if not (image.directory / "oci-layout").exists():
        raise UsageError(f"{image.directory} is not an OCI image layout")
    return Layout(image.directory)


@contextlib.contextmanager
def collecting(layout: Layout, target: LayoutReference) -> Iterator[None]:
    """Remove the blobs of an image that is replaced, or whose tag is removed, within the context.

    In a layout directory of the user, that is what this image alone needed, since others may have put blobs
    there; in the local store it is all that no tag needs. While the layout is read, they stay until the next
    time.
    """
    own = target.directory is not None
    layout.expect_garbage(target.tag if own else None)
    try:
        yield
        layout.collect_garbage(only_noted=own)
    except BaseException:  # an interruption may also come during the collection itself
        layout.collect_garbage(only_noted=own)
        raise


def others_can_read(target: LayoutReference) -> str:
    """Return a warning if other users can read a layout directory, and so the memory of servers; or ""."""
    if target.directory is not None:
        with contextlib.suppress(OSError):
            if target.directory.stat().st_mode & 0o077:
                return (
                    f"others can read {target.directory}, and so the memory of servers: chmod 700 protects it"
                )
    return ""
