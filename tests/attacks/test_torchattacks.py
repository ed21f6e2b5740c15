"""The adapter of the torchattacks package: what it finds, what it passes on, and that nothing leaks."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import robench.attacks.torchattacks as adapter
from robench.attacks import ATTACKS, Attack
from robench.attacks.ascent import ascend
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.losses import cross_entropy
from robench.core.rng import Draws

EPS = 0.2

Make = Callable[..., Ensemble]
MakeBatch = Callable[..., tuple[Tensor, Tensor]]

#: The ℓ∞ attacks of torchattacks 3.5.1; a newer one may bring more.
KNOWN = (
    "APGD", "APGDT", "AutoAttack", "BIM", "DIFGSM", "EOTPGD", "FAB", "FFGSM", "FGSM", "Jitter", "MIFGSM", "NIFGSM",
    "PGD", "PGDRS", "PIFGSM", "PIFGSMPP", "RFGSM", "SINIFGSM", "SPSA", "Square", "TIFGSM", "TPGD", "UPGD", "VMIFGSM",
    "VNIFGSM",
)  # fmt: skip
#: Cheaper settings, through the fields.
SMALL: dict[str, object] = {"steps": 3, "n_queries": 20, "nb_sample": 8, "num_iter_set": 3}


@pytest.fixture
def package() -> ModuleType:
    return pytest.importorskip("torchattacks")


def small(method: str) -> Attack:
    kind = ATTACKS.get(f"torchattacks/{method}")
    names = {item.name for item in fields(kind)}
    return kind(**{name: value for name, value in SMALL.items() if name in names})


def test_importing_robench_does_not_import_it() -> None:
    code = "import sys; from robench.attacks import ATTACKS; ATTACKS.names(); print('torchattacks' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_linf_attack_is_found(package: ModuleType) -> None:
    found = ATTACKS.families()["torchattacks"]
    assert set(KNOWN) <= set(found)
    assert not {"CW", "PGDL2", "PGDRSL2", "DeepFool", "GN", "VANILA", "Pixle", "LGV", "MultiAttack"} & set(found)
    # What the package's own documentation calls ℓ∞ and has a radius.
    documented = {name for name in dir(package) if "Distance Measure : Linf" in (getattr(package, name).__doc__ or "")}
    assert documented == set(found)


@pytest.mark.parametrize("method", KNOWN)
def test_each_keeps_the_contract(
    method: str, package: ModuleType, make_ensemble: Make, make_batch: MakeBatch, capfd: pytest.CaptureFixture[str]
) -> None:
    attack, model = small(method), make_ensemble()
    images, labels = make_batch(model, 4)
    before = [torch.get_rng_state(), *(value.clone() for value in model.state_dict().values())]
    model.members[0].train()
    draws = Draws.of(range(4))
    crafted = attack(model, images, labels, EPS, draws)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        again = attack(model, images, labels, EPS, draws)
    assert torch.equal(crafted.images, again.images)
    assert ((crafted.images - images).abs() <= EPS + 1e-6).all()
    assert ((crafted.images >= 0) & (crafted.images <= 1)).all()
    assert (crafted.linf > 0).any()
    after = [torch.get_rng_state(), *model.state_dict().values()]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert model.members[0].training
    assert not model.members[1].training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert capfd.readouterr().out == ""
    assert attack.batch_dependent
    if method not in ("AutoAttack", "Square", "APGD", "APGDT", "FAB"):  # which stop at success, maybe in the first step
        other = attack(model, images, labels, EPS, draws.at(1))
        assert attack.stochastic is not torch.equal(crafted.images, other.images)


@pytest.mark.parametrize("method", KNOWN)
def test_names_and_manifests(method: str, package: ModuleType) -> None:
    kind = ATTACKS.get(f"torchattacks/{method}")
    assert ATTACKS.get(f"torchattacks/{method}") is kind is ATTACKS.get(kind.name)
    attack = kind()
    assert attack.label == kind.name
    assert attack.manifest()["package"] == f"torchattacks {package.__version__}"
    assert pickle.loads(pickle.dumps(attack)) == attack == copy.deepcopy(attack)
    with pytest.raises(RobenchError, match="loss"):
        kind(loss="cw")


def test_autoattack_is_an_alias(package: ModuleType) -> None:
    assert ATTACKS.get("torchattacks/AutoAttack") is ATTACKS.get("autoattack")
    assert ATTACKS.get("autoattack")().label == "autoattack"


def test_fields_are_the_package_s_parameters(package: ModuleType) -> None:
    attack = ATTACKS.get("torchattacks/PGD")(steps=7, step_ratio=0.1, random_start=False)  # type: ignore[call-arg]
    assert attack.label == "torchattacks/PGD:steps=7:random_start=False:step_ratio=0.1"
    assert not attack.stochastic
    assert small("Square").label == "torchattacks/Square:n_queries=20"
    with pytest.raises(RobenchError, match="steps"):
        ATTACKS.get("torchattacks/PGD")(steps=0)  # type: ignore[call-arg]


def test_what_the_package_is_given(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch, make_ensemble: Make, make_batch: MakeBatch
) -> None:
    given = []

    class Spy(package.APGDT):  # type: ignore[misc, name-defined]
        def __init__(self, model, norm="Linf", eps=8 / 255, alpha=2 / 255, steps=10, seed=None, n_classes=10):
            super().__init__(model, norm, eps, steps, 1, seed, n_classes=n_classes)
            given.append({"eps": eps, "alpha": alpha, "steps": steps, "seed": seed, "n_classes": n_classes})

        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            assert images.dtype == torch.float32
            assert not self.model.training
            given[-1]["count"] = len(images)
            return images + self.eps

    monkeypatch.setattr(package, "Spy", Spy, raising=False)
    model = make_ensemble(dtype=torch.float64)
    images, labels = make_batch(model, 5, dtype=torch.float64)
    eps = torch.tensor([0.1, 0.02, 0.0, 0.1, 0.02], dtype=torch.float64)
    attack = ATTACKS.get("torchattacks/Spy")(steps=4, step_ratio=0.5)  # type: ignore[call-arg]
    crafted = attack(model, images, labels, eps)
    adapter._resolve.cache_clear()
    torch.testing.assert_close(crafted.linf, torch.minimum(eps, (1 - images).flatten(1).amax(dim=1)), atol=1e-6, rtol=0)
    assert [(entry["eps"], entry["alpha"], entry["count"]) for entry in given] == [(0.02, 0.01, 2), (0.1, 0.05, 2)]
    assert {(entry["steps"], entry["n_classes"]) for entry in given} == {(4, 5)}
    assert all(isinstance(entry["seed"], int) for entry in given)


def test_radii_that_share_a_batch_do_not_mix(package: ModuleType, make_ensemble: Make, make_batch: MakeBatch) -> None:
    attack, model = small("PGD"), make_ensemble()
    images, labels = make_batch(model, 3)
    near, far = (attack(model, images, labels, eps, Draws.of([7, 8, 9])).images for eps in (0.05, 0.1))
    both = attack(
        model,
        images.repeat(2, 1, 1, 1),
        labels.repeat(2),
        torch.tensor([0.05, 0.05, 0.05, 0.1, 0.1, 0.1]),
        Draws.of([7, 8, 9, 7, 8, 9]),
    )
    torch.testing.assert_close(both.images, torch.cat([near, far]), rtol=0, atol=0)


@pytest.mark.parametrize("random_start", [False, True])
def test_its_pgd_is_ours_from_the_same_start(
    random_start: bool, package: ModuleType, make_ensemble: Make, make_batch: MakeBatch
) -> None:
    model = make_ensemble(dtype=torch.float64)
    images, labels = make_batch(model, dtype=torch.float64)
    theirs = package.PGD(model, eps=0.1, alpha=0.02, steps=20, random_start=random_start)
    start = images
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wanted = theirs(images, labels)
        if random_start:
            torch.manual_seed(0)
            start = images + torch.empty_like(images).uniform_(-0.1, 0.1)
    found = ascend(
        lambda z, _: cross_entropy(model(z), labels),
        images,
        torch.full((len(images),), 0.1, dtype=torch.float64),
        steps=20,
        step_ratio=0.2,
        start=start,
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_its_pgd_through_the_contract_is_ours(package: ModuleType, make_ensemble: Make, make_batch: MakeBatch) -> None:
    """One step in float32, in which rounding has not moved any sign yet."""
    model = make_ensemble()
    images, labels = make_batch(model)
    theirs = ATTACKS.get("torchattacks/PGD")(steps=1, step_ratio=0.2, random_start=False)  # type: ignore[call-arg]
    ours = ATTACKS.get("pgd")(steps=1, step_ratio=0.2, random_start=False)  # type: ignore[call-arg]
    torch.testing.assert_close(
        theirs(model, images, labels, 0.1).images, ours(model, images, labels, 0.1).images, rtol=0, atol=1e-6
    )


def test_a_zero_gradient_is_seen_though_the_package_returns_the_clean_image(package: ModuleType) -> None:
    class Saturated(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :5] * 0 + torch.tensor([9.0, 0, 0, 0, 0])

    images = torch.full((3, 3, 8, 8), 0.5)
    crafted = small("MIFGSM")(Saturated(), images, torch.zeros(3, dtype=torch.int64), EPS)
    assert crafted.zero_gradient.all()
    assert torch.equal(crafted.images, images)


def test_what_fails_inside_is_named(package: ModuleType) -> None:
    grey = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    images, labels = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RobenchError, match=r"torchattacks/TIFGSM.*3 channels"):
        small("TIFGSM")(grey, images, labels, EPS)
    two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        labels = two(images).argmax(dim=1)
    with pytest.raises(RobenchError, match="at least 4 classes"):
        small("APGDT")(two, images, labels, 1e-3)


def test_unknown_names_list_neighbours(package: ModuleType) -> None:
    with pytest.raises(RobenchError, match="torchattacks/MIFGSM"):
        ATTACKS.get("torchattacks/MFGSM")
    with pytest.raises(RobenchError, match="ℓ∞"):
        ATTACKS.get("torchattacks/DeepFool")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter._resolve.cache_clear()
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    assert "autoattack" in ATTACKS.names()
    assert ATTACKS.families()["torchattacks"] == []
    for make in (lambda: ATTACKS.get("torchattacks/PGD"), ATTACKS.get("autoattack")):
        with pytest.raises(RobenchError, match=r"pip install robench\[torchattacks\]"):
            make()
