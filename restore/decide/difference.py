# SPDX-License-Identifier: Apache-2.0
"""Differences between a recorded node and this one."""

from msgspec import Struct


class Difference(Struct, frozen=True):
    """A difference, without its consequence, which `restore.decide.rules` defines.

    `code` is that of a rule, `field` describes what was compared. `recorded` is empty if there is nothing
    to compare `here` with.
    """

    code: str
    field: str
    recorded: str
    here: str
