# SPDX-License-Identifier: Apache-2.0
"""Make text for people: safe for a terminal, and no longer than they read."""

from collections.abc import Sequence

_LISTED = 5


def printable(text: str, *, lines: bool = False) -> str:
    """Escape the control characters of a text; keep line feeds and tabs if `lines` is true.

    A record or a server's log may contain sequences that move a terminal's cursor or set its title.
    """
    kept = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)


def listed(names: Sequence[str]) -> str:
    """Return the first names of a list, and the number of the others."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
