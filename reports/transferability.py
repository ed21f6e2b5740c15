"""Figure 3: how often an attack on one member fools another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from robench.core.errors import RobenchError
from robench.reports import style
from robench.reports._queries import transfer_rates

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
    shades = mpl.colormaps["Blues"]
    for row, source in enumerate(rates.index):
        for column, member in enumerate(rates.columns):
            rate = float(rates.to_numpy()[row, column])
            # The ensemble is no member: it stands apart.
            x = column + (0.25 if member == "ensemble" else 0)
            shade = "#EEEEEE" if pd.isna(rate) else to_hex(shades(0.9 * rate))
            cell = Rectangle((x - 0.5, row - 0.5), 1, 1, facecolor=shade, edgecolor="white", linewidth=0.6)
            text = ax.text(
                x, row, "–" if pd.isna(rate) else f"{100 * rate:.0f}", ha="center", va="center",
                fontsize=6.5 if len(rates) <= 5 else 5.5, color=_readable(shade),
            )  # fmt: skip
            # They lie within the axes: the layout need not measure each.
            cell.set_in_layout(False)
            text.set_in_layout(False)
            if link is not None:
                cell.set_url(link(source, member))
                text.set_url(link(source, member))
            ax.add_patch(cell)
    width = len(rates.columns) + (0.25 if "ensemble" in rates.columns else 0)
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(len(rates) - 0.5, -0.5)
    ax.set_aspect("equal")
    ax.set_xticks(
        [x + (0.25 if name == "ensemble" else 0) for x, name in enumerate(rates.columns)],
        ["ens." if name == "ensemble" else name for name in rates.columns],
    )
    ax.set_yticks(range(len(rates)), rates.index)
    ax.tick_params(length=0, pad=1.5)
    ax.grid(False)
    ax.spines[:].set_visible(False)
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
    rank = {name: place for place, name in enumerate(style.order(targets["defense"]))}
    targets = targets.sort_values(["seed", "defense"], key=lambda s: s.map(rank) if s.name == "defense" else s)
    across = len(targets) if len(targets) <= (4 if n <= 5 else 3) else 3
    down = -(-len(targets) // across)
    side = min(style.TEXT / across, 0.6 + 0.32 * n)
    # A matrix is wider than high; titles and ticks come on top.
    figure = style.figure(max(side * across, 1.8), down * ((side - 0.3) * n / (n + 1.25) + 0.45) + 0.2)
    figure.set_layout_engine("compressed")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    several = targets["seed"].nunique() > 1
    for ax, (name, seed, target) in zip(axes, targets.itertuples(index=False), strict=False):
        title = f"{style.label(name)}/{n}" + (f", seed {seed}" if several else "")
        cell = None if link is None else partial(link, target)
        transferability(frame, ax, target=target, eps=eps, title=title, link=cell)
    for ax in axes[len(targets) :]:
        ax.set_axis_off()
    figure.supxlabel("member judged", fontsize=7)
    figure.supylabel("member attacked", fontsize=7)
    return figure


def _readable(background: str) -> str:
    """Black or white, whichever has more contrast (relative luminance of WCAG)."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(background)]
    return "black" if 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] > 0.179 else "white"
