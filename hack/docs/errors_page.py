# SPDX-License-Identifier: Apache-2.0
"""Write docs/errors.md from rekindle/errors.py; with --check, fail if the file differs."""

import sys

from hack.docs import pages
from rekindle.errors import RekindleError

HEAD = """\
# Errors and exit statuses

Generated from `rekindle/errors.py` by `make docs`; do not edit.

An error prints what failed, the cause in the tool's own words, a hint, where the log is, and the command to
replay. With `--json` or `--report FILE`, the report holds the same under `error`, with the code below.

The last column says what `restore` does: whether it may take a lower rung instead, or must end. Where the
image itself cannot be had, the only lower rung is the cold start of a command that was given to it
([ADR 8](adr/0008-ladder.md)).

"""
TAIL = """\

Once a server serves, `rekindle restore` ends with the server's own status, but 3 in place of 0 on a lower
rung.
"""
# Exit statuses without an error class.
OTHERS = {
    0: ("done as asked", ""),
    1: ("a bug in rekindle: a traceback is printed; please report it", "yes"),
    3: ("done, but on a lower rung than asked for; `match` and `restore --plan`: it would be", ""),
}


def page() -> str:
    """Return the text of the page."""
    rows = [(status, "", *others) for status, others in OTHERS.items()]
    for error in RekindleError.__subclasses__():
        meaning, descends = " ".join((error.__doc__ or "").split()), "yes" if error.descends else "no"
        rows.append((error.exit_status, f"`{error.code}`", meaning, descends))
    last = ("128 + n", "", "ended by signal n, after everything was cleaned up", "")
    head = ("status", "code", "meaning", "may a lower rung be tried?")
    return HEAD + pages.table(head, [*sorted(rows), last]) + TAIL


if __name__ == "__main__":
    sys.exit(pages.finish("errors.md", page()))
