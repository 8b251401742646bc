"""A Gaussian process over an enumerated list of configurations: the model that says where the next trial is worth most.

Matérn-5/2 kernel with one length scale per knob (Rasmussen and Williams, *Gaussian Processes for Machine Learning*, MIT Press 2006,
sections 4.2 and 5.4), expected improvement after Jones, Schonlau and Welch (J. Global Optimization 13, 1998). Spaces
here hold tens to hundreds of points and a run some dozens of trials, so everything is dense linear algebra of that size: milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flashgen.config import KernelConfig, Tunable

Array = NDArray[np.float64]

_SCALES = (0.2, 4.0)  # a length scale, in units of a knob's whole range
_NOISES = (0.003, 0.03, 0.2)  # noise variance over signal variance
_SQRT5 = math.sqrt(5.0)
_erf = np.vectorize(math.erf, otypes=[float])


def features(configs: Sequence[KernelConfig]) -> Array:
    """Coordinates of configurations in the unit cube, (number of configs, number of knobs that vary).

    Numbers count in doublings, truth values as 0 and 1, names by one coordinate each.
    """
    columns: list[list[float]] = []
    for name in configs[0] if configs else ():
        values = [config[name] for config in configs]
        if any(isinstance(value, str) for value in values):
            columns += [[float(value == word) for value in values] for word in sorted(set(map(str, values)))]
        else:
            columns.append([_number(value) for value in values])
    varying = []
    for column in columns:
        low, high = min(column), max(column)
        if high > low:
            varying.append([(value - low) / (high - low) for value in column])
    return np.array(varying, dtype=float).T.reshape(len(configs), len(varying))


def _number(value: Tunable) -> float:
    return float(value) if isinstance(value, bool) else math.log2(1 + abs(int(value)))


def expected_improvement(mean: Array, std: Array, best: float) -> Array:
    """How much lower than `best` each point is expected to come out; 0 and more."""
    z = (best - mean) / std
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return np.asarray(std * (z * 0.5 * (1 + _erf(z / math.sqrt(2))) + density))


class Surrogate:
    """The process. Length scales are kept from fit to fit, so that each starts where the last ended.

    Args:
        points: (n, knobs) coordinates of every configuration of the list.
    """

    def __init__(self, points: Array) -> None:
        self._squares = (points[:, None, :] - points[None, :, :]) ** 2
        self._scales = np.ones(points.shape[1])

    def predict(self, seen: Sequence[int], values: Array) -> tuple[Array, Array]:
        """Mean and standard deviation at every point of the list.

        Args:
            seen: which points were observed; repeats are legal, they average.
            values: what was observed there, of about unit variance and mean 0.
        """
        index = np.asarray(seen)
        scales, noise, variance = self._fit(index, values)
        cross = _kernel(self._squares[:, index], scales)
        factor = np.linalg.cholesky(cross[index] + noise * np.eye(len(index)))
        weights = np.linalg.solve(factor.T, np.linalg.solve(factor, values))
        explained = np.linalg.solve(factor, cross.T)
        spread = np.sqrt(np.maximum(1e-12, variance * (1.0 - (explained**2).sum(0))))
        return cross @ weights, spread

    def _fit(self, index: NDArray[np.intp], values: Array) -> tuple[Array, float, float]:
        """Length scales, noise and signal variance: the most probable ones, by coordinate descent in factors of two.

        Every noise descends on its own, all side by side: matrices this small cost calls, not arithmetic.
        """
        squares = self._squares[np.ix_(index, index)]
        noises = np.array(_NOISES)
        scales = np.tile(self._scales, (len(noises), 1))
        losses, variances = _losses(squares, values, scales, noises)
        for _ in range(2):
            for knob in range(scales.shape[1]):
                steps = np.concatenate([scales, scales])
                steps[:, knob] = np.clip(steps[:, knob] * np.repeat((0.5, 2.0), len(noises)), *_SCALES)
                found = _losses(squares, values, steps, np.tile(noises, 2))
                for half in np.split(np.arange(len(steps)), 2):
                    better = found[0][half] < losses - 1e-9
                    losses[better], variances[better] = found[0][half][better], found[1][half][better]
                    scales[better] = steps[half][better]
        best = int(losses.argmin())
        self._scales = scales[best]
        return self._scales, float(noises[best]), float(variances[best])


def _kernel(squares: Array, scales: Array) -> Array:
    """Correlations from squared distances per knob, (..., knobs); one set of scales gives (...), several give (sets, ...)."""
    r = _SQRT5 * np.sqrt(np.moveaxis(squares @ (scales.T**-2), -1, 0) if scales.ndim == 2 else squares @ scales**-2)
    return np.asarray((1.0 + r + r * r / 3.0) * np.exp(-r))


def _losses(squares: Array, values: Array, scales: Array, noises: Array) -> tuple[Array, Array]:
    """Negative log posterior of sets of length scales and noises, the signal variance profiled out (with a weak prior of 1).

    Returns:
        Losses and signal variances, one a set.
    """
    n = len(values)
    # The values are the matrix's last row: one factorisation also solves for them. The corner is large enough to stay positive.
    whole = np.empty((len(noises), n + 1, n + 1))
    whole[:, :n, :n] = _kernel(squares, scales) + noises[:, None, None] * np.eye(n)
    whole[:, n, :n] = whole[:, :n, n] = values
    whole[:, n, n] = 1.0 + values @ values / noises
    factor = np.linalg.cholesky(whole)
    variances = ((factor[:, n, :n] ** 2).sum(-1) + 0.5) / (n + 1.0)
    priors = 0.25 * (np.log(scales) ** 2).sum(-1)  # log-normal round 1, the whole range of a knob
    logs = np.log(np.diagonal(factor[:, :n, :n], axis1=1, axis2=2)).sum(-1)
    return 0.5 * n * np.log(variances) + logs + priors, variances
