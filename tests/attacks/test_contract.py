"""What the contract of attacks adds to what plug-ins do: `tests/test_conformance.py` says what they must do."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robench.attacks import ATTACKS, Attack, Crafted
from robench.attacks.pgd import PGD
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.losses import LOSSES
from robench.core.rng import Draws

Make = Callable[..., Ensemble]
MakeBatch = Callable[..., tuple[Tensor, Tensor]]


def small(name: str, **values: object) -> Attack:
    """The attack with few steps."""
    return ATTACKS.get(name)(steps=6, **values)


def state(model: nn.Module) -> dict[str, object]:
    """All that an attack may not change."""
    hooks = [value for module in model.modules() for key, value in vars(module).items() if "_hooks" in key]
    return {
        "modes": [module.training for module in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "hooks": copy.copy([dict(hook) if isinstance(hook, dict) else hook for hook in hooks]),
        "keys": list(model.state_dict()),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "values": [value.clone().tolist() for value in model.state_dict().values()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state(legacy=False)),  # noqa: NPY002
        "random": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "enabled": torch.is_grad_enabled(),
    }


def test_wrong_inputs_are_named(make_ensemble: Make, make_batch: MakeBatch) -> None:
    """The call is the base class's and final: one attack stands for all."""
    attack, model = small("pgd"), make_ensemble()
    images, labels = make_batch(model, 4)
    wrong: list[tuple[str, tuple[object, ...]]] = [
        ("eps", (images, labels, 1.5)),
        ("eps", (images, labels, -0.1)),
        ("eps", (images, labels, float("nan"))),
        ("eps", (images, labels, torch.full((3,), 0.1))),
        ("eps", (images, labels, torch.full((4,), 2.0))),
        ("images", (images * 2 + 1, labels, 0.1)),
        ("images", (images * float("nan"), labels, 0.1)),
        ("images", ((images * 255).to(torch.uint8), labels, 0.1)),
        ("images", (images[0], labels, 0.1)),
        ("images", (images.double(), labels, 0.1)),
        ("images", (images[:, :1], labels[:, None], 0.1)),
        ("labels", (images, labels[:3], 0.1)),
        ("labels", (images, labels + 99, 0.1)),
        ("labels", (images, labels - 99, 0.1)),
        ("labels", (images, labels.float(), 0.1)),
        ("draws", (images, labels, 0.1, Draws.of(range(3)))),
    ]
    for parameter, inputs in wrong:
        with pytest.raises(RobenchError, match=parameter):
            attack(model, *inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize("name", ["pgd", "mdi2", "sgm"])
def test_a_larger_ball_gives_a_larger_loss(name: str, loss: str, make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(dtype=torch.float64)
    images, labels = make_batch(model, dtype=torch.float64)
    attack, value = small(name, loss=loss), LOSSES.get("ce")
    clean = value(model(images), labels).mean()
    near, far = (value(model(attack(model, images, labels, eps).images), labels).mean() for eps in (0.01, 0.1))
    assert clean < near < far


@dataclass(frozen=True, kw_only=True)
class _Careless(Attack):
    """Does everything that an attack may not do."""

    name = "careless"
    returned: str = "far"

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        model.train()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
        labels.fill_(0)
        eps.fill_(1)
        if self.returned == "error":
            raise KeyError("broken")
        if self.returned == "nan":
            return images * float("nan")
        if self.returned == "shape":
            return images[:, :1]
        if self.returned == "dtype":
            return images.double()
        return images.add_(7) * torch.ones((), requires_grad=True)


def test_a_careless_plug_in_is_put_right(make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble()
    images, labels = make_batch(model)
    kept, before = (images.clone(), labels.clone()), state(model)
    radii = torch.tensor([0.0, 0.1, 0.2, 0.1, 0.3, 0.1])
    given = radii.clone()
    crafted = _Careless()(model, images, labels, given)
    assert isinstance(crafted, Crafted)
    torch.testing.assert_close(crafted.images, (images + radii.view(-1, 1, 1, 1)).clamp(max=1))
    torch.testing.assert_close(crafted.linf, (crafted.images - images).abs().flatten(1).amax(dim=1))
    assert torch.equal(given, radii)
    assert not crafted.images.requires_grad
    assert torch.equal(images, kept[0])
    assert torch.equal(labels, kept[1])
    # Judging the gradient in train mode would have moved BatchNorm's statistics.
    assert state(model) == before


@pytest.mark.parametrize(
    ("returned", "error"),
    [("error", KeyError), ("nan", RobenchError), ("shape", RobenchError), ("dtype", RobenchError)],
)
def test_a_broken_plug_in_is_named_and_leaves_no_trace(
    returned: str, error: type[Exception], make_ensemble: Make, make_batch: MakeBatch
) -> None:
    model = make_ensemble()
    batch, before = make_batch(model), state(model)
    with pytest.raises(error) as found:
        _Careless(returned=returned)(model, *batch, 0.1)
    assert "careless" in " ".join([str(found.value), *getattr(found.value, "__notes__", ())])
    assert state(model) == before


def test_a_zero_gradient_is_counted(make_ensemble: Make, make_batch: MakeBatch) -> None:
    class Flat(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return (images.flatten(1)[:, :3] * 0).nan_to_num()

    images = torch.full((2, 3, 4, 4), 0.5)
    crafted = small("pgd")(Flat(), images, torch.zeros(2, dtype=torch.int64), 0.1)
    assert crafted.zero_gradient.all()
    assert (crafted.linf > 0).all()


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_part_of_the_gradient_that_is_not_finite_spoils_no_other(
    make_ensemble: Make, make_batch: MakeBatch, momentum: float
) -> None:
    """√0 has the slope ∞, and 0·∞ is NaN: of such pixels, with momentum, whole images stayed where they were."""

    class Rooted(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model(images.sqrt().square())

    model = make_ensemble()
    images, labels = make_batch(model)
    images[:, :, 0, 0] = 0.0
    attack = PGD(steps=6, momentum=momentum, random_start=False)
    plain, rooted = attack(model, images, labels, 0.1), attack(Rooted(), images, labels, 0.1)
    others = torch.ones_like(images, dtype=torch.bool)
    others[:, :, 0, 0] = False
    moved = (rooted.images - images).abs()[others]
    assert (moved > 0.05).double().mean() > 0.9 * ((plain.images - images).abs()[others] > 0.05).double().mean()
    assert not plain.zero_gradient.any()
    assert rooted.zero_gradient.all()
