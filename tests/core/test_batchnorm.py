"""BatchNorm differentiated twice: torch's own second gradients are the oracle."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from robench.core.batchnorm import TwiceDifferentiable


def layer(dims: int, *, affine: bool = True, tracks: bool = True, momentum: float | None = 0.3) -> nn.Module:
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[max(dims, 1)]
    made = kind(3, affine=affine, track_running_stats=tracks, momentum=momentum, eps=1e-3)
    if affine:
        nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(made.bias, generator=torch.Generator().manual_seed(2))
    return made


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(3)) + 1).to(dtype)


def seconds(
    made: nn.Module, images: Tensor, within: AbstractContextManager[object], of: Callable[..., Tensor]
) -> list[Tensor]:
    """Output, first gradients, second gradients and running statistics."""
    x = images.clone(memory_format=torch.preserve_format).requires_grad_(True)
    with within:
        y = made(x)
    by = [x, *made.parameters()]
    first = torch.autograd.grad((y.float() if y.dtype == torch.bfloat16 else y).sin().sum(), by, create_graph=True)
    second = torch.autograd.grad(of(*first), by, allow_unused=True)
    return [y, *first, *(torch.zeros(()) if each is None else each for each in second), *made.buffers()]


def both(
    make: Callable[[], nn.Module], images: Tensor, of: Callable[..., Tensor] = lambda x, *rest: x.pow(3).sum()
) -> list[tuple[Tensor, Tensor]]:
    ours = seconds(make(), images, TwiceDifferentiable(), of)
    return list(zip(ours, seconds(make(), images, nullcontext(), of), strict=True))


@pytest.mark.parametrize("shape", [(6, 3), (5, 3, 4), (4, 3, 5, 2), (2, 3, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"tracks": False}, {"momentum": None}], ids=str)
def test_equals_torchs_own(shape, options):
    for ours, theirs in both(lambda: layer(len(shape) - 2, **options).double(), drawn(*shape)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reads", [[1], [2], [0, 1, 2]], ids=["weight", "bias", "all"])
def test_so_do_those_of_gradients_by_the_parameters(reads):
    def of(*first: Tensor) -> Tensor:
        return torch.stack([first[at].pow(3).sum() for at in reads]).sum()

    for ours, theirs in both(lambda: layer(2).double(), drawn(4, 3, 5, 2), of):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_channels_last_stays_so():
    images = drawn(4, 3, 5, 2).contiguous(memory_format=torch.channels_last)
    pairs = both(lambda: layer(2).double(), images)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert pairs[1][0].is_contiguous(memory_format=torch.channels_last)
    assert pairs[4][0].is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_is_rounded_as_in_torchs_own():
    images = drawn(16, 3, 5, 5, dtype=torch.bfloat16)
    pairs = both(lambda: layer(2), images)
    truth = seconds(layer(2).double(), images.double(), nullcontext(), lambda x, *rest: x.pow(3).sum())
    for (ours, theirs), right in zip(pairs, truth, strict=True):
        assert ours.dtype == theirs.dtype
        off, usual = (ours - right).double().norm(), (theirs - right).double().norm()
        assert off <= 1.5 * usual + 1e-6 * right.double().norm()


def test_it_is_what_a_training_network_meets_and_a_frozen_one_does_not():
    net, images = layer(2).double(), drawn(4, 3, 5, 2)
    with TwiceDifferentiable():
        training, plain = net(images), net.eval()(images)
    assert "Normalised" in type(training.grad_fn).__name__
    assert "Normalised" not in type(plain.grad_fn).__name__
    torch.testing.assert_close(plain, net(images), rtol=0, atol=0)


def test_one_value_per_channel_is_refused_as_torch_does():
    with TwiceDifferentiable(), pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(0)(drawn(1, 3, dtype=torch.float32))
