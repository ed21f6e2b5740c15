"""Plans: which tasks, in which order, at what cost; without loading data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robench.cli import run
from robench.core import data as data_module
from robench.core import plugins
from robench.core.data import load, make, outline
from robench.defenses import DEFENSES
from robench.studies.plan import Plan, Step, bill, makespan, pace, ranks
from robench.training.task import resolve
from tests.studies import small
from tests.studies.small import planned


def of(plan: Plan, kind: str, threat: str = "") -> list[Step]:
    return [step for step in plan.steps.values() if step.kind == kind and step.threat == threat]


def test_every_task_comes_after_what_it_needs() -> None:
    plan = planned("dverge2020")
    seen: set[str] = set()
    for step in plan.steps.values():
        assert set(step.needs) <= seen, step.title
        seen.add(step.key)
    titles = {step.title: step for step in plan.steps.values()}
    trained = titles["train cifar10-resnet20-dverge-n5-s1"]
    assert [plan.steps[key].title for key in trained.needs] == ["train cifar10-resnet20-baseline-n5-s1"]
    judged = titles["blackbox of cifar10-resnet20-dverge-n5-s1"]
    assert sum(plan.steps[key].kind == "craft" for key in judged.needs) == 18
    assert {trained.key, titles["train cifar10-resnet20-baseline-n8-s0-surrogate"].key} <= set(judged.needs)
    assert set(of(plan, "report")[0].needs) == {step.key for step in plan.steps.values() if step.kind == "judge"}


def test_the_paper_is_planned_whole() -> None:
    """6 defenses x 3 sizes x 3 seeds; 3 Baseline surrogates, and those of the other five; 27 settings of the axes, of
    which λ = 1, ε = .07 and a trained Baseline's start are the main runs'."""
    plan = planned("dverge2020")
    assert len(plan.main) == len(set(plan.main)) == 54
    assert len(of(plan, "train")) == 54 + 6 * 3 + 4 + 20 + 3 + 1
    # 1,000 images, 7 radii, 30 versions of 100 steps: on 3 + 5 + 8 members, 10 versions each. The contract looks at the
    # clean image and at the last gradient, the evaluator at what the copy and the original return; then clean images.
    crafted = sum(step.passes for step in of(plan, "craft", "blackbox"))
    assert crafted == pytest.approx((1000 * 7 * 10 * (100 + 1 / 3 + 1 + 2 / 3) + 1000 / 3) * (3 + 5 + 8))
    assert sum(step.disk for step in of(plan, "craft", "blackbox")) == 1000 * 7 * 30 * 3 * 32 * 32 * 4
    white = next(step for step in of(plan, "judge", "whitebox") if step.task and step.task.n == 8)
    # Of 100 survivors, each is attacked again with 50 steps, with 25, MORA's five runs of 20, and 200 queries.
    again = 100 * (50 + 2 + 25 + 2 + 5 * (20 + 1) + 2 + 200 / 3 + 4 / 3) * 8
    assert white.passes == pytest.approx(1000 * 7 * 5 * (50 + 2) * 8 + 1000 * 8 / 3 + again)
    moved = next(step for step in of(plan, "judge", "transfer") if step.task and step.task.n == 8)
    assert moved.passes == pytest.approx(1000 * 7 * 5 * 8 * (50 + 5 / 3 + 8 / 3) + 10_000 * 8 / 3)
    train = next(step for step in of(plan, "train") if step.title == "train cifar10-resnet20-baseline-n3-s0")
    assert train.passes == 200 * 390 * 128 * 3
    assert train.disk == 4 * 3 * 272_474


def test_passes_of_a_training_step() -> None:
    def passes(name: str, n: int = 5) -> float:
        return DEFENSES.get(name)().passes(n)

    assert passes("baseline") == passes("adp") == 1
    assert passes("advt") == 10 + 1
    assert passes("dverge") == 10 + 4
    assert passes("dverge-advt") == 10 + 10 + 4 + 1


def test_tasks_are_those_of_the_train_command() -> None:
    plan = planned("demo", "defenses.dverge.epochs=3")
    digits = load("digits")
    tasks = {step.task.name: step.task.key for step in of(plan, "train") if step.task}
    for task in (
        resolve(digits, "baseline", 3),
        resolve(digits, "dverge", 3, overrides={"epochs": "3"}),
        resolve(digits, "baseline", 5, role="surrogate"),
    ):
        assert tasks[task.name] == task.key
    named = planned("demo", 'recipe="cifar10-fast"').main[0]
    assert named == resolve(digits, "baseline", 3, recipe="cifar10-fast").name
    # A value that is the recipe's own makes no other run.
    assert "digits-resnet8-dverge-n3-s0" in planned("demo", "defenses.dverge.epochs=20").main


def test_any_setting_of_a_threat_makes_another_task_and_no_other() -> None:
    before, after = planned("demo"), planned("demo", "threats.whitebox.steps=21")
    changed = {before.steps[key].title for key in before.steps.keys() - after.steps.keys()}
    assert changed == {f"whitebox of digits-resnet8-{name}-n3-s0" for name in ("baseline", "dverge")} | {"report"}


def test_an_outline_is_the_data_set_without_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data_module.DATASETS._items, "cifar10", None)  # loading it would fail
    blank = outline("cifar10")
    shape = (3, 32, 32)
    arrays = [np.zeros((2, *shape), np.uint8), np.arange(2)]
    whole = make("cifar10", (arrays[0], arrays[1]), (arrays[0], arrays[1]), classes=blank.classes,
                 statistics=(blank.mean, blank.std), recipe="cifar10")  # fmt: skip
    assert blank.model("resnet20") == whole.model("resnet20")
    assert resolve(blank, "dverge", 3).key == resolve(whole, "dverge", 3).key
    assert (len(blank.train), len(blank.test)) == (50_000, 10_000)
    assert blank.train.images.shape == (50_000, *shape)
    assert blank.train.images.untyped_storage().nbytes() == 1


def step(key: str, passes: float, *needs: str) -> Step:
    return Step(kind="train", title=key, key=key, needs=needs, passes=passes)


def test_the_schedule_of_a_known_graph() -> None:
    """A chain of 2 + 3, and five single tasks of 1: 10 in all."""
    steps = {each.key: each for each in (step("a", 2), step("b", 3, "a"), *(step(f"c{i}", 1) for i in range(5)))}
    assert ranks(steps, lambda each: each.passes) == {"a": 5, "b": 3, **{f"c{i}": 1 for i in range(5)}}
    assert [makespan(steps, lambda each: each.passes, k) for k in (1, 2, 3, 64)] == [10, 5, 5, 5]
    # What is done already is not waited for.
    assert makespan({"b": steps["b"]}, lambda each: each.passes, 1) == 3


def test_a_pass_is_measured() -> None:
    found = pace(planned("demo"), torch.device("cpu"))
    assert 1e-6 < found.attacking < 0.1
    assert 1e-6 < found.training < 0.1


def test_dry_run_of_the_paper_is_quick_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    assert run(["run", "dverge2020", "--dry-run", "--device", "cpu"]) == 0
    # Beside the import of torch.
    assert time.process_time() - began < 5
    printed = capsys.readouterr().out
    plan = planned("dverge2020")
    assert f"in all {len(plan.steps)} of {len(plan.steps)} tasks" in printed
    for name, (count, passes, _) in bill(list(plan.steps.values())).items():
        assert any(line.split()[: len(name.split()) + 1] == [*name.split(), str(count)] and f"{passes:.4g}" in line
                   for line in printed.splitlines())  # fmt: skip
    assert "cpu:" in printed
    assert list(tmp_path.iterdir()) == []


def test_only_a_kind_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = small.write(tmp_path)
    assert run(["run", str(study), "--out", str(tmp_path / "out"), "--dry-run", "--only", "train"]) == 0
    assert "craft" not in capsys.readouterr().out


def test_a_task_is_counted_once_where_it_is_needed_twice() -> None:
    steps = {each.key: each for each in (step("a", 2), step("b", 3, "a", "a"))}
    assert makespan(steps, lambda each: each.passes, 2) == 5


def test_expanding_a_large_study_reads_the_types_of_each_plug_in_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[type] = []

    def counted(cls: type, original: Any = plugins.get_type_hints) -> Any:
        read.append(cls)
        return original(cls)

    monkeypatch.setattr(plugins, "get_type_hints", counted)
    plugins._adapters.cache_clear()
    assert len(planned("dverge2020").steps) > 500
    assert len(read) == len(set(read))
    plugins._adapters.cache_clear()
