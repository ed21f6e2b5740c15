"""Whether a model can be judged at all, and whether its gradient is one: looked at before the first attack."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from robench.attacks.ascent import gradient
from robench.core.data import Data, to_images
from robench.core.errors import RobenchError, in_a_line, out_of_memory
from robench.core.fast import ROUNDING, disagreement
from robench.core.frozen import frozen
from robench.core.hidden import unregistered
from robench.core.losses import Loss, cross_entropy, margin
from robench.core.rng import Stream, key
from robench.evaluation.cost import AROUND
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.findings import Finding, Status

#: Names of the checks of the gradient, which an attack without gradients has no use for.
GRADIENT = "gradient true"
FLAT = "gradient at every pixel"
REPEAT, BLIND = "outputs repeat", "cross-entropy sees"
#: Images that are looked at.
IMAGES = 16
#: Outputs of one image, alone and in a batch, that differ by more than this part of their scale are another function's.
BATCH = 1e-2
#: Outputs of the same images that differ by more than this part of their scale are drawn.
DRAWN = 1e-4

#: Random directions per image in which the gradient is held against finite differences, and the steps of these, in
#: units of a pixel: kinks of ReLU ask for small ones, float32 for large ones.
DIRECTIONS = 3
STEPS = {torch.float32: (1e-3, 3e-4, 3e-3, 1e-2), torch.float64: (1e-6, 1e-4, 1e-2)}
#: Where else it is looked at: one step of this size from the image.
NEAR = 8 / 255
#: The least contrast of images that are no longer alike in range: a batch of clean ones may have one for all.
FAINT = 0.5
#: How far from black and white, and how much noise is added: where a black ground is all the same, a maximum of
#: neighbours has no gradient.
INSIDE, NOISE = 0.02, 0.01
#: An image's gradient is wrong where slopes differ from finite differences by more than this part of them.
WRONG = 0.3
#: Leads of the first class, in the median, below which a softmax is flat, and below which float32 loses it.
SMALL, LOST = 0.3, 1e-3
#: Share of images with a wrong gradient that is worth a warning, and that is a failure.
SOME, MANY = 0.15, 0.4
#: Share of pixels without a gradient that is worth a warning: most networks have none, one that begins with a maximum
#: of pixels 12 %, and of the digits a clamp at .05 leaves 58 % without.
FLAT_SHARE = 0.2


@dataclass(frozen=True)
class Soundness:
    """What `examine` found.

    Attributes:
        checks: of the repetition of outputs and of the gradient.
        outputs: of every member on the images that were looked at, (B,K) each.
        draws: the same images give other outputs.
        blind: a check that does not pass where cross-entropy is no loss to follow.
        differentiable: some member's outputs depend differentiably on its input.
    """

    checks: tuple[Finding, ...]
    outputs: tuple[Tensor, ...]
    draws: bool
    blind: Finding | None
    differentiable: bool


_KNOWN: WeakKeyDictionary[nn.Module, dict[str, Soundness]] = WeakKeyDictionary()


def examine(model: EvaluatedModel, data: Data, device: torch.device) -> Soundness:
    """Looks at every member on a few test images; once per `EvaluatedModel` and data set in a process.

    Raises:
        RobenchError: a member that returns something else than logits (B,K) for a batch of 1, 2 or more images, changes
            its input or its state, gives an image another output in another batch, or cannot be copied.
    """
    known = _KNOWN.setdefault(model.ensemble, {})
    if data.identity not in known:
        known[data.identity] = _examine(model, data, device)
    return known[data.identity]


def changed(model: EvaluatedModel, data: Data, device: torch.device) -> Finding | None:
    """A failing check where ``model`` gives the images of `examine` other outputs by now: something that no module
    owns, as a counter, has changed it while it was judged. None where it does not, and where its outputs are drawn."""
    known = examine(model, data, device)
    if known.draws:
        return None
    images, _ = _looked_at(data, device)
    with keyed_torch(device, "examine"), frozen(model.ensemble), torch.no_grad():
        apart = max(
            disagreement(member(images), before)
            for member, before in zip(model.ensemble.members, known.outputs, strict=True)
        )
    if apart <= DRAWN:
        return None
    return Finding(
        REPEAT,
        "fail",
        f"after it was attacked {model.name} gives the same images other outputs than before, by {apart:.1%} of "
        f"their scale: its rows are of more than one function",
        "let nothing outside the model decide, such as a counter, a clock or a global",
    )


def _looked_at(data: Data, device: torch.device) -> tuple[Tensor, Tensor]:
    chosen = data.subset(IMAGES, "random")
    return to_images(data.test.images[chosen]).to(device), data.test.labels[chosen].to(device)


def _examine(model: EvaluatedModel, data: Data, device: torch.device) -> Soundness:
    images, labels = _looked_at(data, device)
    outputs, drawn, wrong, flat = [], [], [], []
    differentiable = False
    blind: Finding | None = None
    with keyed_torch(device, "examine"), frozen(model.ensemble):
        for number, member in enumerate(model.ensemble.members, 1):
            who = model.name if model.n == 1 else f"member {number} of {model.name}"
            apart, first = _passes(member, images, who, data.num_classes)
            outputs.append(first)
            differentiable = differentiable or _differentiable(member, images)
            if apart > DRAWN:
                drawn.append(f"{who} by {apart:.1%}")
                continue
            share = wrong_gradients(member, images, labels)
            wrong.append((share, who))
            if share <= SOME:
                flat.append((flat_pixels(member, images, labels), who))
            blind = blind or _blind(member, images, labels, who)
    checks = []
    if drawn:
        checks.append(
            Finding(
                REPEAT,
                "fail",
                f"the same images give outputs that differ, {', '.join(drawn)} of their scale: verdicts are of one "
                f"draw, and an attack follows one",
                "switch dropout and noise off, or attack the mean of several draws and judge over them (--draws 20)",
            )
        )
    else:
        checks.append(Finding(REPEAT, "pass", f"{model.name}: alone, in a batch and again"))
    if wrong:
        share, who = max(wrong)
        evidence = f"{share:.0%} of slopes differ from finite differences, at most, in {who}"
        fix = (
            "the attack follows something else: look for detach, no_grad and a backward pass that is not the "
            "forward pass's, or attack without gradients (--attacks square)"
        )
        status: Status = "fail" if share > MANY else "warn" if share > SOME else "pass"
        checks.append(Finding(GRADIENT, status, evidence, "" if status == "pass" else fix))
    share, who = max(flat, default=(0.0, ""))
    if share > FLAT_SHARE:
        evidence = (
            f"{share:.0%} of pixels have a gradient of exactly zero in {who} near the images, and another "
            f"in images of less contrast: a clamp, a threshold or a crop of contrast may hide them from an attack"
        )
        fix = f"judge it with gradients from around the images too (--attacks pgd,{AROUND.label})"
        checks.append(Finding(FLAT, "warn", evidence, fix))
    return Soundness(tuple(checks), tuple(outputs), bool(drawn), blind, differentiable)


@contextmanager
def keyed_torch(device: torch.device, *purpose: str | int) -> Iterator[None]:
    """Within, torch's global generators start from a key; afterwards they are where they were, whatever a model did."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(key("model", *purpose))
        if devices:
            torch.cuda.default_generators[device.index or 0].manual_seed(key("model", *purpose))
        yield


def _differentiable(member: nn.Module, images: Tensor) -> bool:
    with torch.enable_grad():
        outputs: Tensor = member(images[:2].clone().requires_grad_(True))
    return outputs.requires_grad


def _passes(member: nn.Module, images: Tensor, who: str, classes: int) -> tuple[float, Tensor]:
    """How far the outputs of two passes over the same images lie apart, as a part of their scale; those of the first,
    (B,K). A state that moves is put back."""
    if hidden := unregistered(member):
        raise RobenchError(
            f"{who} keeps {hidden[0]!r} where no module owns it, so that eval(), identity and kinship miss it; "
            f"register it: nn.ModuleList, nn.ModuleDict, nn.Parameter or register_buffer"
        )
    before = {name: value.clone() for name, value in member.named_buffers()}
    versions = {name: value._version for name, value in member.named_parameters()}
    given = images.clone()
    first = outputs_of(member, given, who)
    if not torch.equal(given, images):
        raise RobenchError(f"{who} changes the images that it is given; write x = x - mean instead of x -= mean")
    moved = [name for name, value in member.named_buffers() if not same_values(value, before.get(name))]
    moved += [name for name, value in member.named_parameters() if value._version != versions.get(name)]
    if moved:
        with torch.no_grad():
            for name, value in member.named_buffers():
                if name in before and value.shape == before[name].shape:
                    value.copy_(before[name])
        raise RobenchError(
            f"{who} changes its own {moved[0]!r} in a forward pass in eval mode, so that a verdict depends on what was "
            f"judged before; let eval() reach every module, and call no train() in forward"
        )
    if first.shape[1] != classes:
        raise RobenchError(
            f"{who} returns {first.shape[1]} outputs and the data have {classes} classes; choose the data that it was "
            f"trained on, or a model that fits"
        )
    if not bool(torch.isfinite(first).all()):
        raise RobenchError(f"{who} returns NaN or infinity; `robench check model` looks for the reason")
    apart = disagreement(outputs_of(member, images.clone(), who), first)
    if apart <= DRAWN:
        # What is clean may hide it: most images have a pixel of pure black and one of pure white, attacked ones do not.
        contrast = torch.linspace(1, FAINT, len(images), device=images.device).view(-1, 1, 1, 1)
        for seen in (images, 0.5 + contrast * (images - 0.5)):
            _refuse_batches(member, seen, who)
    return apart, first


def _refuse_batches(member: nn.Module, images: Tensor, who: str) -> None:
    """RobenchError where an image has another output in a small batch than among all ``images``, (B,C,H,W)."""
    together = outputs_of(member, images, who)
    for count in (1, 2):
        # Neither the first nor the last of the batch is the first or last here: either may decide.
        own = torch.arange(len(images), device=images.device).roll(-1)[:count]
        small = outputs_of(member, images[own], who)
        other = disagreement(together.index_copy(0, own, small), together)
        if other > BATCH:
            raise RobenchError(
                f"{who} gives an image another output in a batch of {count} than in one of {len(images)}, by "
                f"{other:.1%} of the outputs' scale; use running statistics, and nothing that is drawn or computed "
                f"per batch"
            )


def outputs_of(member: nn.Module, images: Tensor, who: str) -> Tensor:
    """Logits (B,K) of a member; RobenchError, with the remedy, where it returns or raises anything else."""
    shape = "x".join(map(str, images.shape))
    try:
        with torch.no_grad():
            found = member(images)
    except RobenchError:
        raise
    except Exception as error:  # whatever a user's module may raise
        if out_of_memory(error):
            raise
        dtypes = {str(value.dtype) for value in member.parameters() if value.is_floating_point()} - {"torch.float32"}
        remedy = (
            f"its weights are {', '.join(sorted(dtypes))}: judge it in float32, model.float()"
            if dtypes
            else "a batch of one image must do, as of more: flatten(1) instead of squeeze()"
            if len(images) == 1
            else "choose the data or the model that fits"
        )
        raise RobenchError(
            f"{who} does not take images {shape} of float32 in [0, 1] ({in_a_line(error)}); {remedy}"
        ) from error
    if not isinstance(found, Tensor):
        wrap = "return its .logits" if hasattr(found, "logits") else "return the logits alone"
        raise RobenchError(f"{who} returns a {type(found).__name__} for images {shape}; wrap it, to {wrap}")
    if found.ndim != 2 or len(found) != len(images):
        raise RobenchError(
            f"{who} returns {tuple(found.shape)} for images {shape}, expected ({len(images)}, classes); "
            f"flatten(1) instead of squeeze()"
        )
    if not found.is_floating_point():
        raise RobenchError(f"{who} returns {found.dtype}, expected logits; return them before any argmax")
    return found


def wrong_gradients(member: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images (B,C,H,W), clean and one sign step of `NEAR` away, whose gradient of the margin is not that of
    finite differences: in random directions, so that a part of the network that is left out shows as well as noise.

    float32 decides where it is sure; else a copy in float64 does, where the model has one.
    """
    share = _wrong(member, images, labels)
    if share <= SOME:
        return share
    try:
        double = copy.deepcopy(member).double()
        with torch.no_grad():
            apart = disagreement(double(images.double()), member(images))
        if apart > ROUNDING["float64"]:
            return share
        return _wrong(double, images.double(), labels)
    except Exception:  # a model may refuse float64, or convert within
        return share


def _wrong(member: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        outputs = member(images)
    rival = outputs.scatter(1, labels[:, None], -float("inf")).argmax(dim=1)

    def lead(z: Tensor) -> Tensor:
        found: Tensor = member(z)
        return (found.gather(1, labels[:, None]) - found.gather(1, rival[:, None]))[:, 0]

    # Away from black and white, where a clamp inside the model has a kink.
    noise = NOISE * (Stream(("gradient", "noise")).uniform(images.shape, 0).to(images) - 0.5)
    images = INSIDE + (1 - 2 * INSIDE) * images + noise
    try:
        slope = gradient(lead, images)
    except (RobenchError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        return 1.0
    step = (images - NEAR * slope.sign()).clamp(INSIDE, 1 - INSIDE) + noise
    bad = [_bad(lead, images, slope), _bad(lead, step, gradient(lead, step))]
    return float(torch.stack(bad).double().mean(dim=1).max())


def _bad(lead: Callable[[Tensor], Tensor], images: Tensor, slope: Tensor) -> Tensor:
    """Per image, whether slopes along some directions differ from finite differences at every step size, (B,)."""
    stream = Stream(("gradient",))
    directions = [
        (stream.uniform(images.shape[1:], number).to(images) - 0.5).sign().expand_as(images)
        for number in range(DIRECTIONS)
    ] + [slope.sign()]
    claimed = torch.stack([(slope * direction).flatten(1).sum(dim=1) for direction in directions]).double()
    bad = torch.ones(len(images), dtype=torch.bool, device=images.device)
    # No gradient at all, as of rounding, is wrong where outputs change at any distance.
    flat, moved = claimed.abs().amax(dim=0) == 0, ~bad
    for h in STEPS[images.dtype]:
        with torch.no_grad():
            measured = torch.stack(
                [(lead(images + h * each) - lead(images - h * each)).double() / (2 * h) for each in directions]
            )
        # The sign's own direction is longer than the random ones: each kind is measured by itself.
        parts = []
        for rows in (slice(0, DIRECTIONS), slice(DIRECTIONS, None)):
            size = torch.maximum(claimed[rows].norm(dim=0), measured[rows].norm(dim=0))
            parts.append((claimed[rows] - measured[rows]).norm(dim=0) > WRONG * size)
        bad &= parts[0] | parts[1]
        moved |= measured.abs().amax(dim=0) > 0
        if not bool(flat.any()) and float(bad.double().mean()) <= SOME:
            break
    return torch.where(flat, moved, bad)


def flat_pixels(member: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of pixels of images (B,C,H,W) whose gradient of the margin is exactly zero at a random point within `NEAR`,
    as where an attack starts, though other pixels of the image have one, and they in the image at half its contrast.

    Half the contrast leaves the larger of two neighbours the larger, so that few pixels of a maximum count.
    """
    noise = 2 * Stream(("gradient", "near")).uniform(images.shape, 0).to(images) - 1
    slope = input_gradient(member, margin, (images + NEAR * noise).clamp(0, 1), labels)
    inside = input_gradient(member, margin, 0.25 + 0.5 * images, labels)
    seen = (slope != 0).flatten(1).any(dim=1).view(-1, 1, 1, 1)
    return float(((slope == 0) & (inside != 0) & seen).double().mean())


def _blind(member: nn.Module, images: Tensor, labels: Tensor, who: str) -> Finding | None:
    """A check that does not pass where cross-entropy is no loss to follow on the images that are right.

    Of large outputs it has no gradient, on more than a tenth of the images, where the margin has. Of small ones a
    softmax is flat, and its gradient pulls all other classes up alike; of still smaller ones float32 loses in log p̄
    which class is second, and no loss is one to follow.
    """
    with torch.no_grad():
        outputs = member(images)
        right = outputs.argmax(dim=1) == labels
        # Of probabilities all is said by the true class's.
        probabilities = bool(((outputs.sum(dim=1) - 1).abs() < 1e-3).all() and (outputs >= 0).all())
        leads = (outputs.amax(dim=1) - outputs.median(dim=1).values)[right].double()
        lead = float(leads.median()) if len(leads) else 0.0
    why = f"the outputs of {who} are so"
    if 0 < lead < SMALL and not probabilities:
        if lead >= LOST:
            return Finding(BLIND, "warn", f"{why} small that cross-entropy pulls all other classes up alike")
        factor = 10 ** -math.floor(math.log10(lead))
        lost = f"{why} small that float32 loses in a softmax which class is second"
        return Finding(BLIND, "fail", lost, f"multiply its logits by {factor:.0e}")
    if _saturated(member, images[right], labels[right]):
        return Finding(BLIND, "warn", f"{why} large that cross-entropy has no gradient")
    return None


def _saturated(member: nn.Module, images: Tensor, labels: Tensor) -> bool:
    if not len(images):
        return False
    sizes = []
    for loss in (cross_entropy, margin):
        try:
            slope = input_gradient(member, loss, images, labels)
        except (RobenchError, RuntimeError):
            return False
        sizes.append(slope.abs().flatten(1).amax(dim=1))
    return bool(((sizes[0] == 0) & (sizes[1] > 0)).float().mean() > 0.1)


def input_gradient(member: nn.Module, loss: Loss, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the loss in the images, (B,C,H,W)."""
    return gradient(lambda z: loss(member(z), labels), images)


def same_values(value: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are equal, NaN in the same places included."""
    return other is not None and value.shape == other.shape and torch.equal(value.nan_to_num(), other.nan_to_num())
