"""Recorded steps: what is replayed is the step of the batch that is given, or nothing is recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robench.core.data import make
from robench.core.ensemble import Ensemble
from robench.core.models import build
from robench.core.rng import Stream
from robench.defenses import Batch, Defense, Terms
from robench.training import loop
from robench.training.batches import batches
from robench.training.compiling import differs
from robench.training.loop import make_optimizer, plain_gradients, train_step
from robench.training.recording import NotRecorded, Record, Recorded, or_plain
from robench.training.task import Task, resolve

pytestmark = pytest.mark.slow


def played(ensemble: Ensemble) -> Record:
    """A recording as a CPU can make one: what was recorded runs again, and writes into the same tensors."""

    def record(
        call: Callable[[], dict[str, Tensor]], restore: Callable[[], None]
    ) -> tuple[Callable[[], None], dict[str, Tensor]]:
        call()
        restore()
        terms = call()
        restore()
        slopes = [parameter.grad for parameter in ensemble.parameters()]

        def replay() -> None:
            for name, value in call().items():
                terms[name].copy_(value)
            for parameter, slope in zip(ensemble.parameters(), slopes, strict=True):
                if slope is not None:
                    assert parameter.grad is not None
                    slope.copy_(parameter.grad)

        return replay, terms

    return record


def started(defense: str, **fields: object) -> tuple[Task, Ensemble, Iterator[Batch]]:
    draws = np.random.default_rng(0)
    images, labels = draws.integers(0, 256, (96, 3, 16, 16), dtype=np.uint8), np.arange(96) % 4
    few = make("npz:few", (images, labels), (images[:8], labels[:8]), recipe="digits")
    task = resolve(few, defense, 2, models=["resnet8"], init="scratch", overrides={"batch_size": 8, **fields})
    ensemble = Ensemble(build(spec, key) for key, spec in enumerate(task.members)).train()
    return task, ensemble, batches(few.train, task.recipe, Stream(("here",)), 0, task.defense.paired)


@pytest.mark.parametrize(
    ("defense", "fields"),
    [
        ("baseline", {}),
        ("adp", {}),
        ("gal", {}),
        ("dverge", {"layer_per": "batch"}),
        ("dverge", {"layer_per": "epoch"}),
        ("advt", {}),
        ("dverge-advt", {"layer_per": "batch"}),
        ("igat", {}),
    ],
)
def test_steps_are_plain_ones(defense: str, fields: dict[str, Any]) -> None:
    task, ensemble, source = started(defense, **fields)
    other = copy.deepcopy(ensemble)
    mine = Recorded(plain_gradients(task), played(ensemble))
    one, two = make_optimizer(task.recipe, ensemble), make_optimizer(task.recipe, other)
    for batch in source:
        found, wanted = train_step(ensemble, one, task, batch, mine), train_step(other, two, task, batch)
        assert {name: float(value) for name, value in found.items()} == {
            name: float(value) for name, value in wanted.items()
        }
    for (name, value), expected in zip(ensemble.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    if fields.get("layer_per") == "batch":
        assert len(mine._found) > 1


def test_dropout_draws_what_it_draws_in_plain_steps() -> None:
    task, ensemble, source = started("advt")
    for member in ensemble.members:
        for module in list(member.modules()):
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda module, inputs, outputs: F.dropout(outputs, 0.2, module.training))
    other = copy.deepcopy(ensemble)
    mine = Recorded(plain_gradients(task), played(ensemble))
    one, two = make_optimizer(task.recipe, ensemble), make_optimizer(task.recipe, other)
    for batch in source:
        found, wanted = train_step(ensemble, one, task, batch, mine), train_step(other, two, task, batch)
        assert float(found["ce"]) == float(wanted["ce"])


def test_terms_of_a_step_outlive_the_next() -> None:
    task, ensemble, source = started("baseline")
    mine = Recorded(plain_gradients(task), played(ensemble))
    first = mine(ensemble, next(source))["ce"]
    kept = float(first)
    mine(ensemble, next(source))
    assert float(first) == kept


@dataclass(frozen=True, kw_only=True)
class Loss(Defense):
    """A loss that needs what is not recorded."""

    what: str = ""
    name: ClassVar[str] = "not-recorded"
    calls: ClassVar[int] = 0

    def loss(self, ensemble: Ensemble, batch: Batch) -> Iterator[Terms]:
        Loss.calls += 1
        loss = F.cross_entropy(ensemble(batch.images), batch.labels)
        if self.what == "progress":
            loss = loss * (1 + batch.progress)
        if self.what == "late" and batch.progress > 0.9:
            loss = 2 * loss
        if self.what == "state":
            batch.state["seen"] = batch.labels
        if self.what == "key":
            loss = loss * batch.draws.key("own")
        if self.what == "count":
            loss = loss + float(batch.draws.uniform((Loss.calls,), "noise").sum())
        if self.what == "choices":
            for number in range(Loss.calls):
                batch.draws.below(3, "which", number)
        yield {"ce": loss}


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("progress", "it changes with the part"),
        ("late", "it changes with the part"),
        ("state", "it keeps something"),
        ("key", "it draws by a key"),
        ("count", "its draws differ"),
    ],
)
def test_what_needs_more_than_batch_and_draws_is_found_at_once(what: str, why: str) -> None:
    task, ensemble, source = started("baseline")
    task = replace(task, defense=Loss(what=what))
    plain, few = plain_gradients(task), list(source)[:3]
    before = copy.deepcopy(ensemble.state_dict())
    mine = Recorded(plain, played(ensemble))

    def step(each: Ensemble, optimizer: torch.optim.Optimizer, number: int) -> dict[str, Tensor]:
        batch = replace(few[number], state={}, progress=0.5)
        return train_step(each, optimizer, task, batch, mine if each is ensemble else plain)

    assert why in differs(ensemble, partial(make_optimizer, task.recipe), step, "float32")
    assert all(torch.equal(value, before[name]) for name, value in ensemble.state_dict().items())


def test_other_choices_are_no_recording() -> None:
    Loss.calls = 0
    task, ensemble, source = started("baseline")
    mine = Recorded(plain_gradients(replace(task, defense=Loss(what="choices"))), played(ensemble))
    mine(ensemble, next(source))
    with pytest.raises(NotRecorded, match="choices"):
        [mine(ensemble, batch) for batch in source]


@pytest.mark.parametrize("defense", ["baseline", "dverge", "advt", "dverge-advt"])
def test_members_side_by_side_are_members_in_turn(defense: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, ensemble, source = started(defense)
    other, batch = copy.deepcopy(ensemble), next(source)
    wanted = plain_gradients(task)(ensemble, batch)
    monkeypatch.setattr("robench.defenses._members.recording", lambda device: True)
    found = plain_gradients(task)(other, batch)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-6)
    for one, two in zip(ensemble.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert torch.allclose(one.grad, two.grad, atol=1e-6)
    for one, two in zip(ensemble.buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two)


def test_training_goes_on_where_a_later_step_cannot_be_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """A new layer may find the memory full, hours after the first steps were compared."""
    task, ensemble, source = started("dverge", layer_per="batch")
    other, record, made = copy.deepcopy(ensemble), played(ensemble), 0

    def failing(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == 3:
            arguments[0]()
            raise RuntimeError("CUDA out of memory")
        return record(*arguments)

    plain = plain_gradients(task)
    mine = or_plain(Recorded(plain, failing), plain)
    one, two = make_optimizer(task.recipe, ensemble), make_optimizer(task.recipe, other)
    for batch in source:
        train_step(ensemble, one, task, batch, mine)
        train_step(other, two, task, batch)
    assert made == 3
    assert [record.getMessage() for record in caplog.records] == [
        "training goes on without CUDA graphs: RuntimeError: CUDA out of memory"
    ]
    for (name, value), expected in zip(ensemble.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("fits", [True, False])
def test_training_goes_on_plain_where_recording_takes_too_much_memory(
    fits: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    task, ensemble, source = started("baseline")
    few, made = list(source)[:3], 0

    def record(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if not fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return played(ensemble)(*arguments)

    monkeypatch.setattr(loop, "cuda_record", lambda device: record)
    gradients = loop.recorded_if_same(ensemble, task, few, torch.device("cuda"))
    assert made == 1
    assert ("out of memory" in caplog.text) is not fits
    terms = gradients(ensemble, few[0])
    assert made == 1
    assert float(terms["ce"]) == float(plain_gradients(task)(ensemble, few[0])["ce"])
