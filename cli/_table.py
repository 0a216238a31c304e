# SPDX-License-Identifier: Apache-2.0
"""Tables of what is listed, with sizes and ages for people."""

from collections.abc import Iterable, Sequence

from rekindle.text import printable


def age(seconds: float) -> str:
    """Return a time span in the largest unit of which there are two."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def megabytes(count: int) -> str:
    """Return a size in MB."""
    return f"{count / 1e6:,.0f} MB"


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Print rows in columns, on standard output."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
