"""Against what the DVERGE authors' own code computes on their published weights (`parity.npz`)."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from robench.attacks.distill import distill
from robench.core.ensemble import Ensemble, mixture
from robench.core.features import depth, features
from robench.core.models import ModelSpec, build
from robench.core.rng import Stream
from robench.defenses import DEFENSES, Batch
from tests.defenses.test_adp import terms_of

Answers = dict[str, npt.NDArray[np.generic]]

SPEC = ModelSpec(
    name="resnet20", num_classes=10, in_channels=3, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
)


pytestmark = pytest.mark.usefixtures("one_thread")


def published(path: Path) -> Ensemble:
    """The authors' ensemble, in eval mode; the normalisation is their file's."""
    members = []
    for state in torch.load(path, weights_only=True, map_location="cpu").values():
        member = build(SPEC, 0)
        named = {name.removeprefix("normalizer."): value for name, value in state.items()}
        member.load_state_dict({**named, "mean": named["mean"].flatten(), "std": named["std"].flatten()})
        members.append(member)
    return Ensemble(members).eval()


@pytest.fixture(scope="module")
def answers(shared_data: Path) -> Answers:
    path = shared_data / "parity.npz"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file}


@pytest.fixture(scope="module")
def images(shared_data: Path) -> tuple[Tensor, Tensor, Tensor]:
    """xs, ys and xt."""
    path = shared_data / "cifar10-lossless-subset.npz"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    with np.load(path, allow_pickle=False) as file:
        x, y = torch.from_numpy(file["x_test"][:32]).float() / 255, torch.from_numpy(file["y_test"][:16]).long()
    return x[:16], y, x[16:]


@pytest.fixture(scope="module")
def dverge(shared_data: Path) -> Ensemble:
    return _checkpoint(shared_data, "dverge-3-resnet20-eps0.07-seed0.pth")


@pytest.fixture(scope="module")
def baseline(shared_data: Path) -> Ensemble:
    return _checkpoint(shared_data, "baseline-3-resnet20-seed0.pth")


def _checkpoint(shared_data: Path, name: str) -> Ensemble:
    path = shared_data / "checkpoints" / name
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    return published(path)


def close(ours: Tensor, theirs: npt.NDArray[np.generic], atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(ours.detach(), torch.from_numpy(theirs), atol=atol, rtol=rtol)


def test_members_and_ensemble(dverge, images, answers):
    with torch.no_grad():
        logits = dverge.logits(images[0])
        close(logits, answers["member_logits"], atol=1e-4)
        close(mixture(logits), answers["ensemble_logprob"], atol=1e-4)
        close(dverge(images[0]), answers["ensemble_logprob"], atol=1e-4)


def test_features(dverge, images, answers):
    member = dverge.members[0]
    assert depth(member, images[0]) == 20
    with torch.no_grad():
        found = [features(member, images[0], layer).flatten(1) for layer in range(1, 21)]
    summary = torch.stack([torch.stack([f.mean(dim=1), f.std(dim=1), f.norm(dim=1)], dim=1) for f in found])
    close(summary, answers["feature_mean_std_norm"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [1, 2, 3, 10, 19, 20])
def test_distilled_images(layer, dverge, images, answers):
    """Where rounding moves a ReLU processors make other images: each is theirs in one of three roundings."""
    source, _, target = images
    wanted = torch.from_numpy(answers[f"distilled_layer{layer:02}"])
    kinds = (torch.contiguous_format, torch.float32), (torch.channels_last, torch.float32), (None, torch.float64)
    apart = []
    for layout, dtype in kinds:
        how = {"dtype": dtype} | ({"memory_format": layout} if layout else {})
        model = copy.deepcopy(dverge.members[0]).to(**how)
        crafted = distill(model, source.to(**how), target.to(**how), layer, eps=0.07)
        apart.append((crafted.float() - wanted).abs().flatten(1).amax(dim=1))
    assert torch.stack(apart).amin(dim=0).max() < 1e-5
    assert (apart[0] < 1e-5).sum() >= 14


def test_distilled_images_in_train_mode(dverge, images, answers):
    source, labels, target = images
    ensemble = Ensemble(copy.deepcopy(member) for member in list(dverge.members)[:2]).train()
    stream = Stream(("test",))
    crafted = DEFENSES.get("dverge")(layer=10).distilled(ensemble, Batch(source, labels, stream, stream, target))[0]
    close(crafted, answers["distilled_layer10_train_mode"], atol=1e-5)


def test_running_statistics_in_train_mode(dverge, images, answers):
    """The authors recompute the target at each of 10 steps: 20 updates of the running mean, where ours makes 11."""
    source, _, target = images
    theirs, ours = (copy.deepcopy(dverge.members[0]).train() for _ in range(2))
    z, velocity = source, torch.zeros_like(source)
    for _ in range(10):
        z = z.detach().requires_grad_(True)
        distance = (features(theirs, z, 10) - features(theirs, target, 10).detach()).square().flatten(1).mean(dim=1)
        (slope,) = torch.autograd.grad(distance.sum(), z)
        velocity = velocity + slope / slope.abs().sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
        z = (z - 0.007 * velocity.sign()).clamp(source - 0.07, source + 0.07).clamp(0, 1)
    crafted = distill(ours, source, target, 10, eps=0.07)
    torch.testing.assert_close(crafted, z.detach(), atol=1e-5, rtol=0)

    wanted = answers["train_mode_stem_running_mean_after"]
    assert updates(dverge.members[0], theirs) == 20
    assert updates(dverge.members[0], ours) == 11
    close(stem(theirs).running_mean, wanted, atol=1e-5)
    assert (stem(ours).running_mean - torch.from_numpy(wanted)).abs().max() > 1e-3


def stem(member: nn.Module) -> nn.BatchNorm2d:
    return member.model.bn1


def updates(before: nn.Module, after: nn.Module) -> int:
    return int(stem(after).num_batches_tracked - stem(before).num_batches_tracked)


def test_adp(answers):
    terms = terms_of(torch.from_numpy(answers["adp_logits"]), torch.from_numpy(answers["adp_labels"]))
    ours = torch.stack(
        [terms["ce"], terms["entropy"] / -2, terms["logdet"] / -0.5, torch.stack(list(terms.values())).sum()]
    )
    close(ours, answers["adp_ce_entropy_logdet_loss"], atol=1e-5, rtol=1e-5)


def test_gal(baseline, images, answers):
    x, labels, _ = images
    slopes = []
    for member in baseline.members:
        z = x.clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(member(z), labels), z)
        slopes.append(slope.flatten(1))
    cosines = [torch.cosine_similarity(slopes[i], slopes[j], eps=1e-8) for i, j in ((0, 1), (0, 2), (1, 2))]
    ours, theirs = torch.stack(cosines, dim=1), torch.from_numpy(answers["gal_cosines"])
    with torch.no_grad():
        right = torch.stack(
            [member(x).double().softmax(dim=1).gather(1, labels[:, None]) for member in baseline.members]
        )
    # As in float32 the slope of CE, p_y − 1, is a multiple of 2⁻²⁴: see test_parity_attacks.
    assert ((ours - theirs).abs() < 1e-5 + 2**-24 / (1 - right).amin(dim=0)).all()

    stream = Stream(("test",))
    ensemble = copy.deepcopy(baseline)
    (terms,) = DEFENSES.get("gal")().loss(ensemble, Batch(x, labels, stream, stream))
    total = terms["ce"] + terms["coherence"]
    rounded = float((ours.logsumexp(dim=1) - theirs.logsumexp(dim=1)).mean())
    wanted = torch.from_numpy(answers["gal_ce_mean_coherence_loss"]) + torch.tensor([0, rounded, 0.5 * rounded])
    torch.testing.assert_close(torch.stack([terms["ce"], terms["coherence"] / 0.5, total]), wanted, atol=1e-5, rtol=0)
    total.backward()
    network = ensemble.members[0].model
    for name, gradient in (("conv1", network.conv1.weight.grad), ("fc", network.fc.weight.grad)):
        wanted = answers[f"gal_grad_member0_{name}"]
        # Theirs to the last digits where this processor rounds those images as theirs did.
        allowed = 1e-6 if (ours - theirs).abs().max() < 1e-5 else 0.1 * float(gradient.abs().max())
        assert (gradient - torch.from_numpy(wanted)).abs().max() < allowed, name
