"""Rows, tables and values of figures as they were, made in float64 by untrained networks: a change of code alone keeps
them. ``python -m tests.test_golden`` writes them anew; the CHANGELOG says why a number was wrong."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch

from robench.attacks.mdi2 import MDI2
from robench.attacks.pgd import PGD
from robench.attacks.sgm import SGM
from robench.core.data import Data
from robench.evaluation.engine import Evaluator
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.outcomes import Outcomes
from robench.evaluation.settings import Settings
from robench.evaluation.threats import Blackbox, Convergence, Transfer, Whitebox
from robench.reports import build
from tests import small

FOLDER = Path(__file__).with_name("golden")
ROWS = FOLDER / "rows.csv.gz"
CPU = torch.device("cpu")
SORTED = ["target", "threat", "surrogate", "attack", "loss", "eps", "restart", "member", "sample"]


def made() -> Outcomes:
    """Every threat on two ensembles that differ in size, in float64."""
    data: Data = small.noise()
    targets = [
        EvaluatedModel.of_model(small.ensemble(0, members), CPU, name=f"{defense}-{members}", defense=defense)
        for defense, members in (("baseline", 2), ("dverge", 3))
    ]
    surrogate = EvaluatedModel.of_model(small.ensemble(7), CPU, name="hold-out", defense="baseline")
    black = tuple(
        attack
        for loss in ("ce", "cw")
        for attack in (PGD(steps=4, momentum=1.0, loss=loss), MDI2(steps=4, loss=loss), SGM(steps=4, loss=loss))
    )
    parts = []
    for threat in (
        Whitebox(eps=(0.02, 0.05), attacks=(PGD(steps=5), PGD(steps=5, loss="cw")), restarts=2),
        Transfer(eps=(0.03,), attacks=(PGD(steps=5),), restarts=2),
        Convergence(eps=(0.02,), attacks=(PGD(steps=1), PGD(steps=8))),
        Blackbox(surrogates=(surrogate,), eps=(0.05, 0.1), attacks=black, restarts=2),
    ):
        evaluator = Evaluator(data, Settings(CPU, "float64"))
        parts.append(evaluator.run(targets, threat, torch.arange(40)))
    return Outcomes.concat(parts)


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """Sorted, and without the keys of cells, which hold versions of code, and without what is of models that draw."""
    assert (frame["draws"] == 1).all()
    assert (frame["expected"] == frame["correct"]).all()
    plain = frame.drop(columns=["cell", "expected", "draws"])
    for name in plain.select_dtypes(["category", "string"]).columns:
        plain[name] = plain[name].astype(object).fillna("")
    return plain.sort_values(SORTED, ignore_index=True)


def drawn(outcomes: Outcomes, out: Path) -> list[Path]:
    """The tables and the values of figures."""
    build.write(build.draw(outcomes.frame), out, {}, formats=("png",))
    return sorted(path for path in out.iterdir() if path.suffix in (".csv", ".md", ".tex"))


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return made()


def test_rows_are_those_of_before(outcomes: Outcomes) -> None:
    before = pd.read_csv(ROWS, keep_default_na=False).sort_values(SORTED, ignore_index=True)
    now = comparable(outcomes.frame)
    assert list(now.columns) == list(before.columns)
    pd.testing.assert_frame_equal(now, before, check_dtype=False, rtol=1e-5, atol=1e-6)
    verdicts = ["prediction", "correct", "zero_gradient", "restart"]
    assert (now[verdicts].to_numpy() == before[verdicts].to_numpy()).all()


def test_tables_and_values_of_figures_are_those_of_before(outcomes: Outcomes, tmp_path: Path) -> None:
    paths = drawn(outcomes, tmp_path)
    assert {path.name for path in paths} == {path.name for path in FOLDER.iterdir()} - {ROWS.name}
    for path in paths:
        assert path.read_text() == (FOLDER / path.name).read_text(), path.name


if __name__ == "__main__":
    rows = made()
    comparable(rows.frame).to_csv(ROWS, index=False)
    for path in FOLDER.iterdir():
        if path != ROWS:
            path.unlink()
    with tempfile.TemporaryDirectory() as made_anew:
        for path in drawn(rows, Path(made_anew)):
            (FOLDER / path.name).write_bytes(path.read_bytes())
