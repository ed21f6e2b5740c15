"""A task is known by everything that determines its weights, and by nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from robench.core.data import Data, load, make
from robench.core.errors import RobenchError
from robench.core.models import ModelSpec
from robench.defenses import DEFENSES
from robench.training.recipes import Recipe
from robench.training.task import Task, resolve

DIGITS = load("digits")


def task(defense: str = "dverge", n: int = 3, **changes: Any) -> Task:
    return resolve(DIGITS, defense, n, **changes)


def test_a_key_never_changes() -> None:
    """If this fails, every finished training is made again: raise a version, do not edit the key."""
    spec = ModelSpec(name="resnet8", num_classes=10, in_channels=1, mean=(0.5,), std=(0.25,))
    recipe = Recipe(epochs=2, batch_size=8, optimizer="sgd", lr=0.1, weight_decay=1e-4)
    fixed = Task(
        data="digits",
        data_label="digits",
        defense=DEFENSES.get("baseline")(),
        n=2,
        seed=0,
        role="target",
        members=(spec, spec),
        recipe=recipe,
        init="scratch",
        start=None,
    )
    assert fixed.key == "c0274360a3b1b317"
    # Names are for people.
    assert replace(fixed, given_name="mine", data_label="other", customised=True).key == fixed.key


def test_the_same_words_give_the_same_key() -> None:
    assert task().key == task().key
    assert task(models=["resnet8"]).key == task().key
    assert task(overrides={"eps": "0.3"}).key == task(overrides={"eps": 0.3}).key


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"n": 4},
        {"role": "surrogate"},
        {"models": ["resnet14"]},
        {"models": ["resnet8", "resnet8", "resnet14"]},
        {"overrides": {"eps": 0.1}},
        {"overrides": {"epochs": 3}},
        {"overrides": {"negative_slope": 0.1}},
        {"init": "scratch"},
        {"init": "someones-run"},
        {"recipe": "generic"},
        {"defense": "baseline"},
    ],
    ids=str,
)
def test_whatever_changes_weights_changes_the_key(changes: dict[str, Any]) -> None:
    assert task(**changes).key != task().key


def test_another_version_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before, baseline = task().key, task("baseline").key
    monkeypatch.setattr(DEFENSES.get("baseline"), "version", 99)
    assert task("baseline").key != baseline
    # DVERGE starts from it.
    assert task().key != before


def test_other_data_is_another_key() -> None:
    images = np.arange(64, dtype=np.uint8).reshape(4, 1, 4, 4)

    def data(name: str, shift: int) -> Data:
        return make(name, (images + np.uint8(shift), np.arange(4) % 2), (images, np.arange(4) % 2))

    one = resolve(data("npz:/a/x.npz", 0), "baseline", 3)
    assert resolve(data("npz:/b/y.npz", 0), "baseline", 3).key == one.key
    assert resolve(data("npz:/a/x.npz", 1), "baseline", 3).key != one.key
    assert "/" not in one.name


def test_a_name_says_what_it_is() -> None:
    assert task().name == "digits-resnet8-dverge-n3-s0"
    assert task(seed=2, role="surrogate").name == "digits-resnet8-dverge-n3-s2-surrogate"
    assert task(models=["resnet8", "resnet14", "resnet8"]).name == "digits-resnet8_resnet14-dverge-n3-s0"
    assert task(name="mine").name == "mine"
    changed = task(overrides={"eps": 0.1})
    assert changed.name == f"digits-resnet8-dverge-n3-s0-{changed.key[:6]}"
    assert task(init="scratch").name != task().name
    assert task(init="baseline").name == task().name


def test_the_baseline_that_dverge_starts_from() -> None:
    start = task(seed=4, role="surrogate", overrides={"epochs": 3}).start
    assert start is not None
    assert start == task("baseline", seed=4, role="surrogate")
    assert start.recipe.epochs == 10
    assert (start.init, start.start) == ("scratch", None)
    assert task(init="scratch").start is None
    assert task(init="someones-run").start is None


def test_the_baseline_has_the_same_models() -> None:
    models = ["resnet8", "resnet14", "resnet8"]
    child = task(models=models)
    assert child.start is not None
    assert child.start.members == child.members
    leaky = task(overrides={"negative_slope": 0.1})
    assert leaky.start is not None
    assert leaky.start.members == leaky.members
    assert leaky.start.name != task("baseline").name
    assert {spec.negative_slope for spec in leaky.members} == {0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "expected `n` to be at least 1, got 0"),
        ({"n": 1}, "`n` of defense 'dverge' to be at least 2, got 1"),
        ({"seed": -1}, "expected `seed` to be at least 0, got -1"),
        ({"models": ["resnet8", "resnet14"]}, "one for each of the 3 members, got 2"),
        ({"models": ["resnet9"]}, "unknown model 'resnet9'; did you mean resnet"),
        ({"name": "../x"}, "expected the name of a run"),
        ({"recipe": "cifar"}, "unknown recipe 'cifar'"),
        ({"overrides": {"epoch": 1}}, "did you mean epochs"),
        ({"defense": "dverg"}, "unknown defense 'dverg'"),
    ],
    ids=str,
)
def test_what_cannot_be_trained(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RobenchError, match=message):
        task(**changes)
