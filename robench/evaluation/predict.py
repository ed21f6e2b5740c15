"""What an ensemble says of images: the one place that decides whether it is right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robench.core.drawn import model_draws
from robench.core.ensemble import Ensemble, decided
from robench.core.errors import RobenchError
from robench.core.frozen import frozen
from robench.core.losses import margin
from robench.core.rules import USUAL, Rule
from robench.evaluation.soundness import keyed_torch

#: Leads of a class over the others within which float32 decides as float64 does.
USUAL_LEADS = (1e-2, 1e4)
#: Below this lead of logits log p̄ is their mean up to a constant, to float64's last digit but some: a softmax loses it.
FIRST_ORDER = 1e-10

Indices = npt.NDArray[np.int64]
Radii = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """Per judge and image, (J,B): the last judge is the ensemble.

    Attributes:
        prediction, margin: of several draws, those of the draw with the least margin.
        correct: in every draw; expected: in which part of the draws.
    """

    prediction: npt.NDArray[np.int16]
    correct: npt.NDArray[np.bool_]
    margin: npt.NDArray[np.float32]
    expected: npt.NDArray[np.float32]

    @classmethod
    def empty(cls, judges: int, count: int) -> Predictions:
        """Of nothing yet: all are right."""
        shape = (judges, count)
        zeros, ones = np.zeros(shape, np.float32), np.ones(shape, np.float32)
        return cls(np.zeros(shape, np.int16), np.ones(shape, np.bool_), zeros, ones)

    @classmethod
    def over_draws(cls, each: Sequence[Predictions]) -> Predictions:
        """What several draws say together; of one, itself."""
        if len(each) == 1:
            return each[0]
        margins = np.stack([one.margin for one in each])
        least = margins.argmin(axis=0)[None]
        prediction = np.take_along_axis(np.stack([one.prediction for one in each]), least, axis=0)[0]
        right: npt.NDArray[np.bool_] = np.stack([one.correct for one in each])
        expected = right.mean(axis=0).astype(np.float32)
        return cls(prediction, np.asarray(right.all(axis=0)), margins.min(axis=0), expected)

    def arrays(self) -> Iterable[npt.NDArray[Any]]:
        return self.prediction, self.correct, self.margin, self.expected

    def at(self, columns: Indices) -> Predictions:
        """Of some of the images."""
        return Predictions(*(values[:, columns] for values in self.arrays()))


def predict(
    ensemble: Ensemble,
    images: Tensor,
    labels: Indices,
    *,
    members: bool = False,
    draws: int = 1,
    samples: Indices | None = None,
) -> Predictions:
    """Predictions of the ensemble, or of each member and then of the ensemble.

    Args:
        images: (B,C,H,W) in [0, 1]; labels: (B,).
        draws: how often a model that draws at inference is asked, or the member of rule ``random`` drawn; 0 is once.
        samples: of a model whose members draw, indices in the data set, (B,): its draws are keyed by these.

    Raises:
        RobenchError: labels beyond the classes, NaN or infinity.
    """
    found: list[Predictions] = []
    logits: Tensor | None = None
    for number in range(max(draws, 1)):
        if logits is None or samples is not None:
            logits = _logits(ensemble, images, samples, number)
        found.append(_judged(ensemble, logits, images, labels, members, number))
    return Predictions.over_draws(found)


def _judged(
    ensemble: Ensemble, logits: Tensor, images: Tensor, labels: Indices, members: bool, number: int
) -> Predictions:
    """The predictions of one draw."""
    if labels.max() >= logits.shape[-1]:  # on a GPU torch would end the process over it
        raise RobenchError(f"expected logits of more than {labels.max()} classes, got {logits.shape[-1]}")
    truth = torch.from_numpy(labels).to(images.device)
    shape = (len(ensemble) + 1 if members else 1, len(images))
    prediction, margins = truth.new_empty(shape), logits.new_empty(shape)
    for at, outputs in _decisive(logits, members, ensemble.rule, _drawn(ensemble, images, number)):
        prediction[:, at] = torch.stack([output.argmax(dim=1) for output in outputs])
        margins[:, at] = torch.stack([margin(output, truth[at]) for output in outputs]).to(margins.dtype)
    predicted = prediction.cpu().numpy()
    if not bool(torch.isfinite(logits).all()):
        raise RobenchError("the model returned NaN or infinity; `robench check model` looks for the reason")
    right = predicted == labels
    return Predictions(predicted.astype(np.int16), right, margins.float().cpu().numpy(), right.astype(np.float32))


def classes(ensemble: Ensemble, images: Tensor, *, members: bool = False) -> Tensor:
    """The predicted classes, on the device of ``images``: (B,), or with ``members`` (N+1,B), the ensemble last."""
    logits = _logits(ensemble, images)
    found = torch.empty((len(ensemble) + 1 if members else 1, len(images)), dtype=torch.int64, device=images.device)
    for at, outputs in _decisive(logits, members, ensemble.rule, _drawn(ensemble, images)):
        found[:, at] = torch.stack([output.argmax(dim=1) for output in outputs])
    return found if members else found[0]


def correct(ensemble: Ensemble, images: Tensor, labels: Tensor, *, members: bool = False) -> Tensor:
    """Whether each of ``labels``, (B,), is the class of `classes`, whose shape and device it has."""
    return classes(ensemble, images, members=members) == labels.to(images.device)


def _logits(ensemble: Ensemble, images: Tensor, samples: Indices | None = None, number: int = 0) -> Tensor:
    with keyed_torch(images.device, "judge"), frozen(ensemble), torch.no_grad():
        if samples is None:
            return ensemble.logits(images)
        # Alone, an image's draws could not be told from those that are one for the whole batch.
        order = np.array([0, 0]) if len(samples) == 1 else np.arange(len(samples))
        with model_draws(("judge", number), samples[order]):
            return ensemble.logits(images[torch.from_numpy(order).to(images.device)])[:, : len(samples)]


def _drawn(ensemble: Ensemble, images: Tensor, number: int = 0) -> Tensor | None:
    """The member of each image, (B,), where a drawn one decides: keyed by the image in 255ths, so that neither rounding
    nor who shares its batch draws another, and by the number of the draw."""
    if ensemble.rule != "random":
        return None
    pixels = (images.detach() * 255).round().to(torch.uint8).cpu().numpy()
    salt = number.to_bytes(16, "little")  # of zeros it is none
    keys = [
        int.from_bytes(hashlib.blake2b(each.tobytes(), digest_size=8, salt=salt).digest(), "little") for each in pixels
    ]
    return torch.tensor([each % len(ensemble) for each in keys], device=images.device)


def _decisive(logits: Tensor, members: bool, rule: Rule, drawn: Tensor | None) -> Iterator[tuple[Any, list[Tensor]]]:
    """Outputs of each judge, (B,K), for all images; then in float64 for those whose logits float32 does not decide.

    Of tiny logits float32 loses the differences in a softmax, of huge ones the rest.
    """
    usual = decided(logits, rule, drawn)
    yield slice(None), [*logits, usual] if members else [usual]
    lead = (logits.amax(dim=2) - logits.median(dim=2).values).amax(dim=0)
    odd = (lead < USUAL_LEADS[0]) | (lead > USUAL_LEADS[1])
    if bool(odd.any()):
        exact = logits[:, odd].double()
        mixed = decided(exact, rule, None if drawn is None else drawn[odd])
        if rule == USUAL:
            mixed = torch.where(lead[odd, None] < FIRST_ORDER, exact.mean(dim=0), mixed)
        yield odd, [*exact, mixed] if members else [mixed]
