# SPDX-License-Identifier: Apache-2.0
"""Facts about NVIDIA's drivers by their branches, for `rekindle doctor`; docs/gpu/drivers.md has it all.

Nothing is decided by this but what a person should know: rekindle tries what a driver can do.
"""

from typing import NamedTuple


class DriverNote(NamedTuple):
    """A note on the branches from `first` to `last`."""

    first: int
    last: int
    text: str
    remedy: str


_NEWEST = 999
NOTES = (
    DriverNote(
        555,
        569,
        "this branch is reached through cuda-checkpoint only, which starts the driver at each step",
        "update the driver to 580, which has an API",
    ),
    DriverNote(
        555,
        579,
        "this branch restores a process onto the same GPUs only",
        "update the driver to 580, which restores onto others of the same model",
    ),
    DriverNote(
        570,
        570,
        "570.158 failed to checkpoint PyTorch",
        "update the driver to 580",
    ),
    DriverNote(
        590,
        _NEWEST,
        "hosts hung after a live restored process was killed (NVIDIA/cuda-checkpoint#53, driver 595)",
        "rekindle suspends such a server before it ends, which cuts off its requests: drain it first, and "
        "never use kill -9 on rekindle; of 580 there is no such report",
    ),
    DriverNote(
        610,
        610,
        "a lock crashed a server of many threads (NVIDIA/cuda-checkpoint#58, driver 610.57)",
        "use 580 if a snapshot fails in a lock",
    ),
)


def notes(version: str) -> list[DriverNote]:
    """Return the notes on a driver by its version, such as 580.65.06."""
    major = version.partition(".")[0]
    return [each for each in NOTES if major.isdecimal() and each.first <= int(major) <= each.last]
