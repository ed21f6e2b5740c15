"""What is wrong with a model before anything is measured on it: in seconds, each finding with its fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from robench.attacks._ascent import gradient
from robench.core.data import Data, to_images
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.frozen import frozen
from robench.core.losses import Loss, cross_entropy, margin
from robench.core.models import Normalized
from robench.evaluation.statistics import mcnemar

#: Outputs that differ by more than this part of their range are not the same up to rounding (TF32 included).
SAME = 1e-2
#: How much better another input convention must be: in accuracy, and by McNemar's test.
FAR, SURE = 0.05, 0.001
#: Share of images without a gradient that is worth a warning.
MANY = 0.01

_Verdicts = npt.NDArray[np.bool_]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, on one line, and how to mend it."""

    name: str
    status: Literal["warn", "fail"]
    evidence: str
    fix: str

    def __str__(self) -> str:
        return f"{self.status}  {self.name}: {self.evidence}; {self.fix}"


def diagnose(model: nn.Module, data: Data, *, samples: int = 128) -> list[Finding]:
    """What would make a result on ``model`` false; nothing where it is well. The model is left as it was.

    Args:
        model: images float32 in [0, 1] (B,C,H,W) -> logits (B,K). Of an `Ensemble` every member is examined.
        data: what it is to be judged on; so many of its test images are looked at.
    """
    if not isinstance(model, Ensemble):
        return _diagnose(model, data, samples)
    found: dict[tuple[str, str], tuple[Finding, list[int]]] = {}
    for number, member in enumerate(model.members, 1):
        for finding in _diagnose(member, data, samples):
            found.setdefault((finding.name, finding.status), (finding, []))[1].append(number)
    return [
        replace(finding, name=f"{finding.name} (member {', '.join(map(str, numbers))})")
        for finding, numbers in found.values()
    ]


def _diagnose(model: nn.Module, data: Data, samples: int) -> list[Finding]:
    found = list(_handed_over(model))
    chosen = data.subset(samples, "random")
    place = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    images, labels = to_images(data.test.images[chosen]).to(place), data.test.labels[chosen].to(place)
    devices = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices), _restored(model) as before, frozen(model):
        found += _stuck(model)
        try:
            if isinstance(model, Normalized) and len(model.mean) not in (1, images.shape[1]):
                # Broadcasting would make up the missing channels.
                raise RobenchError(f"it normalises {len(model.mean)} channels")
            output = _outputs(model, images)
        except Exception as error:  # whatever the user's code raises
            text = " ".join(str(error).split())
            evidence = f"it does not take images {tuple(images.shape)} of float32 in [0, 1]: {text}"
            return [*found, Finding("input", "fail", evidence, "choose the --dataset or the model that fits")]
        changed = [name for name, tensor in _state(model).items() if not _equal(tensor, before[name])]
        if changed:
            found.append(
                Finding(
                    "statistics move",
                    "fail",
                    f"a forward pass in eval mode changes {changed[0]!r}"
                    + (f" and {len(changed) - 1} more" if len(changed) > 1 else ""),
                    "its BatchNorm is in train mode inside forward, or it counts calls: let eval() reach every module",
                )
            )
        malformed = list(_malformed(output, images, data))
        found += malformed
        if any(finding.status == "fail" for finding in malformed):
            return found
        found += _range_of_outputs(model, output, images)
        found += _repeats(model, output, images)
        found += _conventions(model, output, images, labels, data)
        found += _gradients(model, images[:64], labels[:64])
    return found


def _handed_over(model: nn.Module) -> Iterator[Finding]:
    if model.training:
        modal = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
        kinds = sorted({type(module).__name__ for module in model.modules() if isinstance(module, modal)})
        which = f", in which {' and '.join(kinds)} compute something else" if kinds else ""
        yield Finding(
            "train mode",
            "warn",
            f"the model was handed over in train mode{which}",
            "call model.eval() first; robench does so by itself, other tools may not",
        )


def _stuck(model: nn.Module) -> Iterator[Finding]:
    stuck = [name or type(module).__name__ for name, module in model.named_modules() if module.training]
    if stuck:
        yield Finding(
            "train mode",
            "fail",
            f"{len(stuck)} modules stay in train mode after model.eval(), the first is {stuck[0]!r}",
            "let train() and eval() reach every module",
        )


def _malformed(output: object, images: Tensor, data: Data) -> Iterator[Finding]:
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        yield Finding("output", "fail", f"it returns {got}", f"return logits ({len(images)}, classes) alone")
        return
    if not output.is_floating_point():
        yield Finding("output", "fail", f"it returns {output.dtype}", "return logits, before any argmax")
        return
    if output.shape[1] != data.num_classes:
        yield Finding(
            "number of classes",
            "fail",
            f"the model has {output.shape[1]} outputs, {data.label} has {data.num_classes} classes",
            "choose the --dataset that it was trained on, or give it a last layer that fits",
        )
    bad = int((~torch.isfinite(output)).any(dim=1).sum())
    if bad:
        yield Finding(
            "not finite",
            "fail",
            f"NaN or infinity in the output of {bad} of {len(images)} images",
            "look for a logarithm or a division by zero in forward, and at the weights",
        )


def _range_of_outputs(model: nn.Module, output: Tensor, images: Tensor) -> Iterator[Finding]:
    extremes = torch.stack([torch.zeros_like(images[0]), torch.ones_like(images[0]), (images[0] > 0.5).to(images)])
    if not bool(torch.isfinite(_outputs(model, extremes)).all()):
        yield Finding(
            "not finite",
            "fail",
            "NaN or infinity in the output of black, white or two-level images",
            "an attack will find such images: look for a division by a norm or a deviation of the image",
        )
    if bool((output == output[0]).all()):
        yield Finding("constant", "fail", "the output is the same for every image", "load weights, and use the input")
        return
    sums = output.sum(dim=1)
    if bool((output >= 0).all() and (output <= 1).all() and ((sums - 1).abs() < 1e-3).all()):
        yield Finding(
            "probabilities",
            "fail",
            "the outputs are in [0, 1] and sum to 1, so that softmax would be taken twice",
            "return logits: remove the softmax",
        )
    elif output.dtype != torch.float32 and output.dtype != torch.float64:
        yield Finding("precision", "warn", f"it returns {output.dtype}", "judge it in float32: model.float()")
    else:
        # Logarithms of softmax(softmax(z)) span exactly 1 where z is sure.
        span = output.amax(dim=1) - output.amin(dim=1)
        if bool((span.max() <= 1 + 1e-4) & (span.max() > 0.98) & (span.median() > 0.9)):
            yield Finding(
                "softmax twice",
                "warn",
                f"the outputs of an image never span more than {span.max():.3f}, as if softmax were taken twice",
                "return logits: take no softmax inside",
            )


def _repeats(model: nn.Module, output: Tensor, images: Tensor) -> Iterator[Finding]:
    """The same images again, alone, and in another order."""
    scale = float(output.max() - output.min()) or 1.0

    def apart(other: Tensor, mine: Tensor) -> float:
        return float((other - mine).abs().max()) / scale

    again = apart(_outputs(model, images), output)
    if again > 1e-4:
        yield Finding(
            "not deterministic",
            "fail",
            f"the same images give outputs that differ by {again:.1%} of their range",
            "switch dropout and noise off in eval mode; where they are the defense, attack their mean "
            "(--attacks torchattacks/EOTPGD)",
        )
        return
    alone = apart(torch.cat([_outputs(model, images[i : i + 1]) for i in range(min(4, len(images)))]), output[:4])
    turned = apart(_outputs(model, images.flip(0)).flip(0), output)
    if max(alone, turned) > SAME:
        how = "alone than in a batch" if alone >= turned else "in another order"
        yield Finding(
            "batch dependence",
            "fail",
            f"an image gives another output {how}, by {max(alone, turned):.1%} of the outputs' range",
            "use running statistics: BatchNorm in eval mode with track_running_stats",
        )


def _conventions(model: nn.Module, output: Tensor, images: Tensor, labels: Tensor, data: Data) -> Iterator[Finding]:
    """Whether it is right far more often under another input convention than the one it will be used with."""
    right = _right(output, labels)
    network: nn.Module = model.model if isinstance(model, Normalized) else model
    twice = "it normalises twice, or was trained without"
    views: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {}
    if isinstance(model, Normalized):
        views["in [0, 1] without robench's normalisation"] = (
            lambda x: x,
            "double normalisation",
            f"{twice}: remove its own, for robench's models have theirs",
        )
        views["normalised by the data set's mean and std"] = (
            lambda x: _normalised(x, data.mean, data.std),
            "wrong normalisation",
            "import it for this --dataset, so that it gets the data set's mean and std",
        )
    else:
        views["normalised by the data set's mean and std"] = (
            lambda x: _normalised(x, data.mean, data.std),
            "missing normalisation",
            "wrap it: robench.core.models.Normalized(model, data.mean, data.std)",
        )
        views["de-normalised by the data set's mean and std"] = (
            lambda x: x * _channels(x, data.std) + _channels(x, data.mean),
            "double normalisation",
            f"{twice}: remove one",
        )
    if images.shape[1] == 3:
        fix = "normalise by ImageNet's mean and std inside the model"
        views["normalised by ImageNet's"] = (lambda x: _normalised(x, *_IMAGENET), "input range", fix)
        own = model.normalize if isinstance(model, Normalized) else lambda x: x
        views["with channels in reverse order"] = (
            lambda x: own(x.flip(1)),
            "channel order",
            "it takes BGR: flip the channels inside the model",
        )
    views["in [-1, 1]"] = (lambda x: 2 * x - 1, "input range", "compute 2x - 1 inside the model")
    views["in [0, 255]"] = (lambda x: 255 * x, "input range", "multiply by 255 inside the model")
    found: dict[str, _Verdicts] = {}
    for how, (view, _, _) in views.items():
        # A model may refuse what is out of its range.
        with suppress(Exception):
            found[how] = _right(_outputs(network, view(images)), labels)
    if not found:
        return
    best = max(float(other.mean()) for other in found.values())
    # Normalisations resemble one another: the plainest of those about as good.
    how = next(how for how, other in found.items() if other.mean() >= best - 0.02)
    other = found[how]
    if other.mean() - right.mean() > FAR and mcnemar(other, right) < SURE:
        _, name, fix = views[how]
        yield Finding(name, "fail", f"accuracy is {right.mean():.1%} as it is, {other.mean():.1%} on images {how}", fix)
    else:
        chance = np.bincount(labels.cpu().numpy()).max() / len(labels)
        if right.mean() <= chance + 3 * np.sqrt(chance * (1 - chance) / len(labels)):
            yield Finding(
                "accuracy",
                "warn",
                f"{right.mean():.1%} is no better than chance ({chance:.1%}), which hides a wrong input convention",
                "load trained weights; compare the order of classes",
            )


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Finding]:
    fix = (
        "remove no_grad, detach, rounding and argmax from forward, or attack it without gradients (torchattacks/Square)"
    )
    try:
        slopes = [gradient(partial(_loss, loss, model, labels), images) for loss in (margin, cross_entropy)]
    except (RobenchError, RuntimeError) as error:
        yield Finding("no gradient", "fail", " ".join(str(error).split()), fix)
        return
    if not all(bool(torch.isfinite(slope).all()) for slope in slopes):
        yield Finding("gradient not finite", "fail", "the input gradient holds NaN or infinity", fix)
        return
    of_margin, of_loss = ((slope.abs().flatten(1).amax(dim=1) == 0).float().mean().item() for slope in slopes)
    if of_margin > MANY:
        evidence = f"the input gradient is exactly zero on {of_margin:.1%} of {len(images)} images"
        yield Finding("no gradient", "fail" if of_margin > 0.1 else "warn", evidence, fix)
    elif of_loss > MANY:
        yield Finding(
            "saturation",
            "warn",
            f"the gradient of cross entropy is exactly zero on {of_loss:.1%} of {len(images)} images",
            "attack it with --losses cw or --precision float64 too",
        )


def _loss(loss: Loss, model: nn.Module, labels: Tensor, images: Tensor) -> Tensor:
    return loss(model(images), labels)


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)  # type: ignore[no-any-return]


def _right(output: Tensor, labels: Tensor) -> _Verdicts:
    return np.asarray((output.argmax(dim=1) == labels).cpu().numpy(), dtype=np.bool_)


def _channels(images: Tensor, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).to(images).view(-1, 1, 1)


def _normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (images - _channels(images, mean)) / _channels(images, std)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in chain(model.named_parameters(), model.named_buffers())}


def _equal(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.nan_to_num(), second.nan_to_num())


@contextmanager
def _restored(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """A copy of every parameter and buffer, written back at the end: a forward pass may have moved them."""
    before = {name: tensor.clone() for name, tensor in _state(model).items()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, tensor in _state(model).items():
                tensor.copy_(before[name])
