"""Lines with their 95 % intervals, drawn alike in every figure."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from robench.reports import style
from robench.reports.style import Look


def look(defense: str, n: int) -> Look:
    """Colour and marker of the defense, dash of the ensemble's size."""
    return Look(style.color(defense), style.marker(defense), style.dash(n))


def by_defense(points: pd.DataFrame) -> dict[str, Look]:
    """Names the line of each point, such as DVERGE/3, in a column ``line``; the looks of the lines, in their order."""
    points["line"] = [f"{style.label(name)}/{n}" for name, n in zip(points["defense"], points["n"], strict=True)]
    drawn = style.ordered(points[["defense", "n", "line"]].drop_duplicates(), "defense", "n")
    return {line: look(name, n) for name, n, line in drawn.itertuples(index=False)}


def lines(
    points: pd.DataFrame,
    ax: Axes,
    *,
    x: str,
    y: str,
    looks: Mapping[str, Look],
    scale: float = 100,
    markevery: int | None = None,
) -> None:
    """Draws ``scale * y`` against ``x``, a line for each value of the column ``line``, which becomes its label.

    Columns ``low`` and ``high`` are drawn as a band: the 95 % interval, of several seeds as other images and other
    trainings would move it. Columns ``sd`` and ``seeds`` are drawn as bars of one standard deviation over seeds.

    Args:
        looks: of the lines, by name, in the order in which they are drawn.
        markevery: points between two markers.
    """
    names = [name for name in looks if (points["line"] == name).any()]
    before = len(ax.get_lines())
    sns.lineplot(
        points.assign(**{y: scale * points[y]}), x=x, y=y, hue="line", style="line", hue_order=names,
        style_order=names, palette={name: looks[name].color for name in names},
        markers={name: looks[name].marker for name in names},
        dashes=False, estimator=None, errorbar=None, sort=False, legend=False,
        markeredgewidth=0, markevery=markevery, ax=ax,
    )  # fmt: skip
    for drawn, name in zip(ax.get_lines()[before:], names, strict=True):
        drawn.set_label(name)
        drawn.set_linestyle(looks[name].dash)
        own = points[points["line"] == name]
        at, color = own[x].to_numpy(), looks[name].color
        if "low" in own:
            low, high = (scale * own[end].to_numpy() for end in ("low", "high"))
            ax.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        if "sd" in own and own["seeds"].max() > 1:
            middle, spread = (scale * own[name].fillna(0).to_numpy() for name in (y, "sd"))
            ax.errorbar(at, middle, yerr=spread, fmt="none", ecolor=color, elinewidth=0.7, capsize=1.5)
