# SPDX-License-Identifier: Apache-2.0
"""How a step of the acceptance ends early.

StepError     it has failed
LateError     its deadline is over; not a StepError, so that no step goes on after catching one
SkippedError  it has nothing to do on this machine
"""

from rekindle.errors import RekindleError


class StepError(Exception):
    """What was to be shown was not, in words for the report."""


class LateError(Exception):
    """The deadline of a step is over."""


class SkippedError(Exception):
    """A step has nothing to do on this machine."""


def in_words(error: Exception) -> str:
    """Return one line for the report; with the name of its class, if the error was not expected."""
    if isinstance(error, RekindleError):
        return f"{error.message}: {error.cause}" if error.cause else error.message
    return str(error) if isinstance(error, StepError | LateError) else f"{type(error).__name__}: {error}"
