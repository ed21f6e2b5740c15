"""How figures look: NeurIPS widths, Type 42 fonts, colours that survive colour blindness and grey print."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.textpath import TextPath

from robench.core.errors import RobenchError
from robench.defenses.base import DEFENSES
from robench.reports import published

#: Width of the text and of half of it, in inches, in the NeurIPS template.
TEXT = 5.5
COLUMN = 2.7

_T = TypeVar("_T")

#: As matplotlib names it; a triple is a star, of so many points.
Marker = str | tuple[int, Literal[0, 1, 2], int]

#: For defenses that declare none, beside Okabe and Ito's, which the paper's have.
_OTHERS = (
    "#56B4E9", "#882255", "#999933", "#332288", "#AA4499", "#117733", "#661100", "#DDCC77", "#44AA99",
)  # fmt: skip
_OTHER_MARKERS: tuple[Marker, ...] = ("X", "<", ">", "p", "h", "*", "d", (4, 1, 0), (3, 1, 0))
_DASHES: dict[int, tuple[float, tuple[float, ...]]] = {
    3: (0, ()),
    5: (0, (4, 1.5)),
    8: (0, (1, 1.2)),
}
_OTHER_DASHES: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0, (5, 1, 1, 1)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (8, 2)),
    (0, (2, 3)),
)


@dataclass(frozen=True)
class Look:
    """How a line is told from the others: by colour, and in grey print by marker and dash."""

    color: str
    marker: Marker
    dash: tuple[float, tuple[float, ...]] = (0, ())


@dataclass(frozen=True)
class Shown:
    """How a threat is named and drawn.

    Attributes:
        label: within a sentence; title: over the panel of a figure.
        table: file name of its table of accuracy, where it has one; those of an A are extras.
        look: of its line, where lines are threats.
    """

    label: str
    title: str
    table: str = ""
    look: Look | None = None


#: Threats with an accuracy at several ε, in the order of tables and figures.
THREATS = {
    "clean": Shown("clean", "Clean images", look=Look("#555555", "o")),
    "blackbox": Shown("black-box", "Black-box transfer attacks", "table4_blackbox", Look("#0072B2", "D")),
    "whitebox": Shown("white-box", "White-box attacks", "table5_whitebox", Look("#D55E00", "s")),
    "blackbox-own": Shown(
        "black-box from surrogates of its own defense", "Black-box, surrogates of the own defense",
        "tableA_blackbox_own",
    ),
    "blackbox-related": Shown(
        "from related networks, no black-box result", "From related networks, not black-box",
        "tableA_blackbox_related",
    ),
}  # fmt: skip

_RC: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same glyphs on every machine
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.2,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    # A name may hold a $, which is no formula here.
    "text.parse_math": False,
    "text.usetex": False,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "pdf.compression": 6,
    "svg.fonttype": "path",
    "svg.hashsalt": "robench",
    "figure.dpi": 200,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
}


@contextmanager
def context() -> Iterator[None]:
    """Draw and save within this block; rcParams are as before after it."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)  # type: ignore[arg-type, unused-ignore]
        yield


def figure(width: float = TEXT, height: float = 2.2) -> Figure:
    """A figure, in inches, that pyplot knows nothing of."""
    return Figure(figsize=(width, height), layout="constrained")


@cache
def label(defense: str) -> str:
    """The title of a defense that is installed here; else the name that its rows have."""
    try:
        return DEFENSES.get(defense).title or defense
    except RobenchError:
        return defense


def color(defense: str) -> str:
    return _look(defense)[0]


def marker(defense: str) -> Marker:
    return _look(defense)[1]


@cache
def _look(defense: str) -> tuple[str, Marker]:
    """Colour and marker: declared, or its own among all that are installed, as far as there are enough; a name that is
    not installed has those that its letters give."""
    installed = {name: _declared(name) for name in sorted(DEFENSES.names())}
    colors: dict[str, str] = {name: own["color"] for name, own in installed.items() if own.get("color")}
    markers: dict[str, Marker] = {name: own["marker"] for name, own in installed.items() if own.get("marker")}
    for name in dict.fromkeys((*installed, defense)):
        colors.setdefault(name, _least_used("color", name, _OTHERS, list(colors.values())))
        markers.setdefault(name, _least_used("marker", name, _OTHER_MARKERS, list(markers.values())))
    return colors[defense], markers[defense]


def _declared(defense: str) -> Mapping[str, Any]:
    """What its class itself says; nothing of one that does not load, which must not spoil the others' figures.

    Raises:
        RobenchError: a colour or a marker that matplotlib does not know.
    """
    try:
        own = vars(DEFENSES.get(defense))
    except RobenchError:
        return {}
    if own.get("color") and not is_color_like(own["color"]):
        raise RobenchError(f"expected `color` of defense {defense!r} to be as in '#0072B2', got {own['color']!r}")
    if own.get("marker") and own["marker"] not in MarkerStyle.markers:
        raise RobenchError(f"expected `marker` of defense {defense!r} to be one of matplotlib's, got {own['marker']!r}")
    return own


def _least_used(purpose: str, name: str, choices: Sequence[_T], taken: Sequence[_T]) -> _T:
    """Of the choices that the fewest others have, the first from the name's own place on."""
    place = hashlib.sha256(f"{purpose}:{name}".encode()).digest()[0] % len(choices)
    return min((*choices[place:], *choices[:place]), key=taken.count)


def dash(n: int) -> tuple[float, tuple[float, ...]]:
    """The line style of an ensemble size."""
    return _DASHES.get(n, _OTHER_DASHES[n % len(_OTHER_DASHES)])


def order(defenses: Iterable[str]) -> list[str]:
    """Unique defenses: those of published tables in their order, then others by name."""
    known = published.order()
    return sorted(set(defenses), key=lambda name: (known.index(name) if name in known else len(known), name))


def ordered(frame: pd.DataFrame, *by: str, threats: Iterable[str] = THREATS) -> pd.DataFrame:
    """``frame`` sorted by these columns: of them ``defense`` as `order` says, ``threat`` as ``threats`` are."""
    orders = {"threat": list(threats), "defense": order(frame["defense"])}

    def place(column: pd.Series) -> pd.Series:
        return column.astype(object).map(orders[column.name].index) if column.name in orders else column

    return frame.sort_values(list(by), key=place, ignore_index=True)


def legend(
    ax: Axes | Figure,
    defenses: Iterable[str],
    sizes: Iterable[int],
    areas: Mapping[int, float] | None = None,
    **where: Any,
) -> None:
    """Defenses by colour and marker, sizes by dash; one size alone goes with the defense's name. Below a figure it has
    at most ``ncols`` columns, and no more than fit.

    Args:
        areas: of the markers, in points², of figures where these tell the size and there are no lines.
    """
    sizes = sorted(set(sizes))
    only = f"/{sizes[0]}" if len(sizes) == 1 else ""
    line: Literal["-", ""] = "-" if areas is None else ""
    handles = [
        Line2D([], [], color=color(name), marker=marker(name), linestyle=line, label=_shown(label(name) + only))
        for name in order(defenses)
    ]
    if len(sizes) > 1 and areas is not None:
        handles += [
            Line2D([], [], color="black", marker="o", linestyle="", markersize=areas[n] ** 0.5, label=f"N = {n}")
            for n in sizes
        ]
    elif len(sizes) > 1:
        handles += [Line2D([], [], color="black", linestyle=dash(n), label=f"N = {n}") for n in sizes]
    if isinstance(ax, Figure) and "ncols" in where:
        labels = [str(handle.get_label()) for handle in handles]
        where["ncols"] = _columns(labels, 72 * ax.get_figwidth(), where["ncols"])
    ax.legend(handles=handles, **where)


def _columns(labels: Sequence[str], width: float, most: int) -> int:
    """How many columns of a legend are as wide as a figure of ``width`` points, or narrower; at most ``most``."""
    font = float(mpl.rcParams["legend.fontsize"])
    around = font * (mpl.rcParams["legend.handlelength"] + mpl.rcParams["legend.handletextpad"])
    texts = [around + TextPath((0, 0), label, size=font).get_extents().width for label in labels]
    for count in range(min(most, len(labels)), 1, -1):
        columns = [max(column) for column in np.array_split(texts, count)]
        if sum(columns) + (count + 1) * font * mpl.rcParams["legend.columnspacing"] <= width:
            return count
    return 1


def metadata(provenance: Mapping[str, object], title: str, kind: str) -> dict[str, Any]:
    """What a file of ``kind`` (pdf, png, svg) says of itself: no date, so that the same rows give the same bytes.

    Raises:
        RobenchError: provenance that is not JSON.
    """
    text = provenance_json(provenance)
    if kind == "pdf":
        return {"Title": title, "Subject": "robench", "Keywords": text, "CreationDate": None}
    if kind == "png":
        return {"Title": title, "Description": text}
    return {"Title": title, "Description": text, "Date": None}


def provenance_json(provenance: Mapping[str, object]) -> str:
    """One line of JSON; RobenchError where a value is none."""
    try:
        return json.dumps(dict(provenance), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RobenchError(f"expected `provenance` to hold JSON values only ({error})") from error


def words(value: object) -> str:
    """A JSON value for readers; a name stands before the rest."""
    if isinstance(value, Mapping):
        rest = [f"{key} {words(each)}" for key, each in value.items() if key != "name"]
        return ", ".join([str(value["name"]), *rest] if "name" in value else rest)
    return ", ".join(map(words, value)) if isinstance(value, (list, tuple)) else str(value)


def _shown(text: str) -> str:
    # matplotlib leaves labels with a leading underscore out of legends.
    return f" {text}" if text.startswith("_") else text
