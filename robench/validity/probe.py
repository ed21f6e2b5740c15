"""Would a harder attack say the same? A few survivors of a white-box result under stronger and stranger attacks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from robench.attacks import Attack
from robench.attacks.apgd import APGD
from robench.attacks.mora import MORA
from robench.attacks.square import Square
from robench.core.data import Data
from robench.core.errors import RobenchError
from robench.core.logs import logged
from robench.core.progress import Progress, silent
from robench.core.rng import Draws
from robench.core.rules import Rule, label
from robench.evaluation import cost
from robench.evaluation.checks import POINT, SURVIVORS, probed
from robench.evaluation.engine import Evaluator
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.findings import Finding
from robench.evaluation.outcomes import ENSEMBLE, PROBE, Outcomes
from robench.evaluation.schema import PROTOCOL, Count
from robench.evaluation.settings import Settings
from robench.evaluation.soundness import examine
from robench.evaluation.threats import Threat, Whitebox

log = logging.getLogger(__name__)

#: Survivors that are attacked again at most.
LIMIT = 200
#: An ε at which every image can be made grey: nothing is left to be right about.
LARGE = 0.5
STEPS, RESTARTS = 10, 2
DRAWS, QUERIES = 100, 1000
#: Steps of each target of APGD-T, and of each run of MORA.
OTHER_STEPS = 100
SQUARE, TARGETED, MEMBERS = (
    "Square does not beat it",
    "targeted attacks do not beat it",
    "weighing the members does not beat it",
)


class Probe(Whitebox):
    """A few survivors of a white-box result, attacked in ways that were not part of it."""

    name: ClassVar[str] = PROBE
    clean: ClassVar[bool] = False

    restarts: Count = 1


def attack_again(
    evaluator: Evaluator, targets: Sequence[EvaluatedModel], threat: Threat, outcomes: Outcomes
) -> Outcomes:
    """Attacks a few survivors of each target by `robench.evaluation.cost.harder`: without gradient (`Square`), by PGD
    with the loss that was not tried, with gradients from around the iterate (`cost.AROUND`), and with members weighed
    anew at every step (`MORA`), for at most `cost.SHARE` of the gradient steps that the result took, or `cost.FLOOR`
    steps where that is less.

    They are taken at the ε whose accuracy is nearest to half the clean one. What `evaluator` has of it already is not
    computed again.

    Args:
        outcomes: what `Evaluator.run` returned of ``targets`` under ``threat``.

    Returns:
        The same rows with a check more for each target; of a threat that is not white-box, as they were.
    """
    if type(threat) is not Whitebox:
        return outcomes
    found = [_attacked_again(evaluator, target, threat, outcomes) for target in targets]
    return outcomes.with_checks((*outcomes.checks, *found))


def _attacked_again(evaluator: Evaluator, target: EvaluatedModel, threat: Whitebox, outcomes: Outcomes) -> Finding:
    own = outcomes.where(target=target.name, member=ENSEMBLE)
    chosen = _survivors(own)
    if chosen is None:
        return Finding(SURVIVORS, "pass", f"nothing of {target.name} survives")
    eps, _, survivors = chosen
    attacks = cost.harder(threat.attacks, target.n)
    if not examine(target, evaluator.data, evaluator.settings.device).differentiable:
        attacks = tuple(attack for attack in attacks if attack.gradient_free)
    count = min(len(survivors), cost.affordable(attacks, _steps_taken(own, threat, target.ensemble.rule)))
    samples = survivors[torch.linspace(0, len(survivors) - 1, count).long()]
    found = probed(own, evaluator.run([target], Probe(eps=(eps,), attacks=attacks, draws=threat.draws), samples))
    evaluator.remember(target, PROBE, [found])
    return found


def _steps_taken(outcomes: Outcomes, threat: Whitebox, rule: Rule) -> float:
    """Gradient steps that white-box rows took: an image that fell at a restart was left alone after it."""
    rows = outcomes.where(threat="whitebox").frame
    taken = 0.0
    for attack in threat.attacks:
        mine = rows[(rows["attack"] == label(attack.label, rule)) & (rows["loss"] == attack.loss)]
        starts = np.where(mine["correct"], threat.restarts if attack.stochastic else 1, mine["restart"] + 1)
        taken += float(starts.sum()) * attack.passes
    return taken


@dataclass(frozen=True, kw_only=True)
class SignNoise(Attack):
    """x + ε·s, s drawn from {−1, 1} for every pixel: a corner of the ball, without a gradient."""

    name: ClassVar[str] = "sign-noise"

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        noise = draws.uniform("noise", images.shape[1:], images)
        return images + eps.view(-1, 1, 1, 1) * (noise - 0.5).sign()


@dataclass(frozen=True)
class _Trial:
    """One attack on the survivors, and what it means that it takes some."""

    name: str
    attack: Attack
    eps: float
    restarts: int
    says: str


def probe(
    target: EvaluatedModel,
    outcomes: Outcomes,
    data: Data,
    attacks: Sequence[Attack],
    restarts: int | None = None,
    settings: Settings | None = None,
    *,
    limit: int = LIMIT,
    progress: Progress = silent,
) -> list[Finding]:
    """Attacks some survivors again: in a ball of 0.5, with ten times the steps and twice the restarts, with random sign
    noise, with Square (Andriushchenko et al. 2020), towards every other class (Croce & Hein 2020), and with members
    weighed anew at every step (Yu et al. 2022). The last two find what a loss on the true class, or on the average of
    the members, misses.

    They are taken at the ε whose accuracy is nearest to half the clean one, where a stronger attack shows most.

    Args:
        outcomes: white-box rows of ``target``.
        attacks, restarts: what the result was measured with (by default the protocol's restarts); of several attacks
            the first that takes steps is strengthened.
        limit: survivors at most.
    """
    chosen = _survivors(outcomes.where(target=target.name, member=ENSEMBLE))
    if chosen is None:
        return [Finding("probe", "pass", f"nothing of {target.name} survives, so that there is nothing to probe")]
    eps, accuracy, survivors = chosen
    samples = survivors[torch.linspace(0, len(survivors) - 1, min(limit, len(survivors))).long()]
    attack = next((each for each in attacks if hasattr(each, "steps")), attacks[0])
    trials, checks = _trials(attack, eps, restarts or PROTOCOL["whitebox"].restarts, target.n, data.num_classes)
    counts = [(trial.attack.gradient_free, len(samples) * trial.restarts * trial.attack.passes) for trial in trials]
    steps, queries = (sum(count for free, count in counts if free == which) for which in (False, True))
    log.info(
        f"probing {len(samples)} of {len(survivors)} survivors of {target.name} at ε {eps:g}: "
        f"at most {steps:,} gradient steps and {queries:,} queries"
    )
    for trial in trials:
        threat = Whitebox(eps=(trial.eps,), attacks=(trial.attack,), restarts=trial.restarts)
        try:
            # What the evaluator warns of concerns rows that are kept, and these are not.
            with logged(logging.NullHandler()):
                outcomes = Evaluator(data, settings, progress=progress).run([target], threat, samples)
            rows = outcomes.where(threat="whitebox")
        except RobenchError as error:
            checks.append(Finding(trial.name, "warn", f"skipped: {error}"))
            continue
        checks.append(_judged(trial, rows, target, accuracy, large=trial.eps != eps))
    return checks


_EFFORT = "more effort changes nothing"
_NOISE = "noise does not beat it"


def _others(members: int, classes: int) -> Iterator[tuple[str, Attack]]:
    """Attacks without gradients, towards single classes, and on members: name of the check, attack."""
    yield SQUARE, Square(queries=QUERIES)
    # DLR towards a class needs four of them.
    yield (
        TARGETED,
        APGD(objective="dlr", targets=classes - 1, steps=OTHER_STEPS)
        if classes >= 4
        else APGD(loss="cw", steps=OTHER_STEPS),
    )
    if members > 1:
        yield MEMBERS, MORA(targets=0, steps=OTHER_STEPS)


def _trials(
    attack: Attack, eps: float, restarts: int, members: int, classes: int
) -> tuple[list[_Trial], list[Finding]]:
    """What to try, and a check for what cannot be tried."""
    masked = "gradients are masked or the attack is set badly, and the accuracy is too high"
    trials, skipped = [], []
    if eps < LARGE:
        trials.append(
            _Trial("a large ε takes all", attack, LARGE, restarts, f"{attack.label} does not reach it: {masked}")
        )
    trials.append(_Trial(_NOISE, SignNoise(), eps, DRAWS, f"a gradient attack must do better: {masked}"))
    for name, other in _others(members, classes):
        says = f"the accuracy is too high: evaluate with --attacks {other.label} or strongest too"
        trials.append(_Trial(name, other, eps, 1, says))
    values = {item.name: getattr(attack, item.name) for item in fields(attack)}
    if "steps" in values:
        harder: Attack = type(attack)(**{**values, "steps": STEPS * values["steps"]})
        more = restarts * (RESTARTS if attack.stochastic else 1)
        says = f"the attack had not converged: evaluate with --steps {STEPS * values['steps']}"
        trials.append(_Trial(_EFFORT, harder, eps, more, says))
    else:
        skipped.append(Finding(_EFFORT, "warn", f"skipped: attack {attack.label!r} has no `steps` to raise"))
    return trials, skipped


def _judged(trial: _Trial, rows: Outcomes, target: EvaluatedModel, accuracy: float, *, large: bool) -> Finding:
    verdicts = rows.verdicts(["target"])
    standing = int(verdicts["correct"].sum())
    fallen = len(verdicts) - standing
    # Points of accuracy of the whole result, not of the survivors.
    excess = accuracy * (standing if large else fallen) / len(verdicts)
    if large:
        evidence = f"{standing} of {len(verdicts)} survivors of {target.name} are right at ε {trial.eps:g}"
    else:
        tries = f" in {trial.restarts} tries" if trial.restarts > 1 else ""
        evidence = (
            f"{trial.attack.label}{tries} takes {fallen} of {len(verdicts)} survivors of {target.name} at ε "
            f"{trial.eps:g}, {100 * excess:.1f} points of accuracy"
        )
    if excess > POINT:
        return Finding(trial.name, "fail", f"{evidence}: {trial.says}")
    return Finding(trial.name, "pass", evidence)


def _survivors(outcomes: Outcomes) -> tuple[float, float, Tensor] | None:
    """ε, accuracy there, and the samples that are right under every white-box attack."""
    verdicts = outcomes.where(threat="whitebox").verdicts(["eps"])
    accuracies = verdicts.groupby("eps")["correct"].mean()
    accuracies = accuracies[accuracies > 0]
    if accuracies.empty:
        return None
    clean = outcomes.where(threat="clean").verdicts(["eps"])["correct"].mean()
    # The larger ε of two that are as near.
    radii = accuracies.index.to_numpy(dtype=float)[::-1]
    eps = float(radii[np.argmin(np.abs(accuracies.to_numpy()[::-1] - clean / 2))])
    own = verdicts[(verdicts["eps"] == eps) & verdicts["correct"]]
    return eps, float(accuracies[eps]), torch.from_numpy(own["sample"].to_numpy(dtype="int64"))
