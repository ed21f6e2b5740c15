"""Statistics against scipy, closed forms and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robench.core.errors import RobenchError
from robench.evaluation.outcomes import wilson
from robench.evaluation.statistics import (
    Interval,
    bootstrap_difference,
    difference_over_seeds,
    holm,
    mcnemar,
)

VERDICTS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@settings(max_examples=50, deadline=None)
@given(VERDICTS)
def test_mcnemar_is_the_binomial_test_of_the_images_that_differ(pairs: list[tuple[bool, bool]]) -> None:
    first, second = np.array(pairs).T
    wins, losses = int((first & ~second).sum()), int((~first & second).sum())
    # Twice the smaller tail of the binomial distribution.
    tail = 2 * stats.binom.cdf(min(wins, losses), wins + losses, 0.5)
    assert mcnemar(first, second) == pytest.approx(min(1.0, float(tail)))
    assert mcnemar(first, second) == mcnemar(second, first)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 80), st.integers(0, 80))
def test_wilson_is_where_the_score_test_rejects(right: int, wrong: int) -> None:
    total = right + wrong
    if not total:
        return
    for bound in wilson(right, total):
        if 0 < bound < 1:
            z = (right / total - bound) / np.sqrt(bound * (1 - bound) / total)
            assert abs(z) == pytest.approx(1.959964, rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_is_the_closure_of_bonferroni(p_values: list[float]) -> None:
    """The adjusted p is the largest Bonferroni p of any set of hypotheses that the hypothesis is in."""
    sets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(range(len(p_values)), size)]
    for index, adjusted in enumerate(holm(p_values)):
        brute = max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets if index in s)
        assert adjusted == pytest.approx(brute)


def draw(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> npt.NDArray[np.bool_]:
    return np.asarray(rng.random(shape) < share)


def test_the_bootstrap_covers_what_it_promises() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        first = draw(rng, (300,), 0.6)
        second = first ^ draw(rng, (300,), 0.2)  # expectation 0.6 x 0.8 + 0.4 x 0.2
        low, high = bootstrap_difference(first, second, resamples=500)
        inside += low <= 0.6 - 0.56 <= high
    assert 88 <= inside <= 100


def bootstrap(verdicts: npt.NDArray[np.bool_]) -> Interval:
    """Of an accuracy: of its difference from none."""
    return bootstrap_difference(verdicts, np.zeros(verdicts.shape[-1]))


def test_the_bootstrap_is_keyed_and_agrees_with_the_normal_interval() -> None:
    verdicts = draw(np.random.default_rng(1), (900,), 0.7)
    low, high = bootstrap(verdicts)
    assert (low, high) == bootstrap(verdicts)
    half = 1.96 * np.sqrt(verdicts.mean() * (1 - verdicts.mean()) / 900)
    assert low == pytest.approx(verdicts.mean() - half, abs=0.004)
    assert high == pytest.approx(verdicts.mean() + half, abs=0.004)


def test_images_are_resampled_once_for_all_seeds() -> None:
    """Seeds that agree on every image tell no more than one of them; independent ones narrow the interval."""
    rng = np.random.default_rng(2)
    one = draw(rng, (400,), 0.6)
    assert bootstrap(np.stack([one] * 4)) == bootstrap(one)
    low, high = bootstrap(draw(rng, (4, 400), 0.6))
    alone = bootstrap(one)
    assert high - low == pytest.approx((alone.high - alone.low) / 2, rel=0.15)


def test_a_difference_over_seeds_counts_seeds_and_images() -> None:
    rng = np.random.default_rng(3)
    image = rng.random(500)
    first, second = ((image + 0.1 * rng.standard_normal((3, 500))) < share for share in (0.7, 0.5))
    value, low, high, p = difference_over_seeds(first, second)
    assert low < value < high
    assert p < 1e-3
    assert value == pytest.approx(first.mean() - second.mean())
    welch = stats.ttest_ind(first.mean(axis=1), second.mean(axis=1), equal_var=False).confidence_interval()
    images = bootstrap_difference(first, second)
    variance = sum((0.5 * (end[1] - end[0]) / z) ** 2 for end, z in ((images, 1.96), (welch, 3.2)))
    assert high - low > images.high - images.low
    assert (high - low) / 2 == pytest.approx(1.98 * np.sqrt(variance), rel=0.25)
    same = difference_over_seeds(first, first)
    assert (same.value, same.p) == (0, 1)


def test_false_claims_about_defenses_are_rare() -> None:
    """Seeds differ, images differ, and the defenses do not."""
    rng = np.random.default_rng(4)
    claims = 0
    for _ in range(200):
        image = rng.standard_normal(200)
        sides = [(image + 0.3 * rng.standard_normal((3, 1)) + rng.standard_normal((3, 200))) > 0 for _ in range(2)]
        claims += difference_over_seeds(*sides).p <= 0.05
    assert claims <= 14


@pytest.mark.parametrize(("images", "sure"), [(2, False), (3, False), (5, False), (8, True)])
def test_a_few_images_are_no_certainty_however_alike_they_are(images: int, sure: bool) -> None:
    right, wrong = np.ones((3, images)), np.zeros((3, images))
    found = difference_over_seeds(right, wrong)
    assert (found.p <= 0.05) == sure
    assert -1 <= found.low < 0.9 < found.high <= 1 + 1e-9
    assert bootstrap_difference(right, wrong) == (found.low, found.high)
    nearly = right.copy()
    nearly[0, 0] = 0
    assert difference_over_seeds(nearly, wrong).p > 0.05 or sure


def test_no_difference_on_any_image_is_no_certainty_of_none() -> None:
    low, high = bootstrap_difference(np.zeros(20), np.zeros(20))
    assert low == -high < -0.1
    wide, narrow = (bootstrap_difference(np.ones(n), np.ones(n)) for n in (20, 2000))
    assert narrow.high < wide.high / 10


def test_other_images_are_refused() -> None:
    with pytest.raises(RobenchError, match="same images"):
        mcnemar([True, False], [True])
    with pytest.raises(RobenchError, match="same images"):
        bootstrap_difference(np.ones((2, 4)), np.ones((2, 3)))
    with pytest.raises(RobenchError, match="shape"):
        mcnemar([[True]], [[True]])
