"""The call from Python, on a user's own modules, without any folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robench
from robench import api
from robench.attacks.pgd import PGD
from robench.core.data import Data
from robench.evaluation.evaluated import EvaluatedModel


class Linear(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 64, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - 0.5) @ self.weight.T


def test_a_module_and_a_list_of_members(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threat = robench.Whitebox(eps=(0.01, 0.2), attacks=(PGD(steps=5),), restarts=2)
    for model in (Linear(0), [Linear(0), Linear(1)]):
        table = robench.evaluate(model, data, threat, samples=20).accuracy()
        assert list(table["threat"]) == ["clean", "whitebox", "whitebox"]
        assert (table["samples"] == 20).all()
        assert table["accuracy"].iloc[2] <= table["accuracy"].iloc[1]
    assert not list(tmp_path.iterdir())


def test_the_users_module_is_left_as_it_was(data: Data) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    robench.evaluate(model, data, robench.Whitebox(eps=(0.1,), attacks=(PGD(steps=2),)), samples=8)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)


def test_a_model_is_judged_where_it_is(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    there = nn.Linear(1, 1, device="meta")
    assert {api._device_of(model).type for model in (there, [there], [nn.Identity(), there])} == {"meta"}
    assert api._device_of(nn.Identity()).type == "cpu"
    found: list[torch.device] = []

    def of_model(model: Any, device: torch.device, **options: Any) -> EvaluatedModel:
        found.append(device)
        return original(model, torch.device("cpu"), **options)

    original = EvaluatedModel.of_model
    monkeypatch.setattr(EvaluatedModel, "of_model", of_model)
    monkeypatch.setattr(api, "_device_of", lambda model: torch.device("cpu", 0))
    robench.evaluate(Linear(0), data, robench.Whitebox(eps=(0.1,), attacks=(PGD(steps=1),)), samples=4)
    assert found == [torch.device("cpu", 0)]


def test_black_box_takes_models_made_of_modules(data: Data) -> None:
    surrogate = robench.EvaluatedModel.of_model(Linear(5), torch.device("cpu"), name="hold-out")
    threat = robench.Blackbox(eps=(0.1,), attacks=(PGD(steps=2),), surrogates=(surrogate,))
    frame = robench.evaluate(Linear(0), data, threat, samples=8).frame
    assert set(frame.loc[frame["threat"] == "blackbox", "surrogate"]) == {"hold-out"}


def test_what_the_package_offers_exists() -> None:
    for name in robench.__all__:
        assert getattr(robench, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        robench.nothing  # noqa: B018


def test_scripts_with_the_old_name_of_a_model_run() -> None:
    assert robench.Subject is robench.EvaluatedModel


@pytest.mark.parametrize("threat", ["whitebox", robench.Whitebox])
def test_a_name_in_place_of_an_object_is_told_what_to_type(data: Data, threat: Any) -> None:
    with pytest.raises(robench.RobenchError, match=r"`threat` such as robench.Whitebox\(eps=\(8 / 255,\)\)"):
        robench.evaluate(Linear(0), data, threat)
    wrong: Any = "digits"
    with pytest.raises(robench.RobenchError, match=r"got 'digits'; try robench.load_data\(NAME\)"):
        robench.evaluate(Linear(0), wrong, robench.Whitebox(eps=(0.1,)))
    with pytest.raises(robench.RobenchError, match=r"got 'pgd'; objects, such as \(robench.attacks.pgd.PGD"):
        robench.Whitebox(eps=(0.1,), attacks=("pgd",))
    with pytest.raises(robench.RobenchError, match=r"got Sequential.*robench.EvaluatedModel.of_model") as caught:
        robench.Blackbox(eps=(0.1,), surrogates=(nn.Sequential(nn.Linear(1, 1)),))
    assert "\n" not in str(caught.value)


def test_transfer_among_one_member_is_refused(data: Data) -> None:
    with pytest.raises(robench.RobenchError, match="'transfer' is among members, and 'model' has one"):
        robench.evaluate(Linear(0), data, robench.Transfer(eps=(0.1,), attacks=(PGD(steps=1),)), samples=4)
