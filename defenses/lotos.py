"""LOTOS: what one member's layer amplifies most, the same layer of the others does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.frozen import frozen, hooked
from robench.defenses.base import DEFENSES, Batch, Defense, Terms

#: Of the power iteration before the first step; later ones go on from the vectors of the last step.
_FIRST = 20


@DEFENSES.register("lotos")
@dataclass(frozen=True, kw_only=True)
class Lotos(Defense):
    """Σ_i CE(z_i(x), y) + λ·Σ_l Σ_{j≠k} relu(‖f_l^j(v_l^k)‖ − mal), and a spectral norm of every f_l^j of at most C
    (Ebrahimpour-Boroojeny et al. 2025, ICLR, layer-wise orthogonalization, https://arxiv.org/abs/2410.05136).

    f_l^j is convolution l of member j, in the order of the forward pass and without its bias; v_l^k, of length 1, is
    the right singular vector of member k's convolution with the largest singular value, by power iteration, constant
    for the gradient. Members of other architectures are compared where these take inputs of one shape.

    The published numbers are the code's (https://github.com/Ali-E/LOTOS, ``train/Empirical/trainer.py``), hence
    ``normalised`` and ``composition`` are off: it sets the normaliser to 1 (l. 287–291), and its condition for adding
    the term of compositions never holds (l. 299). Other differences: its ``bottom_clip``, here ``mal``, is 1 unless
    set, also in its README's command for λ = .05; norms are clipped at every step, where it clips every 50 to 100 with
    FastClip; with BatchNorm it may clip compositions, here convolutions alone are.

    Attributes:
        weight: λ; the paper has .01 for networks with BatchNorm and .05 without.
        mal: what a layer may amplify another member's vector by.
        normalised: divide the sum by M·N(N−1), with M layers, as in the paper.
        composition: the same term for each convolution followed by BatchNorm, with its running variance, too.
        clip: C; 0 leaves spectral norms alone.
        iterations: of the power iteration, per step.
    """

    min_members: ClassVar[int] = 2

    weight: float = 0.01
    mal: float = 0.8
    normalised: bool = False
    composition: bool = False
    clip: float = 1.0
    iterations: int = 1

    def __post_init__(self) -> None:
        for field, least in (("weight", 0), ("mal", 0), ("clip", 0), ("iterations", 1)):
            if getattr(self, field) < least:
                raise RobenchError(
                    f"expected `{field}` of defense {self.name!r} to be at least {least}, got {getattr(self, field)}"
                )

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        with torch.autocast(batch.images.device.type, enabled=False):
            yield {"orthogonality": self.weight * self._overlap(ensemble, batch)}
        for member in ensemble.members:
            yield {"ce": F.cross_entropy(member(batch.images), batch.labels)}

    def finish(self, ensemble: Ensemble, batch: Batch) -> None:
        for i, member in enumerate(ensemble.members) if self.clip else ():
            for number, layer in enumerate(_layers(member, batch.images)):
                vector = self._top(layer, False, f"convolution.{i}.{number}", batch)
                _clip(layer.convolution, vector, self.clip)

    def _overlap(self, ensemble: Ensemble, batch: Batch) -> Tensor:
        every = [_layers(member, batch.images) for member in ensemble.members]
        total = batch.images.new_zeros(())
        for kind, composed in (("convolution", False), ("composition", True))[: 1 + self.composition]:
            for number in range(max(map(len, every))):
                same = [(i, layers[number]) for i, layers in enumerate(every) if number < len(layers)]
                same = [(i, layer) for i, layer in same if layer.scale is not None or not composed]
                vectors = {i: self._top(layer, composed, f"{kind}.{i}.{number}", batch) for i, layer in same}
                for j, layer in same:
                    others = [v for k, v in vectors.items() if k != j and v.shape == layer.shape]
                    for vector in others:
                        total = total + F.relu(layer(vector, composed).norm() - self.mal)
        members = len(ensemble)
        return total / (max(map(len, every)) * members * (members - 1)) if self.normalised else total

    def _top(self, layer: _Layer, composed: bool, name: str, batch: Batch) -> Tensor:
        """The layer's top right singular vector, from where the last step left it; of length 1, without a graph."""
        count = self.iterations
        if name not in batch.state:
            start = batch.epoch_draws.uniform((1, int(torch.tensor(layer.shape).prod())), "lotos", name)
            batch.state[name] = (start - 0.5).view(layer.shape).to(layer.convolution.weight)
            count += _FIRST
        vector = batch.state[name]
        for _ in range(count):
            vector = vector.detach().requires_grad_(True)
            with torch.enable_grad():
                (vector,) = torch.autograd.grad(layer(vector, composed).square().sum(), vector)
            vector = vector / vector.norm().clamp(min=1e-12)
        batch.state[name] = vector
        return vector


class _Layer(NamedTuple):
    """A convolution, the BatchNorm that follows it, and the shape (1,C,H,W) of one input."""

    convolution: nn.Conv2d
    scale: nn.BatchNorm2d | None
    shape: tuple[int, ...]

    def __call__(self, images: Tensor, composed: bool) -> Tensor:
        """f(images) − f(0)."""
        layer = self.convolution
        made = F.conv2d(images, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        if composed and self.scale is not None:
            assert self.scale.running_var is not None
            made = made * (self.scale.weight * (self.scale.running_var + self.scale.eps).rsqrt()).view(1, -1, 1, 1)
        return made


def _clip(layer: nn.Conv2d, vector: Tensor, most: float) -> None:
    """Lowers ‖f(v)‖ to ``most`` where it is above: the least-squares step of the kernel along its gradient.

    As FastClip, it leaves directions orthogonal to v alone as far as a kernel can.
    """
    of = _Layer(layer, None, ())
    weight = layer.weight
    with torch.enable_grad():
        made = of(vector, False)
        size = made.detach().norm().clamp(min=1e-12)
        excess = (made * (1 - most / size).clamp(min=0)).detach()
        (direction,) = torch.autograd.grad(made, weight, excess)
    change = F.conv2d(vector, direction, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    step = (change * excess).sum() / change.square().sum().clamp(min=1e-12)
    weight.sub_(step * direction)


#: Found once per network, as it costs a forward pass and is not a matter of weights; forgotten with the network.
_LAYERS: WeakKeyDictionary[nn.Module, list[_Layer]] = WeakKeyDictionary()


def _layers(member: nn.Module, images: Tensor) -> list[_Layer]:
    """The member's convolutions in the order of a forward pass; RobenchError where it has none."""
    if member not in _LAYERS:
        calls: list[tuple[nn.Module, tuple[int, ...]]] = []

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            calls.append((module, tuple(args[0].shape)))

        kinds = (nn.Conv2d, nn.BatchNorm2d)
        hooks = (each.register_forward_pre_hook(note) for each in member.modules() if isinstance(each, kinds))
        with frozen(member), torch.no_grad(), hooked(hooks):
            member(images[:1])
        _LAYERS[member] = [
            _Layer(module, follower if isinstance(follower, nn.BatchNorm2d) else None, shape)
            for (module, shape), (follower, _) in pairwise([*calls, (None, ())])
            if isinstance(module, nn.Conv2d)
        ]
    if not _LAYERS[member]:
        raise RobenchError("defense 'lotos' needs nn.Conv2d modules, and found none; choose another --model")
    return _LAYERS[member]
