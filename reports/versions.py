"""What each black-box surrogate and version takes: a figure by the number of surrogates, a table by version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from robench.core.errors import RobenchError
from robench.evaluation.outcomes import ENSEMBLE, robust, that_count
from robench.reports import style
from robench.reports._queries import RUNS, accuracies, tidy
from robench.reports.curves import telling_eps
from robench.reports.document import Table, TableCell
from robench.reports.lines import by_defense, lines
from robench.reports.sheet import FIGURES, Inputs, Sheet, Skipped

_WHO = ["defense", "n"]
#: What makes a version of an image, but for its random start.
_VERSION = ["surrogate", "attack", "loss"]


def by_surrogates(frame: pd.DataFrame, eps: float) -> pd.DataFrame:
    """Black-box accuracy at ``eps`` on every version of 1, 2, ... of the surrogates, on average over their choice.

    Returns:
        A row per defense, size and number of surrogates: defense, n, surrogates; accuracy, the mean over all choices of
        so many, with low and high, the means of their intervals' ends; least and most, of any choice; all in [0, 1];
        choices, samples, seeds.

    Raises:
        RobenchError: no black-box rows at that ε.
    """
    found = []
    for (defense, n), own in _rows(frame, eps).groupby(_WHO, observed=True):
        names = sorted(own["surrogate"].unique())
        for count in range(1, len(names) + 1):
            choices = pd.concat(
                _accuracy(own[own["surrogate"].isin(chosen)], _WHO) for chosen in combinations(names, count)
            )
            rates, images, seeds = choices["accuracy"], choices["samples"].min(), choices["seeds"].min()
            ends = choices["low"].mean(), choices["high"].mean()
            found.append((defense, n, count, rates.mean(), rates.min(), rates.max(), len(rates), images, seeds, *ends))
    columns = [*_WHO, "surrogates", "accuracy", "least", "most", "choices", "samples", "seeds", "low", "high"]
    return style.ordered(pd.DataFrame(found, columns=columns), *_WHO, "surrogates")


def surrogates(points: pd.DataFrame, ax: Axes, eps: float) -> Axes:
    """The points of `by_surrogates` in percent, against the number of surrogates; the 95 % interval as a band."""
    lines(points, ax, x="surrogates", y="accuracy", looks=by_defense(points))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(-2, 102)
    ax.set_xlabel("surrogates")
    ax.set_ylabel("accuracy, %")
    ax.set_title(f"{style.THREATS['blackbox'].title} (ε = {eps:g})")
    return ax


def by_version(frame: pd.DataFrame, eps: float) -> pd.DataFrame:
    """What each surrogate, attack and loss takes at ``eps`` by itself, with all its random starts.

    Returns:
        defense, n, surrogate, attack, loss; accuracy under it alone, with low and high (Wilson); alone, the share of
        images that it takes and no other version; all in [0, 1]; samples, seeds, and versions, its random starts. The
        strongest of a defense first.

    Raises:
        RobenchError: no black-box rows at that ε.
    """
    points = _alone(frame, eps, _VERSION)
    columns = [*_WHO, *_VERSION, "accuracy", "low", "high", "alone", "samples", "seeds", "versions"]
    return style.ordered(points, *_WHO, "accuracy", *_VERSION)[columns]


def by_surrogate(frame: pd.DataFrame, eps: float, clean: Mapping[str, float]) -> pd.DataFrame:
    """What each surrogate takes at ``eps``, with all its attacks and starts.

    Args:
        clean: accuracy of each surrogate itself on clean images, by name.

    Returns:
        defense, n, surrogate; clean, NaN where it is not known; accuracy under it alone, with low and high (Wilson);
        alone, the share of images that it takes and no other; all in [0, 1]; samples, seeds. The strongest first.

    Raises:
        RobenchError: no black-box rows at that ε.
    """
    points = _alone(frame, eps, ["surrogate"])
    points["clean"] = points["surrogate"].astype(object).map(clean).astype("float64")
    columns = [*_WHO, "surrogate", "clean", "accuracy", "low", "high", "alone", "samples", "seeds"]
    return style.ordered(points, *_WHO, "accuracy", "surrogate")[columns]


def _alone(frame: pd.DataFrame, eps: float, version: list[str]) -> pd.DataFrame:
    """Per defense, size and ``version``: `accuracies` under it alone at ``eps``, and
    ``alone``, the share of images that it takes and no other version."""
    verdicts = robust(_rows(frame, eps), [*_WHO, *RUNS, *version])
    image = [verdicts[name] for name in (*_WHO, *RUNS, "sample")]
    only = (~verdicts["correct"]).groupby(image, observed=True).transform("sum") == 1
    verdicts["alone"] = ~verdicts["correct"] & only
    by = [*_WHO, *version]
    alone = verdicts.groupby(by, observed=True)["alone"].mean().reset_index()
    return accuracies(verdicts, by).merge(alone, on=by)


def by_surrogate_described(points: pd.DataFrame, eps: float, caption: str = "") -> Table:
    """`by_surrogate` for documents."""
    rows = [
        [
            TableCell.of(style.label(row["defense"])),
            *(TableCell.of(row[name]) for name in ("n", "surrogate")),
            TableCell.of(row["clean"], rate=True),
            TableCell.measured(row["accuracy"], row["low"], row["high"]),
            TableCell.of(row["alone"], rate=True),
        ]
        for row in points.to_dict("records")
    ]
    note = (
        f"In percent at ε = {eps:g}: what a surrogate gets right itself on clean images, black-box accuracy under it "
        f"alone, with all its attacks and starts, and its 95 percent Wilson interval, and the share of images that no "
        f"other surrogate takes."
    )
    return Table(["Defense", "N", "Surrogate", "Its own", "Accuracy", "It alone takes"], rows, caption, note)


def each_surrogate(points: pd.DataFrame, ax: Axes, eps: float) -> Axes:
    """The points of `by_surrogate` in percent: a line for each surrogate, its own clean accuracy as a circle, and what
    is left of each ensemble with its 95 % interval; the surrogate that leaves least on top."""
    means = points.groupby("surrogate", observed=True)[["accuracy", "clean"]].mean()
    means = means.sort_values("accuracy", ascending=False)
    names, looks = means.index.tolist(), by_defense(points)
    for place, clean in enumerate(means["clean"]):
        ax.plot(100 * clean, place, "o", mfc="none", color="black", label="_own")
    for number, (line, look) in enumerate(looks.items()):
        own = points[points["line"] == line]
        shift = 0.5 * ((number + 0.5) / len(looks) - 0.5)
        middle, low, high = (100 * own[end].to_numpy() for end in ("accuracy", "low", "high"))
        at = [names.index(name) + shift for name in own["surrogate"]]
        ax.errorbar(
            middle,
            at,
            xerr=(middle - low, high - middle),
            marker=look.marker,
            linestyle="none",
            color=look.color,
            label=line,
        )
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.set_xlim(-2, 102)
    ax.set_xlabel("accuracy, %; circle: of the surrogate itself, clean")
    ax.set_title(f"{style.THREATS['blackbox'].title}, one surrogate (ε = {eps:g})")
    return ax


def described(points: pd.DataFrame, eps: float, caption: str = "") -> Table:
    """`by_version` for documents."""
    rows = [
        [
            TableCell.of(style.label(row["defense"])),
            *(TableCell.of(row[name]) for name in ("n", *_VERSION)),
            TableCell.measured(row["accuracy"], row["low"], row["high"]),
            TableCell.of(row["alone"], rate=True),
        ]
        for row in points.to_dict("records")
    ]
    note = (
        f"Black-box accuracy in percent at ε = {eps:g} under one surrogate, attack and loss alone, with all its random "
        f"starts, and its 95 percent Wilson interval; the last column is the share of images that no other takes."
    )
    headers = ["Defense", "N", "Surrogate", "Attack", "Loss", "Accuracy", "It alone takes"]
    return Table(headers, rows, caption, note)


def _accuracy(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    return accuracies(robust(rows, [*by, *RUNS]), by)


def _rows(frame: pd.DataFrame, eps: float) -> pd.DataFrame:
    """Black-box rows of ensembles at that ε, of which those count that make the threat's number."""
    rows = tidy(frame)
    rows = rows[(rows["threat"] == "blackbox") & (rows["eps"] == eps) & (rows["member"] == ENSEMBLE)]
    if rows.empty:
        raise RobenchError(f"no blackbox accuracy at ε {eps:g} in these outcomes; run `robench eval --threat blackbox`")
    return that_count(rows)


@FIGURES.register("figA_surrogates")
def by_number(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Black-box accuracy against the number of surrogates."""
    eps = _eps(inputs)
    if eps is None:
        return
    figure = style.figure(style.TEXT / 2 + 0.8, 2.3)
    shown = by_surrogates(inputs.frame, eps)
    surrogates(shown.copy(), figure.subplots(), eps)
    style.legend(figure, shown["defense"], shown["n"], loc="outside lower center", ncols=4)
    yield Sheet(
        "figA_surrogates", "Accuracy against the number of surrogates", figure, shown,
        f"Black-box accuracy at ε = {eps:g} against the number of surrogates, on average over their choice.",
    )  # fmt: skip


@FIGURES.register("figA_each_surrogate")
def one_by_one(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Black-box accuracy under each surrogate alone."""
    eps = _eps(inputs)
    if eps is None or not inputs.surrogates:
        return
    shown = by_surrogate(inputs.frame, eps, inputs.surrogates)
    figure = style.figure(style.TEXT, 1.1 + 0.28 * shown["surrogate"].nunique())
    each_surrogate(shown.copy(), figure.subplots(), eps)
    style.legend(figure, shown["defense"], shown["n"], loc="outside lower center", ncols=6)
    yield Sheet(
        "figA_each_surrogate", "What each surrogate leaves, and gets right itself", figure, shown,
        f"Black-box accuracy at ε = {eps:g} under each surrogate alone, and its own clean accuracy.",
    )  # fmt: skip


def _eps(inputs: Inputs) -> float | None:
    """Where surrogates are compared; None where there are not several."""
    rows = inputs.frame[inputs.frame["threat"] == "blackbox"]
    return telling_eps(inputs.frame, "blackbox") if rows["surrogate"].nunique() > 1 else None
