"""Diversity of an ensemble (eq. 2 of the DVERGE paper), and what is tracked along training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from robench.attacks.distill import distill
from robench.attacks.pgd import PGD
from robench.core.data import Data, to_images
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.features import depth
from robench.core.files import content_key, read_frame, write_frame
from robench.core.frozen import frozen
from robench.core.parts import read_parts
from robench.core.progress import Progress, silent
from robench.core.rng import Stream
from robench.evaluation.craft import craft
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.predict import correct
from robench.evaluation.schema import DIVERSITY_STEPS

#: Images that share a feature layer.
GROUP = 10


def diversity(
    ensemble: Ensemble, images: Tensor, labels: Tensor, *, eps: float = 0.07, steps: int = 10, seed: int = 0
) -> Tensor:
    """Mean over i ≠ j of CE(z_j(x'_i(x, x_s)), y) per image, (B,): how little member j sees of what was distilled on i.

    x' is distilled from a source x_s towards x, and y is the label of x, the target. Members run in eval mode; the
    layer is drawn uniformly for every 10 images. Sources are the same images in a keyed order without fixed points.

    Args:
        images: float in [0, 1], (B,C,H,W), that all members classify correctly, on the ensemble's device.

    Raises:
        RobenchError: fewer than two members or two images.
    """
    _enough(len(ensemble), len(images))
    groups = range(0, len(images), GROUP)
    return torch.cat([values for _, values in _by_group(ensemble, images, labels, groups, eps, steps, seed)])


def _by_group(
    ensemble: Ensemble, images: Tensor, labels: Tensor, groups: Iterable[int], eps: float, steps: int, seed: int
) -> Iterator[tuple[int, Tensor]]:
    """For every group's first place: the values of its images, which depend on no other group's."""
    stream = Stream(("diversity", seed))
    order = stream.permutation(len(images))
    sources = images[order[(order.argsort() + 1) % len(order)].to(images.device)]
    with frozen(ensemble):
        layers = [depth(member, images[:1]) for member in ensemble.members]
        for start in groups:
            at = slice(start, start + GROUP)
            position = float(stream.uniform((1,), "layer", start))
            losses = torch.zeros(len(images[at]), device=images.device)
            for i, member in enumerate(ensemble.members):
                layer = 1 + math.floor(position * layers[i])
                crafted = distill(member, sources[at], images[at], layer, eps=eps, steps=steps, step_ratio=1 / steps)
                with torch.no_grad():
                    for j, other in enumerate(ensemble.members):
                        if j != i:
                            losses += F.cross_entropy(other(crafted), labels[at], reduction="none")
            yield start, losses / (len(ensemble) * (len(ensemble) - 1))


_read = partial(read_frame, columns=("key", "sample", "diversity"))


def _enough(members: int, images: int) -> None:
    if members < 2 or images < 2:
        raise RobenchError(f"expected at least 2 members and 2 images for the diversity, got {members} and {images}")


def measure(
    target: EvaluatedModel,
    data: Data,
    samples: Tensor,
    folder: Path,
    *,
    eps: float = 0.07,
    steps: int = DIVERSITY_STEPS,
    seed: int = 0,
    device: torch.device,
    progress: Progress = silent,
) -> pd.DataFrame:
    """`diversity` of a run, kept in ``folder`` ten groups at a time: interrupted, it goes on.

    Args:
        samples: indices of test images that all members classify correctly; a value depends on all of them, as each
            is the source of another.

    Returns:
        One row per image: target, defense, n, seed, eps, steps, sample, diversity.

    Raises:
        RobenchError: fewer than two members or two images.
    """
    _enough(target.n, len(samples))
    if steps < 1:
        raise RobenchError(f"expected `steps` of the diversity to be at least 1, got {steps}")
    about = {"eps": eps, "steps": steps, "draws": seed}
    key = content_key({**about, "target": target.identity, "data": data.identity, "samples": samples.tolist()})
    kept = read_parts(folder, "part-*.parquet", _read, "its values", "are computed again")
    known = [rows[rows["key"] == key] for _, rows in kept if rows is not None]
    done = {int(sample) for part in known for sample in part["sample"]}
    groups = [start for start in range(0, len(samples), GROUP) if int(samples[start]) not in done]
    images, labels = to_images(data.test.images[samples].to(device)), data.test.labels[samples].to(device)
    fresh: list[pd.DataFrame] = []
    for start, values in _by_group(target.ensemble, images, labels, groups, eps, steps, seed):
        own = samples[start : start + GROUP]
        fresh.append(pd.DataFrame({"key": key, "sample": own.numpy(), "diversity": values.cpu().numpy()}))
        progress(start + len(own), len(samples), f"diversity of {target.name}")
        if len(fresh) == 10 or start == groups[-1]:
            known.append(pd.concat(fresh, ignore_index=True))
            write_frame(folder, known[-1])
            fresh = []
    rows = pd.concat(known, ignore_index=True).drop_duplicates("sample").sort_values("sample", ignore_index=True)
    who: dict[str, Any] = {"target": target.name, "defense": target.defense, "n": target.n, "seed": target.seed}
    return rows.assign(**who, eps=eps, steps=steps)[[*who, "eps", "steps", "sample", "diversity"]]


def transfer_rate(
    ensemble: Ensemble, images: Tensor, labels: Tensor, *, eps: float, steps: int, restarts: int
) -> float:
    """Mean off-diagonal success of PGD between members, in [0, 1]; images as for `diversity`."""
    attack, count = PGD(steps=steps), len(ensemble)
    samples, radii, known = np.arange(len(images)), np.full(len(images), eps), labels.cpu().numpy()
    fooled = torch.zeros(count, count, len(images), dtype=torch.bool, device=images.device)
    for i, member in enumerate(ensemble.members):
        for restart in range(restarts):
            crafted = craft(member, attack, images, known, samples, radii, seed=0, restart=restart).images
            fooled[i] |= ~correct(ensemble, crafted, labels, members=True)[:-1]
    off = ~torch.eye(count, dtype=torch.bool, device=images.device)
    return float(fooled[off].float().mean())


@dataclass(frozen=True)
class Tracking:
    """What is measured along training: images, attack steps and starts, and the radii.

    ``full()`` is the paper's protocol (Fig. 2); the default is small, and the training loop spaces it so that it takes
    less than 15 % of the time.
    """

    transfer_eps: float
    diversity_eps: float
    images: int = 100
    steps: int = 10
    restarts: int = 1

    @classmethod
    def full(cls, transfer_eps: float, diversity_eps: float) -> Tracking:
        return cls(transfer_eps, diversity_eps, images=1000, steps=50, restarts=5)

    def on(self, data: Data, device: torch.device) -> Callable[[Ensemble], dict[str, float]]:
        """A function that measures an ensemble on the first test images, or random ones of data that are ordered by
        class: its clean accuracy, and diversity and transferability on those that all its members classify correctly.
        """
        chosen = data.order(data.resolved("auto", 2 * self.images))[: 2 * self.images]
        pixels, truth = data.test.images[chosen].to(device), data.test.labels[chosen].to(device)

        def measure(ensemble: Ensemble) -> dict[str, float]:
            images = to_images(pixels)
            right = correct(ensemble, images, truth, members=True)
            clean = {"clean": float(right[-1].float().mean()), "clean_images": float(len(images))}
            by_all = right[:-1].all(dim=0)
            images, labels = images[by_all][: self.images], truth[by_all][: self.images]
            if len(images) < 2:
                return {**clean, "images": float(len(images))}
            return {
                **clean,
                "diversity": float(diversity(ensemble, images, labels, eps=self.diversity_eps).mean()),
                "transferability": transfer_rate(
                    ensemble, images, labels, eps=self.transfer_eps, steps=self.steps, restarts=self.restarts
                ),
                "images": float(len(images)),
                "diversity_eps": self.diversity_eps,
                "transferability_eps": self.transfer_eps,
            }

        return measure
