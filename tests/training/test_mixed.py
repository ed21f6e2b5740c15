"""Ensembles of several architectures, trained, attacked and judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from robench.api import evaluate
from robench.attacks import ATTACKS
from robench.core import data
from robench.core.data import Split
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.threats import Transfer, Whitebox
from robench.store.runs import Runs
from robench.training.loop import ensure
from robench.training.task import resolve

MIXED = ["resnet8", "mobilenetv2", "wrn16-4"]
CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore::robench.core.errors.DoubtWarning")
def test_a_mixed_ensemble_is_trained_attacked_and_judged(tmp_path: Path) -> None:
    digits = data.load("digits")
    few = replace(digits, train=Split(digits.train.images[:320], digits.train.labels[:320]))
    store = Runs(tmp_path)
    fields = {"epochs": 3, "steps": 1, "eps": 0.1, "lr": 0.05, "batch_size": 32}
    task = resolve(few, "dverge", 3, models=MIXED, overrides=fields, init="scratch")
    run = ensure(task, few, store, device=CPU)
    assert [spec.name for spec in run.specs] == MIXED
    model = EvaluatedModel.of_run(run, CPU)
    pgd = ATTACKS.get("pgd")(steps=5)
    white = evaluate(model, digits, Whitebox(eps=(0.15,), attacks=(pgd,), restarts=1), samples=40, probe=False)
    rates = white.accuracy(["threat"]).set_index("threat")["accuracy"]
    assert rates["clean"] > 0.3, "it has learnt"
    assert rates["whitebox"] < rates["clean"] - 0.1, "the attack reaches every member"
    inside = evaluate(model, digits, Transfer(eps=(0.3,), attacks=(pgd,), restarts=1), samples=30, probe=False).frame
    assert set(inside["surrogate"]) == {"1", "2", "3"}
    fooled = inside[inside["surrogate"] == inside["member"]].groupby("member")["correct"].mean()
    assert (fooled < 0.9).all(), fooled.to_dict()
