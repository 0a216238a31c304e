# SPDX-License-Identifier: Apache-2.0
"""The number of replicas that a model needs at a time, as a distribution.

Requests come as a Poisson process whose rate is that of the step, and each is served for a while: the number
in service is Poisson distributed with the mean rate x seconds, whatever the distribution of the seconds
(M/G/infinity; Kleinrock, Queueing Systems I, 1975). Over a period it is the mixture of its steps. Requests
see it as time does, weighted by the rate (PASTA; Wolff, 1982).
"""

import math
from collections.abc import Sequence

import numpy as np

from rekindle.fleet.problem import ServedModel

_NEGLIGIBLE = 1e-9
_UNITS = 840  # of a node, which 1 to 8 GPUs divide


class Need:
    """The probabilities that 0, 1, 2, … replicas are needed: of the time, and of the requests' arrivals."""

    def __init__(self, of_time: Sequence[float], of_requests: Sequence[float]) -> None:
        self.of_time, self.of_requests = tuple(of_time), tuple(of_requests)

    @classmethod
    def of(cls, model: ServedModel, period: int) -> "Need":
        """Return the need of a model in a period."""
        rates = model.rates(period)
        distinct = {rate: rates.count(rate) / len(rates) for rate in set(rates)}
        total = sum(rate * share for rate, share in distinct.items())
        of_time: list[float] = [0.0]
        of_requests: list[float] = [0.0]
        for rate, share in distinct.items():
            for size, probability in enumerate(_poisson(rate * model.service_seconds)):
                # A request that finds `size` others needs as many replicas as serve one more.
                _add(of_time, -(-size // model.concurrency), share * probability)
                if total:
                    _add(of_requests, size // model.concurrency + 1, share * rate / total * probability)
        return cls(of_time, of_requests if total else [1.0])

    @property
    def most(self) -> int:
        """The number that is never exceeded, but for a negligible time."""
        return len(self.of_time) - 1

    def quantile(self, share: float) -> int:
        """Return the least number that suffices for a share of the requests."""
        reached = 0.0
        for number, probability in enumerate(self.of_requests):
            reached += probability
            if reached >= share - _NEGLIGIBLE:
                return number
        return len(self.of_requests) - 1

    def late_share(self, replicas: int) -> float:
        """Return the share of the requests that find so many replicas full."""
        return math.fsum(self.of_requests[replicas + 1 :])

    def above(self, replicas: int) -> float:
        """Return how many more replicas than these are needed, on average over time."""
        return math.fsum((n - replicas) * p for n, p in enumerate(self.of_time) if n > replicas)

    def effective(self, replicas: int, weight: float, theta: float) -> float:
        """Return the effective bandwidth of the need above so many replicas, each of which takes `weight`.

        If the sum of these over independent models, plus ln(1/e)/theta, is at most a capacity, what is
        needed exceeds that with a probability of at most e, for any theta > 0 (Chernoff's bound; Kelly,
        Notes on effective bandwidths, 1996). As theta nears 0 it is the mean.
        """
        beyond = np.maximum(np.arange(len(self.of_time)) - replicas, 0) * weight * theta
        top = beyond.max()  # whose exponential alone could overflow
        return float((top + math.log(np.asarray(self.of_time) @ np.exp(beyond - top))) / theta)


def quantile_of_sum(parts: Sequence[tuple[Need, int, float]], share: float) -> float:
    """Return what independent needs above so many replicas take together, but for a share of the time.

    Each part is a need, the replicas that run anyway, and the weight of each further one.
    """
    unit = 1 / _UNITS
    total = np.ones(1)
    for need, replicas, weight in parts:
        size = math.ceil(weight / unit - _NEGLIGIBLE)
        of_one = np.zeros(max(0, need.most - replicas) * size + 1)
        for number, probability in enumerate(need.of_time):
            of_one[max(0, number - replicas) * size] += probability
        total = np.convolve(total, of_one)
        reached = np.cumsum(total)
        total = total[: int(np.searchsorted(reached, 1 - _NEGLIGIBLE)) + 1]
    return float(np.searchsorted(np.cumsum(total), 1 - share)) * unit


def _poisson(mean: float) -> list[float]:
    """Return the probabilities of 0, 1, 2, … until what follows is negligible."""
    if mean == 0:
        return [1.0]
    found: list[float] = []
    reached, size = 0.0, 0
    while reached < 1 - _NEGLIGIBLE and size < mean + 40 * math.sqrt(mean) + 40:
        probability = math.exp(size * math.log(mean) - mean - math.lgamma(size + 1))
        found.append(probability)
        reached += probability
        size += 1
    return [each / reached for each in found]


def _add(to: list[float], index: int, value: float) -> None:
    to.extend([0.0] * (index + 1 - len(to)))
    to[index] += value
