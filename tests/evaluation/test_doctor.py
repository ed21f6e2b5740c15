"""Each fault is one finding with its name; a sound model has none."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robench.core.data import Data, make
from robench.core.ensemble import Ensemble
from robench.core.models import Normalized
from robench.evaluation.doctor import diagnose
from robench.evaluation.findings import Finding

MEAN, STD = (0.4, 0.45, 0.5), (0.2, 0.22, 0.25)


class Net(nn.Module):
    """Images as the network wants them -> logits: no symmetry in channels, scale or offset."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 64), nn.Tanh()
            )
            self.last = nn.Linear(64, classes)
        with torch.no_grad():
            self.last.weight.mul_(8)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.layers(images))  # type: ignore[no-any-return]


class Around(nn.Module):
    """A network with something before it and something after."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.model(self.before(images)))


class Listed(nn.Module):
    """Keeps its network in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = [sound()]

    def forward(self, images: Tensor) -> Tensor:
        return self.networks[0](images)  # type: ignore[no-any-return]


def sound() -> Normalized:
    return Normalized(Net(), MEAN, STD).eval()


@pytest.fixture(scope="module")
def images() -> Data:
    """240 noise images, labelled as the sound model sees them."""
    pixels = np.random.default_rng(0).integers(0, 256, (240, 3, 8, 8), dtype=np.uint8)
    with torch.no_grad():
        labels = sound()(torch.from_numpy(pixels).float() / 255).argmax(dim=1).numpy()
    data = make("npz:noise", (pixels, labels), (pixels, labels), classes="abcd", statistics=(MEAN, STD))
    assert np.bincount(labels).max() < 150
    return data


def one(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, [str(finding) for finding in findings]
    assert "\n" not in str(findings[0])
    return findings[0]


def test_a_sound_model_has_no_finding_and_stays_as_it_was(images: Data) -> None:
    model = sound()
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    assert diagnose(model, images) == []
    assert diagnose(Ensemble([model, sound()]).eval(), images) == []
    assert diagnose([model, sound()], images) == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_members_that_no_module_owns_are_left_as_they_were(images: Data) -> None:
    model = Listed()
    model.networks[0].train()
    before = copy.deepcopy(model.networks[0].state_dict())
    diagnose(model, images)
    assert model.networks[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.networks[0].state_dict().items())


def test_a_member_that_falls_behind_is_looked_at_by_itself(images: Data) -> None:
    sick = Normalized(Net(), (0.9, 0.1, 0.5), (0.5, 0.5, 0.5))
    (finding,) = diagnose(Ensemble([sound(), sick, sound(), sound()]).eval(), images)
    assert finding.name == "wrong normalisation (member 2)"


def test_train_mode(images: Data) -> None:
    model = sound().train()
    finding = one(diagnose(model, images))
    assert (finding.name, finding.status) == ("train mode", "warn")
    assert "BatchNorm2d" in finding.evidence
    assert model.training


class Stubborn(Net):
    """Stays in train mode."""

    def train(self, mode: bool = True) -> Stubborn:
        super().train(True)
        return self


def test_train_mode_that_eval_does_not_end(images: Data) -> None:
    model = Normalized(Stubborn(), MEAN, STD)
    before = copy.deepcopy(model.state_dict())
    names = {finding.name: finding.status for finding in diagnose(model, images)}
    assert names.items() >= {"train mode": "fail", "statistics move": "fail", "batch dependence": "fail"}.items()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: Normalized(sound(), MEAN, STD), "double normalisation"),
        (lambda: Around(Normalized(sound(), MEAN, STD)), "double normalisation"),
        (lambda: Net(), "missing normalisation"),
        (lambda: Normalized(Net(), (0.9, 0.1, 0.5), (0.5, 0.5, 0.5)), "wrong normalisation"),
        (lambda: Around(sound(), lambda x: x.flip(1)), "channel order"),
        (lambda: Around(sound(), lambda x: x / 255), "input range"),
        (lambda: Around(sound(), lambda x: (x + 1) / 2), "input range"),
        (lambda: Around(sound(), after=lambda z: z.softmax(1)), "probabilities"),
        (lambda: Around(sound(), after=lambda z: z.softmax(1).softmax(1)), "probabilities"),
        (lambda: Around(sound(), after=lambda z: (100 * z).softmax(1).log_softmax(1)), "softmax twice"),
        (lambda: Normalized(Net(5), MEAN, STD), "number of classes"),
        (lambda: Around(sound(), after=lambda z: z / (z * 0)), "not finite"),
        (lambda: Around(sound(), lambda x: x + 0 * (x / x.std((1, 2, 3), keepdim=True))), "not finite"),
        (lambda: Around(sound(), after=lambda z: z - z.mean(0)), "batch dependence"),
        (lambda: Around(sound(), after=lambda z: z + torch.rand_like(z)), "not deterministic"),
        (lambda: Around(sound(), lambda x: torch.dropout(x, 0.1, True)), "not deterministic"),
        (lambda: Around(sound(), after=lambda z: z * 0), "constant"),
        (lambda: Around(sound(), lambda x: (x * 255).round() / 255), "no gradient"),
        (lambda: Around(sound(), after=lambda z: z.detach()), "no gradient"),
        (lambda: Around(sound(), lambda x: 0.7 * x.detach() + 0.3 * x), "wrong gradient"),
        (lambda: Around(sound(), after=lambda z: 100 * z), "saturation"),
        (lambda: Around(sound(), after=lambda z: z.roll(1, 1)), "order of classes"),
        (lambda: Around(sound(), after=lambda z: z[:, [1, 0, 2, 3]]), "order of classes"),
        (lambda: Around(sound(), lambda x: 1 - x), "inverted"),
        (lambda: Around(sound(), lambda x: x.transpose(2, 3)), "transposed"),
        (lambda: Normalized(Net(), (0.5,) * 3, (0.5,) * 3), "wrong normalisation"),
        (lambda: Listed(), "hidden weights"),
        (lambda: Around(sound(), after=lambda z: z.argmax(1)), "output"),
        (lambda: Around(sound(), lambda x: x[:, :2]), "input"),
    ],
)
def test_each_fault_by_its_name(images: Data, model: Callable[[], nn.Module], name: str) -> None:
    found = diagnose(model().eval(), images)
    assert found
    assert found[0].name == name
    # What follows from the first finding may be told too, but nothing else that fails.
    assert {finding.name for finding in found if finding.status == "fail"} <= {name, "no gradient", "batch dependence"}
    assert all("\n" not in str(finding) and finding.fix for finding in found)


def test_another_task_is_not_blamed_on_the_input_range(images: Data) -> None:
    shuffled = (images.test.images.numpy(), images.test.labels.numpy()[::-1].copy())
    data = make("npz:other", shuffled, shuffled, classes="abcd", statistics=(MEAN, STD))
    finding = one(diagnose(sound(), data))
    assert (finding.name, finding.status) == ("accuracy", "warn")


def test_images_with_other_channels_are_not_made_up_by_broadcasting(images: Data) -> None:
    grey = (images.test.images.numpy()[:, :1].copy(), images.test.labels.numpy())
    finding = one(diagnose(sound(), make("npz:grey", grey, grey, classes="abcd")))
    assert finding.name == "input"
    assert "it normalises 3 channels" in finding.evidence


def test_a_model_that_refuses_other_ranges_is_well(images: Data) -> None:
    def strict(x: Tensor) -> Tensor:
        assert x.min() >= 0
        assert x.max() <= 1
        return x

    assert diagnose(Around(sound(), strict).eval(), images) == []


def test_members_are_told_apart(images: Data) -> None:
    sick = Around(sound(), after=lambda z: z.softmax(1))
    finding = one(diagnose(Ensemble([sound(), sick, sick]).eval(), images))
    assert finding.name == "probabilities (member 2, 3)"
