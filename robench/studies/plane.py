"""Figure 1: decision regions of several ensembles on one plane."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from robench.core.data import to_images
from robench.core.errors import RobenchError
from robench.core.frozen import frozen, full_float32
from robench.core.losses import cross_entropy
from robench.core.rng import Draws
from robench.evaluation.predict import correct
from robench.evaluation.soundness import input_gradient
from robench.reports import regions, style
from robench.session import Session
from robench.store.runs import Run


def decision_regions(
    session: Session, runs: Sequence[Run], surrogate: Run, *, resolution: int = 1000, extent: float | None = None
) -> regions.Regions:
    """What each run predicts around the first test image that all of them, and the surrogate, classify correctly, in
    the order of the other figures.

    Axis 1 is the sign of the surrogate's input gradient, axis 2 a keyed Rademacher vector; ± ``extent`` along each
    (by default .1), the same for every run (protocol §3, Fig. 1).

    Raises:
        RobenchError: no test image that all get right.
    """
    data, device = session.data, session.settings.device
    models = [session.load(run) for run in runs]
    order = style.order(model.defense for model in models)
    models.sort(key=lambda model: (order.index(model.defense), model.n, model.name))
    attacked = session.load(surrogate).ensemble
    images = to_images(data.test.images[:500].to(device))
    labels = data.test.labels[:500].to(device)
    right = torch.ones(len(images), dtype=torch.bool, device=device)
    for ensemble in (*(model.ensemble for model in models), attacked):
        right &= correct(ensemble, images, labels)
    if not bool(right.any()):
        raise RobenchError("none of the first 500 test images is classified correctly by all ensembles")
    sample = int(right.nonzero()[0])
    image, label = images[sample : sample + 1], labels[sample : sample + 1]
    with frozen(attacked):
        first = input_gradient(attacked, cross_entropy, image, label).sign()[0]
    second = (Draws.of([sample]).uniform("rademacher", image.shape[1:], image)[0] - 0.5).sign()
    names = [f"{style.label(model.defense)}/{model.n}" for model in models]
    titles = names if len(set(names)) == len(names) else [model.name for model in models]
    ensembles = {title: model.ensemble.eval() for title, model in zip(titles, models, strict=True)}
    with full_float32():
        return regions.compute(
            ensembles,
            image[0],
            first,
            second,
            label=int(label),
            extent=extent or 0.1,
            resolution=resolution,
            names=data.classes,
        )
