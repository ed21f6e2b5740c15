"""MORA: ascent on an ensemble whose members are weighed anew at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.attacks.apgd import averaged_step, slope_at
from robench.attacks.ascent import uniform_start
from robench.attacks.base import ATTACKS, Attack
from robench.attacks.survivors import Least, Standing, in_turn
from robench.core import linf
from robench.core.drawn import mixed_over_draws
from robench.core.ensemble import followed, lead
from robench.core.fast import members, rule_of
from robench.core.losses import LOSSES
from robench.core.rng import Draws

Weights = Literal["paper", "code"]
Rule = Literal["softmax", "logits", "vote"]

#: s, the share of the weighed members in what is ascended, in the order of the runs.
SHARES = (0.5, 0.0, 0.25, 0.75, 1.0)
#: T of the members' softmax in their weights, by rule.
TEMPERATURE: dict[Rule, float] = {"softmax": 0.2, "logits": 0.0, "vote": 0.8}
#: Weight of the new step against that of the one before.
MOMENTUM = 0.75


@ATTACKS.register("mora")
@dataclass(frozen=True, kw_only=True)
class MORA(Attack):
    """Model-reweighing attack (Yu et al., NeurIPS 2022, https://openreview.net/forum?id=d_m7OKOmPiM).

    Runs with the shares s = .5, 0, .25, .75, 1 of `reweighed`, then towards each of the most likely wrong classes, each
    run on what stands: steps of 2ε·cos(πi/2n) at step i of n, averaged with the step before, from x + U(−ε, ε). A run
    returns its point of the least margin; the authors' code (lafeat/mora) stops a sample at its first wrong point. A
    model without members is an ensemble of one.

    As in the authors' code a targeted run ascends log p̄_t alone: the weighed sum is computed there and then
    overwritten. Their script anneals by (1 + cos(πi/n))/2 instead.

    Attributes:
        steps: gradient steps of a run.
        targets: this many targeted runs, or as many as there are wrong classes; the authors' published log has none.
        weights: of the members: ``paper``, or ``code``, which differs while the ensemble is right, see `reweighed`.
        rule: how the ensemble under attack decides; ``softmax`` stands for the rule of an `Ensemble` that has another.
            What the model returns decides whatever is said here.
    """

    by_member: ClassVar[bool] = True

    steps: int = 100
    targets: int = 9
    weights: Weights = "paper"
    rule: Rule = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("weights", self.weights in get_args(Weights), f"to be one of {', '.join(get_args(Weights))}")
        self.require("rule", self.rule in get_args(Rule), f"to be one of {', '.join(get_args(Rule))}")
        self.require("targets", self.targets >= 0, "to be at least 0")

    @property
    def passes(self) -> int:
        """At most: each run is on survivors alone."""
        return (len(SHARES) + self.targets) * (self.steps + 1)

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        loss, rule = LOSSES.get(self.loss), self._rule(model)
        with torch.no_grad():
            clean = mixed_over_draws(lambda: model(images))
        wrong = clean.scatter(1, labels[:, None], -float("inf"))
        likely = wrong.topk(min(self.targets, clean.shape[1] - 1), dim=1).indices

        def shared(share: float) -> Callable[[Standing], Tensor]:
            def part(here: Standing) -> Tensor:
                def raised(logits: Tensor) -> Tensor:
                    return loss(reweighed(logits, here.labels, share, self.weights, rule), here.labels)

                return self._run(model, raised, here, f"start {share:g}")

            return part

        def towards(rank: int) -> Callable[[Standing], Tensor]:
            def part(here: Standing) -> Tensor:
                target = likely[here.rows, rank, None]

                def raised(logits: Tensor) -> Tensor:
                    return F.log_softmax(followed(logits, rule), dim=1).gather(1, target)[:, 0]

                return self._run(model, raised, here, f"start towards {rank}")

            return part

        parts = [*map(shared, SHARES), *map(towards, range(likely.shape[1]))]
        return in_turn(parts, model, images, labels, eps, draws)[0]

    def _rule(self, model: nn.Module) -> Rule:
        """The rule that is attacked."""
        own = rule_of(model)
        return own if self.rule == "softmax" and own in ("logits", "vote") else self.rule

    def _run(self, model: nn.Module, raised: Callable[[Tensor], Tensor], here: Standing, purpose: str) -> Tensor:
        """One run, (B,C,H,W)."""
        images, labels, eps = here.images, here.labels, here.eps
        lower, upper = linf.bounds(images, eps)
        noise = here.draws.uniform(purpose, images.shape[1:], images)
        z = previous = uniform_start(images, eps, noise).clamp_(lower, upper)
        least = Least(z, labels)

        def judged(point: Tensor) -> tuple[Tensor, Tensor]:
            logits = torch.stack([member(point) for member in members(model)])
            return raised(logits), followed(logits, rule_of(model))

        for i in range(self.steps):
            _, slope, outputs = slope_at(judged, z)
            least.see(z, outputs)
            step = 2 * math.cos(math.pi * i / (2 * self.steps)) * eps.view(-1, 1, 1, 1)
            z, previous = averaged_step(z, previous, slope, step, lower, upper, MOMENTUM if i else 1.0), z
        with torch.no_grad():
            least.see(z, mixed_over_draws(lambda: model(z)))
        return least.images


def reweighed(logits: Tensor, labels: Tensor, share: float, weights: Weights, rule: Rule) -> Tensor:
    """u = (1−s)·v/lead(v) + s·Σ_i w_i m_i ẑ_i / (Σ_i w_i m_i + 1e-8), shape (B,K), whose loss MORA ascends.

    v is what the ensemble decides by, lead(·) the distance of its two highest values; ẑ_i = z_i/max(1, λ/10), λ the
    longest lead of a member; m_i is 1 while member i is right, else 0 (``logits``: always 1); and
    w_i = q_{i,c}·(q_{i,y}/P_y + (1−q_{i,c})/P_c), with q_i = softmax(T·z_i), P the mean of softmax(ẑ_i) and c its
    highest wrong class. Only v and ẑ_i have gradients.

    With weights ``code``, as the authors' code has it (mora_attack.py, get_probablity_weight): v is a member too, but
    not of P, and while P is right q_{i,c} and P_c enter with a minus sign, which makes
    w_i = q_{i,c}·((1+q_{i,c})/P_c − q_{i,y}/P_y), and that may be negative. Not kept is a factor N/(N+1) of P.

    Args:
        logits: of the members, (N,B,K); share: s.
    """
    main = followed(logits, rule)
    parts = torch.cat([logits, main[None]]) if weights == "code" else logits
    scale = (lead(parts).amax(dim=0) / 10).clamp(min=1)
    scaled = parts / scale
    with torch.no_grad():
        true = labels[:, None]
        mean = scaled[: len(logits)].softmax(dim=-1).mean(dim=0)
        rival = mean.scatter(1, true, -1.0).argmax(dim=1, keepdim=True)
        own = (TEMPERATURE[rule] * parts).softmax(dim=-1)
        own_true, own_rival = (own.gather(2, at.expand(len(parts), -1, -1)) for at in (true, rival))
        mean_true, mean_rival = mean.gather(1, true), mean.gather(1, rival)
        if weights == "code":
            sign = torch.where(mean.argmax(dim=1, keepdim=True) == true, -1.0, 1.0).to(mean)
            own_rival, mean_rival = sign * own_rival, sign * mean_rival
        weight = own_rival * (own_true / mean_true + (1 - own_rival) / mean_rival)
        if rule != "logits":
            weight = weight * (parts.argmax(dim=-1, keepdim=True) == true)
    weighed = (weight * scaled).sum(dim=0) / (weight.sum(dim=0) + 1e-8)
    return (1 - share) * main / lead(main) + share * weighed
