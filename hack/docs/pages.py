# SPDX-License-Identifier: Apache-2.0
"""Write a generated page of docs/ or, with --check, compare it with the file."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def finish(name: str, text: str) -> int:
    """Write a page and return 0; with --check, return 1 if the file differs and write nothing."""
    page = DOCS / name
    if "--check" not in sys.argv[1:]:
        page.write_text(text)
        return 0
    if page.exists() and page.read_text() == text:
        return 0
    print(f"docs/{name} is not up to date: run `make docs`", file=sys.stderr)
    return 1


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    written = ["|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|\n" for line in lines]
    return written[0] + "|" + "---|" * len(head) + "\n" + "".join(written[1:])
