# SPDX-License-Identifier: Apache-2.0
"""Why a step of the acceptance test ends early: it failed, its deadline passed, or it does not apply here.

LateError is no StepError: a step may catch StepError and continue, but not after its deadline.
"""

from rekindle.errors import RekindleError


class StepError(Exception):
    """A step failed; the message is for the report."""


class LateError(Exception):
    """The deadline of a step passed."""


class SkippedError(Exception):
    """A step does not apply to this machine."""


def in_words(error: Exception) -> str:
    """Return the text for the report. An unexpected error is named by its class, too."""
    if isinstance(error, RekindleError):
        return error.summary
    return str(error) if isinstance(error, StepError | LateError) else f"{type(error).__name__}: {error}"
