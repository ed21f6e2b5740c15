"""What a figure of the report is: a function of `Inputs` in a file of its own, registered under its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
from matplotlib.figure import Figure

from robench.core.registry import Registry

if TYPE_CHECKING:
    from robench.reports.regions import Regions


@dataclass(frozen=True)
class Sheet:
    """A figure that is ready to be written.

    Attributes:
        values: every value that it shows.
        alt: what a reader who cannot see it should know.
        rows_are: what a row of ``values`` is, if it has a drill-down in the page: a cell of a matrix (columns target,
            eps, source, member) or a point of a curve (panel, the threat; defense, n, eps).
    """

    name: str
    title: str
    figure: Figure
    values: pd.DataFrame
    alt: str
    rows_are: Literal["", "cells", "points"] = ""


@dataclass(frozen=True)
class Skipped:
    """A figure that is not drawn, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} skipped: {self.reason}"


@dataclass(frozen=True)
class Links:
    """Addresses that matrix cells (target, ε, source, member) and points (threat, defense, n, ε) lead to, for SVG."""

    cell: Callable[[str, float, str, str], str]
    point: Callable[[str, str, int, float], str]


@dataclass(frozen=True)
class Studies:
    """Ablations.

    Attributes:
        frame: outcomes of all their targets, which the other figures leave out.
        settings: by name ("lambda", "layer"), the value of that setting for each target.
    """

    frame: pd.DataFrame
    settings: Mapping[str, Mapping[str, float | str]]


@dataclass(frozen=True)
class Inputs:
    """What a report is drawn from.

    Attributes:
        frame: outcomes.
        history: the training of DVERGE, see `robench.reports.trend.trend`, for Figure 2.
        regions: decision regions, for Figure 1.
        studies: one setting of a defense varied; a figure each.
        costs: of training and decision, see `robench.reports.pareto.values`.
        surrogates: clean accuracies of black-box surrogates, in [0, 1], by name.
        links: where what is drawn leads to.
    """

    frame: pd.DataFrame
    history: pd.DataFrame | None = None
    regions: Regions | None = None
    studies: Studies | None = None
    costs: pd.DataFrame | None = None
    surrogates: Mapping[str, float] | None = None
    links: Links | None = None

    def has(self, threat: str) -> bool:
        """Whether there are outcomes under it."""
        return bool((self.frame["threat"] == threat).any())


#: A figure: what there is data for, within `style.context`, and what is skipped. One function may draw several, such as
#: one per ε, each under a name of its own.
Drawing = Callable[[Inputs], Iterator[Sheet | Skipped]]
FIGURES: Registry[Drawing] = Registry("figure", group="robench.figures", package="robench.reports")


def order(name: str) -> tuple[bool, str]:
    """By which figures are sorted: those of the paper, others, the appendix."""
    return name.startswith("figA"), name
