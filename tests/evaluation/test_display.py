"""Outcomes as people see them: the numbers of `accuracy`, whatever the form."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pytest

import robench
from robench.attacks import ATTACKS
from robench.core.data import Data
from robench.core.errors import RobenchError
from robench.evaluation import display
from robench.evaluation.findings import Finding
from robench.evaluation.outcomes import Outcomes
from tests.small import ensemble

mpl.use("agg")

PGD = ATTACKS.get("pgd")


@pytest.fixture(scope="module")
def white(data: Data) -> Outcomes:
    threat = robench.Whitebox(eps=(0.02, 0.1), restarts=1, attacks=(PGD(steps=2),))  # type: ignore[call-arg]
    with warnings.catch_warnings(action="ignore", category=robench.DoubtWarning):
        found = robench.evaluate(ensemble(0), data, threat, samples=30, name="a_<b>", probe=False)
    return Outcomes(found.frame, [Finding("sound", "pass", "yes"), Finding("odd", "warn", "1 < 2 & so on")])


@pytest.fixture(scope="module")
def transfer(data: Data) -> Outcomes:
    threat = robench.Transfer(eps=(0.1,), restarts=1, attacks=(PGD(steps=2),))  # type: ignore[call-arg]
    with warnings.catch_warnings(action="ignore", category=robench.DoubtWarning):
        return robench.evaluate(ensemble(0), data, threat, samples=10, name="t", probe=False)


def percent(outcomes: Outcomes, threat: str, eps: float) -> str:
    (row,) = outcomes.where(threat=threat, eps=eps).accuracy().to_dict("records")
    return f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def test_the_table_has_the_numbers(white: Outcomes) -> None:
    (line,) = display.table(white).to_dict("records")
    assert list(line) == ["target", "threat", "clean", "0.02", "0.1", "images"]
    assert line["threat"] == "white-box"
    assert line["clean"] == percent(white, "clean", 0.0)
    assert line["0.1"] == percent(white, "whitebox", 0.1)
    assert line["images"] == "30"


def test_repr_says_what_speaks_against_it(white: Outcomes) -> None:
    lines = repr(white).splitlines()
    assert lines[0].startswith(f"Outcomes of {len(white.frame)} rows, 1 of 2 checks pass; accuracy in %")
    assert percent(white, "whitebox", 0.1) in lines[4]
    assert lines[-1] == "warn  odd: 1 < 2 & so on"


def test_html_is_escaped(white: Outcomes) -> None:
    shown = white._repr_html_()
    assert "<td>a_&lt;b&gt;</td>" in shown
    assert "<li>warn  odd: 1 &lt; 2 &amp; so on</li>" in shown
    assert "<th>ε 0.1</th>" in shown
    assert "<b>" not in shown


def test_plot_draws_on_the_axes_that_are_given(white: Outcomes) -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert white.plot(axes) is axes
    (line,) = axes.get_lines()
    table = white.accuracy().sort_values("eps")
    assert list(line.get_xdata()) == [0.0, 0.02, 0.1]  # type: ignore[arg-type]
    assert list(line.get_ydata()) == list(100 * table["accuracy"])  # type: ignore[arg-type]
    assert white.plot().figure is not axes.figure
    plt.close("all")


def test_latex_escapes_names_and_compiles_where_it_can(white: Outcomes, tmp_path: Path) -> None:
    text = white.to_latex()
    assert r"a\_<b>" in text
    assert percent(white, "whitebox", 0.1) in text
    assert text.count(r"\\") == 2
    if shutil.which("pdflatex"):
        page = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{text}\end{{document}}"
        (tmp_path / "t.tex").write_text(page)
        done = subprocess.run(["pdflatex", "-interaction=batchmode", "t.tex"], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0


def test_transfer_is_the_mean_between_members(transfer: Outcomes) -> None:
    rates = transfer.transferability()
    between = rates[(rates["member"] != "ensemble") & (rates["member"] != rates["source"].astype(str))]
    (line,) = display.table(transfer).query("threat == 'transfer, success'").to_dict("records")
    assert line["0.1"] == f"{100 * between['success'].mean():.1f}"
    with pytest.raises(RobenchError, match=r"transferability\(\) is a matrix"):
        transfer.plot()


def test_nothing_can_be_shown_too(white: Outcomes) -> None:
    empty = Outcomes.concat([])
    assert repr(empty).startswith("Outcomes of 0 rows, nothing was checked")
    assert "<table" in empty._repr_html_()
    assert pd.DataFrame(display.table(empty)).empty
    clean = white.where(threat="clean")
    assert percent(white, "clean", 0.0) in repr(clean)


def test_names_are_no_markup_and_near_radii_have_columns_of_their_own(white: Outcomes) -> None:
    near = white.frame.assign(target="net[a]:bug:[/x]")
    rest = near[near["eps"] == 0.1].assign(eps=0.1 + 1e-9, cell="other", correct=False)
    both = Outcomes(pd.concat([near, rest], ignore_index=True))
    (line,) = display.table(both).to_dict("records")
    assert list(line) == ["target", "threat", "clean", "0.02", "0.1", "0.100000001", "images"]
    assert line["0.1"] == percent(white, "whitebox", 0.1) != line["0.100000001"]
    assert "net[a]:bug:[/x]" in repr(both)


def test_images_are_counted_per_line_and_attacks_stay_with_their_target(white: Outcomes) -> None:
    frame = white.frame
    fewer = frame[~((frame["eps"] == 0.1) & (frame["sample"] >= 15))]
    (line,) = display.table(Outcomes(fewer)).to_dict("records")
    assert line["images"] == "15 or 30"
    attacked = frame[frame["eps"] == 0.1].assign(threat="convergence")
    parts = [
        attacked.assign(target=target, attack=attack, cell=f"{target}{attack}")
        for attack in ("pgd:steps=20", "fgsm") for target in "ab"
    ]  # fmt: skip
    shown = display.table(Outcomes(pd.concat(parts, ignore_index=True)))
    assert [(row["target"], row["threat"].split()[-1]) for row in shown.to_dict("records")] == [
        ("a", "fgsm"), ("a", "pgd:steps=20"), ("b", "fgsm"), ("b", "pgd:steps=20"),
    ]  # fmt: skip
