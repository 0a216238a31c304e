# SPDX-License-Identifier: Apache-2.0
"""Make sure that what was added under a tag stays there, although other clients add theirs.

No registry compares before it replaces a tag. So two clients that read the same state both write, and what
the first one wrote is lost. That cannot be seen before the other has written: hence the pause.
"""

import random
from collections.abc import Callable

from rekindle.errors import RegistryError

_WRITES_LIMIT = 10
_SETTLE_SECONDS = 0.3  # longer than another client takes from reading what is under the tag to writing it


class Settling:
    """Tags that were written, and how to write each again."""

    def __init__(self, pause: Callable[[float], object]) -> None:
        self._pause = pause
        self._written: dict[str, Callable[[], bool]] = {}

    def keep(self, tag: str, write_again: Callable[[], bool]) -> None:
        """See `Destination.keep`."""
        self._written[tag] = write_again

    def settle(self) -> None:
        """Wait until everything that was written stays. Raises RegistryError."""
        for number in range(_WRITES_LIMIT):
            if not self._written:
                return
            self._pause(_SETTLE_SECONDS * (number + 1) * random.uniform(1.0, 1.5))  # noqa: S311
            waiting, self._written = self._written, {}
            self._written = {tag: again for tag, again in waiting.items() if again()}
        raise RegistryError(
            f"what was added under {next(iter(self._written))} does not stay",
            cause="other clients replace it",
            hint="try again when they are done",
        )
