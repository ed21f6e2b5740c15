"""Accuracy under attack against clean accuracy: who gives up what for which, and at what cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from robench.evaluation.statistics import accuracy_interval
from robench.evaluation.threats import BLACKBOX
from robench.evaluation.worst import verdicts
from robench.reports import style
from robench.reports._queries import survived, tidy
from robench.reports.curves import nearest_eps, telling_eps
from robench.reports.document import MISSING, Table, TableCell
from robench.reports.sheet import FIGURES, Inputs, Sheet, Skipped

#: What accuracies are compared with clean accuracy, and how a panel calls them: black-box, and under everything.
PANELS = {"blackbox": "black-box", "worst": "under everything that was tried"}
#: What a training and a decision cost, see `robench.studies.drawing.costs`, and its column in the table.
COSTS = {
    "passes": "Training, passes per image",
    "seconds": "Training, s",
    "flops": "Decision, MFLOP per image",
}

_POINT = ["under", "defense", "n"]


def values(frame: pd.DataFrame, eps: float, costs: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per panel, defense and size that was judged on clean images and under attack.

    Args:
        eps: of the attacks.
        costs: by column `target`, those of `COSTS` that are known.

    Returns:
        under (of `PANELS`), defense, n; clean and accuracy in [0, 1], each with its ends, such as clean_low, by
        `robench.evaluation.statistics.accuracy_interval`; front: no other of its panel is better in
        one and at least as good in the other; seeds, samples; `COSTS`, means over seeds.
    """
    rows = tidy(frame)
    who = ["target", "defense", "n", "seed", "sample", "correct"]
    judged = {"blackbox": survived(rows, "blackbox"), "worst": verdicts(rows)}
    clean = survived(rows, "clean")[who]
    found = []
    for panel, all_ in judged.items():
        own = all_[all_["eps"] == eps][who]
        both = own.merge(clean, on=[name for name in who if name != "correct"], suffixes=("_accuracy", "_clean"))
        for (defense, n), part in both.groupby(["defense", "n"], observed=True):
            if point := _point(part):
                found.append({"under": panel, "defense": defense, "n": n, "eps": eps, **point})
    ends = [f"{name}{end}" for name in ("clean", "accuracy") for end in ("", "_low", "_high")]
    points = pd.DataFrame(found, columns=[*_POINT, "eps", *ends, "seeds", "samples"])
    points["front"] = [_on_front(points[points["under"] == row["under"]], row) for row in points.to_dict("records")]
    targets = rows[["target", "defense", "n"]].drop_duplicates()
    known = targets if costs is None else targets.merge(costs, on="target", how="left")
    means = known.reindex(columns=["defense", "n", *COSTS]).groupby(["defense", "n"], observed=True).mean()
    points = points.merge(means.reset_index(), on=["defense", "n"], how="left")
    return style.ordered(points, "under", "defense", "n")


def pareto(points: pd.DataFrame, ax: Axes) -> Axes:
    """The points of one panel of `values`, in percent: defense by colour and marker, N by size, 95 % intervals as bars
    both ways, and the front as a line through its points, which are named."""
    shown = points.assign(clean=100 * points["clean"], accuracy=100 * points["accuracy"])
    names = style.order(shown["defense"])
    for row in points.to_dict("records"):
        across, up = (
            [[100 * (row[name] - row[f"{name}_low"])], [100 * (row[f"{name}_high"] - row[name])]]
            for name in ("clean", "accuracy")
        )
        ax.errorbar(
            100 * row["clean"], 100 * row["accuracy"], xerr=across, yerr=up, fmt="none",
            ecolor=style.color(row["defense"]), elinewidth=0.5, alpha=0.45, zorder=1,
        )  # fmt: skip
    front = shown[shown["front"]].sort_values(["clean", "accuracy"], ascending=[True, False])
    ax.plot(front["clean"], front["accuracy"], color="black", linewidth=0.8, linestyle=(0, (4, 1.5)), zorder=2)
    sns.scatterplot(
        shown, x="clean", y="accuracy", hue="defense", style="defense", hue_order=names, style_order=names,
        palette={name: style.color(name) for name in names}, markers={name: style.marker(name) for name in names},
        size="n", sizes=areas(points["n"]), legend=False,
        edgecolor="white", linewidth=0.3, alpha=0.9, zorder=3, ax=ax,
    )  # fmt: skip
    ax.scatter(front["clean"], front["accuracy"], s=90, facecolors="none", edgecolors="black", linewidths=0.6, zorder=4)
    ax.margins(0.12, 0.14)
    for x, y, names in _together(front, ax):
        ax.annotate(
            "\n".join(names), (x, y), xytext=(4, 6), textcoords="offset points", ha="right", fontsize=6, zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
        )  # fmt: skip
    panel, eps = points["under"].iloc[0], points["eps"].iloc[0]
    ax.set_title(f"{PANELS[panel][:1].upper()}{PANELS[panel][1:]}, ε = {eps:g}")
    ax.set_xlabel("clean accuracy, %")
    ax.set_ylabel("accuracy under attack, %")
    return ax


def _together(front: pd.DataFrame, ax: Axes) -> Iterator[tuple[float, float, list[str]]]:
    """Where names are written, and which: points that names of their own would not tell apart share a place."""
    across, up = (high - low for low, high in (ax.get_xlim(), ax.get_ylim()))
    groups: list[list[tuple[float, float, str]]] = []
    for x, y, defense, n in front[["clean", "accuracy", "defense", "n"]].itertuples(index=False):
        near = [g for g in groups if abs(g[0][0] - x) < 0.3 * across and abs(g[0][1] - y) < 0.1 * up]
        if not near:
            groups.append([])
        (near or groups[-1:])[0].append((x, y, f"{style.label(defense)}/{n}"))
    for group in groups:
        yield group[-1][0], max(y for _, y, _ in group), [name for *_, name in group]


def areas(sizes: Iterable[int]) -> dict[Any, float]:
    """The area of the marker of each ensemble size, in points²."""
    return {n: 26.0 + 16.0 * place for place, n in enumerate(sorted(set(sizes)))}


def described(points: pd.DataFrame, caption: str = "") -> Table:
    """`values` as a table: a row per defense and size, with the cost beside the accuracies."""
    panels = [panel for panel in PANELS if (points["under"] == panel).any()]
    eps = points["eps"].iloc[0]
    rows = []
    for (defense, n), own in points.groupby(["defense", "n"], sort=False, observed=True):
        by_panel = own.set_index("under").to_dict("index")
        first = own.to_dict("records")[0]
        cells = [TableCell.of(style.label(str(defense))), TableCell.of(n), _measured(first, "clean", best=False)]
        for panel in panels:
            row = by_panel.get(panel)
            cells.append(_measured(row, "accuracy", best=row["front"]) if row else MISSING)
        rows.append([*cells, TableCell.of(first["seeds"]), *(_cost(first[name]) for name in COSTS)])
    headers = [
        "Defense",
        "N",
        "clean",
        *(f"{PANELS[panel]}, ε = {eps:g}" for panel in panels),
        "Seeds",
        *COSTS.values(),
    ]
    note = (
        "Accuracy in percent with its 95 percent interval, as other images and, of several seeds, other trainings "
        "would move it. Bold: on the Pareto front, by the means alone: nobody is better in one and at least as good in "
        "the other. A pass is a forward and a backward pass of one image through one member, counted per training "
        "image, with those of the Baseline that a training starts from; seconds are those of the study's tasks, "
        "whatever else the machine did; FLOP are of the forward pass of all members."
    )
    return Table(headers, rows, caption, note)


def _point(part: pd.DataFrame) -> dict[str, float]:
    """Both accuracies of one defense and size, with their intervals; nothing where its seeds share no image."""
    found: dict[str, float] = {}
    for name in ("clean", "accuracy"):
        table = part.pivot(index=["seed", "target"], columns="sample", values=f"correct_{name}")
        table = table.dropna(axis="columns").astype(bool)
        if table.empty:
            return {}
        found[name] = float(table.to_numpy().mean())
        found[f"{name}_low"], found[f"{name}_high"] = accuracy_interval(table.to_numpy())
    return {**found, "seeds": len(table), "samples": table.shape[1]}


def _on_front(points: pd.DataFrame, row: Mapping[Any, Any]) -> bool:
    least = (points["clean"] >= row["clean"]) & (points["accuracy"] >= row["accuracy"])
    more = (points["clean"] > row["clean"]) | (points["accuracy"] > row["accuracy"])
    return not (least & more).any()


def _measured(row: Mapping[Any, Any], name: str, *, best: bool) -> TableCell:
    return TableCell.measured(row[name], row[f"{name}_low"], row[f"{name}_high"], best=best)


def _cost(value: float) -> TableCell:
    return MISSING if np.isnan(value) else TableCell(f"{value:,.0f}" if value >= 100 else f"{value:.3g}", value)


def trade_offs(frame: pd.DataFrame, costs: pd.DataFrame | None) -> pd.DataFrame:
    """`values` at `robench.reports.curves.telling_eps`; empty where no image was judged both ways."""
    return values(frame, telling_eps(frame, *BLACKBOX, "whitebox") or nearest_eps(frame), costs)


@FIGURES.register("fig_pareto")
def sheet(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Accuracy under attack against clean accuracy."""
    points = trade_offs(inputs.frame, inputs.costs)
    if points.empty:
        yield Skipped("fig_pareto", "no ensemble was judged both on clean images and under attack")
        return
    panels = [panel for panel in PANELS if (points["under"] == panel).any()]
    figure = style.figure(style.TEXT if len(panels) > 1 else style.TEXT / 2 + 0.6, 3.0)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        pareto(points[points["under"] == panel], ax)
    sizes = areas(points["n"])
    style.legend(figure, points["defense"], sizes, sizes, loc="outside lower center", ncols=6)
    front = {
        panel: [
            f"{style.label(row.defense)}/{row.n}"
            for row in points[(points["under"] == panel) & points["front"]].itertuples()
        ]
        for panel in panels
    }
    yield Sheet(
        "fig_pareto", "Clean and robust accuracy", figure, points,
        "Accuracy under attack against clean accuracy. On the front: "
        + "; ".join(f"{PANELS[panel]} {', '.join(names)}" for panel, names in front.items())
        + ". The values are in the table.",
    )  # fmt: skip
