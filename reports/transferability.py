"""Figure 3: how often an attack on one member fools another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robench.core.errors import RobenchError
from robench.evaluation.display import named_radii
from robench.reports import style
from robench.reports._queries import transfer_rates
from robench.reports.sheet import FIGURES, Inputs, Links, Sheet, Skipped

#: ε of the paper's figure.
EPS = 0.03

#: Inches that a letter of a title is wide, and a line of it high.
LETTER, LINE = 0.062, 0.13

#: The link of a cell, from (source, member).
Link = Callable[[str, str], str]


def matrix(frame: pd.DataFrame, target: str, eps: float) -> pd.DataFrame:
    """Success rates in [0, 1]: a row per source "1".."N", a column per member and, where judged, "ensemble".

    Raises:
        RobenchError: nothing was measured for that target and ε.
    """
    rates = transfer_rates(frame[(frame["target"] == target) & (frame["eps"] == eps)])
    if rates.empty:
        raise RobenchError(
            f"no transferability of {target!r} at ε = {eps:g} in these outcomes; run `robench eval --threat transfer`"
        )
    square = rates.pivot(index="source", columns="member", values="rate")
    sources = sorted(square.index, key=int)
    members = sorted((name for name in square.columns if name != "ensemble"), key=int)
    return square.loc[sources, [*members, *(["ensemble"] if "ensemble" in square.columns else [])]]


def transferability(
    frame: pd.DataFrame, ax: Axes, *, target: str, eps: float, title: str | None = None, link: Link | None = None
) -> Axes:
    """The matrix of one ensemble, in percent: row = the member attacked, column = the member judged.

    Args:
        frame: outcomes of threat "transfer".
        link: the address that a cell leads to, for SVG.
    """
    rates = matrix(frame, target, eps)
    size = 6.5 if len(rates) <= 5 else 5.5
    sns.heatmap(
        100 * rates, ax=ax, vmin=0, vmax=110, cmap="Blues", cbar=False, square=True, linewidths=0.6, linecolor="white",
        annot=True, fmt=".0f", annot_kws={"fontsize": size},
    )  # fmt: skip
    rows, columns = np.indices(rates.shape) + 0.5
    unknown = rates.isna().to_numpy()
    for x, y in zip(columns[unknown], rows[unknown], strict=True):
        ax.text(x, y, "–", ha="center", va="center", fontsize=size)
    if "ensemble" in rates.columns:
        # It is no member: it stands apart.
        ax.axvline(len(rates.columns) - 1, color="white", linewidth=4)
    if link is not None:
        # What a mouse can hit.
        urls = [link(source, member) for source in rates.index for member in rates.columns]
        ax.scatter(columns.ravel(), rows.ravel(), s=200, marker="s", alpha=0, zorder=5, urls=urls)
    ax.set_xticks(columns[0], ["ens." if name == "ensemble" else name for name in rates.columns])
    ax.set_yticks(rows[:, 0], rates.index, rotation=0)
    ax.set_xlabel("")
    ax.set_ylabel("")
    ax.tick_params(length=0, pad=1.5)
    if title is not None:
        ax.set_title(title)
    return ax


def panels(frame: pd.DataFrame, *, n: int, eps: float, link: Callable[[str, str, str], str] | None = None) -> Figure:
    """A matrix per ensemble of ``n`` members, by defense and seed.

    Args:
        link: the address of a cell from (target, source, member).
    """
    rates = transfer_rates(frame)
    targets = rates.loc[(rates["n"] == n) & (rates["eps"] == eps), ["defense", "seed", "target"]].drop_duplicates()
    targets = style.ordered(targets, "seed", "defense")
    across = len(targets) if len(targets) <= (4 if n <= 5 else 3) else 3
    down = -(-len(targets) // across)
    side = min(style.TEXT / across, 0.6 + 0.32 * n)
    several = targets["seed"].nunique() > 1
    titles = [
        _title(f"{style.label(name)}/{n}" + (f", seed {seed}" if several else ""), side)
        for name, seed in targets[["defense", "seed"]].itertuples(index=False)
    ]
    above = 0.45 + LINE * max(title.count("\n") for title in titles)
    # A matrix is wider than high; titles and ticks come on top.
    figure = style.figure(max(side * across, 1.8), down * ((side - 0.3) * n / (n + 1.25) + above) + 0.27)
    figure.set_layout_engine("compressed")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, title, target in zip(axes, titles, targets["target"], strict=False):
        cell = None if link is None else partial(link, target)
        transferability(frame, ax, target=target, eps=eps, title=title, link=cell)
    for ax in axes[len(targets) :]:
        ax.set_axis_off()
    figure.supxlabel("member judged", fontsize=7)
    figure.supylabel("member attacked", fontsize=7)
    return figure


def _title(text: str, width: float) -> str:
    """Runs that share defense, size and seed go by their names, which are wider than a matrix: in lines, then."""
    lines = [""]
    for part in re.findall(r"[^\s-]+[\s-]*", text):
        if lines[-1] and len(f"{lines[-1]}{part}".rstrip()) * LETTER > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


@FIGURES.register("fig3_transferability")
def sheets(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Figure 3: how often an attack on one member fools another; one figure per ε and size."""
    rates = transfer_rates(inputs.frame) if inputs.has("transfer") else pd.DataFrame()
    if rates.empty:
        yield Skipped("fig3_transferability", "no transferability in these outcomes")
        return
    radii = sorted(rates["eps"].unique(), key=lambda eps: (abs(eps - EPS), eps))
    sizes, names = sorted(rates["n"].unique()), named_radii(radii)
    for eps in radii:
        for n in sizes:
            part = rates[(rates["eps"] == eps) & (rates["n"] == n)]
            if part.empty:
                continue
            main = eps == radii[0] and n == sizes[0]
            name = "fig3_transferability" if main else f"figA_transferability_n{n}_eps{names[eps]}"
            yield Sheet(
                name, f"Transferability within ensembles of {n}, ε = {names[eps]}",
                panels(inputs.frame, n=int(n), eps=float(eps), link=_cells(inputs.links, float(eps))), part,
                "Percentage of samples that an attack on one member (row) takes from another or from the ensemble "
                f"(column), at ε = {names[eps]}; the values are in the table.",
                "cells",
            )  # fmt: skip


def _cells(links: Links | None, eps: float) -> Callable[[str, str, str], str] | None:
    return None if links is None else lambda target, source, member: links.cell(target, eps, source, member)
