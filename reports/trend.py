"""Figure 2: diversity, transferability and clean accuracy along training."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from robench.evaluation.outcomes import intervals
from robench.reports import style
from robench.reports._queries import ambiguous
from robench.reports.lines import by_defense, lines
from robench.reports.sheet import FIGURES, Inputs, Sheet, Skipped

TITLES = {"diversity": "Diversity", "transferability": "Transferability", "clean": "Clean accuracy"}
UNITS = {"diversity": "cross-entropy", "transferability": "success rate, %", "clean": "accuracy, %"}
#: Rates in [0, 1], and the column that says of how many images.
COUNTS = {"transferability": "images", "clean": "clean_images"}
#: Part of a training that the rolling mean spans: 30 of the paper's 200 epochs.
SHARE = 0.15


def values(history: pd.DataFrame, share: float = SHARE) -> pd.DataFrame:
    """One row per defense, size and epoch: the mean over seeds of the rolling mean over ``share`` of a run's records.

    The first records average over as many as there are. Runs that share defense, size and seed go by their own names.

    Args:
        history: not empty; columns run, defense, n, seed, epoch, diversity and transferability (a rate in [0, 1]);
            where there, diversity_eps and transferability_eps name the radii, and clean is the ensemble's accuracy, a
            rate.
    """
    rivals = history["run"].isin(ambiguous(history.rename(columns={"run": "target"})))
    history = history.assign(defense=history["defense"].astype(object).where(~rivals, history["run"]))
    rows = history.sort_values(["run", "epoch"], kind="stable").reset_index(drop=True)
    for quantity in there(rows):
        rows[quantity] = rows.groupby("run", observed=True)[quantity].transform(
            lambda run: run.rolling(max(1, round(share * len(run))), min_periods=1).mean()
        )
    means = {**{quantity: (quantity, "mean") for quantity in there(rows)}, "seeds": ("run", "nunique")}
    means |= {name: (name, "min") for name in COUNTS.values() if name in rows and rows[name].notna().any()}
    return rows.groupby(["defense", "n", "epoch"], observed=True).agg(**means).reset_index()


def there(history: pd.DataFrame) -> list[str]:
    """The quantities that were recorded, in the order in which they are drawn."""
    return [quantity for quantity in TITLES if quantity in history and history[quantity].notna().any()]


def trend(history: pd.DataFrame, ax: Axes, *, quantity: str, share: float = SHARE) -> Axes:
    """The rolling mean of ``quantity`` ("diversity", or in percent "transferability" or "clean") by epoch.

    The band is the 95 % interval of a rate of as many images as one record has, where the history says how many.
    """
    points = values(history, share).dropna(subset=quantity)
    looks = by_defense(points)
    if COUNTS.get(quantity) in points:
        points["low"], points["high"] = intervals(points[quantity], points[COUNTS[quantity]])
    scale, every = (100 if quantity in COUNTS else 1), max(1, points["epoch"].nunique() // 8)
    lines(points, ax, x="epoch", y=quantity, looks=looks, scale=scale, markevery=every)
    radii = sorted(history[f"{quantity}_eps"].unique()) if f"{quantity}_eps" in history.columns else []
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel(UNITS[quantity])
    ax.set_title(TITLES[quantity] + (f" (ε = {', '.join(f'{eps:g}' for eps in radii)})" if radii else ""))
    # Limits that fit the points alone would cut the markers, once the axis begins at 0.
    ax.set_ylim(0, 1.05 * ax.get_ylim()[1])
    return ax


@FIGURES.register("fig2_trend")
def sheet(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Figure 2: diversity, transferability and clean accuracy along training."""
    history = inputs.history
    if history is None or history.empty:
        yield Skipped("fig2_trend", "no diversity was recorded in training")
        return
    figure = style.figure(style.TEXT, 2.1)
    drawn = there(history)
    for ax, quantity in zip(figure.subplots(1, len(drawn)), drawn, strict=True):
        trend(history, ax, quantity=quantity)
    shown = values(history)
    style.legend(figure, shown["defense"], shown["n"], loc="outside lower center", ncols=6)
    yield Sheet(
        "fig2_trend", "Diversity and transferability along training", figure, shown,
        "Rolling means over epochs: diversity, transferability within the ensemble and, where it was recorded, clean "
        "accuracy.",
    )  # fmt: skip
