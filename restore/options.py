# SPDX-License-Identifier: Apache-2.0
"""What a restore may be asked for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Our descriptors that the server gets as its standard output and standard error."""

    stdout: int
    stderr: int
