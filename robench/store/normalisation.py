"""Which normalisation weights were trained with, where their file does not say: tried on images, never guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from robench.core.data import Data, to_images
from robench.core.errors import RobenchError
from robench.core.frozen import frozen, hooked
from robench.core.models import Normalized

#: Images on which candidates are tried.
IMAGES = 500
#: A candidate whose accuracy is lower with this p-value (McNemar) is out.
CLEARLY = 1e-3
#: The first BatchNorm of a network recorded the variance that its input had in training. Logarithms of the variance of
#: test images over that: how far it may lie for the right candidate, as augmentation and noise raise the variance in
#: training (measured: −.41, −.31 and −.13 of three published networks), and how much closer than the next one it is.
USUAL, CLOSER = (-0.6, 0.2), 0.1

Values = tuple[float, ...]

_KNOWN: dict[int, dict[str, tuple[Values, Values]]] = {
    1: {"half": ((0.5,), (0.5,))},
    3: {
        "half": ((0.5,) * 3, (0.5,) * 3),
        "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "CIFAR-10's with std .247": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "CIFAR-10's with std .202": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    },
}
#: Two normalisations that differ by less than this part of the standard deviation are one.
SAME = 0.02
#: Means that differ by more than this part of the standard deviation are far apart.
FAR = 0.5
#: Images on which one that was given is held against the candidates.
FEW = 200


@dataclass(frozen=True)
class _Tried:
    """One candidate: verdicts (B,), and the logarithm of variances at the first BatchNorm, None without one."""

    name: str
    mean: Values
    std: Values
    correct: np.ndarray[tuple[int], np.dtype[np.bool_]]
    variance: float | None

    def __str__(self) -> str:
        told = "" if self.variance is None else f", variance at the first BatchNorm x {np.exp(self.variance):.2f}"
        return f"{self.name} {self.correct.mean():.1%}{told}"


def find(members: Sequence[nn.Module], data: Data) -> tuple[Values, Values, str]:
    """Tries none, the data set's and the usual normalisations on 500 test images (keyed).

    Args:
        members: networks without normalisation, in eval mode.

    Returns:
        Mean, standard deviation, and what was tried, in a line.

    Raises:
        RobenchError: none beats chance, or several fit.
    """
    tried = _tried(members, data, _candidates(data), IMAGES)
    count = len(tried[0].correct)
    said = f"on {count} test images of {data.label}: {'; '.join(map(str, tried))}"
    remedy = f"say which the weights were trained with: {typed('R,G,B', 'R,G,B')}, or --mean none"
    best = max(tried, key=lambda each: float(each.correct.mean()))
    if not _beats_chance(best, data):
        raise RobenchError(
            f"no normalisation makes these weights better than chance ({1 / data.num_classes:.1%}) {said}; they are of "
            f"another data set, order of classes or architecture, or {remedy}"
        )
    close = [each for each in tried if each is best or not _clearly_worse(each, best)]
    if any(each.variance is None for each in close):
        if len(close) > 1:
            choices = " or ".join(typed(each.mean, each.std) for each in close)
            raise RobenchError(
                f"several normalisations fit these weights {said}; say which they were trained with: {choices}"
            )
        return best.mean, best.std, f"{best.name}, by accuracy {said}"
    ranked = sorted(close, key=lambda each: abs(each.variance or 0.0))
    first = ranked[0]
    apart = [abs(each.variance or 0.0) - abs(first.variance or 0.0) for each in ranked[1:]]
    outside = not USUAL[0] <= (first.variance or 0.0) <= USUAL[1]
    if outside or min(apart, default=CLOSER) < CLOSER or any(_rivals(each, first) for each in ranked[1:]):
        raise RobenchError(f"no normalisation fits these weights well enough, or several do, {said}; {remedy}")
    return first.mean, first.std, f"{first.name}, {said}"


def against(members: Sequence[nn.Module], data: Data, given: tuple[Values, Values]) -> tuple[str, str]:
    """What ``given`` makes right of a few test images, in words, and what speaks against that: a candidate that makes
    clearly more of them right, or chance; else nothing."""
    mine, *others = _tried(members, data, {"as given": given, **_candidates(data)}, FEW)
    best = max([mine, *others], key=lambda each: float(each.correct.mean()))
    accuracy = f"{mine.correct.mean():.1%} of {len(mine.correct)} test images of {data.label} are right"
    if best is not mine and _clearly_worse(mine, best) and _beats_chance(best, data):
        better = f"with {best.name}, {typed(best.mean, best.std)}, {best.correct.mean():.1%} of them are"
        return accuracy, f"is this normalisation right? {better}"
    if _beats_chance(mine, data):
        return accuracy, ""
    return accuracy, (
        f"no better than chance ({1 / data.num_classes:.1%}): another data set, order of classes or normalisation; "
        f"robench check model looks for the reason"
    )


def _beats_chance(one: _Tried, data: Data) -> bool:
    count = scipy.stats.binomtest(int(one.correct.sum()), len(one.correct))
    return bool(count.proportion_ci(0.99, method="wilson").low > 1 / data.num_classes)


def typed(mean: Values | str, std: Values | str) -> str:
    """A normalisation as options of `robench import`."""
    if not isinstance(mean, str) and not any(mean) and all(value == 1 for value in std):
        return "--mean none"
    told = (each if isinstance(each, str) else ",".join(f"{value:g}" for value in each) for each in (mean, std))
    return "--mean {} --std {}".format(*told)


def _candidates(data: Data) -> dict[str, tuple[Values, Values]]:
    """Normalisations that people use, each once."""
    channels = len(data.mean)
    named = {
        "none": ((0.0,) * channels, (1.0,) * channels),
        "the data set's": (data.mean, data.std),
        "that of pixels in [0, 255]": ((0.0,) * channels, (1 / 255,) * channels),
        **_KNOWN.get(channels, {}),
    }
    chosen: dict[str, tuple[Values, Values]] = {}
    for name, values in named.items():
        if not any(_alike(values, other) for other in chosen.values()):
            chosen[name] = values
    return chosen


def _alike(one: tuple[Values, Values], other: tuple[Values, Values]) -> bool:
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    return all(abs(a - b) <= SAME * min(*one[1], *other[1]) for a, b in pairs)


def _tried(
    members: Sequence[nn.Module], data: Data, candidates: Mapping[str, tuple[Values, Values]], count: int
) -> list[_Tried]:
    chosen = data.subset(count, "random")
    images, labels = to_images(data.test.images[chosen]), data.test.labels[chosen]
    return [_try(members, name, mean, std, images, labels) for name, (mean, std) in candidates.items()]


def _rivals(one: _Tried, first: _Tried) -> bool:
    """Whether ``one`` gets as many right as ``first`` with a mean far from its: no variance tells means apart."""
    far = any(abs(a - b) > FAR * std for a, b, std in zip(one.mean, first.mean, first.std, strict=True))
    return far and int(one.correct.sum()) >= int(first.correct.sum())


def _clearly_worse(one: _Tried, best: _Tried) -> bool:
    lost, won = int((best.correct & ~one.correct).sum()), int((one.correct & ~best.correct).sum())
    return lost > won and scipy.stats.binomtest(won, won + lost).pvalue < CLEARLY


def _try(members: Sequence[nn.Module], name: str, mean: Values, std: Values, images: Tensor, labels: Tensor) -> _Tried:
    probabilities = torch.zeros(())
    batches = images.tensor_split(max(1, len(images) // 100))
    variances = []
    for member in members:
        model = Normalized(member, mean, std)
        norm = next((each for each in member.modules() if isinstance(each, nn.BatchNorm2d)), None)
        with frozen(model), torch.no_grad():
            if norm is None or norm.running_var is None:
                outputs = torch.cat([model(part) for part in batches])
            else:
                seen: list[Tensor] = []
                with hooked([norm.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))]):
                    outputs = torch.cat([model(part) for part in batches])
                ratio = torch.cat(seen).var(dim=(0, 2, 3)) / norm.running_var.clamp(min=1e-12)
                variances.append(float(ratio.clamp(min=1e-12).log().median()))
        probabilities = probabilities + outputs.softmax(dim=1)
    correct = (probabilities.argmax(dim=1) == labels).numpy()
    return _Tried(name, mean, std, correct, float(np.mean(variances)) if variances else None)
