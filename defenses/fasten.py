"""FASTEN: each member learns from images that leave the features of another, made in one step and remembered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.ascent import gradient
from robench.attacks.training import check
from robench.core import linf
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.features import depth, features
from robench.core.frozen import BatchNormMode, batchnorm
from robench.defenses.base import DEFENSES, Batch, Defense, Terms


@DEFENSES.register("fasten")
@dataclass(frozen=True, kw_only=True)
class Fasten(Defense):
    """Σ_i [CE(z_i(x + δ), y) + (β/2)·Σ_v KL(p̄_i ‖ p_iv) − .05β·mean_{j≠i} KL(p̄_j ‖ p̄_i)], each a mean over the batch
    (Huang et al. 2023, IEEE TIFS, fast ensemble training).

    Views v are the clean image, constant, and x + δ; p̄_i is their mean, in the repulsion's second place the mean of
    logarithms. Of two members a and b, drawn per batch, δ_j = Π(ρ·(x'_j − x) + (1 − ρ)·δ_mem): x'_j leaves f_j^l(x) by
    sign steps from x + r_0 + r_1, where r_0 is common to both, and δ_mem is what b had for the image when it was last
    seen (in its own crop and flip). Member a learns from δ_b, b from δ_a, any other from one of them. l is drawn as in
    DVERGE. The memory is as large as the training set, 614 MB for CIFAR-10, in every checkpoint too.

    Fields of which the released code (https://github.com/mesunhlf/FASTEN, ``train/train_fasten.py``), and with it the
    published numbers, has another value, default first: ``repulsion`` .05, there between constants, which trains as 0;
    ``start_eps`` ε, there 8/255; ``project_start``, there not; ``blend`` per image, there per batch; ``chained`` off,
    there on; ``constant_target``, there not.

    Attributes:
        beta: β; repulsion: the factor of β in the last term.
        eps: radius of δ; steps of ``step_ratio``·ε.
        start_eps: of r_0, r_1 is within ε; project_start: whether the start is projected onto the ball.
        blend: whether ρ ~ U(0, 1) is drawn for each image or batch; where there is no memory yet, ρ = 1.
        chained: whether b blends with δ_a instead of the memory.
        constant_target: whether p̄_i is constant in the second term.
        layer_per: how often l is drawn.
        craft_bn: BatchNorm while crafting, see `robench.core.frozen.batchnorm`.
    """

    start: ClassVar[Literal["scratch", "baseline"]] = "baseline"
    min_members: ClassVar[int] = 2

    beta: float = 3.0
    repulsion: float = 0.05
    eps: float = 0.06
    steps: int = 1
    step_ratio: float = 1.0
    start_eps: float = 0.06
    project_start: bool = True
    blend: Literal["image", "batch"] = "image"
    chained: bool = False
    constant_target: bool = True
    layer_per: Literal["epoch", "batch"] = "epoch"
    craft_bn: BatchNormMode = "train"

    def __post_init__(self) -> None:
        check(self.name, "", self.eps, self.steps, self.step_ratio)
        for field in ("beta", "repulsion", "start_eps"):
            if getattr(self, field) < 0:
                raise RobenchError(
                    f"expected `{field}` of defense {self.name!r} to be at least 0, got {getattr(self, field)}"
                )

    def passes(self, members: int) -> float:
        return 1.5 + 2 * self.steps / members  # clean images forward alone; two members craft

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        chosen, perturbed = self._perturbed(ensemble, batch)
        losses, likeness, logs, means = [], [], [], []
        for i, member in enumerate(ensemble.members):
            with torch.no_grad():
                clean = member(batch.images).log_softmax(dim=1)
            other = 1 - chosen.index(i) if i in chosen else int(_draw(batch, "other", i) * 2)
            logits = member(perturbed[other])
            views = torch.stack([clean, logits.log_softmax(dim=1)])
            mean = views.exp().mean(dim=0)
            target = mean.detach() if self.constant_target else mean
            losses.append(F.cross_entropy(logits, batch.labels))
            likeness.append(torch.stack([_divergence(target, view) for view in views]).mean())
            logs.append(views.mean(dim=0))
            means.append(mean.detach())
        apart = [
            torch.stack([_divergence(mean, log) for j, mean in enumerate(means) if j != i]).mean()
            for i, log in enumerate(logs)
        ]
        yield {
            "ce": torch.stack(losses).sum(),
            "consistency": self.beta * torch.stack(likeness).sum(),
            "repulsion": -self.repulsion * self.beta * torch.stack(apart).sum(),
        }

    def _perturbed(self, ensemble: Ensemble, batch: Batch) -> tuple[list[int], list[Tensor]]:
        """The members a and b, and x + δ_a and x + δ_b (B,C,H,W); the memory moves on."""
        assert batch.samples is not None
        first = int(_draw(batch, "first") * len(ensemble))
        second = int(_draw(batch, "second") * (len(ensemble) - 1))
        chosen = [first, second + (second >= first)]
        images, state, rows = batch.images, batch.state, (batch.train_size, *batch.images.shape[1:])
        if "perturbation" not in state:
            state.update(perturbation=images.new_zeros(rows), seen=images.new_zeros(batch.train_size))
        memory, seen = state["perturbation"][batch.samples], state["seen"][batch.samples].view(-1, 1, 1, 1)
        lower, upper = linf.bounds(images, linf.as_eps(self.eps, images))
        common = (2 * batch.draws.uniform(images.shape, "fasten", "start").to(images) - 1) * self.start_eps
        perturbed = []
        for which, i in enumerate(chosen):
            made = self._crafted(ensemble.members[i], images + common, lower, upper, batch, which)
            count = len(images) if self.blend == "image" else 1
            share = batch.draws.uniform((count, 1, 1, 1), "fasten", "share", which).to(images)
            share = 1 - seen * (1 - share)
            blended = (images + share * (made - images) + (1 - share) * memory).clamp(lower, upper)
            perturbed.append(blended)
            if self.chained:
                memory = blended - images
        state["perturbation"][batch.samples] = perturbed[1] - images
        state["seen"][batch.samples] = 1.0
        return chosen, perturbed

    def _crafted(
        self, member: nn.Module, start: Tensor, lower: Tensor, upper: Tensor, batch: Batch, which: int
    ) -> Tensor:
        """x' (B,C,H,W), whose features at the layer that is drawn are far from those of the images."""
        draws = batch.epoch_draws if self.layer_per == "epoch" else batch.draws
        layer = 1 + math.floor(float(draws.uniform((1,), "layer")) * _depth(member, batch.images))
        noise = batch.draws.uniform(start.shape, "fasten", "noise", which).to(start)
        z = start + (2 * noise - 1) * self.eps
        z = z.clamp(lower, upper) if self.project_start else z.clamp(0, 1)
        with batchnorm(member, self.craft_bn):
            with torch.no_grad():
                wanted = features(member, batch.images, layer)
            for _ in range(self.steps):
                slope = gradient(lambda x: (features(member, x, layer) - wanted).square().flatten(1).mean(dim=1), z)
                z = (z + self.step_ratio * self.eps * slope.sign()).clamp(lower, upper)
        return z


def _draw(batch: Batch, *purpose: str | int) -> float:
    return float(batch.draws.uniform((1,), "fasten", *purpose))


def _divergence(target: Tensor, log: Tensor) -> Tensor:
    """KL(target ‖ exp log), the batch's mean, of probabilities and logarithms (B,K)."""
    return F.kl_div(log, target, reduction="batchmean")


#: Found once per network, as it costs a forward pass and is not a matter of weights; forgotten with the network.
_DEPTHS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def _depth(member: nn.Module, images: Tensor) -> int:
    if member not in _DEPTHS:
        _DEPTHS[member] = depth(member, images[:1])
    return _DEPTHS[member]
