"""Figures 4 and 5: accuracy against ε."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from matplotlib.axes import Axes

from robench.core.errors import RobenchError
from robench.reports import style
from robench.reports._queries import accuracies, survived
from robench.reports.lines import by_defense, lines

#: The link of a point, from (defense, n, ε).
Link = Callable[[str, int, float], str]


def values(frame: pd.DataFrame, threat: str) -> pd.DataFrame:
    """One row per defense, size and ε: accuracy in [0, 1] under ``threat``, and at ε = 0 the clean one.

    Raises:
        RobenchError: nothing was measured under that threat.
    """
    verdicts = survived(frame, threat, "clean")
    attacked = verdicts[verdicts["threat"] == threat]
    if attacked.empty:
        raise RobenchError(f"no {threat} accuracy in these outcomes; run `robench eval --threat {threat}`")
    # A clean accuracy alone is no curve.
    clean = verdicts[(verdicts["threat"] == "clean") & verdicts["target"].isin(attacked["target"].unique())]
    # An attack at ε = 0 is no second clean accuracy.
    attacked = attacked[attacked["eps"] > 0]
    points = accuracies(pd.concat([clean, attacked]))
    points["defense"] = points["defense"].astype(object)
    columns = ["threat", "defense", "n", "eps", "accuracy", "low", "high", "sd", "seeds", "samples", "versions"]
    return style.ordered(points, "defense", "n", "eps")[columns]


def curves(frame: pd.DataFrame, ax: Axes, *, threat: str, link: Link | None = None) -> Axes:
    """Accuracy in percent against ε: defense by colour and marker, N by dash; the 95 % interval over images as a band,
    one standard deviation over seeds as bars.

    Args:
        frame: outcomes of ``threat`` and "clean".
        link: the address that a point leads to, for SVG.
    """
    points = values(frame, threat)
    lines(points, ax, x="eps", y="accuracy", looks=by_defense(points))
    if link is not None:
        # Larger than the marker, and not seen: what a mouse can hit.
        places = zip(points["defense"], points["n"], points["eps"], strict=True)
        ax.scatter(
            points["eps"], 100 * points["accuracy"], s=40, alpha=0, zorder=5, urls=[link(*each) for each in places]
        )
    ax.set_ylim(-2, 102)
    ax.set_xlim(left=-0.02 * float(points["eps"].max()))
    ax.set_xlabel("perturbation ε (ℓ∞, pixels in [0, 1])")
    ax.set_ylabel("accuracy, %")
    ax.set_title(style.THREATS[threat].title if threat in style.THREATS else threat)
    return ax
