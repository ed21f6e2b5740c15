"""Whatever happens to a model while it is attacked, it comes back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from robench.core.frozen import BatchNormMode, batchnorm, frozen
from robench.core.models import ModelSpec, build

IMAGES = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    """In mixed modes, with some gradients off and one hook."""
    made = build(ModelSpec(name="resnet8", num_classes=4, in_channels=1, mean=(0.5,), std=(0.5,)), 0)
    made.train()
    made.model.get_submodule("layer1").eval()
    for parameter in made.model.get_submodule("layer2").parameters():
        parameter.requires_grad_(False)
    made.register_forward_hook(_keep)
    return made


def _keep(*_: Any) -> None:
    """A user's own hook."""


def state(model: nn.Module) -> list[object]:
    hooks = [
        [
            sorted(map(str, getattr(module, name).items()))
            for name in vars(module)
            if name.endswith(("_hooks", "_with_kwargs", "_always_called"))
            and name.startswith(("_forward", "_backward"))
        ]
        for module in model.modules()
    ]
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        hooks,
    ]


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    before = state(model)
    yield
    assert state(model) == before


def test_within_it_is_in_eval_mode_without_parameter_gradients(model: nn.Module) -> None:
    with restored(model), frozen(model) as same:
        assert same is model
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_exception_changes_nothing(model: nn.Module) -> None:
    with restored(model), pytest.raises(KeyError), frozen(model):
        raise KeyError


def test_what_a_plug_in_leaves_behind_is_undone(model: nn.Module) -> None:
    with restored(model), frozen(model):
        model.train()
        for module in model.modules():
            module.register_forward_hook(_keep, always_call=True)
            module.register_forward_hook(_keep, with_kwargs=True)
            module.register_forward_pre_hook(_keep)
            module.register_forward_pre_hook(_keep, with_kwargs=True)
            module.register_full_backward_hook(_keep)
            module.register_full_backward_pre_hook(_keep)
        for parameter in model.parameters():
            parameter.requires_grad_(True)


def test_a_hook_that_a_plug_in_removed_is_back(model: nn.Module) -> None:
    with restored(model), frozen(model):
        model._forward_hooks.clear()


def test_a_users_handle_still_removes_its_hook(model: nn.Module) -> None:
    handle = model.register_forward_pre_hook(_keep)
    with frozen(model):
        pass
    handle.remove()
    assert not model._forward_pre_hooks


def test_frozen_contexts_nest(model: nn.Module) -> None:
    with restored(model), frozen(model):
        with frozen(model):
            pass
        assert not any(module.training for module in model.modules())


def running(model: nn.Module) -> dict[str, torch.Tensor]:
    kept = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith(kept)}


@pytest.mark.parametrize(
    ("mode", "moves", "by_batch"), [("train", True, True), ("batch", False, True), ("eval", False, False)]
)
def test_batchnorm_modes(mode: BatchNormMode, moves: bool, by_batch: bool) -> None:
    model = build(ModelSpec(name="resnet8", num_classes=4, in_channels=1, mean=(0.5,), std=(0.5,)), 0).train()
    with torch.no_grad():
        trained = model.eval()(IMAGES)
        model.train()
        statistics = running(model)
        with restored(model), batchnorm(model, mode):
            output = model(IMAGES)
        moved = [name for name, value in running(model).items() if not torch.equal(value, statistics[name])]
        # Each of the nine BatchNorms has three buffers.
        assert len(moved) == (27 if moves else 0)
        assert torch.equal(output, trained) != by_batch
        assert torch.allclose(output, model(IMAGES), atol=1e-6) == by_batch


@pytest.mark.parametrize("mode", ["batch", "eval"])
def test_batchnorm_modes_end_with_an_exception(model: nn.Module, mode: BatchNormMode) -> None:
    tracked = [getattr(module, "track_running_stats", None) for module in model.modules()]
    with restored(model), pytest.raises(KeyError), batchnorm(model, mode):
        raise KeyError
    assert [getattr(module, "track_running_stats", None) for module in model.modules()] == tracked
