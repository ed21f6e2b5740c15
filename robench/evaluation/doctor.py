"""What is wrong with a model before anything is measured on it: in seconds, each finding with its fix."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
import numpy.typing as npt
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.core.data import Data, to_images
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError, in_a_line
from robench.core.frozen import frozen
from robench.core.hidden import unregistered
from robench.core.losses import cross_entropy, margin
from robench.core.models import Normalized
from robench.evaluation.findings import Finding, failed
from robench.evaluation.outcomes import wilson
from robench.evaluation.soundness import IMAGES as LOOKED
from robench.evaluation.soundness import MANY as MANY_WRONG
from robench.evaluation.soundness import SOME as SOME_WRONG
from robench.evaluation.soundness import input_gradient, same_values, wrong_gradients
from robench.evaluation.statistics import mcnemar
from robench.evaluation.words import numbers

#: Outputs that differ by more than this part of their range are not the same up to rounding (TF32 included).
SAME = 1e-2
#: How much better another input convention must be: in accuracy, and by McNemar's test.
FAR, SURE = 0.05, 0.001
#: What is better by less on images with fewer colours or pixels may be a weak network.
MUCH = 0.2
#: Share of images without a gradient that is worth a warning.
MANY = 0.01

_Verdicts = npt.NDArray[np.bool_]

#: Images that are looked at: of all that is tried, and of what looks better on those; conventions that get so far.
FEW, SAMPLES, TRIED = 64, 500, 4
#: What is so much less accurate on a few images may still be more on all.
SLACK = 0.03
#: Sides of images up to which other sizes are tried.
LARGEST = 64
#: A member whose accuracy lies so far below the others' is looked at by itself.
BEHIND = 0.1

_DIFFERENTIABLE = (
    "remove no_grad, detach, rounding and argmax from forward, or attack it without gradients (--attacks square)"
)
_HALF = ".5 and .5"
_USUAL: dict[int, dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    1: {_HALF: ((0.5,), (0.5,))},
    3: {_HALF: ((0.5,) * 3, (0.5,) * 3), "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))},
}


def diagnose(model: nn.Module | Sequence[nn.Module], data: Data) -> list[Finding]:
    """What would make a result on ``model`` false; nothing where it is well. A copy is examined: the model is left as
    it was, with whatever it keeps outside its modules.

    Args:
        model: images float32 in [0, 1] (B,C,H,W) -> logits (B,K). Of an `Ensemble`, or a list of members, every member
            is examined.
        data: what it is to be judged on; at most `SAMPLES` of its test images are looked at.
    """
    model = model if isinstance(model, nn.Module) else Ensemble(model)
    try:
        model = copy.deepcopy(model)
    except Exception as error:  # whatever a user's module may raise
        text = f"it cannot be copied ({in_a_line(error)})"
        return [Finding("copy", "fail", text, "every attack works on a copy: keep no graph, lock or open file in it")]
    members = list(model.members) if isinstance(model, Ensemble) else [model]
    found: dict[tuple[str, str], tuple[Finding, list[int]]] = {}
    chosen = data.order("random")[:SAMPLES]
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    images, labels = to_images(data.test.images[chosen]).to(device), data.test.labels[chosen].to(device)
    devices = [device] if device.type == "cuda" else []
    well = []
    with torch.random.fork_rng(devices):
        for number, member in enumerate(members, 1):
            findings, usable = _diagnose(member, data, images, labels)
            well += [member] if usable else []
            for finding in findings:
                found.setdefault((finding.name, finding.status), (finding, []))[1].append(number)
        named = [
            replace(finding, name=f"{finding.name} (member {', '.join(map(str, numbers))})")
            if isinstance(model, Ensemble)
            else finding
            for finding, numbers in found.values()
        ]
        return named + _accuracy(well, images, labels, data) if well else named


def _diagnose(member: nn.Module, data: Data, images: Tensor, labels: Tensor) -> tuple[list[Finding], bool]:
    """What is wrong with one member whatever it was trained on, and whether its accuracy can be looked at."""
    found = [*_handed_over(member), *_unowned(member)]
    images, labels = images[:FEW], labels[:FEW]
    before = {name: tensor.clone() for name, tensor in _state(member).items()}
    with frozen(member):
        found += _stuck(member)
        try:
            if isinstance(member, Normalized) and len(member.mean) not in (1, images.shape[1]):
                # Broadcasting would make up the missing channels.
                raise RobenchError(f"it normalises {len(member.mean)} channels")
            output = _outputs(member, images)
        except Exception as error:  # whatever the user's code raises
            evidence = f"it does not take images {tuple(images.shape)} of float32 in [0, 1]: {in_a_line(error)}"
            return [*found, Finding("input", "fail", evidence, "choose the --dataset or the model that fits")], False
        changed = [name for name, tensor in _state(member).items() if not same_values(tensor, before.get(name))]
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
        if failed(malformed):
            return found, False
        found += _range_of_outputs(member, output, images)
        found += _repeats(member, output, images)
        found += _gradients(member, images, labels)
        if not {"not deterministic", "batch dependence", "no gradient"} & {finding.name for finding in found}:
            found += _true_gradients(member, images[:LOOKED], labels[:LOOKED])
    return found, True


def _unowned(model: nn.Module) -> Iterator[Finding]:
    hidden = unregistered(model)
    if hidden:
        yield Finding(
            "hidden weights",
            "fail",
            f"it keeps {hidden[0]!r} where no module owns it" + (f", and {len(hidden) - 1} more" * (len(hidden) > 1)),
            "register it: nn.ModuleList, nn.ModuleDict, nn.Parameter or register_buffer",
        )


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
            "switch dropout and noise off in eval mode; where they are the defense, attack the mean of several draws "
            "and judge over them (--draws 20)",
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


@dataclass(frozen=True)
class _View:
    """Another way to give images to the members.

    Attributes:
        how: in words; name, fix: of the finding, where they are right far more often so.
        given: what a network sees instead of an image in [0, 1].
        inside: given to a member's network in place of its own normalisation.
        poorer: it takes colours or pixels away, which may help a weak network too.
    """

    how: str
    given: Callable[[Tensor], Tensor]
    name: str
    fix: str
    inside: bool = False
    poorer: bool = False


def _greyed(images: Tensor) -> Tensor:
    return images.mean(1, keepdim=True).expand_as(images)


def _views(members: Sequence[nn.Module], images: Tensor, data: Data) -> list[_View]:
    """The plainest first: of several that are about as good, the first is named."""
    normalised = all(isinstance(member, Normalized) for member in members)
    usual = {"the data set's mean and std": (data.mean, data.std), **_USUAL.get(images.shape[1], {})}
    views = []
    if normalised:
        none = "it normalises twice, or was trained without: import it with --mean none, or remove its own"
        views.append(
            _View("in [0, 1] without robench's normalisation", lambda x: x, "double normalisation", none, True)
        )
    for whose, (mean, std) in usual.items():
        given = partial(_normalised, mean=mean, std=std)
        said = f"--mean {numbers(mean)} --std {numbers(std)}"
        if normalised:
            fix = f"import it with {said}"
            views.append(_View(f"normalised by {whose}", given, "wrong normalisation", fix, True))
        elif whose != _HALF:  # which is [-1, 1]
            fix = f"wrap it: robench.core.models.Normalized(model, {mean}, {std})"
            views.append(_View(f"normalised by {whose}", given, "missing normalisation", fix))
    for whose, (mean, std) in usual.items():
        undone = partial(_denormalised, mean=mean, std=std)
        fix = "it normalises twice, or was trained without: remove one"
        views.append(_View(f"de-normalised by {whose}", undone, "double normalisation", fix))
    if images.shape[1] == 3:
        fix = "it takes BGR: flip the channels inside the model"
        views.append(_View("with channels in reverse order", lambda x: x.flip(1), "channel order", fix))
        grey = "it takes grey images: average the channels inside the model"
        views.append(_View("in grey", _greyed, "channels", grey, poorer=True))
    views += [
        *([] if normalised else [_View("in [-1, 1]", lambda x: 2 * x - 1, "input range", "compute 2x - 1 inside it")]),
        _View("in [0, 255]", lambda x: 255 * x, "input range", "multiply by 255 inside the model", normalised),
        _View("in [0, 1/255]", lambda x: x / 255, "input range", "divide by 255 inside the model", normalised),
        _View("with black and white exchanged", lambda x: 1 - x, "inverted", "compute 1 - x inside the model"),
        _View("transposed", lambda x: x.transpose(2, 3), "transposed", "exchange height and width inside the model"),
    ]
    side = images.shape[-1]
    for other in (side // 2, 28, 32, 2 * side, 96):
        if side <= LARGEST and other not in (side, 0):
            fix = f"resize to {other}x{other} inside the model"
            views.append(
                _View(f"of {other}x{other} pixels", partial(_resized, side=other), "size", fix, poorer=other < side)
            )
    return views


def _accuracy(members: Sequence[nn.Module], images: Tensor, labels: Tensor, data: Data) -> list[Finding]:
    """What of the ensemble's accuracy another convention explains, and members that fall behind."""
    first = [_probabilities([member], images[:FEW]) for member in members]
    shares = [float(_right(outputs, labels[:FEW]).mean()) for outputs in first]
    usual = float(np.median(shares))
    behind = [at for at, share in enumerate(shares) if share < usual - BEHIND]
    others = [at for at in range(len(members)) if at not in behind]
    found = _conventions(
        [members[at] for at in others], images, labels, data, torch.stack([first[at] for at in others]).mean(dim=0)
    )
    for at in behind:
        evidence = f"{shares[at]:.1%}, the members' median is {usual:.1%}"
        own = _conventions([members[at]], images, labels, data, first[at])
        own = own or [Finding("accuracy", "warn", evidence, "train it again")]
        found += [replace(each, name=f"{each.name} (member {at + 1})") for each in own]
    return found


def _conventions(
    members: Sequence[nn.Module], images: Tensor, labels: Tensor, data: Data, first: Tensor
) -> list[Finding]:
    """Whether members are right far more often under another convention than the one they will be used with.

    All are tried on a few images, and those that look no worse on all.

    Args:
        first: what the members give for the first few images, (B,K).
    """
    few, chance = len(first), _chance(labels)
    right = _right(first, labels[:few])
    promising: list[tuple[_View, _Verdicts]] = []
    views = _views(members, images, data)
    for view in views:
        with suppress(Exception):  # a model may refuse what is out of its range
            other = _right(_seen(members, view, images[:few]), labels[:few])
            if other.mean() > right.mean() - SLACK:
                promising.append((view, other))
    promising.sort(key=lambda each: -float(each[1].mean()))
    rest = images[few:]
    outputs = torch.cat([first, _probabilities(members, rest)]) if len(rest) else first
    right = _right(outputs, labels)
    tried = []
    for view, other in promising[:TRIED]:
        tail = [_right(_seen(members, view, rest), labels[few:])] if len(rest) else []
        tried.append((view, np.concatenate([other, *tail])))
    best = max((float(other.mean()) for _, other in tried), default=0.0)
    # Normalisations resemble one another: the plainest of those about as good.
    for view, other in sorted(tried, key=lambda each: views.index(each[0])):
        if other.mean() < best - 0.02:
            continue
        if _far_better(other, right, chance):
            evidence = f"accuracy is {right.mean():.1%} as it is, {other.mean():.1%} on images {view.how}"
            told = view.poorer and other.mean() - right.mean() < MUCH
            return [Finding(view.name, "warn" if told else "fail", evidence, view.fix)]
    return _renamed(outputs, labels, right, data) or list(_at_chance(right, chance))


def _far_better(other: _Verdicts, right: _Verdicts, chance: float) -> bool:
    """Whether ``other`` beats chance, and ``right`` by far and for sure."""
    beats = wilson(int(other.sum()), len(other))[0] > chance
    return bool(beats and other.mean() - right.mean() > FAR and mcnemar(other, right) < SURE)


def _renamed(outputs: Tensor, labels: Tensor, right: _Verdicts, data: Data) -> list[Finding]:
    """Whether classes are in another order: the best order on every second image, judged on the others."""
    truth, guess = labels.cpu().numpy(), outputs.argmax(dim=1).cpu().numpy()
    table = np.zeros((outputs.shape[1], outputs.shape[1]))
    np.add.at(table, (guess[::2], truth[::2]), 1)
    # Where the images do not say, a class keeps its name.
    table += 0.5 * np.eye(len(table))
    renamed = scipy.optimize.linear_sum_assignment(table, maximize=True)[1]
    other, own = renamed[guess[1::2]] == truth[1::2], right[1::2]
    if not _far_better(other, own, _chance(labels)):
        return []
    moved = np.flatnonzero(renamed != np.arange(len(renamed)))
    names = ", ".join(f"{data.classes[i]} is {data.classes[renamed[i]]}" for i in moved[:4])
    return [
        Finding(
            "order of classes",
            "fail",
            f"accuracy is {own.mean():.1%} as it is, {other.mean():.1%} with {len(moved)} outputs renamed ({names}"
            + (", …)" if len(moved) > 4 else ")"),
            "give its outputs in the data set's order of classes",
        )
    ]


def _at_chance(right: _Verdicts, chance: float) -> Iterator[Finding]:
    if right.mean() <= chance + 3 * np.sqrt(chance * (1 - chance) / len(right)):
        yield Finding(
            "accuracy",
            "warn",
            f"{right.mean():.1%} is no better than chance ({chance:.1%}), which hides a wrong input convention",
            "load trained weights; compare the data set",
        )


def _chance(labels: Tensor) -> float:
    return float(np.bincount(labels.cpu().numpy()).max()) / len(labels)


def _seen(members: Sequence[nn.Module], view: _View, images: Tensor) -> Tensor:
    networks = [member.model if view.inside and isinstance(member, Normalized) else member for member in members]
    return _probabilities(networks, images, view.given)


def _probabilities(
    members: Sequence[nn.Module], images: Tensor, given: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Mean softmax of the members, (B,K)."""
    parts = []
    for part in images.tensor_split(max(1, len(images) // FEW)):
        outputs = []
        for member in members:
            with frozen(member):
                outputs.append(_outputs(member, given(part)).softmax(dim=1))
        parts.append(torch.stack(outputs).mean(dim=0))
    return torch.cat(parts)


def _gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Finding]:
    try:
        slopes = [input_gradient(model, loss, images, labels) for loss in (margin, cross_entropy)]
    except (RobenchError, RuntimeError) as error:
        yield Finding("no gradient", "fail", in_a_line(error), _DIFFERENTIABLE)
        return
    if not all(bool(torch.isfinite(slope).all()) for slope in slopes):
        yield Finding("gradient not finite", "fail", "the input gradient holds NaN or infinity", _DIFFERENTIABLE)
        return
    of_margin, of_loss = ((slope.abs().flatten(1).amax(dim=1) == 0).float().mean().item() for slope in slopes)
    if of_margin > MANY:
        evidence = f"the input gradient is exactly zero on {of_margin:.1%} of {len(images)} images"
        yield Finding("no gradient", "fail" if of_margin > 0.1 else "warn", evidence, _DIFFERENTIABLE)
    elif of_loss > MANY:
        yield Finding(
            "saturation",
            "warn",
            f"the gradient of cross entropy is exactly zero on {of_loss:.1%} of {len(images)} images",
            "attack it with --losses cw or --precision float64 too",
        )


def _true_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Finding]:
    share = wrong_gradients(model, images, labels)
    if share > SOME_WRONG:
        yield Finding(
            "wrong gradient",
            "fail" if share > MANY_WRONG else "warn",
            f"on {share:.0%} of {len(images)} images the input gradient is not that of finite differences",
            _DIFFERENTIABLE,
        )


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)  # type: ignore[no-any-return]


def _right(output: Tensor, labels: Tensor) -> _Verdicts:
    return np.asarray((output.argmax(dim=1) == labels).cpu().numpy(), dtype=np.bool_)


def _channels(images: Tensor, values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).to(images).view(-1, 1, 1)


def _normalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (images - _channels(images, mean)) / _channels(images, std)


def _denormalised(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return images * _channels(images, std) + _channels(images, mean)


def _resized(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True, align_corners=False)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in chain(model.named_parameters(), model.named_buffers())}
