# SPDX-License-Identifier: Apache-2.0
"""Make untrusted text safe for a terminal."""


def printable(text: str, *, lines: bool = False) -> str:
    """Escape the control characters of a text; keep line feeds and tabs if `lines` is true.

    A record or a server's log may contain sequences that move a terminal's cursor or set its title.
    """
    kept = "\n\t" if lines else ""
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)
