"""What people publish is read, or refused with what to type; a normalisation is told, tried or asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.core.data import Data, load, make, to_images
from robench.core.errors import RobenchError
from robench.core.logs import Lines, logged
from robench.core.models import MODELS
from robench.store.importing import import_weights
from robench.store.normalisation import _candidates, _Tried, find
from robench.store.runs import Run, Runs, load_state
from robench.store.weights import FoundNetwork, networks_in

Save = Callable[[str, Any], Path]
STATE = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}
OTHER = {name: value + 1 for name, value in STATE.items()}
PIXELS = {"mean": torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1), "std": torch.tensor([63.0, 62.1, 66.7])}
UNIT = {name: value / 255 for name, value in PIXELS.items()}
VALUES = (0.491373, 0.482353, 0.446667), (0.247059, 0.243529, 0.261569)


def at(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def networks(path: Path, key: str | None = None) -> list[FoundNetwork]:
    """Those of one linear layer."""
    return networks_in(path, nn.ModuleDict({"fc": nn.Linear(3, 2)}), 3, key)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(name: str, content: Any) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


READ: dict[str, tuple[Any, list[str]]] = {
    "alone": (STATE, [""]),
    "state_dict": ({"state_dict": STATE, "epoch": 3}, ["state_dict"]),
    "net": ({"net": STATE, "acc": 98.0, "best": torch.tensor(98.0)}, ["net"]),
    "optimizer": (
        {"model": STATE, "optimizer": {"state": {0: {"m": torch.ones(2)}}, "groups": [{"lr": 0.1}]}},
        ["model"],
    ),
    "numpy": ({"state_dict": STATE, "best": np.float64(0.98), "args": argparse.Namespace(lr=0.1)}, ["state_dict"]),
    "nested": ({"state": {"model": STATE}}, ["state.model"]),
    "beside numbers": ({**STATE, "epoch": 3}, [""]),
    "parameters": ({name: nn.Parameter(value) for name, value in STATE.items()}, [""]),
    "lightning": ({"state_dict": {**at("model.", STATE), "criterion.weight": torch.ones(2)}}, ["state_dict.model"]),
    "averaged": ({**at("module.", STATE), "n_averaged": torch.tensor(5)}, ["module"]),
    "members": ({"model0": STATE, "model1": OTHER}, ["model0", "model1"]),
    "ten and two": ({"model10": OTHER, "model2": STATE}, ["model2", "model10"]),
    "wrapped members": ({"state_dict": {"net_1": STATE, "net_2": OTHER}}, ["state_dict.net_1", "state_dict.net_2"]),
    "flat": ({**at("model0.", STATE), **at("model1.", OTHER)}, ["model0", "model1"]),
    "list": ([STATE, OTHER], ["0", "1"]),
    "list beside": ({"models": [STATE, OTHER], "acc": 0.9}, ["models.0", "models.1"]),
    "distributed": (
        {**at("module.models.0.", STATE), **at("module.models.1.", OTHER)},
        ["module.models.0", "module.models.1"],
    ),
    "torchensemble": (
        {"model": {**at("estimators_.0.", STATE), **at("estimators_.1.", OTHER)}},
        ["model.estimators_.0", "model.estimators_.1"],
    ),
    "other word": ({name.replace("fc", "linear"): value for name, value in STATE.items()}, [""]),
}


@pytest.mark.parametrize("name", READ)
def test_what_people_publish_is_read(name: str, save: Save) -> None:
    content, under = READ[name]
    found = networks(save("x.pth", content))
    assert [each.under for each in found] == under
    torch.testing.assert_close(found[0].weights, STATE)
    if len(found) > 1:
        torch.testing.assert_close(found[1].weights, OTHER)


ASKED: dict[str, tuple[Any, str, str]] = {
    "net and ema": ({"net": STATE, "ema": OTHER}, "net", "ema"),
    "two names": ({"state_dict": STATE, "state_dict_ema": OTHER}, "state_dict", "state_dict_ema"),
    "epochs": ({"epoch_1": STATE, "epoch_2": OTHER}, "epoch_1", "epoch_2"),
    "seeds": ({"seed0": STATE, "seed1": OTHER}, "seed0", "seed1"),
    "snapshots": ({"checkpoints": [STATE, OTHER]}, "checkpoints.0", "checkpoints.1"),
    "student and teacher": (
        {"state_dict": {**at("student.", STATE), **at("teacher.", OTHER)}},
        "state_dict.student",
        "state_dict.teacher",
    ),
    "folds": (
        {"a": {"net1": STATE, "net2": OTHER}, "b": {"net1": OTHER, "net2": STATE}},
        "a.net1",
        "b.net1",
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_networks_that_are_no_members_are_asked_about(name: str, save: Save) -> None:
    content, first, other = ASKED[name]
    path = save("x.pth", {"epoch": 3, **content})
    with pytest.raises(RobenchError, match=f"holds several state dicts: {first}, .*{other}.* --key {first}$"):
        networks(path)
    torch.testing.assert_close(networks(path, other)[0].weights, OTHER)
    with pytest.raises(RobenchError, match=f"holds no state dict 'neither' .* {first}, .*{other}"):
        networks(path, "neither")


def test_a_key_chooses_all_members_below_it(save: Save) -> None:
    path = save("x.pth", ASKED["folds"][0])
    assert [each.under for each in networks(path, "b")] == ["b.net1", "b.net2"]


NORMALISED: dict[str, tuple[Any, int]] = {
    "before it": ({**at("0.", UNIT), **at("1.", STATE)}, 1),
    "around it": ({**UNIT, **at("model.", STATE)}, 1),
    "of pixels": ({**at("0.", PIXELS), **at("1.", STATE)}, 1),
    "of all members": ({**at("normalize.", UNIT), **at("models.0.", STATE), **at("models.1.", OTHER)}, 2),
    "each its own": (
        {f"model{i}": {**at("norm.", UNIT), **at("net.", state)} for i, state in enumerate((STATE, OTHER))},
        2,
    ),
    "ours": (
        {**at("members.0.", {**UNIT, **at("model.", STATE)}), **at("members.1.", {**UNIT, **at("model.", OTHER)})},
        2,
    ),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_a_normalisation_in_the_file_is_found(name: str, save: Save) -> None:
    content, members = NORMALISED[name]
    assert [each.normalisation for each in networks(save("x.pth", content))] == [VALUES] * members


def test_each_member_has_the_normalisation_beside_it(save: Save) -> None:
    other = {"mean": torch.tensor([0.5, 0.5, 0.5]), "std": torch.tensor([0.25, 0.25, 0.25])}
    own = {**at("models.1.norm.", other), **at("models.1.net.", STATE), **at("models.10.norm.", UNIT)}
    first, second = networks(save("x.pth", {**own, **at("models.10.net.", OTHER)}))
    assert first.normalisation == ((0.5,) * 3, (0.25,) * 3)
    assert second.normalisation == VALUES
    assert networks(save("y.pth", {**at("models.0.net.", OTHER), **own}))[0].normalisation is None


def test_what_is_left_out_is_told_and_what_the_network_lacks_is_refused(save: Save) -> None:
    lines: list[str] = []
    with logged(Lines(lines)):
        networks(save("x.pth", {**at("models.0.", STATE), **at("models.1.", OTHER), "alpha": torch.ones(2)}))
    assert lines[0].startswith("x.pth: left out alpha (1 in all), which the network does not have; if outputs depend")
    deeper = networks(save("y.pth", at("module.", {**STATE, "more.weight": torch.ones(2)})))
    with pytest.raises(RobenchError, match=r"has 'more.weight' \(1 in all\) too many; choose the architecture"):
        load_state(nn.ModuleDict({"fc": nn.Linear(3, 2)}), deeper[0].weights, "y.pth")
    with pytest.raises(RobenchError, match=r"lacks 'fc.bias' \(1 in all\); choose the architecture"):
        networks(save("z.pth", {"net": {"module.fc.weight": STATE["fc.weight"]}, "epoch": torch.ones(1)}))


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("never",)


@pytest.mark.parametrize("content", [{"net": STATE, "code": Evil()}, {"epoch": 3}, {"net": {"a": 1}}, {}, []])
def test_anything_else_is_refused(content: Any, save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RobenchError, match=r"x\.pth holds"):
        networks(save("x.pth", content))
    assert capsys.readouterr().out == ""


def test_torchscript_is_refused_as_what_it_is(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    network = torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    network.save(tmp_path / "net.pt")
    recwarn.clear()
    with pytest.raises(RobenchError, match=r"net\.pt is a TorchScript archive, .*torch\.jit\.load\(.*state_dict"):
        networks(tmp_path / "net.pt")
    assert not recwarn.list


# --- normalisation


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


@pytest.fixture(scope="module")
def trained(digits: Data) -> Callable[[float, float], dict[str, Tensor]]:
    """A small network on digits that are normalised so, as a state dict."""
    known: dict[tuple[float, float], dict[str, Tensor]] = {}

    def train(mean: float, std: float) -> dict[str, Tensor]:
        if (mean, std) not in known:
            torch.manual_seed(0)
            network = MODELS.get("resnet8")(num_classes=10, in_channels=1)
            images, labels = (to_images(digits.train.images) - mean) / std, digits.train.labels
            optimizer = torch.optim.Adam(network.parameters(), 3e-3)
            for _ in range(3):
                for batch in torch.randperm(len(images)).tensor_split(20):
                    optimizer.zero_grad()
                    F.cross_entropy(network(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            known[mean, std] = {name: value.clone() for name, value in network.state_dict().items()}
        return dict(known[mean, std])

    return train


def imported(paths: list[Path], dataset: str = "digits", **options: Any) -> tuple[Run, list[str]]:
    lines: list[str] = []
    with logged(Lines(lines)):
        run = import_weights(
            paths, Runs(paths[0].parent / "runs"), model="resnet8", dataset=dataset, defense="unknown", seed=0,
            role="target", name=None, parent=None, data_folder=Path("nowhere"), **options,
        )  # fmt: skip
    return run, lines


@pytest.mark.parametrize("which", ["none", "the data set's", "half", "that of pixels in [0, 255]"])
def test_the_normalisation_is_found_on_the_data(
    which: str, digits: Data, trained: Callable[[float, float], dict[str, Tensor]], save: Save
) -> None:
    (mean,), (std,) = {
        "none": ((0.0,), (1.0,)),
        "the data set's": (digits.mean, digits.std),
        "half": ((0.5,), (0.5,)),
        "that of pixels in [0, 255]": ((0.0,), (1 / 255,)),
    }[which]
    run, lines = imported([save("w.pth", trained(mean, std))])
    assert (run.specs[0].mean, run.specs[0].std) == ((mean,), (std,))
    assert lines[0] == "w.pth: one member"
    assert lines[1].startswith(f"normalisation: {which}, on 500 test images of digits: none ")
    assert run.manifest["normalisation"] == lines[1].removeprefix("normalisation: ")


def test_what_fits_none_is_refused_and_can_be_said(
    digits: Data, trained: Callable[[float, float], dict[str, Tensor]], save: Save
) -> None:
    path = save("w.pth", trained(digits.mean[0], 1.4 * digits.std[0]))
    with pytest.raises(RobenchError, match=r"no normalisation fits .* --mean R,G,B --std R,G,B, or --mean none"):
        imported([path])
    given = (digits.mean, (1.4 * digits.std[0],))
    run, lines = imported([path], normalisation=given)
    assert run.specs[0].std == given[1]
    assert lines[1].endswith(", as given")
    assert lines[2].endswith("% of 200 test images of digits are right")
    assert len(lines) == 3, "nothing is better"


def test_one_that_was_given_is_held_against_the_others(
    digits: Data, trained: Callable[[float, float], dict[str, Tensor]], save: Save
) -> None:
    """Mean and standard deviation exchanged."""
    path = save("w.pth", trained(digits.mean[0], digits.std[0]))
    run, lines = imported([path], normalisation=((2.0,), (3.0,)))
    assert run.specs[0].std == (3.0,), "who says it decides"
    assert lines[3].startswith("is this normalisation right? with the data set's, --mean 0.")


@pytest.mark.parametrize("scale", [1, 255])
def test_that_of_the_file_is_held_against_the_others_too(
    scale: int, digits: Data, trained: Callable[[float, float], dict[str, Tensor]], save: Save
) -> None:
    """Buffers that the forward pass does not use; and pixels of [0, 255], which are no doubt."""
    state = at("net.", trained(digits.mean[0], digits.std[0]))
    values = {"mean": torch.tensor([digits.mean[0]]) * scale, "std": torch.tensor([digits.std[0]]) * scale}
    run, lines = imported([save("w.pth", {**state, **values})])
    assert run.specs[0].std == pytest.approx(digits.std, abs=1e-5)
    assert lines[-1].endswith("of 200 test images of digits are right")
    _, lines = imported([save("v.pth", {**state, "mean": torch.zeros(1), "std": torch.full((1,), 0.01)})])
    assert lines[-1].startswith("is this normalisation right? with the data set's, --mean 0.")


def test_a_mean_that_no_variance_tells_is_asked_for(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates get alike many right; that of the likelier variance has another mean and one image less."""
    first, second = ("the data set's", 0.25, 0.2, 0.41, 61), ("CIFAR-10's with std .202", 0.49, 0.2, -0.26, 60)
    tried = [
        _Tried(name, (mean,), (std,), np.arange(120) < right, variance)
        for name, mean, std, variance, right in (first, second)
    ]
    monkeypatch.setattr("robench.store.normalisation._tried", lambda *_: tried)
    with pytest.raises(RobenchError, match=r"or several do, .* --mean R,G,B --std R,G,B"):
        find([], digits)
    tried[1] = replace(tried[1], mean=(0.25,))
    assert find([], digits)[:2] == ((0.25,), (0.2,))


def test_a_run_knows_the_data_that_its_classes_are_of(save: Save, tmp_path: Path) -> None:
    images, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "my.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    state = MODELS.get("resnet8")(num_classes=10, in_channels=1).state_dict()
    run, _ = imported([save("w.pth", state)], f"npz:{tmp_path / 'my.npz'}", normalisation=((0.0,), (1.0,)))
    assert run.data_name == load(f"npz:{tmp_path / 'my.npz'}").label


def test_outputs_in_another_order_are_doubted_where_no_normalisation_helps(
    digits: Data, trained: Callable[[float, float], dict[str, Tensor]], save: Save
) -> None:
    state = trained(digits.mean[0], digits.std[0])
    turned = {name: value.roll(1, 0) if name.startswith("fc.") else value for name, value in state.items()}
    _, lines = imported([save("w.pth", turned)], normalisation=(digits.mean, digits.std))
    assert lines[3].startswith("no better than chance (10.0%)")


def test_the_same_weights_twice_are_refused(trained: Callable[[float, float], dict[str, Tensor]], save: Save) -> None:
    state = trained(0.0, 1.0)
    with pytest.raises(RobenchError, match="members 1 and 2 have the same weights: an ensemble of copies is none"):
        imported([save("a.pth", state), save("b.pth", state)])


@pytest.mark.parametrize("std", [(0.2023, 0.1994, 0.2010), (0.2470, 0.2435, 0.2616)])
def test_candidates_that_are_one_are_tried_once(std: tuple[float, ...]) -> None:
    """The data set's own, and nearly its own, whatever it is called."""
    pixels, labels = np.zeros((8, 3, 8, 8), dtype=np.uint8), np.arange(8) % 2
    data = make("npz:x", (pixels, labels), (pixels, labels))
    close = replace(data, mean=(0.4914, 0.482, 0.447), std=tuple(round(each + 0.001, 4) for each in std))
    names = list(_candidates(close))
    assert "the data set's" in names
    assert len(names) == 6


def test_weights_that_know_nothing_of_the_data_are_refused(save: Save) -> None:
    network = MODELS.get("resnet8")(num_classes=10, in_channels=1)
    with pytest.raises(RobenchError, match=r"no normalisation makes these weights better than chance \(10.0%\)"):
        imported([save("w.pth", network.state_dict())])


def test_without_data_it_must_be_said(trained: Callable[[float, float], dict[str, Tensor]], save: Save) -> None:
    path = save("w.pth", trained(0.0, 1.0))
    with pytest.raises(RobenchError, match="mnist is not at hand to try some; say it: --mean"):
        imported([path], "mnist")
    run, _ = imported([path], "mnist", normalisation=((0.0,), (1.0,)))
    assert run.manifest["normalisation"] == "none, as given"


def test_what_the_file_says_counts(trained: Callable[[float, float], dict[str, Tensor]], save: Save) -> None:
    state = trained(0.0, 1.0)
    own = {"mu": torch.tensor([0.25]), "sigma": torch.tensor([0.5]), **{f"_orig_mod.{n}": v for n, v in state.items()}}
    run, lines = imported([save("w.pth", own)], "mnist")
    assert (run.specs[0].mean, run.specs[0].std) == ((0.25,), (0.5,))
    assert lines[1] == "normalisation: the weights' own, mean 0.25, std 0.5"
    with pytest.raises(RobenchError, match="bring a normalisation of their own; leave --mean and --std away"):
        imported([save("v.pth", own)], "mnist", normalisation=((0.0,), (1.0,)))
    with pytest.raises(
        RobenchError, match="of 1 numbers, one a channel of mnist, got 0,0,0 and 1,1,1; try --mean none"
    ):
        imported([save("u.pth", state)], "mnist", normalisation=((0.0,) * 3, (1.0,) * 3))


def test_prefixes_of_any_order_and_weights_of_old_are_read(
    trained: Callable[[float, float], dict[str, Tensor]], save: Save
) -> None:
    state = {name: value for name, value in trained(0.0, 1.0).items() if "num_batches" not in name}
    for number, prefix in enumerate(("module.", "_orig_mod.module.", "module.model.", "model.net.", "1.", "encoder.")):
        content = {f"{prefix}{name}": value for name, value in state.items()}
        run, _ = imported([save(f"w{number}.pth", content)])
        assert isinstance(run.load().members[0], nn.Module)
        torch.testing.assert_close(run.load().members[0].model.conv1.weight, state["conv1.weight"])
