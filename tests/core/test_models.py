"""Networks are built from a key alone, and files cannot name code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench.core.errors import RobenchError
from robench.core.models import MODELS, ModelSpec, Normalized, build, parameter_count

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
        return "someones_code:factory"

    return add


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
        build(spec(code(factory)), 3, trusted=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_normalisation_is_inside() -> None:
    model = Normalized(nn.Identity(), (0.5, 0.25), (0.5, 0.25))
    image = torch.tensor([[[[1.0]], [[0.0]]]])
    assert model(image).flatten().tolist() == [1.0, -1.0]
    assert model.double()(image.double()).dtype == torch.float64


def test_code_is_refused_unless_trusted(code: Callable[[Factory], str]) -> None:
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


def test_trusted_code_is_built_from_the_key(code: Callable[[Factory], str]) -> None:
    def factory(*, num_classes: int, in_channels: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 4, num_classes))

    name = code(factory)
    model = build(spec(name), 1, trusted=True)
    assert model(torch.rand(2, 3, 2, 2)).shape == (2, 10)
    assert same(model, build(spec(name), 1, trusted=True))


@pytest.mark.parametrize("name", ["no_such_module_xyz:factory", "math:factory", "math:pi", ":", "math:", ".math:pi"])
def test_what_cannot_be_imported_is_named(name: str) -> None:
    with pytest.raises(RobenchError, match=r"cannot be imported|must take|is a float"):
        build(spec(name), 0, trusted=True)


def test_a_factory_without_our_arguments_is_an_error(code: Callable[[Factory], str]) -> None:
    with pytest.raises(RobenchError, match="must take `num_classes` and `in_channels`"):
        build(spec(code(lambda: nn.Identity())), 0, trusted=True)


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

    model = build(spec(code(factory), negative_slope=0.1), 0, trusted=True)
    assert [type(module).__name__ for module in model.model.children()][1::2] == ["LeakyReLU"] * 2
    assert all(module.inplace for module in model.modules() if isinstance(module, nn.LeakyReLU))


def test_a_slope_that_changes_nothing_is_an_error(code: Callable[[Factory], str]) -> None:
    with pytest.raises(RobenchError, match=r"`negative_slope` 0\.1 changes nothing"):
        build(spec(code(lambda **_: nn.Flatten()), negative_slope=0.1), 0, trusted=True)


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
