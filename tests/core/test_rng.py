"""A draw depends on its key alone, and on every part of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robench.core.rng import Draws, Stream, key

LIKE = torch.zeros(1)


def test_golden_values() -> None:
    """If this fails, every stored result has another key or other rows: raise versions, do not edit the numbers."""
    assert key("attack", 0, 0, "start") == 601192625803854413
    assert key("train", "x") == 13806245590774296891
    stream = Stream(("target", "baseline", 3, 0))
    assert stream.key("weights", 0) == 11005382710486219022
    assert stream.permutation(12, "order").tolist() == [11, 5, 0, 4, 3, 2, 1, 8, 6, 7, 10, 9]
    assert stream.uniform((4,), "noise").tolist() == [
        0.15702444314956665,
        0.3062238097190857,
        0.21451574563980103,
        0.9546464085578918,
    ]
    assert Draws.of([0, 7, 12345], seed=3, restart=2).uniform("start", (3,), LIKE).tolist() == [
        [0.9089446663856506, 0.8668437600135803, 0.6596818566322327],
        [0.3542702794075012, 0.2538284659385681, 0.5815735459327698],
        [0.31383901834487915, 0.3917558789253235, 0.7131776213645935],
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=8), st.integers(0, 2**40), st.integers(0, 9))
def test_a_sample_draws_the_same_in_any_batch_order_and_number(samples: list[int], seed: int, restart: int) -> None:
    together = Draws.of(samples, seed=seed, restart=restart).uniform("start", (2, 3), LIKE)
    assert together.shape == (len(samples), 2, 3)
    for row, sample in zip(together, samples, strict=True):
        assert torch.equal(Draws.of([sample], seed=seed).at(restart).uniform("start", (2, 3), LIKE)[0], row)
    doubled = Draws.of(samples[::-1] * 2, seed=seed, restart=restart).uniform("start", (2, 3), LIKE)
    assert torch.equal(doubled, torch.cat([together.flip(0)] * 2))


def test_rows_of_a_batch_keep_their_draws() -> None:
    draws = Draws.of([4, 9, 2, 7], seed=5, restart=3)
    some = draws.only(np.array([3, 1, 1]))
    assert some.samples.tolist() == [7, 9, 9]
    assert torch.equal(some.uniform("start", (2,), LIKE), draws.uniform("start", (2,), LIKE)[[3, 1, 1]])


def test_every_part_of_the_key_matters() -> None:
    def draw(sample: int = 0, seed: int = 0, restart: int = 0, purpose: str = "start") -> float:
        return float(Draws.of([sample], seed=seed, restart=restart).uniform(purpose, (), LIKE))

    draws = [draw(), draw(sample=1), draw(seed=1), draw(restart=1), draw(purpose="resize")]
    assert len(set(draws)) == len(draws)


def test_parts_do_not_run_together() -> None:
    keys = {key("a", "b"), key("ab"), key("a,b"), key("a", 1), key("a", "1"), key("a1"), key('a","b')}
    assert len(keys) == 7


def test_longer_shapes_begin_alike() -> None:
    draws = Draws.of([4])
    assert torch.equal(draws.uniform("x", (3,), LIKE)[0], draws.uniform("x", (5,), LIKE)[0, :3])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_samples_may_come_as_any_array(kind: type) -> None:
    assert torch.equal(Draws.of(kind([3, 1])).uniform("x", (2,), LIKE), Draws.of([3, 1]).uniform("x", (2,), LIKE))


def test_every_dtype_gets_the_same_numbers() -> None:
    single = Draws.of(range(50)).uniform("x", (20,), LIKE)
    double = Draws.of(range(50)).uniform("x", (20,), LIKE.double())
    assert double.dtype == torch.float64
    assert torch.equal(single.double(), double)


def test_a_device_changes_nothing() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "meta")
    drawn = Draws.of(range(3)).uniform("x", (2,), torch.zeros(1, device=device))
    assert drawn.device.type == device.type
    if device.type == "cuda":
        assert torch.equal(drawn.cpu(), Draws.of(range(3)).uniform("x", (2,), LIKE))


def test_draws_are_uniform_and_independent() -> None:
    for draws in (
        Draws.of(range(200)).uniform("x", (200,), LIKE).double(),
        Stream(("x",)).uniform((200, 200)).double(),
    ):
        assert 0 < float(draws.min()) < 1e-3
        assert 1 - 1e-3 < float(draws.max()) < 1
        # 40,000 draws: 5 standard errors.
        assert float(draws.mean()) == pytest.approx(0.5, abs=5 * 12**-0.5 / 200)
        assert float(draws.var()) == pytest.approx(1 / 12, abs=0.004)
        counts = torch.histc(draws, bins=10, min=0, max=1)
        assert float(((counts - 4000) ** 2 / 4000).sum()) < 33  # chi-square of 9 degrees, p = 1e-4
        for one, other in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
            assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.025


def test_a_draw_is_never_zero_or_one() -> None:
    from robench.core.rng import _unit

    ends = _unit(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert ends.tolist() == [2.0**-24, 1 - 2.0**-24]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(0, 2**30))
def test_a_permutation_is_one(count: int, seed: int) -> None:
    order = Stream(("x", seed)).permutation(count)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(count))


def test_positions_of_a_permutation_are_uniform() -> None:
    firsts = torch.stack([Stream(("x", seed)).permutation(5) for seed in range(1000)])
    for position in range(5):
        counts = torch.bincount(firsts[:, position], minlength=5)
        assert float(((counts - 200) ** 2 / 200).sum()) < 24  # chi-square of 4 degrees, p = 1e-4


def test_within_extends_the_owner() -> None:
    stream = Stream(("a", 1))
    assert stream.within("epoch", 2).key("order") == Stream(("a", 1, "epoch", 2)).key("order") != stream.key("order")


def test_the_global_generators_are_left_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    Draws.of([1]).uniform("x", (3,), LIKE)
    Stream(("a",)).permutation(9)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]  # noqa: NPY002
