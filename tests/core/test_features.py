"""f^l is the input of the l-th activation, of any network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench.core.errors import RobenchError
from robench.core.features import depth, features, parted
from robench.core.models import ModelSpec, Normalized, build

IMAGES = torch.rand((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))


def small(name: str = "resnet8", **changes: Any) -> Normalized:
    return build(ModelSpec(name=name, num_classes=4, in_channels=3, mean=(0.5,) * 3, std=(0.2,) * 3, **changes), 1)


def by_hand(model: Any, images: Tensor) -> list[Tensor]:
    """Inputs of the activations of our ResNet in execution order, then the logits."""
    relu = model.relu
    layers = [model.bn1(model.conv1(images))]
    x = relu(layers[0])
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            layers.append(block.bn1(block.conv1(x)))
            skip = x if block.downsample is None else block.downsample(x)
            layers.append(block.bn2(block.conv2(relu(layers[-1]))) + skip)
            x = relu(layers[-1])
    return [*layers, model.fc(x.mean(dim=(2, 3)))]


@pytest.mark.parametrize(("name", "layers"), [("resnet8", 8), ("resnet20", 20)])
def test_the_layers_of_a_resnet_are_those_of_the_protocol(name: str, layers: int) -> None:
    model = small(name).eval()
    wanted = by_hand(model.model, (IMAGES - 0.5) / 0.2)
    assert depth(model, IMAGES) == len(wanted) == layers
    for layer, value in enumerate(wanted, start=1):
        assert torch.equal(features(model, IMAGES, layer), value), layer
    assert torch.equal(features(model, IMAGES, layers), model(IMAGES))


def test_a_leaky_network_has_the_same_layers() -> None:
    model = small(negative_slope=0.1).eval()
    wanted = by_hand(model.model, (IMAGES - 0.5) / 0.2)
    assert depth(model, IMAGES) == len(wanted)
    for layer, value in enumerate(wanted, start=1):
        assert torch.equal(features(model, IMAGES, layer), value)


def test_an_activation_in_place_does_not_overwrite_what_is_returned() -> None:
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18(num_classes=4).eval()
    assert all(module.inplace for module in model.modules() if isinstance(module, nn.ReLU))
    assert depth(model, IMAGES) == 18  # 1 + 8 blocks x 2, each block's one ReLU counted twice, and the logits
    with torch.no_grad():
        stem = model.bn1(model.conv1(IMAGES))
    assert bool((stem < 0).any())
    assert torch.equal(features(model, IMAGES, 1), stem)
    x = model.maxpool(stem.clamp(min=0))
    block = model.layer1[0]
    inner = block.bn1(block.conv1(x))
    assert torch.equal(features(model, IMAGES, 2), inner)
    assert torch.equal(features(model, IMAGES, 3), block.bn2(block.conv2(inner.clamp(min=0))) + x)


def test_gradients_flow_through_in_place_activations() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True))
    images = IMAGES.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(features(model, images, 2).square().sum(), images)
    reference = nn.Sequential(model[0], nn.ReLU(), model[2])
    (wanted,) = torch.autograd.grad(reference(images).square().sum(), images)
    assert torch.equal(slope, wanted)
    assert bool((slope != 0).any())


def test_a_module_that_is_used_twice_counts_twice() -> None:
    shared = nn.Tanh()
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), shared, nn.Linear(3, 3), shared)
    assert depth(model, IMAGES) == 3
    first = model[1](IMAGES.flatten(1))
    assert torch.equal(features(model, IMAGES, 1), first)
    assert torch.equal(features(model, IMAGES, 2), model[3](first.tanh()))
    assert torch.equal(features(model, IMAGES, 3), model(IMAGES))


def test_the_forward_pass_ends_at_the_layer() -> None:
    model = small("resnet20").eval()
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    features(model, IMAGES, 1)
    assert calls == ["model.conv1"]
    calls.clear()
    features(model, IMAGES, 3)
    assert calls == ["model.conv1", "model.layer1.0.conv1", "model.layer1.0.conv2"]
    calls.clear()
    features(model, IMAGES, 20)
    assert calls[-1] == "model.fc"


@pytest.mark.parametrize("layer", [0, -1, 9, 100])
def test_a_layer_that_is_not_there_is_an_error(layer: int) -> None:
    with pytest.raises(RobenchError, match=rf"expected `layer` of ResNet in 1\.\.8, got {layer}"):
        features(small(), IMAGES, layer)


def test_no_hook_stays_behind() -> None:
    model = small()
    depth(model, IMAGES)
    features(model, IMAGES, 2)
    with pytest.raises(RobenchError):
        features(model, IMAGES, 99)
    with pytest.raises(RuntimeError):
        features(model, IMAGES[:, :2], 2)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_depth_changes_no_state() -> None:
    model = small().train()
    model.model.get_submodule("layer1").eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    depth(model, IMAGES[:1])
    with pytest.raises(RuntimeError):
        depth(model, IMAGES[:, :2])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_features_use_the_mode_that_the_model_is_in() -> None:
    model = small().train()
    features(model, IMAGES, 1)
    assert int(model.model.get_submodule("bn1").num_batches_tracked) == 1


def test_a_model_without_activation_modules_is_named() -> None:
    with pytest.raises(RobenchError, match="model Sequential has no activation modules"):
        depth(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), IMAGES)
    with pytest.raises(RobenchError, match="model Flatten has no activation modules"):
        depth(Normalized(nn.Flatten(), (0.5,), (0.5,)), IMAGES)


class Own(nn.Module):
    """A network that brings its own layers, as the error above asks."""

    depth = 5

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    def features(self, images: Tensor, layer: int) -> Tensor:
        return images * layer


def test_a_model_may_bring_its_own_layers() -> None:
    assert depth(Own(), IMAGES) == 5
    assert torch.equal(features(Own(), IMAGES, 3), IMAGES * 3)


def test_its_own_layers_are_found_within_the_normalisation() -> None:
    model = Normalized(Own(), (0.5,) * 3, (0.25,) * 3)
    assert depth(model, IMAGES) == 5
    assert torch.equal(features(model, IMAGES, 3), (IMAGES - 0.5) / 0.25 * 3)


def test_a_part_called_features_is_not_a_models_own_layers() -> None:
    """torchvision's VGG and DenseNet have one."""

    class Vgg(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())

        def forward(self, images: Tensor) -> Tensor:
            return self.features(images).flatten(1)  # type: ignore[no-any-return]

    model = Vgg()
    assert depth(model, IMAGES) == 2
    assert torch.equal(features(model, IMAGES, 1), model.features[0](IMAGES))


def moved(model: nn.Module, images: Tensor, layer: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Features in train mode, a gradient through them, and all statistics afterwards."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    images = images.clone().requires_grad_(True)
    value = features(model, images, layer)
    (slope,) = torch.autograd.grad(value.square().sum(), images)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return value.detach(), slope, after


@pytest.mark.parametrize("name", ["resnet8", "torchvision/resnet18"])
def test_a_part_of_a_network_gives_the_features_and_moves_the_statistics_that_leaving_the_pass_does(name: str) -> None:
    model, images = small(name), torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    made: list[nn.Module] = []

    def note(part: nn.Module) -> nn.Module:
        made.append(part)
        return part

    layers = depth(model, images)
    for layer in (1, 2, 3, layers - 1, layers):
        wanted = moved(model, images, layer)
        with parted([model], note):
            found = moved(model, images, layer)
            assert len(made) == 1, "the part was not taken"
            features(model, images, layer)
            assert len(made) == 1, "a part was made twice"
        for one, other in zip(found[:2], wanted[:2], strict=True):
            torch.testing.assert_close(one, other)
        for key, value in wanted[2].items():
            torch.testing.assert_close(found[2][key], value, msg=key)
        made.clear()
    features(model, images, 2)
    assert not made, "parts outlived their context"
    with parted([model], note), pytest.raises(RobenchError, match=f"1..{layers}"):
        features(model, images, layers + 1)


def test_a_network_that_cannot_be_traced_leaves_its_pass_as_usual() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(x.mean(dim=(2, 3)) - 0.5)
            return y if bool((y > 0).any()) else -y

    def never(part: nn.Module) -> nn.Module:
        raise AssertionError("it has no parts")

    model = Branching()
    with parted([model], never):
        assert torch.equal(features(model, IMAGES, 1), IMAGES.mean(dim=(2, 3)) - 0.5)
