"""Networks are built from a key alone, and files cannot name code."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench.core import models
from robench.core.errors import RobenchError
from robench.core.fast import attackable
from robench.core.features import depth
from robench.core.models import MODELS, ModelSpec, Normalized, build, import_model, parameter_count

Factory = Callable[..., Any]


def spec(name: str = "resnet8", **changes: Any) -> ModelSpec:
    values: dict[str, Any] = {"num_classes": 10, "in_channels": 3, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    return ModelSpec(name=name, **{**values, **changes})


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> Callable[[Factory], str]:
    """Makes ``someones_code:factory`` importable."""

    def add(factory: Factory) -> str:
        module = ModuleType("someones_code")
        module.factory = factory  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "someones_code", module)
        monkeypatch.setattr(models, "_IMPORTED", {})
        return "someones_code:factory"

    return add


def typed(made: ModelSpec, key: int) -> Normalized:
    """As `build`, of code that the user typed."""
    import_model(made.name)
    return build(made, key)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_resnet20_is_the_studys() -> None:
    model = build(spec("resnet20"), 0)
    assert parameter_count(model) == 272_474
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 56])
def test_a_resnet_has_as_many_layers_as_its_name_says(depth: int) -> None:
    model = MODELS.get(f"resnet{depth}")(num_classes=7, in_channels=1)
    weighted = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in name
    ]
    assert len(weighted) == depth
    assert model(torch.rand(1, 1, 8, 8)).shape == (1, 7)


def test_wrn_28_10_is_the_papers() -> None:
    with torch.device("meta"):
        model = MODELS.get("wrn28-10")(num_classes=10, in_channels=3)
    assert parameter_count(model) == 36_479_194
    names = set(model.state_dict())
    # As in TRADES and RobustBench.
    assert {"block1.layer.0.convShortcut.weight", "block3.layer.3.bn2.running_var", "bn1.weight", "fc.bias"} <= names


def test_a_wide_resnet_is_the_formulas() -> None:
    model: Any = MODELS.get("wrn16-4")(num_classes=7, in_channels=1).eval()
    weighted = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len([name for name in weighted if "convShortcut" not in name]) == 14  # 16 counts two of the shortcuts
    images = torch.rand(2, 1, 8, 8)
    x = model.conv1(images)
    for stage in (model.block1, model.block2, model.block3):
        for number, block in enumerate(stage.layer):
            active = block.bn1(x).relu()
            branch = block.conv2(block.bn2(block.conv1(active)).relu())
            x = (x if number else block.convShortcut(active)) + branch
    torch.testing.assert_close(model(images), model.fc(model.bn1(x).relu().mean(dim=(2, 3))))
    assert x.shape == (2, 256, 2, 2)


def test_a_wide_resnet_made_fast_is_the_same() -> None:
    model = build(spec("wrn16-4"), 0).train()
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(images)
        torch.testing.assert_close(attackable(model, images, "float64")(images.double()), model.double().eval()(images))


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/resnet10t"])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_of_other_packages_take_our_classes_and_channels(name: str, channels: int) -> None:
    pytest.importorskip(name.partition("/")[0])
    own = spec(name, num_classes=7, in_channels=channels, mean=(0.5,) * channels, std=(0.2,) * channels)
    model = build(own, 1).eval()
    assert model(torch.rand(2, channels, 32, 32)).shape == (2, 7)
    assert same(model, build(own, 1))
    assert not same(model, build(own, 2))


@pytest.mark.parametrize("name", ["googlenet", "densenet121", "vgg11", "vit_b_32", "convnext_tiny", "squeezenet1_0"])
def test_every_kind_of_torchvision_network_is_built_without_weights(name: str) -> None:
    size = 224 if name == "vit_b_32" else 64
    with torch.device("meta"):
        model = MODELS.get(f"torchvision/{name}")(num_classes=7, in_channels=1).train()
        assert model(torch.rand(2, 1, size, size)).shape == (2, 7)


def test_a_stem_is_not_changed() -> None:
    model = build(spec("torchvision/resnet18"), 0).model
    conv = model.get_submodule("conv1")
    assert isinstance(conv, nn.Conv2d)
    assert (conv.kernel_size, conv.stride, type(model.get_submodule("maxpool"))) == ((7, 7), (2, 2), nn.MaxPool2d)


@pytest.mark.parametrize(
    ("name", "near"),
    [("torchvision/resnet81", "torchvision/resnet18"), ("timm/resnet_18", "timm/resnet18")],
)
def test_a_network_that_a_package_has_not_lists_its_neighbours(name: str, near: str) -> None:
    pytest.importorskip(name.partition("/")[0])
    with pytest.raises(RobenchError, match=rf"unknown model '{name}'; did you mean .*{near}"):
        build(spec(name), 0)


@pytest.mark.parametrize(
    ("absent", "name", "remedy"),
    [
        ("torchvision", "torchvision/resnet18", "install torch and torchvision together"),
        ("torchvision", "timm/resnet18", "install torch and torchvision together"),
        ("timm", "timm/resnet18", r"pip install robench\[timm\]"),
    ],
)
def test_a_package_that_does_not_import_is_named(
    absent: str, name: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(RobenchError, match=remedy):
        build(spec(name), 0)
    assert MODELS.families()[name.partition("/")[0]] == []
    assert {"torchvision", "timm"} <= set(MODELS.prefixes())


def test_weights_depend_on_the_key_alone() -> None:
    torch_state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        one = build(spec(), 5)
        torch.manual_seed(2)
        assert same(one, build(spec(), 5))
        assert not same(one, build(spec(), 6))
    finally:
        torch.set_rng_state(torch_state)


def test_a_key_may_have_all_64_bits() -> None:
    assert not same(build(spec(), 2**64 - 1), build(spec(), 2**63))


def test_building_leaves_every_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(seed: int) -> None:
        raise AssertionError("seeds the generators of all devices")

    monkeypatch.setattr(torch, "manual_seed", forbidden)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", forbidden)
    before = torch.get_rng_state()
    build(spec(), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_building_leaves_the_generator_alone_when_it_fails(code: Callable[[Factory], str]) -> None:
    def factory(*, num_classes: int, in_channels: int) -> nn.Module:
        torch.rand(3)
        raise TypeError("no")

    before = torch.get_rng_state()
    with pytest.raises(RobenchError, match="must take `num_classes` and `in_channels`"):
        typed(spec(code(factory)), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_normalisation_is_inside() -> None:
    model = Normalized(nn.Identity(), (0.5, 0.25), (0.5, 0.25))
    image = torch.tensor([[[[1.0]], [[0.0]]]])
    assert model(image).flatten().tolist() == [1.0, -1.0]
    assert model.double()(image.double()).dtype == torch.float64


def test_code_that_the_user_did_not_type_is_refused(code: Callable[[Factory], str]) -> None:
    name = code(lambda **_: pytest.fail("ran"))
    with pytest.raises(RobenchError, match="names code, which a file may not") as caught:
        build(spec(name), 0)
    assert f"--model {name}" in str(caught.value)


def test_code_is_refused_without_being_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RobenchError, match="names code"):
        build(spec("evil_module:factory"), 0)
    assert "evil_module" not in sys.modules


def test_code_that_the_user_typed_is_built_from_the_key(code: Callable[[Factory], str]) -> None:
    def factory(*, num_classes: int, in_channels: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 4, num_classes))

    name = code(factory)
    model = typed(spec(name), 1)
    assert model(torch.rand(2, 3, 2, 2)).shape == (2, 10)
    assert same(model, build(spec(name), 1))


@pytest.mark.parametrize("name", ["no_such_module_xyz:factory", "math:factory", "math:pi", ":", "math:", ".math:pi"])
def test_what_cannot_be_imported_is_named(name: str) -> None:
    with pytest.raises(RobenchError, match=r"cannot be imported|must take|is a float"):
        typed(spec(name), 0)


def test_a_factory_without_our_arguments_is_an_error(code: Callable[[Factory], str]) -> None:
    with pytest.raises(RobenchError, match="must take `num_classes` and `in_channels`"):
        typed(spec(code(lambda: nn.Identity())), 0)


def test_an_unknown_model_lists_its_neighbours() -> None:
    with pytest.raises(RobenchError, match=r"unknown model 'resnet21'; did you mean .*resnet20"):
        build(spec("resnet21"), 0)


def test_a_slope_replaces_every_relu() -> None:
    model = build(spec(negative_slope=0.1), 0)
    leaky = [module for module in model.modules() if isinstance(module, nn.LeakyReLU)]
    assert len(leaky) == 4  # the stem and three blocks
    assert {module.negative_slope for module in leaky} == {0.1}
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert same(model, build(spec(), 0))


def test_a_slope_replaces_a_relu_that_stands_in_two_places(code: Callable[[Factory], str]) -> None:
    def factory(*, num_classes: int, in_channels: int) -> nn.Module:
        shared = nn.ReLU(inplace=True)
        return nn.Sequential(nn.BatchNorm2d(in_channels), shared, nn.BatchNorm2d(in_channels), shared)

    model = typed(spec(code(factory), negative_slope=0.1), 0)
    assert [type(module).__name__ for module in model.model.children()][1::2] == ["LeakyReLU"] * 2
    assert all(module.inplace for module in model.modules() if isinstance(module, nn.LeakyReLU))


def test_a_slope_that_changes_nothing_is_an_error(code: Callable[[Factory], str]) -> None:
    with pytest.raises(RobenchError, match=r"`negative_slope` 0\.1 changes nothing"):
        typed(spec(code(lambda **_: nn.Flatten()), negative_slope=0.1), 0)


def test_a_spec_survives_its_manifest() -> None:
    import json

    assert ModelSpec.of(json.loads(json.dumps(spec(negative_slope=0.1).manifest()))) == spec(negative_slope=0.1)


@pytest.mark.parametrize(
    "change", [{"mean": None}, {"surprise": 1}, {"num_classes": ...}], ids=["no mean", "extra", "missing"]
)
def test_a_damaged_manifest_is_our_error(change: dict[str, Any]) -> None:
    values = {name: value for name, value in {**spec().manifest(), **change}.items() if value is not ...}
    with pytest.raises(RobenchError, match="describes a model wrongly"):
        ModelSpec.of(values)


def test_parameters_are_counted_without_buffers() -> None:
    class Counted(nn.Module):
        extra: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("extra", torch.zeros(100))

    assert parameter_count(Counted()) == 8


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("preactresnet18", 11_172_170),
        ("wrn34-10", 46_160_474),
        ("vgg16-bn", 14_728_266),
        ("mobilenetv2", 2_236_682),
    ],
)
def test_a_known_network_has_its_known_number_of_parameters(name: str, count: int) -> None:
    """Of ten classes and 32 pixels, as in kuangliu/pytorch-cifar, TRADES and chenyaofo/pytorch-cifar-models."""
    with torch.device("meta"):
        model = MODELS.get(name)(num_classes=10, in_channels=3).eval()
        assert parameter_count(model) == count
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_what_torchvision_has_too_is_its_network_with_another_stem(name: str) -> None:
    """The same weights, and outputs to rounding, where the stem's strides and pooling are made alike."""
    torchvision = pytest.importorskip("torchvision.models")
    theirs = getattr(torchvision, name.replace("v2", "_v2"))(num_classes=10).eval()
    ours = MODELS.get(name)(num_classes=10, in_channels=3).eval()
    if name == "resnet18":
        theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        theirs.maxpool = nn.Identity()
    else:
        theirs.features[0][0].stride = theirs.features[2].conv[1][0].stride = (1, 1)
    pairs = list(zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert all(mine.shape == other.shape for mine, other in pairs)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "preactresnet18", "vgg16-bn", "mobilenetv2"])
def test_layers_of_a_network_for_32_pixels_are_found(name: str) -> None:
    """Activations and the logits: every defense and attack that looks at features takes it."""
    model = build(spec(name), 0).eval()
    layers = {"resnet18": 17, "preactresnet18": 17, "vgg16-bn": 13, "mobilenetv2": 35}[name]
    assert depth(model, torch.rand(1, 3, 32, 32)) == layers + 1


def test_a_file_in_the_working_folder_is_found_and_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_IMPORTED", {})
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_net_here.py").write_text("import torch\ndef make(**_): return torch.nn.Flatten()\n")
    (tmp_path / "click.py").write_text("raise RuntimeError('the installed one is meant')\n")
    import_model("my_net_here:make")
    assert isinstance(build(spec("my_net_here:make"), 0).model, nn.Flatten)
    monkeypatch.delitem(sys.modules, "click", raising=False)
    assert importlib.import_module("click").__file__ != str(tmp_path / "click.py")
    (tmp_path / "needs_more.py").write_text("import not_there_at_all\n")
    with pytest.raises(RobenchError, match="No module named 'not_there_at_all'"):
        import_model("needs_more:make")
    monkeypatch.delitem(sys.modules, "my_net_here")
