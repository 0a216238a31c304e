# SPDX-License-Identifier: Apache-2.0
"""The form of a rule for comparing nodes."""

from msgspec import Struct

from rekindle.report import Rung


class Rule(Struct, frozen=True, kw_only=True):
    """The meaning of a difference in a field: `why`, the `source` for that, and the `advice` to the user."""

    rung: Rung
    hard: bool
    why: str
    source: str
    advice: str
    fixed: bool = False
