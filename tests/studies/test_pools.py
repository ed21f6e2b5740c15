"""Pools of surrogates, from a study file alone: other networks and trainings, stopped early, snapshots, mixed."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from robench.cli import run
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.session import stored
from robench.store.runs import Runs
from robench.studies.plan import Pool, expand
from robench.studies.study import parse
from robench.training.task import Task
from tests.studies import small

POOLS = """
title = "Pools"
dataset = "npz:{data}"
model = "resnet8"
sizes = [1]
samples = 8
batch_size = 16

[defenses.baseline]
epochs = 6
batch_size = 16

[threats.blackbox]
eps = [0.3]
attacks = ["pgd"]
losses = ["ce"]
surrogates = ["early", "mixed", "lgv"]
steps = 2
restarts = 1

[[surrogates.early]]
fields = {{stop_after = 2}}

[[surrogates.mixed]]
model = "resnet14"
fields = {{stop_after = 3}}
[[surrogates.mixed]]
defense = "adp"
n = 2
fields = {{epochs = 3, batch_size = 16}}

[[surrogates.lgv]]
fields = {{epochs = 2, lr = 0.05, gamma = 1.0, snapshots = 2}}
"""


#: The second part of the mixed pool.
PARTS = 'defense = "adp"\nn = 2\nfields = {epochs = 3, batch_size = 16}'


def text(folder: Path) -> str:
    small.write(folder)
    return POOLS.format(data=folder / "data.npz")


def test_a_study_file_alone_makes_its_pools_and_the_report_shows_each(tmp_path: Path) -> None:
    path = tmp_path / "pools.toml"
    path.write_text(text(tmp_path))
    out = tmp_path / "out"
    command = ["run", str(path), "--out", str(out), "--workers", "1", "--device", "cpu"]
    assert run(command) == 0
    store = Runs(out / "runs")
    pools = {name.rpartition("-")[0]: store.get(name) for name in store.names() if name.count("-") == 1}
    assert set(pools) == {"early", "mixed", "lgv"}
    assert {name: each.n for name, each in pools.items()} == {"early": 1, "mixed": 3, "lgv": 4}
    assert [spec.name for spec in pools["mixed"].specs] == ["resnet14", "resnet8", "resnet8"]
    assert pools["mixed"].manifest["defense"]["name"] == "mixed"
    assert len(pools["early"].manifest["history"]) == 2
    assert {each.role for each in pools.values()} == {"surrogate"}
    assert isinstance(pools["mixed"].load(), Ensemble)

    took = pd.read_csv(out / "report" / "table_surrogates.csv")
    assert sorted(name.rpartition("-")[0] for name in took["surrogate"]) == ["early", "lgv", "mixed"]
    assert took["clean"].between(0, 1).all()  # each surrogate's own
    assert took["alone"].between(0, 1).all()
    shown = pd.read_csv(out / "report" / "figA_each_surrogate.csv")
    pd.testing.assert_frame_equal(shown, took)
    page = (out / "report" / "report.html").read_text()
    assert "Black-box accuracy in %, by surrogate" in page
    counted = pd.read_csv(out / "report" / "figA_surrogates.csv")
    assert counted["surrogates"].tolist() == [1, 2, 3]
    assert (out / "report" / "figA_surrogates.pdf").exists()

    runs = {name: store.get(name).weights for name in store.names()}
    before = stored(store.all()).frame
    assert run(command) == 0  # nothing is made again
    assert {name: store.get(name).weights for name in store.names()} == runs
    pd.testing.assert_frame_equal(stored(store.all()).frame, before)


def test_pools_have_keys_and_names_of_their_own(tmp_path: Path) -> None:
    plan = expand("pools", parse("pools", text(tmp_path)))
    (pool,) = [step.pool for step in plan.steps.values() if step.pool]
    assert isinstance(pool, Pool)
    assert pool.count == 3
    trained = {step.task.name: step.task.key for step in plan.steps.values() if step.kind == "train" and step.task}
    assert len(set(trained.values())) == len(trained) == 5  # a target, two parts, early, lgv
    other = expand("pools", parse("pools", text(tmp_path).replace("stop_after = 3", "stop_after = 4")))
    (changed,) = [step.pool for step in other.steps.values() if step.pool]
    assert changed.key != pool.key
    assert changed.name != pool.name
    combined = next(step for step in plan.steps.values() if step.kind == "combine")
    assert set(combined.needs) < set(plan.steps)
    judged = [step for step in plan.steps.values() if step.kind == "craft" and step.surrogates == (pool,)]
    assert judged
    assert all(combined.key in step.needs for step in judged)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"mixed", "lgv"]', '"mixde"]', "should be sizes, .* or pools of .surrogates. .early, mixed, lgv., not mixde"),
        ('defense = "adp"', 'defense = "adb"', r"surrogates\.mixed\.2: unknown defense 'adb'; did you mean adp"),
        ('model = "resnet14"', 'model = "resnet15"', r"surrogates\.mixed\.1: .*resnet15"),
        ("stop_after = 2", "stop_after = 9", r"surrogates\.early\.1: .*`stop_after` of the recipe .* got 9"),
        ("stop_after = 2", "stop_afer = 2", r"surrogates\.early\.1: .*did you mean stop_after"),
        ("n = 2", "n = 0", r"surrogates\.mixed\.2\.n"),
        ("n = 2", "members = 2", r"unknown key 'members'"),
        ("[[surrogates.early]]", "[surrogates.early]", r"surrogates\.early"),
        (PARTS, 'model = "resnet14"\nfields = {stop_after = 3}', "two parts are the same training"),
        ('n = 2', 'n = 1', "adp"),
        ("snapshots = 2", "snapshots = 99", r"surrogates\.lgv\.1: `snapshots` of the recipe, 99, is more than the 4"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_pool_is_said_with_its_place(tmp_path: Path, old: str, new: str, says: str) -> None:
    spoilt = text(tmp_path)
    assert old in spoilt
    with pytest.raises(RobenchError, match=says) as error:
        expand("pools", parse("pools", spoilt.replace(old, new)))
    assert "\n" not in str(error.value)


def test_the_pools_of_the_page_on_studies_are_understood() -> None:
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text("utf-8")
    (block,) = [each for each in re.findall(r"```toml\n(.*?)```", page, re.DOTALL) if "[[surrogates." in each]
    head = 'title = "page"\ndataset = "cifar10"\nsizes = [3]\ndefenses = ["baseline"]\n'
    plan = expand("page", parse("page", head + block))
    (judged,) = [step for step in plan.steps.values() if step.kind == "judge"]
    assert [each.count for each in judged.surrogates] == [3, 1, 4, 40]
    (lgv,) = [each for each in judged.surrogates if each.name.startswith("lgv")]
    assert isinstance(lgv, Task)
    assert {lgv.recipe.rate(epoch) for epoch in range(10)} == {0.05}
    assert lgv.start is not None
