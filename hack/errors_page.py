# SPDX-License-Identifier: Apache-2.0
"""Write docs/errors.md from rekindle/errors.py; with --check, fail if it is not up to date."""

import sys
from pathlib import Path

from rekindle.errors import RekindleError

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
HEAD = """\
# Errors and exit statuses

Generated from `rekindle/errors.py` by `make docs`; do not edit.

An error prints what failed, the cause in the tool's own words, a hint, where the log is, and the command to
replay. With `--json` or `--report FILE`, the report holds the same under `error`, with the code below.

| status | code | meaning | may a lower rung be tried? |
|---|---|---|---|
| 0 | | done as asked | |
| 1 | | a bug in rekindle: a traceback is printed; please report it | |
"""
TAIL = """\
| 128 + n | | ended by signal n, after everything was cleaned up | |

Once a restored server serves, `rekindle restore` ends with the server's own status.
"""


def page() -> str:
    """The page's text."""
    rows = sorted((error.exit_status, error) for error in RekindleError.__subclasses__())
    lines = []
    for status, error in rows:
        meaning, descends = " ".join((error.__doc__ or "").split()), "yes" if error.descends else "no"
        lines.append(f"| {status} | `{error.code}` | {meaning} | {descends} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


def main() -> int:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
        return 0
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    print("docs/errors.md is not up to date: run `make docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
