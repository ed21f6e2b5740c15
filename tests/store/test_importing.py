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
from robench.store.importing import import_weights, read_states
from robench.store.normalisation import _candidates
from robench.store.runs import Run, Runs

Save = Callable[[str, Any], Path]
STATE = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}
OTHER = {name: value + 1 for name, value in STATE.items()}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(name: str, content: Any) -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


READ: dict[str, tuple[Any, int, str]] = {
    "alone": (STATE, 1, "one member"),
    "state_dict": ({"state_dict": STATE, "epoch": 3}, 1, "one member under 'state_dict'"),
    "net": ({"net": STATE, "acc": 98.0, "epoch": 3}, 1, "one member under 'net'"),
    "optimizer": ({"model": STATE, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}, 1, "under 'model'"),
    "numpy": ({"state_dict": STATE, "best": np.float64(0.98), "args": argparse.Namespace(lr=0.1)}, 1, "'state_dict'"),
    "nested": ({"state": {"model": STATE}}, 1, "one member under 'state' under 'model'"),
    "members": ({"model0": STATE, "model1": OTHER}, 2, "members model0, model1"),
    "wrapped members": ({"state_dict": {"net_1": STATE, "net_2": OTHER}}, 2, "members net_1, net_2 under 'state_dict'"),
    "flat": ({f"model{i}.{n}": v for i in range(2) for n, v in STATE.items()}, 2, "members 0, 1"),
}


@pytest.mark.parametrize("name", READ)
def test_what_people_publish_is_read_and_told(name: str, save: Save) -> None:
    content, members, said = READ[name]
    found = read_states(save("x.pth", content))
    assert len(found.states) == members
    assert said in found.said
    torch.testing.assert_close(dict(found.states[0]), STATE)


@pytest.mark.parametrize("names", [("net", "ema"), ("state_dict", "state_dict_ema"), ("epoch_a", "epoch_b")])
def test_several_state_dicts_are_asked_about(names: tuple[str, str], save: Save) -> None:
    path = save("x.pth", {names[0]: STATE, names[1]: OTHER, "epoch": 3})
    with pytest.raises(RobenchError, match=f"holds several state dicts: {names[0]}, {names[1]}; .* --key {names[0]}"):
        read_states(path)
    torch.testing.assert_close(dict(read_states(path, names[1]).states[0]), OTHER)
    with pytest.raises(RobenchError, match=f"holds no state dict 'neither'; .* {names[0]}, {names[1]}"):
        read_states(path, "neither")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return print, ("never",)


@pytest.mark.parametrize("content", [{"net": STATE, "code": Evil()}, {"epoch": 3}, [STATE], {"net": {"a": 1}}, {}])
def test_anything_else_is_refused(content: Any, save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RobenchError, match=r"x\.pth holds"):
        read_states(save("x.pth", content))
    assert capsys.readouterr().out == ""


def test_torchscript_is_refused_as_what_it_is(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    network = torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3))
    network.save(tmp_path / "net.pt")
    recwarn.clear()
    with pytest.raises(RobenchError, match=r"net\.pt is a TorchScript archive, .*torch\.jit\.load\(.*state_dict"):
        read_states(tmp_path / "net.pt")
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
    assert lines[3].startswith("is --mean right? with the data set's, --mean 0.")


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
