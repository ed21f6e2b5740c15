"""One call from Python: a model, data and a threat give outcomes, without any run folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from robench.core.data import Data
from robench.core.errors import DoubtWarning, RobenchError
from robench.core.fast import Precision
from robench.core.progress import bar
from robench.evaluation.checks import check
from robench.evaluation.engine import Evaluator, correct_for_all
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.outcomes import Outcomes
from robench.evaluation.schema import SAMPLES
from robench.evaluation.settings import Settings
from robench.evaluation.threats import Threat, Transfer
from robench.validity.probe import attack_again


def evaluate(
    model: nn.Module | Sequence[nn.Module] | EvaluatedModel,
    data: Data,
    threat: Threat,
    *,
    samples: int = SAMPLES,
    subset: str = "auto",
    name: str = "model",
    device: str | torch.device | None = None,
    precision: Precision = "float32",
    batch_size: int | None = None,
    seed: int = 0,
    probe: bool = True,
) -> Outcomes:
    """Rows of ``model`` under ``threat``, clean rows included; in a notebook with a bar.

    Args:
        model: images float32 in [0, 1] (B,C,H,W) -> logits (B,K), normalisation inside; or a list of such members,
            which is taken as an ensemble averaged in probability.
        data: from `robench.load_data`, or `robench.core.data.make` for your own arrays.
        threat: `Whitebox`, `Blackbox` or `Transfer`.
        device: by default the model's own; the model is moved to another one that is named.
        samples: how many test images; for `Transfer`, of those that every member classifies correctly.
        subset: which, by default the first ones or, of data that are ordered by class, random ones.
        probe: attack a few survivors of `Whitebox` in ways that are not part of it, see `robench.validity.probe`.

    Returns:
        `Outcomes`; ``outcomes.accuracy()`` is the table of strict accuracies with intervals, ``outcomes.checks`` says
        what speaks against it.

    Warns:
        DoubtWarning: for each check that does not pass.

    Raises:
        RobenchError: whatever would make the number false: images out of range, NaN, a related surrogate.
    """
    if not isinstance(data, Data):
        raise RobenchError(
            f"expected `data` as robench.load_data gives it, got {data!r:.80}; try robench.load_data(NAME)"
        )
    if not isinstance(threat, Threat):
        raise RobenchError(f"expected `threat` such as robench.Whitebox(eps=(8 / 255,)), got {threat!r:.80}")
    where = _device_of(model) if device is None else torch.device(device)
    target = model if isinstance(model, EvaluatedModel) else EvaluatedModel.of_model(model, where, name=name)
    settings = Settings(where, precision, batch_size, seed)
    with bar(terminal=False) as progress:
        evaluator = Evaluator(data, settings, progress=progress)
        chosen = chosen_samples(data, threat, samples, subset, settings)
        outcomes = evaluator.run([target], threat, chosen)
        if probe:
            outcomes = attack_again(evaluator, [target], threat, outcomes)
    found = check(outcomes)
    for each in found:
        if each.status != "pass":
            warnings.warn(str(each), DoubtWarning, stacklevel=2)
    return outcomes.with_checks(found)


def _device_of(model: nn.Module | Sequence[nn.Module] | EvaluatedModel) -> torch.device:
    parts = (
        [model.ensemble] if isinstance(model, EvaluatedModel) else [model] if isinstance(model, nn.Module) else model
    )
    weights = (weight for part in parts if isinstance(part, nn.Module) for weight in part.parameters())
    return next((weight.device for weight in weights), torch.device("cpu"))


def chosen_samples(data: Data, threat: Threat, samples: int, subset: str, settings: Settings) -> Any:
    """Indices of test images for `Evaluator.run`: for `Transfer` those that all members of a target get right."""
    subset = data.resolved(subset, samples)
    chosen = data.subset(samples, subset, settings.seed)
    if isinstance(threat, Transfer):
        order = data.order(subset, settings.seed)
        return lambda target: correct_for_all(target, data, order, samples, settings.device, settings.batch_size)
    return chosen
