"""FASTEN: each member learns from images that leave the features of another, made in one step and remembered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robench.attacks.departure import depart
from robench.attacks.training import check
from robench.core import linf
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.frozen import BatchNormMode, batchnorm
from robench.defenses.base import DEFENSES, Batch, Defense, Terms
from robench.defenses.dverge import layers_of


@DEFENSES.register("fasten")
@dataclass(frozen=True, kw_only=True)
class Fasten(Defense):
    """Σ_i [CE(z_i(x + δ), y) + (β/2)·Σ_v KL(p̄_i ‖ p_iv) − c·β·mean_{j≠i} KL(p̄_j ‖ p̄_i)], each a mean over the batch
    (Huang et al. 2023, IEEE TIFS, fast ensemble training).

    Views v are x, constant, and x + δ; p̄_i is their mean, constant in the last term, in its second place the mean of
    logarithms. Of two members a and b, drawn per batch, δ_j = Π(ρ·(x'_j − x) + (1 − ρ)·δ_mem): x'_j leaves f_j^l(x) by
    sign steps from x + r_0 + r_1, where r_0 is common to both, and δ_mem is what b had for the image when it was last
    seen (in its own crop and flip). Member a learns from δ_b, b from δ_a, any other from one of them. l is drawn as in
    DVERGE. The memory is as large as the training set, 614 MB for CIFAR-10, in every checkpoint too.

    The released code (https://github.com/mesunhlf/FASTEN, ``train/train_fasten.py``), from which the published numbers
    come, has c = .05 between constants, which trains as ``repulsion`` 0; ``start_eps`` 8/255; no ``project_start``;
    ``blend`` per batch; ``chained``; no ``constant_target``.

    Attributes:
        beta: β; repulsion: c.
        eps: radius of δ; ``steps`` of ``step_ratio``·ε.
        start_eps: of r_0; r_1 is within ε. project_start: whether the start is projected onto the ball.
        blend: whether ρ ~ U(0, 1) is drawn for each image or batch; where there is no memory yet, ρ = 1.
        chained: whether b blends with δ_a instead of the memory.
        constant_target: whether p̄_i is constant in the second term.
        layer_per: how often l is drawn.
        craft_bn: BatchNorm while crafting, see `robench.core.frozen.batchnorm`.
    """

    title: ClassVar[str] = "FASTEN"
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
            logits = member(perturbed[1 - chosen.index(i) if i in chosen else int(_draw(batch, "other", i) * 2)])
            views = torch.stack([clean, logits.log_softmax(dim=1)])
            mean = views.exp().mean(dim=0)
            target = mean.detach() if self.constant_target else mean
            losses.append(F.cross_entropy(logits, batch.labels))
            likeness.append(torch.stack([F.kl_div(view, target, reduction="batchmean") for view in views]).mean())
            logs.append(views.mean(dim=0))
            means.append(mean.detach())
        pairs = [(mean, log) for i, log in enumerate(logs) for j, mean in enumerate(means) if j != i]
        apart = torch.stack([F.kl_div(log, mean, reduction="batchmean") for mean, log in pairs]).mean() * len(means)
        yield {
            "ce": torch.stack(losses).sum(),
            "consistency": self.beta * torch.stack(likeness).sum(),
            "repulsion": -self.repulsion * self.beta * apart,
        }

    def _perturbed(self, ensemble: Ensemble, batch: Batch) -> tuple[list[int], list[Tensor]]:
        """The members a and b, and x + δ_a and x + δ_b (B,C,H,W); the memory moves on."""
        assert batch.samples is not None
        images, state = batch.images, batch.state
        first, second = int(_draw(batch, "first") * len(ensemble)), int(_draw(batch, "second") * (len(ensemble) - 1))
        chosen, perturbed = [first, second + (second >= first)], []
        if not state:
            state["perturbation"] = images.new_zeros((batch.train_size, *images.shape[1:]))
            state["seen"] = images.new_zeros(batch.train_size)
        memory, seen = state["perturbation"][batch.samples], state["seen"][batch.samples].view(-1, 1, 1, 1)
        lower, upper = linf.bounds(images, linf.as_eps(self.eps, images))
        position = float((batch.epoch_draws if self.layer_per == "epoch" else batch.draws).uniform((1,), "layer"))
        common = images + self.start_eps * _noise(batch, "start")
        for which, member in enumerate(ensemble.members[i] for i in chosen):
            with batchnorm(member, self.craft_bn):
                made = depart(
                    member,
                    images,
                    common + self.eps * _noise(batch, "noise", which),
                    1 + math.floor(position * layers_of(member, images)),
                    eps=self.eps,
                    steps=self.steps,
                    step_ratio=self.step_ratio,
                    project_start=self.project_start,
                )
            count = len(images) if self.blend == "image" else 1
            share = batch.draws.uniform((count, 1, 1, 1), "fasten", "share", which).to(images)
            share = 1 - seen * (1 - share)
            perturbed.append((images + share * (made - images) + (1 - share) * memory).clamp(lower, upper))
            memory = perturbed[-1] - images if self.chained else memory
        state["perturbation"][batch.samples] = perturbed[1] - images
        state["seen"][batch.samples] = 1.0
        return chosen, perturbed


def _draw(batch: Batch, *purpose: str | int) -> float:
    return float(batch.draws.uniform((1,), "fasten", *purpose))


def _noise(batch: Batch, *purpose: str | int) -> Tensor:
    """Uniform in (−1, 1), (B,C,H,W)."""
    return 2 * batch.draws.uniform(batch.images.shape, "fasten", *purpose).to(batch.images) - 1
