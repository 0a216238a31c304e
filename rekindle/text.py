# SPDX-License-Identifier: Apache-2.0
"""Text from foreign hands, made fit for a terminal."""


def printable(text: str) -> str:
    """The text with control characters, but for line feed and tab, shown as their escapes.

    A record or a server's log may hold sequences that move a terminal's cursor or set its title.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
