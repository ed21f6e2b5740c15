"""One bill: `robench eval --dry-run` and `robench run --dry-run` say the same of the same evaluation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from robench.cli import run
from robench.core.data import load
from robench.core.models import ModelSpec
from robench.evaluation import cost
from robench.store.runs import Run, Runs
from robench.studies.board import _training
from robench.studies.drawing import costs
from robench.studies.plan import Plan, Step
from robench.studies.state import StudyFolder
from robench.studies.work import perform
from robench.training import loop
from robench.training.loop import ensure
from tests.studies import small
from tests.studies.small import planned

#: Options of `robench eval` beside ε, as `STUDY` has them.
OPTIONS = {
    "whitebox": ["--steps", "2", "--restarts", "2", "--eps", "0.1,0.3"],
    "convergence": ["--attacks", "fgsm,pgd:steps=3", "--eps", "0.1"],
    "transfer": ["--steps", "1", "--restarts", "2", "--eps", "0.1"],
    "blackbox": ["--attacks", "pgd,mdi2", "--losses", "ce", "--steps", "1", "--restarts", "2", "--eps", "0.1,0.3"],
    "blackbox-own": ["--attacks", "pgd", "--losses", "ce", "--steps", "1", "--restarts", "2", "--eps", "0.1"],
}

STUDY = """
# Trained for so long that cross-entropy is a loss to follow on all of them: that CW is tried too, eval alone can know.
title = "One bill"
dataset = "npz:{data}"
model = "resnet8"
sizes = [2]
samples = 8
batch_size = 16

[defenses.baseline]
epochs = 24
batch_size = 16
[defenses.advt]
epochs = 24
batch_size = 16
steps = 1

[threats.whitebox]
steps = 2
restarts = 2
eps = [0.1, 0.3]
[threats.convergence]
attacks = ["fgsm", "pgd:steps=3"]
eps = [0.1]
[threats.transfer]
steps = 1
restarts = 2
eps = [0.1]
[threats.blackbox]
attacks = ["pgd", "mdi2"]
losses = ["ce"]
steps = 1
restarts = 2
surrogates = [1, 2]
eps = [0.1, 0.3]
[threats.blackbox-own]
attacks = ["pgd"]
losses = ["ce"]
steps = 1
restarts = 2
surrogates = [1, 2]
eps = [0.1]
"""


@dataclass
class Bench:
    """A study whose runs are trained: its plan, file and folder of runs."""

    plan: Plan
    path: Path
    runs: Runs


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bill")
    path = small.write(folder)
    path.write_text(STUDY.format(data=folder / "data.npz"))
    assert run(["run", str(path), "--out", str(folder / "out"), "--only", "train", "--workers", "1"]) == 0
    return Bench(planned(path), path, Runs(folder / "out" / "runs"))


def test_a_finished_run_says_what_its_training_took(bench: Bench) -> None:
    """The forecast's passes, per image of whole batches: 64 images in batches of 16."""
    for step in bench.plan.steps.values():
        if step.kind == "train" and step.task:
            assert cost.trained(bench.runs.get(step.task.name)) == step.passes / 64
    run = bench.runs.get(bench.plan.main[0])
    unknown = [{**run.manifest["defense"], "version": 99}, {**run.manifest["defense"], "name": "gone"}]
    manifests = [{**run.manifest, "defense": each} for each in unknown]
    manifests.append({name: value for name, value in run.manifest.items() if name != "recipe"})
    assert all(math.isnan(cost.trained(Run(run.folder, manifest))) for manifest in manifests)


def test_a_training_costs_what_it_starts_from_too(bench: Bench) -> None:
    plain, other = (bench.runs.get(name) for name in bench.plan.main)
    start = {"run": "called otherwise then", "weights": plain.weights, "members": []}
    child = Run(other.folder, {**other.manifest, "ancestors": [start]})
    orphan = Run(other.folder, {**other.manifest, "ancestors": [{"run": "gone", "weights": "", "members": []}]})
    table = costs([other, child, orphan], torch.Size((1, 8, 8)), {plain.name: 2.0, other.name: 3.0})
    alone, both, lost = table["passes"]
    assert both == alone + cost.trained(plain)
    assert math.isnan(lost)
    assert _training(child, bench.runs) == (both, f"{both:,.0f}")
    assert _training(orphan, bench.runs) == (alone, f"≥ {alone:,.0f}")
    assert table["seconds"].tolist()[:2] == [3.0, 5.0]
    assert table["flops"].nunique() == 1


def test_the_start_of_a_training_is_its_weights_and_no_name(bench: Bench) -> None:
    """A Baseline that was trained anew under the same name is another one."""
    plain, other = (bench.runs.get(name) for name in bench.plan.main)
    again = {"run": plain.name, "weights": "0" * 64, "members": []}
    child = Run(other.folder, {**other.manifest, "ancestors": [again]})
    (row,) = costs([child], None, {plain.name: 2.0, other.name: 3.0}).to_dict("records")
    assert math.isnan(row["passes"])
    assert math.isnan(row["seconds"])
    total, text = _training(child, bench.runs) or (0.0, "")
    assert (total, text[:2]) == (cost.trained(other), "≥ ")


def test_a_training_that_was_resumed_has_no_time(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its task timed what was left of it."""
    plan, folder = bench.plan, StudyFolder(tmp_path)
    steps = [step for step in plan.steps.values() if step.kind == "train" and step.task and step.task.name in plan.main]
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    taken = iter(range(5))
    step_of = loop.train_step

    def cut_off(*arguments: Any) -> Any:
        next(taken)  # StopIteration after some steps
        return step_of(*arguments)

    def done(step: Step) -> str:
        call = plan.name, plan.study.model_dump_json(by_alias=True), str(tmp_path), step.key, "data", "cpu"
        return str(perform(*call)["state"])

    monkeypatch.setattr(loop, "train_step", cut_off)
    assert done(steps[0]) == "failed"
    monkeypatch.setattr(loop, "train_step", step_of)
    assert [done(step) for step in steps[:2]] == ["done", "done"]
    assert steps[1].task is not None
    assert list(folder.seconds(plan)) == [steps[1].task.name]


def test_operations_of_a_decision_are_those_of_the_paper() -> None:
    """ResNet-20 on 32x32 pixels takes 41 million multiplications (He et al. 2016), with 1x1 shortcuts a few more."""
    spec = ModelSpec(name="resnet20", num_classes=10, in_channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert cost.decision([spec] * 3, torch.Size((3, 32, 32))) / 6e6 == pytest.approx(41, rel=0.02)


def common(store: Runs, dataset: str) -> list[str]:
    """Options of every `robench eval` here."""
    where = ["--runs", str(store.root), "--dataset", dataset, "--device", "cpu"]
    return [*where, "--samples", "8", "--batch-size", "16", "--dry-run"]


def of(bench: Bench, threat: str, defense: str) -> float:
    """Passes of the plan's tasks that judge a defense under a threat."""
    return sum(
        step.passes
        for step in bench.plan.steps.values()
        if step.threat == threat and (step.kind == "craft" or (step.task and step.task.defense.name == defense))
    )


def billed(printed: str) -> str:
    """Passes of everything, as printed."""
    found = re.search(r"cells, (\S+) forward and backward passes", printed.splitlines()[-1])
    assert found, printed
    return found[1]


@pytest.mark.parametrize("threat", OPTIONS)
def test_eval_and_run_say_the_same_passes(bench: Bench, threat: str, capsys: pytest.CaptureFixture[str]) -> None:
    defense = "advt" if threat == "blackbox-own" else "baseline"
    target = next(name for name in bench.plan.main if f"-{defense}-" in name)
    surrogates = {task.name for step in bench.plan.steps.values() if step.threat == threat for task in step.surrogates}
    more = ["--surrogates", ",".join(sorted(surrogates))] if surrogates else []
    more += common(bench.runs, bench.plan.study.dataset)
    assert run(["eval", target, "--threat", threat.removesuffix("-own"), *OPTIONS[threat], *more]) == 0
    assert billed(capsys.readouterr().out) == f"{of(bench, threat, defense):.4g}"


def test_run_says_of_its_tasks_what_they_take(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    out = bench.runs.root.parent
    assert run(["run", str(bench.path), "--out", str(out), "--dry-run", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert not re.search(r"^train ", printed, re.MULTILINE)
    for threat in OPTIONS:
        passes = sum(step.passes for step in bench.plan.steps.values() if (step.kind, step.threat) == ("judge", threat))
        assert re.search(rf"^judge {threat} +\d+ tasks +{re.escape(f'{passes:.4g}')} passes", printed, re.MULTILINE)


def test_surrogates_that_are_missing_are_trained_and_crafted_on_in_the_forecast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is to be done is the same whether they are there or not, but for their training."""
    path = tmp_path / "plain.toml"
    fields = "epochs = 24\nbatch_size = 16\n"
    path.write_text(STUDY.replace("npz:{data}", "digits").replace(f"{fields}[defenses.advt]\n{fields}steps = 1\n", ""))
    plan = planned(path)
    target = next(step.task for step in plan.steps.values() if step.task and step.task.name in plan.main)
    store = Runs(tmp_path / "runs")
    # A run under the name of the target, whose weights nobody looks at.
    few = target.recipe.model_copy(update={"epochs": 1})
    ensure(replace(target, recipe=few), load("digits"), store, device=torch.device("cpu"))
    before = sorted(tmp_path.rglob("*"))
    asked = ["eval", target.name, "--threat", "blackbox", "--surrogates", "1,2", *OPTIONS["blackbox"]]
    asked += common(store, "digits")
    assert run(asked) == 0
    printed = capsys.readouterr().out
    wanted = [step for step in plan.steps.values()
              if (step.task and step.task.role == "surrogate" and step.kind == "train")
              or (step.threat == "blackbox" and (step.kind == "craft" or step.task == target))]  # fmt: skip
    assert sum(step.kind == "train" for step in wanted) == 2
    assert billed(printed) == f"{sum(step.passes for step in wanted):.4g}"
    for step in wanted:
        if step.kind == "train":
            assert f"{step.title}: {step.passes:.4g} passes" in printed
    assert sorted(tmp_path.rglob("*")) == before
    # Where they may not be trained, that is the error that the evaluation would end with.
    assert run([*asked, "--no-train"]) == 2
    assert "is missing" in capsys.readouterr().err
