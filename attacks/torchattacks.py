"""The ℓ∞ attacks of the torchattacks package under robench's contract, AutoAttack and Square included."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from importlib.metadata import version as installed_version
from types import ModuleType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from robench.attacks.base import ATTACKS, Attack
from robench.core.errors import RobenchError, in_a_line, out_of_memory, unknown
from robench.core.rng import Draws, key

FAMILY = "torchattacks"

#: What the package calls ε.
_RADII = ("eps", "max_epsilon")
#: Constructor parameters that the adapter fills in, or that stay at their defaults; every other number, word or
#: switch becomes a field.
_FILLED = {"model", "norm", "alpha", "seed", "n_classes", "verbose", *_RADII}
#: Attacks that draw nothing (FAB: in its first restart), or nothing but a random start.
_DRAW_NOTHING = {"BIM", "FAB", "FGSM", "MIFGSM", "NIFGSM", "PIFGSM", "PIFGSMPP", "SINIFGSM"}
_DRAW_A_START = {"EOTPGD", "PGD", "UPGD"}


@dataclass(frozen=True, kw_only=True)
class Torchattack(Attack):
    """An attack of torchattacks (Kim 2020, https://arxiv.org/abs/2010.01950), as the package has it.

    Its constructor gets ε and every field; step sizes keep their share of ε, and are a field ``step_ratio``. It sees
    float32, whatever the model computes in. Each ε of a batch runs by itself.

    **Results depend on the batch**: these attacks draw from torch's global generator, which is seeded here from the
    draws' key and put back afterwards, and some choose steps and queries by what is left of the batch. Other batch
    sizes or orders give other images.

    The package's loss is its own: ``loss`` stays at its default. Some attacks return the clean image where they fail
    or where the gradient is zero; `Crafted.zero_gradient` and the distance tell.
    """

    method: ClassVar[str]
    keeps_clean: ClassVar[bool] = True
    batch_dependent: ClassVar[bool] = True
    over_draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _constructor(self.method)
        if self.loss != "ce":
            raise RobenchError(
                f"attack {self.name!r} ascends the loss that torchattacks gives it, so that `loss` has no effect: "
                f"expected it left out, got {self.loss!r}; pgd, mdi2 and sgm take a loss"
            )

    @property
    def stochastic(self) -> bool:
        if self.method in _DRAW_A_START:
            return bool(getattr(self, "random_start", True))
        return self.method not in _DRAW_NOTHING

    @property
    def restarts_are_versions(self) -> bool:
        return bool(getattr(self, "random_start", self.stochastic))

    def manifest(self) -> dict[str, object]:
        return {**super().manifest(), "package": f"torchattacks {installed_version('torchattacks')}"}

    def __reduce__(self) -> tuple[object, ...]:
        # Classes of the family are made on demand: another process makes its own.
        return _rebuilt, (self.method, {item.name: getattr(self, item.name) for item in fields(self)})

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        seen = _Float32Model(model, images).eval()
        with torch.no_grad():
            classes = seen(images[:1].float()).shape[1]
        crafted = images.clone()
        started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        with torch.random.fork_rng(range(torch.cuda.device_count()) if started else ()):
            radii, group = eps.unique(return_inverse=True)  # type: ignore[no-untyped-call]
            for number, radius in enumerate(radii.tolist()):
                if radius == 0:
                    continue
                rows = (group == number).nonzero()[:, 0]
                samples = draws.samples[rows.cpu().numpy()].tolist()
                seed = key("attack", draws.seed, draws.restart, self.name, *samples) >> 1
                torch.manual_seed(seed)
                try:
                    attack = self._made(seen, radius, classes, seed)
                    crafted[rows] = attack(images[rows].float(), labels[rows]).detach().to(images)
                except Exception as error:
                    if isinstance(error, RobenchError) or out_of_memory(error):
                        raise
                    raise RobenchError(
                        f"attack {self.label!r} failed inside torchattacks ({in_a_line(error)}) on images "
                        f"{tuple(images.shape[1:])} and {classes} classes; some of its attacks need 3 channels or at "
                        f"least 4 classes: take another"
                    ) from error
        return crafted

    def _made(self, model: nn.Module, radius: float, classes: int, seed: int) -> Any:
        """The package's attack. AutoAttack and others seed themselves, by default with the time."""
        constructor = _constructor(self.method)
        known = inspect.signature(constructor).parameters
        filled = dict.fromkeys(_RADII, radius) | {"n_classes": classes, "seed": seed}
        if hasattr(self, "step_ratio"):
            filled["alpha"] = self.step_ratio * radius
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("loss", "step_ratio")}
        return constructor(model, **{name: value for name, value in filled.items() if name in known}, **own)


class _Float32Model(nn.Module):
    """The model as torchattacks sees it: float32 in and out, for several attacks make float32 tensors themselves."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        # The package reads the device off the first parameter, and prints where there is none.
        self.anchor = nn.Parameter(images.new_empty(0), requires_grad=False)
        self.model = model
        self.dtype = images.dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).float()  # type: ignore[no-any-return]


@ATTACKS.register("autoattack")
@dataclass(frozen=True, kw_only=True)
class AutoAttack(Torchattack):
    """AutoAttack, standard: APGD-CE, targeted APGD, targeted FAB, Square (Croce & Hein 2020,
    https://arxiv.org/abs/2003.01690), each on what is left. ``torchattacks/AutoAttack`` is the same attack.

    Needs at least 4 classes. A sample that it does not break comes back clean.
    """

    method: ClassVar[str] = "AutoAttack"


def _package() -> ModuleType:
    try:
        return importlib.import_module("torchattacks")
    except ImportError as error:
        raise RobenchError(
            f"attacks of torchattacks need that package, which is not installed ({error}); "
            f"pip install robench[torchattacks]"
        ) from error


def _constructors() -> dict[str, Any]:
    """The package's ℓ∞ attacks: a model alone suffices, ε is a parameter, and neither name nor norm is another's."""
    found = {}
    for name, item in inspect.getmembers(_package(), inspect.isclass):
        parameters = inspect.signature(item).parameters
        needed = [parameter for parameter in parameters.values() if parameter.default is parameter.empty]
        norm = parameters["norm"].default if "norm" in parameters else "Linf"
        if (
            [parameter.name for parameter in needed] == ["model"]
            and any(radius in parameters for radius in _RADII)
            and norm == "Linf"
            and not name.endswith(("L0", "L1", "L2"))
        ):
            found[name] = item
    return found


def _constructor(method: str) -> Any:
    found = _constructors()
    if method not in found:
        raise unknown(
            "attack",
            f"{FAMILY}/{method}",
            (f"{FAMILY}/{name}" for name in found),
            "Only the ℓ∞ attacks of the package are taken.",
        )
    return found[method]


@cache
def _resolve(method: str) -> type[Attack]:
    """The class of ``torchattacks/<method>``."""
    if method == AutoAttack.method:
        return AutoAttack
    parameters = inspect.signature(_constructor(method)).parameters
    taken = [
        (name, type(parameter.default), field(default=parameter.default))
        for name, parameter in parameters.items()
        # `loss` and `version` are the contract's words.
        if name not in _FILLED and not hasattr(Attack, name) and isinstance(parameter.default, bool | int | float | str)
    ]
    if "alpha" in parameters:
        radius = next(parameters[name].default for name in _RADII if name in parameters)
        taken.append(("step_ratio", float, field(default=parameters["alpha"].default / radius)))
    made = make_dataclass(
        method,
        taken,
        bases=(Torchattack,),
        namespace={
            "__module__": __name__,
            "__doc__": f"`torchattacks.{method}` with the package's defaults: {', '.join(name for name, *_ in taken)}.",
            "name": f"{FAMILY}/{method}",
            "method": method,
        },
        frozen=True,
        kw_only=True,
    )
    return cast(type[Attack], made)


def _rebuilt(method: str, values: dict[str, object]) -> Attack:
    return _resolve(method)(**values)  # type: ignore[arg-type]


ATTACKS.family(FAMILY, _resolve, _constructors)
