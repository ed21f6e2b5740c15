"""Uncertainty: what other images would change, and what other training seeds would.

Verdicts are arrays of bool: images (M,), or training seeds by images (S,M). Every draw is keyed, so that the same
verdicts give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy

from robench.core.errors import RobenchError
from robench.core.rng import Stream
from robench.evaluation.outcomes import CONFIDENCE, wilson

#: A difference is called one where its adjusted p-value is at most this.
LEVEL = 0.05
RESAMPLES = 2000

_Floats = npt.NDArray[np.float64]


class Interval(NamedTuple):
    low: float
    high: float


class Difference(NamedTuple):
    value: float
    low: float
    high: float
    p: float


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value that wins and losses are equally likely; 1 of neither."""
    return float(scipy.stats.binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


def mcnemar(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """McNemar's exact two-sided p-value for two verdicts (M,) on the same images (McNemar 1947)."""
    one, other = _verdicts(first, 1), _verdicts(second, 1)
    _paired(one, other)
    return sign_test(int((one > other).sum()), int((one < other).sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def bootstrap_difference(first: npt.ArrayLike, second: npt.ArrayLike, *, resamples: int = RESAMPLES) -> Interval:
    """The percentile interval of a difference of accuracies, ``first`` less ``second``, under resampled images.

    Every resample takes the same images on both sides and for all seeds: verdicts of several seeds on one image are no
    independent observations. Where the difference is the same on every image, all resamples are alike and say nothing
    of other images: then it is the interval of `_of_wilson`.

    Args:
        first, second: (M,), or of several seeds, whose mean accuracies are compared, (S,M) and (T,M).

    Raises:
        RobenchError: another number of images.
    """
    one, other = _by_image(first), _by_image(second)
    _paired(one, other)
    values = one - other
    count = len(values)
    if (values == values[0]).all():
        return _of_wilson(one, other)
    means = []
    block = max(1, 1_000_000 // count)
    for start in range(0, resamples, block):
        draws = Stream(("bootstrap",)).uniform((min(block, resamples - start), count), start)
        # In float64: in float32 a draw near 1 could round up to `count`.
        means.append(values[(draws.double() * count).long().numpy()].mean(axis=1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return Interval(float(low), float(high))


def difference_over_seeds(first: npt.ArrayLike, second: npt.ArrayLike) -> Difference:
    """The difference of two mean accuracies, as other seeds and other images together would move it.

    The variance over seeds, Welch's (1947), and that over images, of the means over seeds, are added; degrees of
    freedom are Satterthwaite's (1946). What seeds and images share is counted in both, so it errs on the safe side. A
    side of one seed says nothing of others, and counts as that training. The p-value is no less than that of a sign
    test in which every image is on one side.

    Args:
        first, second: (S,M) and (T,M), at least two seeds of one of them and two images.
    """
    one, other = _verdicts(first, 2), _verdicts(second, 2)
    _paired(one, other)
    if max(len(one), len(other)) < 2 or one.shape[1] < 2:
        raise RobenchError(f"expected at least 2 seeds of one side and 2 images, got {one.shape} and {other.shape}")
    by_image = one.mean(axis=0) - other.mean(axis=0)
    value = float(by_image.mean())
    seeds = [side.mean(axis=1) for side in (one, other) if len(side) > 1]
    error, freedom = _error(*seeds, by_image)
    # So few images do not say more, however alike they are.
    least = sign_test(one.shape[1] if value else 0, 0)
    if error == 0:
        return Difference(value, *_of_wilson(one.mean(axis=0), other.mean(axis=0)), least)
    half = _student(freedom) * error
    p = 2 * float(scipy.stats.t.sf(abs(value) / error, freedom))
    return Difference(value, max(-1.0, value - half), min(1.0, value + half), max(p, least))


def accuracy_interval(verdicts: npt.ArrayLike) -> Interval:
    """The interval of a mean accuracy, as other seeds and other images together would move it.

    Variances are added as in `difference_over_seeds`; never narrower than Wilson's for the mean on as many images,
    which is the interval of one seed.

    Args:
        verdicts: (S,M).
    """
    values = _verdicts(verdicts, 2)
    return interval_of_mean(values.mean(axis=1), values.mean(axis=0), values.shape[1])


def interval_of_mean(by_seed: _Floats, by_image: _Floats, images: int) -> Interval:
    """`accuracy_interval` where seeds may have judged other images.

    Wilson's counts whole images: a mean over seeds is rounded to the nearest of them, by half an image at most.

    Args:
        by_seed: the accuracy of each seed; by_image: the mean over the seeds that judged it, of each image.
        images: the fewest of any seed.
    """
    value = float(by_seed.mean())
    low, high = wilson(round(value * images), images)
    if min(len(by_seed), len(by_image)) > 1:
        error, freedom = _error(by_seed, by_image)
        half = _student(freedom) * error if error else 0.0
        low, high = max(0.0, min(low, value - half)), min(1.0, max(high, value + half))
    return Interval(low, high)


def _of_wilson(first: _Floats, second: _Floats) -> Interval:
    """The interval of a difference of accuracies from Wilson's of each (Newcombe 1998), as if images were not paired,
    which is wider; ``first`` and ``second`` (M,)."""
    one, other = float(first.mean()), float(second.mean())
    (low, high), (less, more) = (wilson(round(p * len(first)), len(first)) for p in (one, other))
    value = one - other
    return Interval(value - math.hypot(one - low, more - other), value + math.hypot(high - one, other - less))


def _student(freedom: float) -> float:
    """Standard errors from a mean to either end of its interval."""
    return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def _error(*samples: _Floats) -> tuple[float, float]:
    """The standard error of a sum of means of independent samples, and its degrees of freedom (Satterthwaite)."""
    parts = [(float(each.var(ddof=1)) / len(each), len(each) - 1) for each in samples]
    variance = sum(part for part, _ in parts)
    return math.sqrt(variance), variance**2 / sum(part**2 / df for part, df in parts) if variance else math.inf


def _verdicts(values: npt.ArrayLike, dimensions: int) -> _Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != dimensions or not found.size:
        what = "(images,)" if dimensions == 1 else "(seeds, images)"
        raise RobenchError(f"expected verdicts of shape {what}, got {found.shape}")
    return found


def _by_image(values: npt.ArrayLike) -> _Floats:
    """The mean over seeds of each image, (M,): resampling it resamples images once for all seeds."""
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    return np.asarray(_verdicts(table, 2).mean(axis=0), dtype=np.float64)


def _paired(first: _Floats, second: _Floats) -> None:
    if first.shape[-1] != second.shape[-1]:
        raise RobenchError(f"expected verdicts on the same images, got {first.shape[-1]} and {second.shape[-1]}")
