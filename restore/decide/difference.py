# SPDX-License-Identifier: Apache-2.0
"""A difference between a recorded node and this one."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Difference:
    """One finding of a comparison, without a judgement: `restore.decide.rules` says what it means.

    `code` is that of a rule, `field` what was compared, in words. `recorded` is empty where there is nothing
    to compare `here` with.
    """

    code: str
    field: str
    recorded: str
    here: str
