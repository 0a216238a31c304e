# SPDX-License-Identifier: Apache-2.0
"""The listener that is told of the progress of a restore."""

import contextlib
from typing import TYPE_CHECKING

from rekindle.report import Report

if TYPE_CHECKING:
    from oci.progress import Tally


class Listener:
    """Receives the events of a restore. All methods do nothing here; override those that you need."""

    def say(self, text: str) -> None:
        """Receive a line for people, at each step."""

    def progress(self, tally: "Tally | None") -> contextlib.AbstractContextManager[None]:  # noqa: ARG002
        """Return a context in which bytes are fetched, counted by `tally`; None if nothing is fetched."""
        return contextlib.nullcontext()

    def ready(self, report: Report) -> None:
        """Receive the complete report once the server is ready, or has exited before it was."""

    def interrupted(self, report: Report) -> None:
        """Receive the report when a signal ends the restore before the server is ready, before clean-up."""

    def failed(self, report: Report) -> None:
        """Receive the report when no rung could be taken, after clean-up."""
