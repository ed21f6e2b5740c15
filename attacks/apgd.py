"""Auto-PGD: ascent whose step size follows its progress, untargeted and targeted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robench.attacks.ascent import drawn_start, gradient
from robench.attacks.base import ATTACKS, Attack
from robench.attacks.survivors import Least, Standing, in_turn
from robench.core import linf
from robench.core.drawn import mixed, mixed_over_draws
from robench.core.errors import RobenchError
from robench.core.losses import LOSSES
from robench.core.rng import Draws

Objective = Literal["loss", "dlr"]

#: images -> what to raise, one value per sample (B,), and what decides, (B,K).
Judged = Callable[[Tensor], tuple[Tensor, Tensor]]


@ATTACKS.register("apgd")
@dataclass(frozen=True, kw_only=True)
class APGD(Attack):
    """Auto-PGD (Croce & Hein 2020, algorithm 1, https://arxiv.org/abs/2003.01690): APGD-CE by default, APGD-DLR with
    ``objective=dlr``, APGD-T with ``objective=dlr:targets=9``. On an ensemble it acts on log p̄.

    Every sample has its own step size, 2ε at first. At checkpoints it is halved where too few steps were improvements,
    and the sample goes on from its best point. Targets are attacked in turn, each from a start of its own, on the
    samples that stand.

    The paper returns the point of the highest objective; this returns, of the same points, that of the least margin,
    which is wrong if any was. The authors' code (fra31/auto-attack) compares the first loss with 0, where it has none
    before it, and counts exactly ρ as too few.

    Attributes:
        steps: gradient steps, per target.
        objective: ``loss``, or ``dlr``, the difference of logits ratio: then ``loss`` only says whose gradient
            `Crafted.zero_gradient` looks at.
        targets: attack this many of the most likely wrong classes, or all where there are fewer; 0 is untargeted.
        momentum: α, the weight of the new step.
        rho: ρ, the share of steps that have to be improvements.
        random_start: start from x + U(−ε, ε) instead of x.
    """

    steps: int = 100
    objective: Objective = "loss"
    targets: int = 0
    momentum: float = 0.75
    rho: float = 0.75
    random_start: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            "objective", self.objective in get_args(Objective), f"to be one of {', '.join(get_args(Objective))}"
        )
        if self.targets < 0 or (self.targets and self.objective != "dlr"):
            raise RobenchError(
                f"expected `targets` of attack {self.name!r} to be 0, or above with objective=dlr, got {self.targets} "
                f"with objective={self.objective}; APGD-T is apgd:objective=dlr:targets=9"
            )
        self.require("momentum", 0 < self.momentum <= 1, "in (0, 1]")
        self.require("rho", 0 <= self.rho <= 1, "in [0, 1]")

    @property
    def stochastic(self) -> bool:
        return self.random_start

    @property
    def passes(self) -> int:
        """At most: targets are attacked on survivors alone."""
        return max(self.targets, 1) * (self.steps + 1)

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        if not self.targets:
            loss = dlr if self.objective == "dlr" else LOSSES.get(self.loss)
            return self._climb(model, lambda outputs: loss(outputs, labels), images, labels, eps, draws, "start")
        with torch.no_grad():
            outputs = mixed_over_draws(lambda: model(images))
        wrong = outputs.scatter(1, labels[:, None], -float("inf"))
        likely = wrong.topk(min(self.targets, outputs.shape[1] - 1), dim=1).indices

        def towards(rank: int) -> Callable[[Standing], Tensor]:
            def part(here: Standing) -> Tensor:
                _, images, labels, eps, draws = here
                target = likely[here.rows, rank]
                raised = partial(targeted_dlr, labels=labels, target=target)
                return self._climb(model, raised, images, labels, eps, draws, f"start {rank}")

            return part

        return in_turn(map(towards, range(likely.shape[1])), model, images, labels, eps, draws)[0]

    def _climb(
        self,
        model: nn.Module,
        raised: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        eps: Tensor,
        draws: Draws,
        purpose: str,
    ) -> Tensor:
        start = drawn_start(images, eps, draws, purpose) if self.random_start else images

        def judged(z: Tensor) -> tuple[Tensor, Tensor]:
            outputs = model(z)
            return raised(outputs), outputs

        return climb(judged, images, labels, eps, start, steps=self.steps, momentum=self.momentum, rho=self.rho)


def climb(
    judged: Judged,
    images: Tensor,
    labels: Tensor,
    eps: Tensor,
    start: Tensor,
    *,
    steps: int,
    momentum: float,
    rho: float,
) -> Tensor:
    """Algorithm 1 of the paper, (B,C,H,W): of all points, per sample, that of the least margin.

    A gradient that is not finite counts as zero. The host waits for nothing.

    Args:
        start: the first point (clipped here).
    """
    lower, upper = linf.bounds(images, eps)
    step = (2 * eps).view(-1, 1, 1, 1)
    z = previous = start.clamp(lower, upper)
    least = Least(z, labels)
    value, slope, outputs = slope_at(judged, z)
    least.see(z, outputs)
    best, best_value, best_slope = z, value, slope
    improved, halved, at_check, last = torch.zeros_like(value), torch.zeros_like(labels, dtype=torch.bool), value, 0
    checked = checkpoints(steps)
    for count in range(1, steps):
        z, previous = averaged_step(z, previous, slope, step, lower, upper, momentum if count > 1 else 1.0), z
        before = value
        value, slope, outputs = slope_at(judged, z)
        least.see(z, outputs)
        improved += value > before
        better = value > best_value
        best, best_slope = _where(better, z, best), _where(better, slope, best_slope)
        best_value = torch.where(better, value, best_value)
        if count in checked:
            stuck = (improved < rho * (count - last)) | (~halved & (best_value <= at_check))
            step = _where(stuck, step / 2, step)
            z, slope = _where(stuck, best, z), _where(stuck, best_slope, slope)
            value = torch.where(stuck, best_value, value)
            improved, halved, at_check, last = torch.zeros_like(improved), stuck, best_value, count
    z = averaged_step(z, previous, slope, step, lower, upper, momentum if steps > 1 else 1.0)
    with torch.no_grad():
        least.see(z, mixed_over_draws(lambda: judged(z)[1]))
    return least.images


def checkpoints(steps: int) -> frozenset[int]:
    """The steps w_j = ⌈p_j·steps⌉ after which step sizes are looked at: p_0 = 0, p_1 = .22, and then
    p_{j+1} = p_j + max(p_j − p_{j−1} − .03, .06) (section 3 of the paper)."""
    found, before, now = set(), 0, 22  # in hundredths, which are exact
    while now <= 100:
        found.add(-(-now * steps // 100))
        before, now = now, now + max(now - before - 3, 6)
    return frozenset(found)


def averaged_step(
    z: Tensor, previous: Tensor, slope: Tensor, step: Tensor, lower: Tensor, upper: Tensor, momentum: float
) -> Tensor:
    """Π(z + α·(Π(z + η·sign ∇) − z) + (1−α)·(z − z_previous)), (B,C,H,W): eq. 1 and 2 of the paper."""
    stepped = torch.addcmul(z, step, slope.sign()).clamp_(lower, upper)
    return (z + momentum * (stepped - z) + (1 - momentum) * (z - previous)).clamp_(lower, upper)


def slope_at(judged: Judged, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values (B,), their gradients (B,C,H,W), 0 where not finite, and what decides, (B,K); no graph attached. Each
    over all draws of a model that draws, see `robench.attacks.ascent.gradient`."""
    values: list[Tensor] = []
    outputs: list[Tensor] = []

    def value(point: Tensor) -> Tensor:
        found, decides = judged(point)
        values.append(found.detach())
        outputs.append(decides.detach())
        return found

    slope = gradient(value, z).nan_to_num_(0.0, 0.0, 0.0)
    return values[0] if len(values) == 1 else torch.stack(values).mean(dim=0), slope, mixed(outputs)


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Per sample, (B,C,H,W)."""
    return torch.where(chosen.view(-1, 1, 1, 1), one, other)


def dlr(outputs: Tensor, labels: Tensor) -> Tensor:
    """−(z_y − max_{c≠y} z_c)/(z_{π1} − z_{π3}), shape (B,), π the descending order (Croce & Hein 2020, eq. 6).

    The same for z and a·z + b, hence for logits and for log-probabilities. 1e-12 is added to the divisor.

    Raises:
        RobenchError: fewer than 3 classes.
    """
    _enough(outputs, 3, "objective=dlr")
    top = outputs.topk(3, dim=1).values
    true = outputs.gather(1, labels[:, None])[:, 0]
    wrong = outputs.scatter(1, labels[:, None], -float("inf")).amax(dim=1)
    return (wrong - true) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(outputs: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """−(z_y − z_t)/(z_{π1} − (z_{π3} + z_{π4})/2), shape (B,) (Croce & Hein 2020, eq. 7); see `dlr`.

    Raises:
        RobenchError: fewer than 4 classes.
    """
    _enough(outputs, 4, "objective=dlr:targets=9")
    top = outputs.topk(4, dim=1).values
    true, wanted = (outputs.gather(1, each[:, None])[:, 0] for each in (labels, target))
    return (wanted - true) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def _enough(outputs: Tensor, least: int, fields: str) -> None:
    if outputs.shape[1] < least:
        raise RobenchError(
            f"`{fields}` of attack 'apgd' needs at least {least} classes, got {outputs.shape[1]}; "
            f"take objective=loss with the loss ce or cw"
        )
