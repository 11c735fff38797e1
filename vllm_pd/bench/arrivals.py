"""When requests arrive. Pure; the first one arrives at 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_pd.errors import ConfigError

Seconds = npt.NDArray[np.float64]


def gamma_arrivals(count: int, rate: float, cv: float, rng: np.random.Generator) -> Seconds:
    """Return arrival times of a renewal process with gamma-distributed gaps.

    Unlike ``vllm bench``, which stretches them so that the last one comes at
    ``count / rate``, these keep the randomness of their sum.

    Args:
        count: how many.
        rate: per second, on average; ``inf``: all at once.
        cv: standard deviation of a gap over its mean. 1: a Poisson process; above:
            bursts; 0: equal gaps.
        rng: where the randomness comes from.

    Raises:
        ConfigError: the rate is not positive, or ``cv`` is negative.
    """
    if not rate > 0:
        raise ConfigError(f"rate {rate:g} is not positive")
    if not 0 <= cv < math.inf:
        raise ConfigError(f"coefficient of variation {cv:g} is not 0 or more")
    if math.isinf(rate):
        return np.zeros(count)
    if cv == 0:
        gaps = np.full(count, 1 / rate)
    else:
        shape = 1 / cv**2
        gaps = rng.gamma(shape, 1 / (rate * shape), count)
    arrivals: Seconds = np.cumsum(gaps)
    arrivals -= arrivals[0]
    return arrivals


def replayed(timestamps_s: Sequence[float], rate: float | None) -> Seconds:
    """Return the arrivals of a trace, from its first one on.

    Args:
        timestamps_s: as recorded, in ascending order.
        rate: stretch or squeeze them to this mean rate; None: as recorded.

    Raises:
        ConfigError: the rate is not positive, or asked of a trace in which all come at once.
    """
    arrivals: Seconds = np.asarray(timestamps_s, dtype=np.float64) - timestamps_s[0]
    if rate is None:
        return arrivals
    if not rate > 0:
        raise ConfigError(f"rate {rate:g} is not positive")
    if math.isinf(rate):
        return np.zeros(len(arrivals))
    if not (span := float(arrivals[-1])):
        raise ConfigError("all requests of the trace arrive at once: it has no rate to change")
    arrivals *= (len(arrivals) - 1) / rate / span
    return arrivals
