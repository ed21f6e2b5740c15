"""Draws of a model: an image's are its own, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robench.core.drawn import mixed_over_draws, model_draws, over_draws, part_of_draws, row_key

SAMPLES = np.array([30, 4, 17, 9, 2])
SHAPE = (5, 3, 4, 4)

#: Of a batch, a tensor with as many rows, drawn as models do.
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": torch.randn_like,
    "in place": lambda x: torch.empty_like(x).normal_(),
    "by size": lambda x: torch.rand(x.shape),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "dropped channels": lambda x: F.dropout2d(x, 0.5, training=True),
    "of a distribution": lambda x: torch.distributions.Normal(0.0, 1.0).sample(x.shape),
    "with a mean": lambda x: torch.normal(x, 1.0),
    "a number of each": lambda x: torch.randint(7, (len(x), 40)),
    "by weight": lambda x: torch.multinomial(x.flatten(1).abs(), 9),
    "a coin": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "dropped in a kernel": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "waited for": lambda x: torch.empty_like(x).exponential_(),
}


def images() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) + 3


def drawn(draw: Callable[[Tensor], Tensor], chosen: list[int], x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]), model_draws(("test", 1), SAMPLES[chosen]):
        both = torch.stack([draw(x[chosen]), draw(x[chosen])])
    return both.transpose(0, 1) if both.ndim > 1 else both


@pytest.mark.parametrize("name", DRAWS)
def test_an_image_has_its_own_draws_in_any_batch_order_and_layout(name: str) -> None:
    x = images()
    whole = drawn(DRAWS[name], [0, 1, 2, 3, 4], x)
    assert torch.equal(drawn(DRAWS[name], [3, 1, 3], x), whole[[3, 1, 3]])
    assert torch.equal(drawn(DRAWS[name], [2, 4], x.contiguous(memory_format=torch.channels_last)), whole[[2, 4]])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole[:, 0], whole[:, 1])  # the second is another draw


def test_what_is_not_of_the_images_is_the_same_in_every_batch() -> None:
    for draw in (lambda x: torch.rand(()), lambda x: torch.randperm(6), lambda x: torch.rand(1, 1, 3, 3)):
        assert torch.equal(drawn(draw, [0, 1, 2], images()), drawn(draw, [3, 4], images()))


def test_a_row_is_that_of_a_generator_with_its_key() -> None:
    noise = drawn(torch.randn_like, [0, 1, 2, 3, 4], images())[:, 1]
    for row, sample in enumerate(SAMPLES.tolist()):
        seed = row_key(("test", 1), sample, 1)
        wanted = torch.randn(1, *SHAPE[1:], generator=torch.Generator().manual_seed(seed))
        assert torch.equal(noise[row], wanted[0])


def test_a_generator_of_the_models_own_is_left_to_it() -> None:
    with model_draws(("test",), SAMPLES):
        first = torch.rand(5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, torch.rand(5, generator=torch.Generator().manual_seed(3)))


def test_a_part_draws_alike_whatever_was_drawn_before_it() -> None:
    def made(before: int) -> Tensor:
        with torch.random.fork_rng(devices=[]), model_draws(("test",), SAMPLES):
            for _ in range(before):
                torch.rand(5)
            with part_of_draws(2, SAMPLES[:3]):
                return torch.rand(3)

    assert torch.equal(made(0), made(4))


def test_means_are_over_so_many_draws_and_one_alone_is_itself() -> None:
    x = images()
    with torch.random.fork_rng(devices=[]), model_draws(("test",), SAMPLES, 4):
        mean = over_draws(lambda: torch.randn_like(x))
    with torch.random.fork_rng(devices=[]), model_draws(("test",), SAMPLES):
        single = torch.stack([torch.randn_like(x) for _ in range(4)])
    torch.testing.assert_close(mean, single.mean(dim=0))
    outputs = iter([torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, -1.0]])])
    with model_draws(("test",), SAMPLES, 2):
        found = mixed_over_draws(lambda: next(outputs))
    wanted = (torch.tensor([[0.0, 2.0]]).softmax(1) + torch.tensor([[3.0, -1.0]]).softmax(1)) / 2
    torch.testing.assert_close(found.exp(), wanted)
    assert over_draws(lambda: x) is x
    assert mixed_over_draws(lambda: x) is x
