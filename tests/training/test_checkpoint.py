"""A checkpoint holds all that is needed, and damage to any of it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.files import read_tensors, tensors_hash, write_tensors
from robench.core.logs import Lines, logged
from robench.training.checkpoint import Checkpoint, State
from robench.training.loop import make_optimizer
from robench.training.recipes import Recipe

RECIPES = {
    name: Recipe(epochs=1, batch_size=2, optimizer=kind, lr=0.1, momentum=momentum, weight_decay=1e-2)  # type: ignore[arg-type]
    for name, kind, momentum in (("sgd", "sgd", 0.9), ("plain", "sgd", 0.0), ("adam", "adam", 0.9))
}


def made(name: str = "sgd") -> tuple[Ensemble, torch.optim.Optimizer]:
    members = []
    for seed in (0, 1):
        member = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            for parameter in member.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        members.append(member)
    ensemble = Ensemble(members)
    return ensemble, make_optimizer(RECIPES[name], ensemble)


def step(ensemble: Ensemble, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    images = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    ensemble.logits(images).square().sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ensemble, optimizer = made()
    step(ensemble, optimizer, 0)
    path = tmp_path / "checkpoint.safetensors"
    Checkpoint(path, "key").save(ensemble, optimizer, State(1, 7, {"ce": torch.tensor(2.5)}, [{"epoch": 1}]))
    return path


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_training_goes_on_as_if_nothing_had_happened(tmp_path: Path, name: str) -> None:
    ensemble, optimizer = made(name)
    for seed in (0, 1):
        step(ensemble, optimizer, seed)
    checkpoint = Checkpoint(tmp_path / "x", "key")
    checkpoint.save(ensemble, optimizer, State())
    resumed, other = made(name)
    step(resumed, other, 9)
    checkpoint.load(resumed, other)
    for seed in (2, 3):
        step(ensemble, optimizer, seed)
        step(resumed, other, seed)
    assert tensors_hash(resumed.state_dict()) == tensors_hash(ensemble.state_dict())


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_moments_have_the_layout_of_their_weights(tmp_path: Path, name: str) -> None:
    """torch's optimisers update many weights at once only where all that belongs to one is laid out alike."""
    ensemble, optimizer = made(name)
    ensemble.to(memory_format=torch.channels_last)
    step(ensemble, optimizer, 0)
    Checkpoint(tmp_path / "x", "key").save(ensemble, optimizer, State())
    resumed, other = made(name)
    resumed.to(memory_format=torch.channels_last)
    Checkpoint(tmp_path / "x", "key").load(resumed, other)
    moments = [
        (weight.stride(), value.stride())
        for weight, state in other.state.items()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.shape == weight.shape
    ]
    assert (RECIPES[name].optimizer == "sgd" and not RECIPES[name].momentum) or moments
    assert all(theirs == its for theirs, its in moments)


def test_the_state_makes_the_round_trip(saved: Path) -> None:
    state = Checkpoint(saved, "key").load(*made())
    assert state == State(1, 7, {"ce": torch.tensor(2.5)}, [{"epoch": 1}])


def test_without_a_file_it_starts_at_the_beginning(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path / "x", "key").load(*made()) == State()


def test_other_settings_are_an_error(saved: Path) -> None:
    with pytest.raises(RobenchError, match="of a training with other settings; give this one --name, or remove"):
        Checkpoint(saved, "other").load(*made())
    assert saved.exists()


def assert_starts_over(path: Path) -> None:
    ensemble, optimizer = made()
    before = tensors_hash(ensemble.state_dict())
    lines: list[str] = []
    with logged(Lines(lines)):
        assert Checkpoint(path, "key").load(ensemble, optimizer) == State()
    assert len(lines) == 1
    assert lines[0].endswith("is damaged: it is set aside and the training starts over")
    assert tensors_hash(ensemble.state_dict()) == before


@pytest.mark.parametrize("change", [{"key": "other"}, {"progress": json.dumps({"epoch": 1, "step": 8, "history": []})}])
def test_damage_to_the_position_is_found(saved: Path, change: dict[str, str]) -> None:
    tensors, metadata = read_tensors(saved)
    write_tensors(saved, tensors, {**metadata, **change})
    assert_starts_over(saved)


@pytest.mark.parametrize("entry", ["key", "progress", "hash"])
def test_a_file_that_lacks_something_is_not_used(saved: Path, entry: str) -> None:
    tensors, metadata = read_tensors(saved)
    write_tensors(saved, tensors, {name: value for name, value in metadata.items() if name != entry})
    assert_starts_over(saved)


def test_a_file_cut_short_is_not_used(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        saved.write_bytes(whole[:length])
        assert_starts_over(saved)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
def test_a_flipped_bit_never_gives_another_state(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int
) -> None:
    path = tmp_path_factory.mktemp("bit") / "x"
    ensemble, optimizer = made()
    step(ensemble, optimizer, 0)
    state = State(1, 7, {"ce": torch.tensor(2.5)}, [{"epoch": 1, "lr": 0.1}])
    Checkpoint(path, "key").save(ensemble, optimizer, state)
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)
    resumed, other = made()
    lines: list[str] = []
    with logged(Lines(lines)):
        found = Checkpoint(path, "key").load(resumed, other)
    if lines:
        assert found == State()
    else:  # white space in the header
        assert found == state
        assert tensors_hash(resumed.state_dict()) == tensors_hash(ensemble.state_dict())


def test_terms_are_summed_and_averaged_over_the_epoch() -> None:
    state = State()
    terms: list[dict[str, Any]] = [{"a": torch.tensor(1.0)}, {"a": torch.tensor(3.0), "b": torch.tensor(1.0)}]
    for each in terms:
        state.add(each)
    state.close(0.1)
    assert state == State(1, 0, {}, [{"epoch": 1, "lr": 0.1, "terms": {"a": 2.0, "b": 0.5}}])
