"""What stands side by side in a report and is not of the same kind."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from robench.evaluation.words import attacks
from robench.session import Session, stored
from robench.store.runs import Run
from robench.studies import unlike
from robench.studies.drawing import draw
from tests.small import SPEC, ensemble

BLACK = {"eps": (0.1,), "restarts": 1, "attacks": attacks("blackbox", ["pgd"], ["ce"], steps=1)}


def white(session: Session, runs: list[Run], **options: Any) -> None:
    session.whitebox(runs, **{"eps": (0.1,), "restarts": 1, "attacks": attacks("whitebox", steps=1), **options})


def saved(session: Session, name: str, seed: int, **recipe: float) -> Run:
    history = [
        {"epoch": 1, "lr": 0.1, "terms": {"ce": 1.0}, "track": {
            "diversity": float(seed), "diversity_eps": 0.1, "transferability": 0.5, "transferability_eps": 0.1,
            "images": 16.0,
        }}
    ]  # fmt: skip
    return session.store.save(
        name, ensemble(seed), members=[SPEC] * 2, defense={"name": "adp", "alpha": 2.0}, seed=seed, role="target",
        data=None, more={"recipe": {"epochs": 3, **recipe}, "history": history},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mine", "theirs", "told"),
    [({"lr": 0.1}, {"lr": 0.1}, []), ({"lr": 0.1}, {"lr": 0.2}, ["`lr`"]), ({"lr": 0.1}, {}, [])],
)
def test_trainings_that_differ_in_more_than_the_seed(
    judged: Session, mine: dict[str, float], theirs: dict[str, float], told: list[str]
) -> None:
    runs = [saved(judged, "one", 3, **mine), saved(judged, "two", 4, **theirs)]
    frame = pd.DataFrame([{"target": run.name, "defense": "adp", "n": 2, "seed": run.seed} for run in runs])
    assert list(unlike.trainings(frame, runs)) == [(["one", "two"], what) for what in told]
    assert list(unlike.trainings(frame.assign(seed=0), runs)) == []


def test_they_are_not_averaged_in_a_report(judged: Session, tmp_path: Path, told: list[str]) -> None:
    alike = [saved(judged, "one", 3, lr=0.1), saved(judged, "two", 4, lr=0.1)]
    runs = [*alike, saved(judged, "three", 5, lr=0.2)]
    white(judged, runs)
    draw(stored(alike), alike, tmp_path / "alike")
    assert pd.read_csv(tmp_path / "alike" / "table5_whitebox.csv")["seeds"].tolist() == [2, 2]
    draw(stored(runs), runs, tmp_path / "all")
    for name in ("table5_whitebox", "fig2_trend", "fig4_accuracy"):
        table = pd.read_csv(tmp_path / "all" / f"{name}.csv")
        assert set(table["defense"]) == {"one", "two", "three"}
        assert set(table["seeds"]) == {1}
    (line,) = (text for text in told if "share defense" in text)
    assert line.startswith("one, three, two share defense and size and differ in `lr`, not in the seed alone")


def test_attacks_of_other_strength_are_told(judged: Session) -> None:
    one, two, three = (saved(judged, name, seed) for name, seed in (("one", 3), ("two", 4), ("three", 5)))
    white(judged, [one])
    white(replace(judged, settings=replace(judged.settings, seed=7)), [two])
    assert list(unlike.attacks(stored([one, two]))) == []
    white(judged, [three], restarts=2, attacks=attacks("whitebox", steps=3))
    assert list(unlike.attacks(stored([one, two, three]))) == [
        "at ε 0.1 whitebox numbers are of other attacks, and not all are comparable: one, two: pgd:steps=1 ce x 1; "
        "three: pgd:steps=3 ce x 2"
    ]


def test_a_surrogate_whose_weights_were_replaced_is_told(judged: Session) -> None:
    one = saved(judged, "one", 3)
    judged.blackbox([one], [judged.store.get("sub")], **BLACK)
    assert list(unlike.attacks(stored([one]))) == []
    shutil.rmtree(judged.store.folder("sub"))
    other = saved(judged, "sub", 6)
    Session(judged.store, judged.data, judged.settings, judged.samples).blackbox(
        [one], [other], **BLACK, allow_related=True
    )
    assert list(unlike.attacks(stored([one])))[-1].startswith("surrogate sub is 2 models of different weights")
