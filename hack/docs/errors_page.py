# SPDX-License-Identifier: Apache-2.0
"""Write docs/errors.md from rekindle/errors.py; with --check, fail if the file differs."""

import sys

from hack.docs import pages
from rekindle.errors import RekindleError

HEAD = """\
# Errors and exit statuses

Generated from `rekindle/errors.py` by `make docs`; do not edit.

An error message says what failed, the cause in the tool's own words, a hint and, where a program such as CRIU
has failed, its log and the command to replay. With `--json` or `--report FILE`, the report has the same under
`error`, with its code.

The last column says whether `restore` may fall back to a lower rung, or must fail. If the image cannot be
read, the only lower rung is a cold start of the command that `restore` was given
([ADR 8](adr/0008-ladder.md)).

"""
TAIL = """\

Once the server is ready, `rekindle restore` exits with the server's status; on a lower rung, it exits with 3
instead of 0.
"""
# Exit statuses without an error class.
OTHERS = {
    0: ("success", ""),
    1: ("a bug in rekindle, with a traceback; please report it", "yes"),
    3: ("success, but on a lower rung than requested; `match` and `restore --plan`: a restore would be", ""),
}


def page() -> str:
    """Return the text of the page."""
    rows = [(status, "", *others) for status, others in OTHERS.items()]
    for error in RekindleError.__subclasses__():
        meaning, descends = " ".join((error.__doc__ or "").split()), "yes" if error.descends else "no"
        rows.append((error.exit_status, f"`{error.code}`", meaning, descends))
    last = ("128 + n", "", "terminated by signal n, after the clean-up", "")
    head = ("status", "code", "meaning", "may fall back to a lower rung")
    return HEAD + pages.table(head, [*sorted(rows), last]) + TAIL


if __name__ == "__main__":
    sys.exit(pages.finish("errors.md", page()))
