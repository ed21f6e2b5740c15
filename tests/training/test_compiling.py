"""Training through torch.compile: the same weights up to rounding, or training as usual and a warning."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robench.core import features
from robench.core.ensemble import Ensemble
from robench.core.frozen import batchnorm
from robench.store.runs import Run, Runs
from robench.training.task import Task

pytestmark = pytest.mark.slow

Small = Callable[..., Task]
Train = Callable[..., Run]

compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler"
)


@compiler
@pytest.mark.parametrize("defense", ["baseline", "dverge", "advt"])
def test_weights_are_those_of_plain_training_up_to_rounding(
    small: Small, train: Train, tmp_path: Any, defense: str, told: list[str]
) -> None:
    task = small(defense, overrides={"epochs": 1, "lr": 0.005})
    told.clear()
    plain = train(task).load().state_dict()
    mine = train(task, Runs(tmp_path / "compiled"), compile=True)
    assert not told
    assert mine.manifest["compiled"] is True
    assert not features._PARTS
    for name, value in mine.load().state_dict().items():
        if value.is_floating_point():
            assert float((value - plain[name]).norm()) < 0.01 * float(plain[name].norm()) + 1e-3, name


@compiler
def test_what_cannot_be_compiled_is_trained_as_usual_and_told_once(
    small: Small, train: Train, tmp_path: Any, told: list[str]
) -> None:
    plain = train(small("gal"))
    told.clear()
    mine = train(small("gal"), Runs(tmp_path / "compiled"), compile=True)
    assert len(told) == 1
    assert "training goes on without torch.compile" in told[0]
    assert "double backward" in told[0]
    assert mine.weights == plain.weights
    assert "compiled" not in mine.manifest


def broken(change: Callable[[nn.Module, Tensor], Tensor]) -> Callable[..., None]:
    """A stand-in for `nn.Module.compile` whose modules compute something else."""

    def compile_(self: nn.Module, **_: Any) -> None:
        self._compiled_call_impl = lambda images: change(self, images)

    return compile_


def no_statistics(module: nn.Module, images: Tensor) -> Tensor:
    """BatchNorm's batch statistics, and running ones that stay: what a compiler that drops a mutation gives."""
    with batchnorm(module, "batch"):
        return module._call_impl(images)  # type: ignore[no-any-return]


def halved(module: nn.Module, images: Tensor) -> Tensor:
    return module._call_impl(images) / 2  # type: ignore[no-any-return]


def no_gradient_of_one(module: nn.Module, images: Tensor) -> Tensor:
    result: Tensor = module._call_impl(images)
    return torch.cat([result[:, :1].detach(), result[:, 1:]], dim=1) + 0 * result


def fails(module: nn.Module, images: Tensor) -> Tensor:
    raise RuntimeError("no kernel\nin many lines")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (halved, "'ce' is"),
        (no_statistics, "cosine"),
        (no_gradient_of_one, "cosine"),
        (fails, "RuntimeError: no kernel"),
    ],
)
def test_a_step_that_is_another_one_is_noticed(
    small: Small,
    train: Train,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[nn.Module, Tensor], Tensor],
    said: str,
    told: list[str],
) -> None:
    plain = train(small())
    told.clear()
    monkeypatch.setattr(nn.Module, "compile", broken(change))
    mine = train(small(), Runs(tmp_path / "compiled"), compile=True)
    assert len(told) == 1
    assert said in told[0]
    assert mine.weights == plain.weights, "weights moved while steps were compared"


def test_members_are_as_before_afterwards(small: Small, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Ensemble] = []

    def look(ensemble: Ensemble) -> dict[str, float]:
        seen.append(ensemble)
        assert all(member._compiled_call_impl is not None for member in ensemble.members)
        return {"diversity": 1.0}

    monkeypatch.setattr(nn.Module, "compile", broken(lambda module, images: module._call_impl(images)))
    run = train(small(), compile=True, track=look, track_every=1)
    assert len(seen) == 2
    assert run.manifest["compiled"] is True
    assert all(member._compiled_call_impl is None for member in seen[0].members)
