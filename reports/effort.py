"""Accuracy by attacks of growing effort: has the attack converged, and what do more queries take?"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from matplotlib.axes import Axes

from robench.core.errors import RobenchError
from robench.evaluation.outcomes import robust
from robench.evaluation.words import steps
from robench.reports import style
from robench.reports._queries import accuracies, tidy
from robench.reports.lines import lines, look
from robench.reports.sheet import FIGURES, Inputs, Sheet, Skipped


def values(frame: pd.DataFrame, threat: str = "convergence") -> pd.DataFrame:
    """One row per defense, size, attack and ε, attacks by growing steps or queries: accuracy, low, high in [0, 1],
    samples, seeds.

    Raises:
        RobenchError: nothing was measured under that threat.
    """
    rows = tidy(frame)
    rows = rows[rows["threat"] == threat]
    if rows.empty:
        raise RobenchError(f"no {threat} in these outcomes; run `robench eval --threat {threat}`")
    point = ["defense", "n", "eps", "attack"]
    points = accuracies(robust(rows, [*point, "seed", "target"]), point)[
        [*point, "accuracy", "samples", "seeds", "low", "high"]
    ]
    points["steps"] = points["attack"].map(steps)
    return points.sort_values(["defense", "n", "eps", "steps", "attack"], ignore_index=True)


def convergence(frame: pd.DataFrame, ax: Axes, threat: str = "convergence") -> Axes:
    """Accuracy in percent by attack, from the weakest to the strongest."""
    points = values(frame, threat)
    attacks = points.sort_values(["steps", "attack"])["attack"].drop_duplicates().tolist()
    points["place"] = points["attack"].map(attacks.index)
    points["line"] = [
        f"{name}/{n} {eps}" for name, n, eps in zip(*(points[c] for c in ("defense", "n", "eps")), strict=True)
    ]
    looks = {
        line: look(name, n)
        for name in style.order(points["defense"])
        for line, n in points.loc[points["defense"] == name, ["line", "n"]].drop_duplicates().itertuples(index=False)
    }
    lines(points, ax, x="place", y="accuracy", looks=looks)
    ax.set_xticks(range(len(attacks)), [_short(attack) for attack in attacks])
    ax.set_xlabel("")
    ax.set_xlim(-0.3, len(attacks) - 0.7)
    ax.set_ylim(-2, 102)
    ax.set_ylabel("accuracy, %")
    ax.set_title(f"{threat.capitalize()} at ε = {', '.join(f'{eps:g}' for eps in sorted(points['eps'].unique()))}")
    return ax


def _short(attack: str) -> str:
    name, count = attack.split(":")[0].upper(), steps(attack)
    return name if count == 1 else f"{name}-{count}"


@FIGURES.register("figA_convergence")
def of_convergence(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Accuracy by steps: has the attack converged?"""
    if not inputs.has("convergence"):
        yield Skipped("figA_convergence", "no convergence check in these outcomes")
        return
    alt = "Accuracy under attacks of growing effort; flat lines mean that the attack has converged."
    yield _sheet(inputs.frame, "convergence", "Convergence of the white-box attack", alt)


@FIGURES.register("figA_queries")
def of_queries(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Accuracy by queries."""
    if inputs.has("queries"):
        alt = "Accuracy under attacks that see outputs alone, by how many they ask for."
        yield _sheet(inputs.frame, "queries", "Accuracy against queries", alt)


def _sheet(frame: pd.DataFrame, threat: str, title: str, alt: str) -> Sheet:
    figure = style.figure(style.TEXT / 2 + 0.8, 2.3)
    convergence(frame, figure.subplots(), threat)
    shown = values(frame, threat)
    style.legend(figure, shown["defense"], shown["n"], loc="outside lower center", ncols=4)
    return Sheet(f"figA_{threat}", title, figure, shown, alt)
