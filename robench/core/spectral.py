"""Convolutions as linear maps: their largest singular value, its direction, and lowering it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.core.frozen import frozen, hooked


class Layer(NamedTuple):
    """A convolution, the BatchNorm that follows it, and the shape (1,C,H,W) of one input.

    Called, it is linear: the convolution without its bias, or, ``composed``, that times what the running variance and
    the weight of the BatchNorm make of it.
    """

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d | None
    shape: tuple[int, ...]

    def __call__(self, images: Tensor, composed: bool = False, weight: Tensor | None = None) -> Tensor:
        layer = self.convolution
        kernel = layer.weight if weight is None else weight
        made = F.conv2d(images, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        if composed and self.norm is not None:
            assert self.norm.running_var is not None
            made = made * (self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()).view(1, -1, 1, 1)
        return made

    def top(self, vector: Tensor, iterations: int, composed: bool = False) -> Tensor:
        """The right singular vector of the largest singular value, of length 1 and without a graph, by power iteration
        from ``vector``; both of ``shape``.
        """
        for _ in range(iterations):
            vector = vector.detach().requires_grad_(True)
            with torch.enable_grad():
                half_square = self(vector, composed).square().sum() / 2
            (vector,) = torch.autograd.grad(half_square, vector)
            vector = vector / vector.norm().clamp(min=1e-12)
        return vector

    @torch.no_grad()
    def clip(self, vector: Tensor, most: float) -> None:
        """Lowers the length of the convolution of ``vector``, of length 1, to ``most`` where it is above: the kernel's
        least-squares step along its gradient, which leaves orthogonal directions alone as far as a kernel can.
        """
        weight = self.convolution.weight
        with torch.enable_grad():
            made = self(vector)
        excess = made.detach() * (1 - most / made.detach().norm().clamp(min=1e-12)).clamp(min=0)
        (direction,) = torch.autograd.grad(made, weight, excess)
        change = self(vector, weight=direction)
        weight.sub_(direction * ((change * excess).sum() / change.square().sum().clamp(min=1e-12)))


#: Found once per network, as it costs a forward pass and is not a matter of weights; forgotten with the network.
_LAYERS: WeakKeyDictionary[nn.Module, list[Layer]] = WeakKeyDictionary()


def convolutions(model: nn.Module, images: Tensor) -> list[Layer]:
    """The nn.Conv2d modules of a model in the order of a forward pass; empty where there are none.

    Args:
        images: a batch (B,C,H,W) of the size that the model takes; run in eval mode, no state of the model changes.
    """
    # None found is not remembered: where torch.compile runs the network, its modules are not called.
    if not _LAYERS.get(model):
        calls: list[tuple[nn.Module | None, tuple[int, ...]]] = []

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls.append((module, tuple(args[0].shape)))

        kinds = (nn.Conv2d, nn.BatchNorm2d)
        hooks = (each.register_forward_pre_hook(note) for each in model.modules() if isinstance(each, kinds))
        with frozen(model), torch.no_grad(), hooked(hooks):
            model(images[:1])
        _LAYERS[model] = [
            Layer(module, follower if isinstance(follower, nn.BatchNorm2d) else None, shape)
            for (module, shape), (follower, _) in pairwise([*calls, (None, ())])
            if isinstance(module, nn.Conv2d)
        ]
    return _LAYERS[model]
