"""Training in bfloat16: a setting of the recipe, which the key holds; float32 keeps the keys it had."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robench.core.data import Data
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.models import build
from robench.core.rng import Stream
from robench.defenses import DEFENSES
from robench.store.runs import Run, Runs
from robench.training.batches import batches
from robench.training.loop import make_optimizer, train_step
from robench.training.recipes import Recipe
from robench.training.task import Task

Small = Callable[..., Task]
Train = Callable[..., Run]


def gradient(task: Task, ensemble: Ensemble, data: Data) -> Tensor:
    """Of all parameters that are trained, after one step."""
    batch = next(batches(data.train, task.recipe, Stream(("x",)), 0, task.defense.paired))
    train_step(ensemble, make_optimizer(task.recipe, ensemble), task, batch)
    trained = ensemble.members[:1] if task.defense.in_turn else ensemble
    gradients = [parameter.grad for parameter in trained.parameters()]
    assert all(each is not None and each.dtype == torch.float32 for each in gradients)
    assert all(parameter.dtype == torch.float32 for parameter in ensemble.parameters())
    return torch.cat([each.flatten() for each in gradients if each is not None])


# Where images are crafted, signs of small gradients differ, and in train mode what they do to BatchNorm.
@pytest.mark.parametrize(
    ("defense", "least"),
    [(name, 0.98 if name in ("baseline", "adp", "gal") else 0.7) for name in sorted(DEFENSES.names())],
)
def test_the_gradient_is_about_that_of_float32(defense: str, least: float, small: Small, tiny: Data) -> None:
    task = small(defense, overrides={"batch_size": 32})
    ensemble = Ensemble(build(spec, i) for i, spec in enumerate(task.members)).train()
    wanted = gradient(task, copy.deepcopy(ensemble), tiny)
    found = gradient(small(defense, overrides={"batch_size": 32, "precision": "bfloat16"}), ensemble, tiny)
    assert float(torch.cosine_similarity(wanted, found, dim=0)) > least
    assert not torch.equal(wanted, found)
    assert not torch.is_autocast_enabled("cpu")


def test_it_trains_to_other_weights_under_another_key(small: Small, train: Train) -> None:
    usual, other = small(), small(overrides={"precision": "bfloat16"})
    assert usual.key != other.key
    assert usual.name != other.name
    one, two = train(usual), train(other)
    assert one.weights != two.weights
    assert two.manifest["recipe"]["precision"] == "bfloat16"


def test_logits_stay_in_float32(small: Small, train: Train) -> None:
    seen: list[torch.dtype] = []

    def look(ensemble: Ensemble) -> dict[str, float]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            seen.extend(member(torch.rand(2, 1, 8, 8)).dtype for member in ensemble.members)
        return {}

    train(small(overrides={"precision": "bfloat16"}), track=look, track_every=1)
    assert seen
    assert set(seen) == {torch.float32}


def test_an_interrupted_training_goes_on_alike(small: Small, train: Train, tmp_path: object) -> None:
    task = small("dverge", overrides={"precision": "bfloat16"})

    def stop(done: int, total: int, what: str) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(task, progress=stop)
    assert train(task).weights == train(task, Runs(f"{tmp_path}/other")).weights


def test_float32_keeps_its_keys() -> None:
    usual = {"epochs": 1, "batch_size": 2, "optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0}
    assert "precision" not in Recipe.model_validate(usual).model_dump(mode="json")
    assert Recipe.model_validate({**usual, "precision": "bfloat16"}).model_dump()["precision"] == "bfloat16"


def test_another_precision_is_refused(small: Small) -> None:
    with pytest.raises(RobenchError, match="'precision' of the recipe"):
        small(overrides={"precision": "float16"})
