# SPDX-License-Identifier: Apache-2.0
"""Text from foreign hands, made fit for a terminal."""


def printable(text: str, *, lines: bool = False) -> str:
    """The text with control characters shown as their escapes; line feed and tab too, unless `lines`.

    A record or a server's log may hold sequences that move a terminal's cursor or set its title.
    """
    kept = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)
