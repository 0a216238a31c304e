# SPDX-License-Identifier: Apache-2.0
"""Estimate a mean from several simulations."""

import math
import statistics
from collections.abc import Sequence

from msgspec import Struct


class Estimate(Struct, frozen=True, kw_only=True):
    """A mean over several simulations, and half the width of its 95 % confidence interval."""

    mean: float
    half_width: float


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean and its confidence, by Student's distribution."""
    if len(values) < 2:
        return Estimate(mean=values[0], half_width=math.inf)
    quantiles = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
    quantile = quantiles[len(values) - 2] if len(values) <= 10 else 1.96 + 2.4 / (len(values) - 1)
    return Estimate(
        mean=statistics.fmean(values),
        half_width=quantile * statistics.stdev(values) / math.sqrt(len(values)),
    )
