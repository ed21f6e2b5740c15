"""Skip Gradient Method: the gradient against the formula, what counts as a block, and what is left on the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet

from robench.attacks.ascent import gradient
from robench.attacks.pgd import PGD
from robench.attacks.sgm import SGM, skip_gradient
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.fast import attackable
from robench.core.models import Normalized, ResNet, WideResNet
from robench.core.rng import Stream

from .conftest import member

GAMMA = 0.2

Make = Callable[..., Ensemble]
MakeBatch = Callable[..., tuple[Tensor, Tensor]]


def slope(model: nn.Module, images: Tensor, *, gamma: float | None = None, blocks: str = "all") -> Tensor:
    """Input gradient of a sum of logits with unequal weights, plain or under SGM."""

    def value(z: Tensor) -> Tensor:
        logits = model(z)
        return (logits * torch.linspace(1, 2, logits.shape[1], dtype=logits.dtype)).sum(dim=1)

    if gamma is None:
        return gradient(value, images)
    with skip_gradient(model, gamma, blocks):  # type: ignore[arg-type]
        return gradient(value, images)


def batch(count: int = 3, size: int = 8, dtype: torch.dtype = torch.float64) -> Tensor:
    return Stream(("sgm",)).uniform((count, 3, size, size), "images").to(dtype)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def fold(network: ResNet) -> None:
    """Every block's BatchNorms into its convolutions, Identities in their place."""
    for stage in (network.layer1, network.layer2, network.layer3):
        for block in stage:
            for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
                setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
                setattr(block, norm, nn.Identity())


def timm_net(name: str, **values: object) -> nn.Module:
    return pytest.importorskip("timm").create_model(name, num_classes=5, **values)  # type: ignore[no-any-return]


def written_out(network: ResNet, x: Tensor, gamma: float, first: bool) -> Tensor:
    """The forward pass with y = skip + γ·f + (1−γ)·stop_gradient(f) written out; no hooks."""
    x = network.relu(network.bn1(network.conv1(x)))
    for stage in (network.layer1, network.layer2, network.layer3):
        for number, block in enumerate(stage):
            skip = x if block.downsample is None else block.downsample(x)
            branch = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
            if number or first:
                branch = gamma * branch + (1 - gamma) * branch.detach()
            x = block.relu(branch + skip)
    return network.fc(x.mean(dim=(2, 3)))


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("blocks", ["all", "reference"])
@pytest.mark.parametrize("folded", [False, True])
def test_the_gradient_is_the_formula_s(gamma: float, blocks: str, folded: bool) -> None:
    network = member(0).model.double().eval()
    images = batch()
    weights = torch.linspace(1, 2, 5, dtype=torch.float64)
    wanted = gradient(lambda z: written_out(network, z, gamma, blocks == "all") @ weights, images)
    if folded:
        fold(network)
    found = slope(network, images, gamma=gamma, blocks=blocks)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    if gamma == 1:
        torch.testing.assert_close(found, slope(network, images), rtol=1e-12, atol=1e-14)
    else:
        assert not torch.allclose(found, slope(network, images), rtol=1e-3)


class _Toy(nn.Module):
    """Three blocks on (B,3,8,8): identity shortcuts, a convolution as shortcut, a squeeze-and-excite after the last
    convolution, the sum in place."""

    class Block(nn.Module):
        def __init__(self, *, project: bool, gated: bool) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
            self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
            self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.Sigmoid()) if gated else None
            if project:
                self.shortcut = nn.Conv2d(3, 3, 1)

        def skip(self, x: Tensor) -> Tensor:
            return self.shortcut(x) if hasattr(self, "shortcut") else x

        def branch(self, x: Tensor) -> Tensor:
            x = self.conv2(torch.tanh(self.conv1(x)))
            return x if self.gate is None else x * self.gate(x)

        def forward(self, x: Tensor) -> Tensor:
            branch = self.branch(x)
            branch += self.skip(x)
            return branch.tanh_()

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.Sequential(
                self.Block(project=False, gated=False),
                self.Block(project=True, gated=False),
                self.Block(project=False, gated=True),
            )
            self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("blocks", ["all", "reference"])
def test_three_blocks_by_the_chain_rule(blocks: str) -> None:
    """Jacobians by hand, block after block: J_skip + γ·J_branch; also for classes where only some have a shortcut."""
    model, image = _Toy().double(), batch(1)
    inputs, outputs = [], []
    x = image
    for block in model.blocks:
        inputs.append(x)
        outputs.append(x := block(x))
    weights = torch.linspace(1, 2, 4, dtype=torch.float64)
    flow = (model.head.weight.T @ weights)[None, :, None, None].expand(1, 3, 8, 8) / 64
    for number in (2, 1, 0):
        block, flow = model.blocks[number], flow * (1 - outputs[number] ** 2)
        _, through_skip = torch.autograd.functional.vjp(block.skip, inputs[number], flow)
        _, through_branch = torch.autograd.functional.vjp(block.branch, inputs[number], flow)
        scale = 1 if blocks == "reference" and number == 0 else GAMMA
        flow = through_skip + scale * through_branch
    torch.testing.assert_close(slope(model, image, gamma=GAMMA, blocks=blocks), flow, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_forward_pass_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    model, images = Ensemble([member(0), member(1)]).to(dtype).eval(), batch(dtype=dtype)
    plain = model(images)
    with skip_gradient(model, GAMMA):
        assert torch.equal(model(images), plain)


def test_in_an_ensemble_every_member_has_its_own(make_ensemble: Make) -> None:
    """The gradient through the mixture weighs members as without SGM, each member's own being scaled."""
    ensemble, images = make_ensemble(dtype=torch.float64), batch()
    own = [slope(part, images, gamma=GAMMA) for part in ensemble.members]
    logits = ensemble.logits(images).requires_grad_(True)
    (mixed,) = torch.autograd.grad(torch.logsumexp(logits.log_softmax(-1), 0)[:, 0].sum(), logits)

    def of_member(number: int) -> Tensor:
        with skip_gradient(ensemble.members[number], GAMMA):
            return gradient(lambda z: (ensemble.members[number](z) * mixed[number]).sum(dim=1), images)

    with skip_gradient(ensemble, GAMMA):
        found = gradient(lambda z: ensemble(z)[:, 0], images)
    torch.testing.assert_close(found, of_member(0) + of_member(1), rtol=1e-10, atol=1e-14)
    assert not torch.allclose(own[0], own[1])


def test_a_member_that_comes_twice_is_scaled_once() -> None:
    one, images = member(0).double().eval(), batch()
    torch.testing.assert_close(
        slope(Ensemble([one, one]), images, gamma=GAMMA), slope(Ensemble([one]), images, gamma=GAMMA)
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_works_on_what_the_evaluator_makes_fast(precision: str, make_ensemble: Make) -> None:
    model, images = make_ensemble(), batch(dtype=torch.float32)
    fast = attackable(model, images, precision)  # type: ignore[arg-type]
    plain, scaled = slope(model, images, gamma=GAMMA), slope(fast, images, gamma=GAMMA)
    likeness = nn.functional.cosine_similarity(plain.flatten(1), scaled.flatten(1))
    assert (likeness > (0.9999 if precision == "float32" else 0.95)).all()


def torchvision_net(block: type[BasicBlock | Bottleneck]) -> nn.Module:
    return TorchvisionResNet(block, [2, 1, 1, 1], num_classes=5)


def convnext() -> nn.Module:
    kind = torchvision.models.convnext
    return kind.ConvNeXt([kind.CNBlockConfig(8, None, 2)], num_classes=5)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # factory, branches hooked by `all`, and by `reference`
    "own": (lambda: ResNet(20, num_classes=5, in_channels=3, widths=(4, 6, 8)), 9, 6),
    "own WRN": (lambda: WideResNet(16, 2, num_classes=5, in_channels=3), 6, 3),
    "torchvision BasicBlock": (lambda: torchvision_net(BasicBlock), 5, 1),
    "torchvision Bottleneck": (lambda: torchvision_net(Bottleneck), 5, 1),
    "torchvision ConvNeXt": (convnext, 2, 1),
    "timm resnet18": (lambda: timm_net("resnet18"), 8, 4),
    "timm resnet18, stochastic depth": (lambda: timm_net("resnet18", drop_path_rate=0.2), 8, 4),
    "timm resnet26": (lambda: timm_net("resnet26"), 8, 4),
    "timm squeeze-and-excite": (lambda: timm_net("legacy_seresnet18"), 8, 4),
    "timm pre-activation": (lambda: timm_net("resnetv2_50", layers=(2, 1, 1, 1), channels=(16, 16, 16, 16)), 5, 1),
    "timm RegNet": (lambda: timm_net("regnetx_002"), 13, 9),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_residual_networks_of_others(name: str) -> None:
    factory, every, reference = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = factory().eval()
    images = batch(2, 32, torch.float32)
    with torch.no_grad():
        plain = model(images)
    for blocks, count in (("all", every), ("reference", reference)):
        with skip_gradient(model, GAMMA, blocks):  # type: ignore[arg-type]
            assert hooks(model) == count
            assert torch.equal(model(images), plain)
    # With γ = 0 the branches pass nothing, so that their weights get no gradient, and the shortcuts still do.
    with skip_gradient(model, 0.0):
        model(images).sum().backward()
    scaled = dict(model.named_parameters())
    weights = [key for key in scaled if key.endswith(("conv2.weight", "conv2.conv.weight"))]
    assert all(scaled[key].grad is None or not scaled[key].grad.any() for key in weights)
    assert any(value.grad is not None and value.grad.any() for value in scaled.values())
    assert hooks(model) == 0


def test_hooks_are_gone_after_an_error() -> None:
    model = member(0).eval()
    kept = model.register_forward_hook(lambda *_: None)
    with pytest.raises(KeyError), skip_gradient(model, GAMMA):
        raise KeyError
    assert hooks(model) == 1
    kept.remove()


def test_gamma_one_is_momentum_pgd(make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(dtype=torch.float64)
    images, labels = make_batch(model, dtype=torch.float64)
    plain = PGD(steps=5, momentum=1.0, random_start=False)(model, images, labels, 0.1).images
    assert torch.equal(SGM(steps=5, gamma=1.0)(model, images, labels, 0.1).images, plain)
    assert not torch.equal(SGM(steps=5)(model, images, labels, 0.1).images, plain)


def test_reference_where_it_scales_nothing_is_an_error(make_ensemble: Make, make_batch: MakeBatch) -> None:
    model = make_ensemble(depth=8)
    images, labels = make_batch(model)
    SGM(steps=2)(model, images, labels, 0.1)
    with pytest.raises(RobenchError, match="blocks=all"):
        SGM(steps=2, blocks="reference")(model, images, labels, 0.1)
    assert hooks(model) == 0


def test_a_network_without_residual_blocks_is_an_error(make_batch: MakeBatch) -> None:
    plain = Normalized(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), (0.5,) * 3, (0.25,) * 3)
    images, labels = make_batch(plain)
    with pytest.raises(RobenchError, match="drop_path"):
        SGM(steps=2)(plain, images, labels, 0.1)
    with pytest.raises(RobenchError, match="member 2"):
        SGM(steps=2)(Ensemble([member(0), plain]).eval(), images, labels, 0.1)


def test_hooks_that_are_never_reached_are_an_error(make_batch: MakeBatch) -> None:
    class Compiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.original = member(0).eval()
            object.__setattr__(self, "hidden", member(0).eval())

        def forward(self, images: Tensor) -> Tensor:
            return self.hidden(images)

    images, labels = make_batch(Compiled())
    with pytest.raises(RobenchError, match=r"torch\.compile"):
        SGM(steps=2)(Compiled(), images, labels, 0.1)


@pytest.mark.parametrize("values", [{"gamma": 1.1}, {"gamma": -0.1}, {"blocks": "some"}])
def test_wrong_fields_are_named(values: dict[str, object]) -> None:
    with pytest.raises(RobenchError, match=next(iter(values))):
        SGM(**values)  # type: ignore[arg-type]
    assert not SGM().stochastic
