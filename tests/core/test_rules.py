"""How ensembles decide: each rule against plain Python, and what follows for runs, keys, attacks and verdicts."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robench.api import evaluate
from robench.attacks import ATTACKS
from robench.core import data, rules
from robench.core.ensemble import Ensemble, decided, followed
from robench.core.errors import RobenchError
from robench.core.fast import attackable, rule_of
from robench.core.models import build
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.predict import classes, predict
from robench.evaluation.threats import Whitebox
from robench.store.runs import Runs
from robench.studies.plan import expand
from robench.studies.study import parse
from robench.training.loop import ensure
from robench.training.task import resolve

CPU = torch.device("cpu")


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = sum(math.exp(value - top) for value in row)
    return [math.exp(value - top) / total for value in row]


def by_hand(members: list[list[float]], rule: str) -> int:
    """The class that members with these logits of one image decide on."""
    count = len(members[0])
    probabilities = [softmax(row) for row in members]
    mean = [sum(p[c] for p in probabilities) for c in range(count)]
    if rule == "softmax":
        score: list[float] = mean
    elif rule == "logits":
        score = [sum(row[c] for row in members) for c in range(count)]
    elif rule == "confidence":
        score = max(probabilities, key=max)
    else:
        votes = [row.index(max(row)) for row in members]
        most = max(votes.count(c) for c in range(count))
        score = [mean[c] if votes.count(c) == most else -1.0 for c in range(count)]
    return score.index(max(score))


@pytest.mark.parametrize("rule", ["softmax", "logits", "confidence", "vote"])
def test_each_rule_decides_as_by_hand_and_rules_differ(rule: str) -> None:
    logits = 3 * torch.randn(4, 400, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = decided(logits, rules.checked(rule)).argmax(dim=1).tolist()
    wanted = [by_hand(logits[:, b].tolist(), rule) for b in range(400)]
    assert found == wanted
    usual = [by_hand(logits[:, b].tolist(), "softmax") for b in range(400)]
    assert (wanted == usual) == (rule == "softmax")


@pytest.mark.parametrize("rule", rules.RULES)
def test_what_attacks_follow_has_a_gradient_for_every_member(rule: rules.Rule) -> None:
    logits = torch.randn(3, 50, 5, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    torch.nn.functional.cross_entropy(followed(logits, rule), torch.zeros(50, dtype=torch.int64)).backward()
    assert logits.grad is not None
    assert (logits.grad.abs().amax(dim=(1, 2)) > 0).all()
    if rule not in rules.STAND_INS:
        assert torch.equal(followed(logits, rule), decided(logits, rule))


class Says(nn.Module):
    """Always the same class."""

    def __init__(self, index: int, sure: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.nn.functional.one_hot(torch.tensor(index), 4) * sure)

    def forward(self, images: Tensor) -> Tensor:
        return self.weight.expand(len(images), -1) + 0 * images.flatten(1).sum(dim=1, keepdim=True)


def test_verdicts_follow_the_rule() -> None:
    """One member is sure of class 0, two are a little for 1."""
    members = [Says(0, 4.0), Says(1, 1.0), Says(1, 1.0)]
    images, labels = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(2)), np.ones(40, dtype=np.int64)
    wanted = {"softmax": 0, "logits": 0, "confidence": 0, "vote": 1}
    for rule, index in wanted.items():
        found = predict(Ensemble(members, rule).eval(), images, labels, members=True)
        assert found.prediction[:, 0].tolist() == [0, 1, 1, index], rule
        assert found.correct[-1].all() == (index == 1)
        assert ((found.margin[-1] > 0) == found.correct[-1]).all()


def test_a_drawn_member_decides_alike_in_any_batch_and_everyone_is_drawn() -> None:
    ensemble = Ensemble([Says(index, 1.0) for index in range(3)], "random").eval()
    images = torch.rand(300, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    found = classes(ensemble, images)
    assert torch.equal(classes(ensemble, images[7:9]), found[7:9])
    assert (classes(ensemble, (images + 1e-6).clamp(0, 1)) == found).float().mean() > 0.95  # rounding draws no other
    counts = found.bincount(minlength=4).tolist()
    assert min(counts[:3]) > 70
    assert counts[3] == 0


def test_the_usual_rule_leaves_no_trace(tmp_path: Path) -> None:
    """Keys, identities and manifests are those of before there were rules."""
    digits = data.load("digits")
    task = resolve(digits, "baseline", 2, models=["resnet8"])
    same = resolve(digits, "baseline", 2, models=["resnet8"], rule="softmax")
    assert "rule" not in task.manifest()
    assert (same.key, same.name) == (task.key, task.name)
    members = [build(spec, i) for i, spec in enumerate(task.members)]
    assert "rule" not in vars(Ensemble(members, "softmax"))
    about = {"members": task.members, "defense": {"name": "x"}, "seed": 0, "role": "target", "data": None}
    store = Runs(tmp_path)
    usual = store.save("usual", Ensemble(members), **about)  # type: ignore[arg-type]
    assert "rule" not in json.loads((usual.folder / "manifest.json").read_text())
    voted = store.save("voted", Ensemble(members, "vote"), **about)  # type: ignore[arg-type]
    assert json.loads((voted.folder / "manifest.json").read_text())["rule"] == "vote"
    assert voted.load().rule == store.get("voted").rule == "vote"
    assert voted.weights == usual.weights
    assert voted.identity != usual.identity
    one, other = (EvaluatedModel.of_model(Ensemble(members, rule), CPU) for rule in ("softmax", "logits"))
    assert one.identity != other.identity


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_copies_that_are_attacked_keep_the_rule(precision: str) -> None:
    task = resolve(data.load("digits"), "baseline", 2, models=["resnet8"])
    ensemble = Ensemble((build(spec, i) for i, spec in enumerate(task.members)), "logits").eval()
    fast = attackable(ensemble, torch.rand(1, 1, 8, 8), precision)  # type: ignore[arg-type]
    assert rule_of(fast) == rule_of(copy.deepcopy(ensemble)) == "logits"


def test_a_run_is_trained_and_attacked_by_its_rule(tmp_path: Path) -> None:
    digits, store = data.load("digits"), Runs(tmp_path)
    task = resolve(digits, "baseline", 2, models=["resnet8"], overrides={"epochs": 1}, rule="vote")
    assert task.name.startswith("digits-resnet8-baseline-n2-s0-")
    run = ensure(task, digits, store, device=CPU)
    assert run.rule == "vote"
    pgd = ATTACKS.get("pgd")(steps=3)
    judged = {}
    for rule in rules.RULES:
        ensemble = Ensemble(run.load().members, rule).eval()
        found = evaluate(ensemble, digits, Whitebox(eps=(0.1,), attacks=(pgd,), restarts=1), samples=60, probe=False)
        label = "pgd:steps=3" + (f":follows={rules.STAND_INS[rule]}" if rule in rules.STAND_INS else "")
        rows = found.frame[found.frame["threat"] == "whitebox"]
        assert rows["attack"].unique().tolist() == [label]
        judged[rule] = rows.set_index("sample")["prediction"].sort_index().to_numpy()
        clean = found.frame[found.frame["threat"] == "clean"].set_index("sample")["prediction"].sort_index()
        images = data.to_images(digits.test.images[clean.index.tolist()])
        assert clean.tolist() == classes(ensemble, images).tolist()
    assert (judged["logits"] != judged["vote"]).any()


def test_mora_attacks_the_rule_of_the_ensemble() -> None:
    task = resolve(data.load("digits"), "baseline", 3, models=["resnet8"])
    members = [build(spec, i) for i, spec in enumerate(task.members)]
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    crafted = {
        (rule, named): ATTACKS.get("mora")(steps=2, targets=1, rule=named)(
            Ensemble(members, rule).eval(), images, labels, 0.1
        ).images
        for rule, named in (("softmax", "softmax"), ("logits", "softmax"), ("logits", "logits"))
    }
    assert torch.equal(crafted["logits", "softmax"], crafted["logits", "logits"])
    assert not torch.equal(crafted["logits", "softmax"], crafted["softmax", "softmax"])


def test_defenses_decide_as_their_authors_unless_told() -> None:
    digits = data.load("digits")
    assert resolve(digits, "advoap", 3).rule == resolve(digits, "mrboost", 3).rule == "logits"
    told = resolve(digits, "advoap", 3, rule="softmax")
    assert told.rule == "softmax"
    assert told.name != resolve(digits, "advoap", 3).name
    text = 'title = "x"\ndataset = "digits"\ndefenses = ["baseline"]\nsizes = [3]\nrule = "confidence"\n'
    steps = expand("mine", parse("mine", text), "data").steps.values()
    assert [step.task.rule for step in steps if step.task] == ["confidence"]
    with pytest.raises(RobenchError, match="mine: rule:"):
        parse("mine", text.replace("confidence", "consensus"))
    with pytest.raises(RobenchError, match="rule 'consensus'"):
        resolve(digits, "baseline", 3, rule="consensus")
    with pytest.raises(RobenchError, match="rule 'consensus'"):
        Ensemble([Says(0, 1.0)], "consensus")
