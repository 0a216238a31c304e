# SPDX-License-Identifier: Apache-2.0
"""The listener that is told of the progress of a restore."""

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rekindle.report import Report

if TYPE_CHECKING:
    from oci.progress import Tally

_JOIN_SECONDS = 3.0


class Listener:
    """Receives the events of a restore. All methods do nothing here; override those that you need."""

    def say(self, text: str) -> None:
        """Receive a line for people, at each step."""

    def progress(self, tally: "Tally | None") -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Return a context in which bytes are fetched, counted by `tally`; None if nothing is fetched."""
        return contextlib.nullcontext()

    def ready(self, report: Report) -> None:
        """Receive the complete report once the server is ready, or has exited before it was."""

    def announced(self, report: Report) -> None:
        """Receive the report once more when everybody has been told that the server is ready.

        Called in a thread of its own, while the server serves: this may take a while.
        """

    def interrupted(self, report: Report) -> None:
        """Receive the report when a signal ends the restore before the server is ready, before clean-up."""

    def failed(self, report: Report) -> None:
        """Receive the report when no rung could be taken, after clean-up."""


@contextlib.contextmanager
def announced(listener: Listener, report: Report) -> Iterator[None]:
    """Call `listener.announced` beside the server, which is served within the context."""
    thread = threading.Thread(target=listener.announced, args=[report], daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join(_JOIN_SECONDS)  # it is done long before, unless the server ends at once
