"""What an attack is, and the contract that holds for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn

from robench.attacks.ascent import gradient
from robench.core import linf
from robench.core.errors import RobenchError, out_of_memory, within
from robench.core.frozen import frozen
from robench.core.losses import LOSSES
from robench.core.registry import Registry
from robench.core.rng import Draws


class Crafted(NamedTuple):
    """What a call of an attack returns.

    Attributes:
        images: (B,C,H,W), in the ball and in the box.
        linf: ℓ∞ distance to the clean image, (B,).
        zero_gradient: True where the gradient of the loss at the returned image is exactly zero or not finite, (B,).
            On a sample that is still classified correctly this means that the attack had nothing to follow.
        outputs: what the model that was attacked returns for the images, (B,K): the evaluator compares it with what the
            original returns.
        part: which of `Attack.parts` took the image, int64 (B,), −1 where none did or the attack has none.
    """

    images: Tensor
    linf: Tensor
    zero_gradient: Tensor
    outputs: Tensor
    part: Tensor


class Taken(NamedTuple):
    """Images (B,C,H,W), and which of an attack's parts took each, int64 (B,), −1 where none did."""

    images: Tensor
    part: Tensor


def images_of(made: Tensor | Taken) -> Tensor:
    """The images that `Attack.perturb` returned, (B,C,H,W)."""
    return made.images if isinstance(made, Taken) else made


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """An ℓ∞ attack: frozen, keyword-only, one method to write, `perturb`.

    ε is an argument of the call, so that one attack draws a whole curve; restarts are made by the evaluator through
    `Draws.restart`.

    Attributes:
        loss: name of the loss that is ascended, in `robench.core.losses.LOSSES`.
        version: raise it when the images that the same fields give change; cells of the old version are not reused.
        hooks: whether it hooks modules inside the model, which one that is compiled never calls.
        batch_dependent: whether an image depends on which others share its batch; of robench's own, admix's do.
        gradient_free: whether it needs outputs alone; then none of its images lacks a gradient.
        keeps_clean: whether it returns the clean image where it fails, which is then no sign that it did nothing.
        by_member: whether it looks at the members of an ensemble one by one, as their average hides those that are
            nearly certain.
        over_draws: whether all its gradients are `robench.attacks.ascent.gradient`'s: of a model that draws at
            inference, means over draws.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 1
    hooks: ClassVar[bool] = False
    batch_dependent: ClassVar[bool] = False
    gradient_free: ClassVar[bool] = False
    keeps_clean: ClassVar[bool] = False
    by_member: ClassVar[bool] = False
    over_draws: ClassVar[bool] = True

    loss: str = "ce"

    def __post_init__(self) -> None:
        LOSSES.get(self.loss)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "momentum":
                self.require("momentum", value >= 0, "to be at least 0")
            if item.name == "step_ratio":
                self.require("step_ratio", value > 0, "to be above 0")
            if item.name in ("steps", "restarts", "queries"):
                self.require(item.name, value >= 1, "to be at least 1")

    def require(self, name: str, kept: bool, allowed: str) -> None:
        """RobenchError, which says what is ``allowed``, where the value of the field ``name`` is not."""
        if not kept:
            owner, value = self.name or type(self).__name__, getattr(self, name)
            raise RobenchError(f"expected `{name}` of attack {owner!r} {allowed}, got {value!r}")

    @abstractmethod
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor | Taken:
        """Adversarial images (B,C,H,W), of an attack that has `parts` with what took each; the caller projects, checks
        and judges them.

        Args:
            model: in eval mode, without parameter gradients; images -> logits (B,K) or log-probabilities.
            images: float in [0, 1], (B,C,H,W). Not to be changed.
            labels: int64 (B,).
            eps: one radius per image, (B,).
            draws: the only source of randomness.
        """

    def parts(self, classes: int) -> tuple[Attack, ...]:
        """The attacks that it makes one after the other on a model of so many classes; most attacks have none."""
        return ()

    @property
    def stochastic(self) -> bool:
        """Whether another restart gives other images; where False, evaluators make one."""
        return True

    @property
    def restarts_are_versions(self) -> bool:
        """Whether the black-box threat makes every restart, as a version of the image; by default where it draws."""
        return self.stochastic

    @property
    def passes(self) -> int:
        """Forward and backward passes of one image and restart, for progress and forecasts.

        By default the field ``steps`` or ``queries``, else 1.
        """
        return int(getattr(self, "steps", getattr(self, "queries", 1)))

    @final
    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, eps: float | Tensor, draws: Draws | None = None
    ) -> Crafted:
        """Crafts on ``model`` and enforces the contract whatever the plug-in did.

        Args:
            images: float in [0, 1], (B,C,H,W); labels: int64 (B,).
            eps: ℓ∞ radius in [0, 1], a number or (B,).
            draws: keyed draws; by default samples 0..B−1 of seed 0.

        Raises:
            RobenchError: ε, images or labels out of range, draws for another batch, or a plug-in that returns
                another shape or NaN.
        """
        radius = _radius(images, labels, eps)
        draws = draws or Draws.of(range(len(images)))
        if len(draws.samples) != len(images):
            raise RobenchError(
                f"expected `draws` of {len(images)} samples, one per image, got {len(draws.samples)}; "
                f"pass Draws.of(indices of the images in their data set)"
            )
        lower, upper = linf.bounds(images, radius)
        with frozen(model):
            _check_labels(model, images, labels)
            with within("attack", self.name):
                made = self.perturb(model, images.clone(), labels.clone(), radius, draws)
        raw = images_of(made).detach()
        part = made.part if isinstance(made, Taken) else torch.full_like(labels, -1)
        if raw.shape != images.shape or raw.dtype != images.dtype:
            raise RobenchError(
                f"attack {self.label!r} returned {tuple(raw.shape)} of {raw.dtype}, "
                f"expected {tuple(images.shape)} of {images.dtype}"
            )
        # A NaN stays a NaN under clamp.
        crafted = torch.minimum(torch.maximum(raw, lower), upper)
        if not bool(torch.isfinite(crafted).all()):
            raise RobenchError(f"attack {self.label!r} returned an image that is not finite")
        if self.gradient_free:
            with frozen(model), torch.no_grad():
                outputs = model(crafted)
            none = torch.zeros(len(crafted), dtype=torch.bool, device=crafted.device)
            return Crafted(crafted, linf.distance(crafted, images), none, outputs, part)
        outputs = torch.empty(0)

        def loss(z: Tensor) -> Tensor:
            nonlocal outputs
            outputs = model(z)
            return LOSSES.get(self.loss)(outputs, labels)

        # Frozen anew: a plug-in may have left its own modes and hooks.
        with frozen(model):
            slope = gradient(loss, crafted)
        size = slope.abs().flatten(1).amax(dim=1)
        zero = (size == 0) | ~size.isfinite()
        return Crafted(crafted, linf.distance(crafted, images), zero, outputs.detach(), part)

    @property
    def label(self) -> str:
        """The name and every field but the loss that is not at its default, as the command line takes it."""
        changed = [
            f"{item.name}={getattr(self, item.name):.12g}"
            if isinstance(getattr(self, item.name), float)
            else f"{item.name}={getattr(self, item.name)}"
            for item in fields(self)
            if item.name != "loss" and getattr(self, item.name) != item.default
        ]
        return ":".join([self.name, *changed])

    def manifest(self) -> dict[str, object]:
        """Everything that determines the images, for keys and manifests."""
        return {
            "name": self.name,
            "version": self.version,
            **{item.name: getattr(self, item.name) for item in fields(self)},
        }


def _radius(images: Tensor, labels: Tensor, eps: float | Tensor) -> Tensor:
    """ε of each image, (B,); RobenchError for images and labels that are not of one batch, or images out of range."""
    if images.ndim != 4 or labels.shape != (len(images),):
        raise RobenchError(
            f"expected `images` (B,C,H,W) and `labels` (B,), got {tuple(images.shape)} and {tuple(labels.shape)}"
        )
    radius = linf.as_eps(eps, images)
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise RobenchError(
            f"expected `images` in [0, 1], got [{images.min():.3g}, {images.max():.3g}]; "
            f"divide uint8 by 255 and normalise inside the model"
        )
    return radius


def _check_labels(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Raises for labels that the model has no output for: on a GPU torch would end the process over them."""
    try:
        with torch.no_grad():
            logits = model(images)
    except RuntimeError as error:
        if out_of_memory(error):  # the evaluator halves the batch
            raise
        raise RobenchError(
            f"the model does not take `images` {tuple(images.shape)} of {images.dtype} on {images.device}: {error}"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RobenchError(f"expected the model to return logits ({len(images)},K), got {got}")
    if labels.dtype != torch.int64 or not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
        found = labels.unique().tolist()[:10]  # type: ignore[no-untyped-call]
        raise RobenchError(f"expected `labels` int64 in 0..{logits.shape[1] - 1}, got {labels.dtype} {found}")


ATTACKS: Registry[type[Attack]] = Registry("attack", package="robench.attacks", group="robench.attacks")
