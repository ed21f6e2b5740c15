"""Outcomes: one row per sample and cell, from which every number is a query."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy  # its parts are loaded when they are first named: scipy.stats is a fifth of the time to start

from robench.core.errors import RobenchError, unknown
from robench.evaluation.cells import Cell
from robench.evaluation.evaluations import Evaluation
from robench.evaluation.findings import Finding

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What a cell says about each of its rows, and as which type.
_OF_CELL = {
    "target": "str",
    "defense": "str",
    "n": "int16",
    "seed": "int64",
    "threat": "str",
    "surrogate": "str",
    "attack": "str",
    "loss": "str",
    "eps": "float64",
}
#: What a row says itself.
_OF_ROW = {
    "cell": "str",
    "sample": "int32",
    "member": "str",
    "restart": "int16",
    "label": "int16",
    "prediction": "int16",
    "correct": "bool",
    "margin": "float32",
    "linf": "float32",
    "zero_gradient": "bool",
    "part": "str",
    "expected": "float32",
    "draws": "int16",
}
CELL_COLUMNS, ROW_COLUMNS = tuple(_OF_CELL), tuple(_OF_ROW)
#: Members' rows tell who was judged: the whole ensemble, or its member "1" .. "N".
ENSEMBLE = "ensemble"
#: The column ``threat`` of rows that serve checks and no number, and are kept apart: of a surrogate on what was crafted
#: on itself, and of a few survivors of a white-box result that are attacked otherwise.
SURROGATE, PROBE = ASIDE = "surrogate", "probe"
#: Of every interval.
CONFIDENCE = 0.95


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927) at `CONFIDENCE`; (0, 1) of nothing."""
    if total == 0:
        return 0.0, 1.0
    interval = scipy.stats.binomtest(successes, total).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def intervals(accuracy: npt.ArrayLike, samples: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], ...]:
    """Lower and upper ends of `wilson` of each proportion, to the nearest whole number of its samples."""
    pairs = zip(np.ravel(accuracy).tolist(), np.ravel(samples).tolist(), strict=True)
    ends = np.array([wilson(round(p * n), int(n)) for p, n in pairs], dtype=np.float64).reshape(-1, 2)
    return ends[:, 0], ends[:, 1]


#: What a number is of, and what else where a threat has several at one ε.
_POINT = ("target", "threat", "eps")
_APART = {"convergence": ("attack",), "queries": ("attack",), "transfer": ("surrogate", "member")}


def counted(frame: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """The rows that count in an all-or-nothing verdict per group of ``by`` and sample, as a mask.

    A few images under many attacks do not stand for many images: of a group, cells count that judged at least half as
    many samples as the largest one, and of these cells the samples that the most have judged. `left_out` says what
    does not count.
    """
    group = [frame[name] for name in by]
    sizes = frame.groupby([*group, frame["cell"]], observed=True)["sample"].transform("nunique")
    large = 2 * sizes >= sizes.groupby(group, observed=True).transform("max")
    cells = frame["cell"].where(large).groupby([*group, frame["sample"]], observed=True).transform("nunique")
    return large & (cells == cells.groupby(group, observed=True).transform("max"))


def _point_of(threat: object) -> list[str]:
    return [*_POINT, *_APART.get(str(threat), ())]


def that_count(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that are `counted` in the number of their target, threat and ε."""
    parts = [rows[counted(rows, _point_of(threat))] for threat, rows in frame.groupby("threat", observed=True)]
    return pd.concat(parts) if parts else frame


def left_out(frame: pd.DataFrame) -> list[str]:
    """What of these rows counts in no number, in lines for each target and threat."""
    found = []
    for (target, threat), rows in frame.groupby(["target", "threat"], observed=True):
        by = _point_of(threat)
        counts = rows[counted(rows, by)]
        sizes = rows.groupby([*by, "cell"], observed=True)["sample"].nunique()
        small = sizes[~sizes.index.isin(counts.groupby([*by, "cell"], observed=True).size().index)]
        if len(small):
            few = 2 * small.max() < sizes.max()
            reason = f"{small.max()} images or fewer, others {sizes.max()}" if few else "other images than most"
            found.append(
                f"{small.index.unique('cell').size} of {sizes.index.unique('cell').size} cells of {target}, {threat}, "
                f"are left out: they judged {reason}; judge all on the same (--samples, --subset)"
            )
        judged = counts.groupby(by, observed=True)["sample"].nunique()
        most = sizes.groupby(by, observed=True).max().reindex(judged.index)
        short = sorted((few, all_) for few, all_ in zip(judged.tolist(), most.tolist(), strict=True) if few < all_)
        if short:
            found.append(
                f"numbers of {target}, {threat}, rest on as few as {short[0][0]} images, those that all attacks "
                f"judged, of {short[0][1]}"
            )
        met = counts.groupby([*by, "sample"], observed=True)["cell"].nunique().groupby(by, observed=True).max()
        there = counts.groupby(by, observed=True)["cell"].nunique()
        if len(apart := there[there > met]):
            found.append(
                f"numbers of {target}, {threat}, are of {apart.max()} cells, and no image was judged in more than "
                f"{met[there > met].max()} of them; judge all on the same (--samples, --subset)"
            )
    return found


def robust(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """`survived` of the rows that are `counted`."""
    return survived(frame[counted(frame, by)], by)


def survived(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """All-or-nothing: per group of ``by`` and sample, whether it is right in every row.

    Returns:
        Columns ``by``, sample, correct, and versions: in how many rows.
    """
    groups = frame.groupby([*by, "sample"], sort=True, observed=True)["correct"]
    return groups.agg(correct="all", versions="size").reset_index()


def accuracies(verdicts: pd.DataFrame, by: Sequence[str], runs: Sequence[str] = ()) -> pd.DataFrame:
    """The share of samples that are right, of `robust`'s verdicts.

    Args:
        runs: columns that tell trainings apart: the accuracy is the mean over these.

    Returns:
        Columns ``by``; accuracy in [0, 1]; low, high (Wilson's for that accuracy on ``samples`` images: what other
        images would change); sd over ``seeds`` (what other trainings would; NaN for one); samples and versions, the
        least of any training.
    """
    by = list(by)
    trained = [*by, *(name for name in runs if name not in by)]
    each = verdicts.groupby(trained, observed=True).agg(
        accuracy=("correct", "mean"), samples=("correct", "size"), versions=("versions", "min")
    )
    points = (
        each.reset_index()
        .groupby(by, observed=True)
        .agg(
            accuracy=("accuracy", "mean"),
            sd=("accuracy", "std"),
            seeds=("accuracy", "size"),
            samples=("samples", "min"),
            versions=("versions", "min"),
        )
        .reset_index()
    )
    points["low"], points["high"] = intervals(points["accuracy"], points["samples"])
    return points


def over_draws(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """What is left of models that draw at inference, by both readings, of the rows over most draws.

    Args:
        by: columns; of each group and sample, the attack or restart counts that is survived in the fewest draws.

    Returns:
        Columns ``by``; draws; every_draw, the share of samples that are right in every draw of every attack, with
        every_low and every_high; expectation, the mean over samples of the part of the draws that is right, with low
        and high (Wilson's, which for parts is wide); all in [0, 1]; samples. Empty where all is of one draw.
    """
    by = list(by)
    frame = of_one_draw(frame)
    rows = frame[(frame["draws"] > 1) & (frame["member"] == ENSEMBLE)]
    rows = rows[rows["draws"] == rows.groupby(by, observed=True)["draws"].transform("max")]
    each = rows[counted(rows, by)].groupby([*by, "sample"], observed=True)
    kept = each.agg(every=("correct", "all"), part=("expected", "min"), draws=("draws", "max")).reset_index()
    groups = kept.groupby(by, observed=True)
    points = groups.agg(draws=("draws", "max"), every_draw=("every", "mean"), samples=("every", "size"))
    points = points.assign(expectation=groups["part"].mean()).reset_index()
    points = points.astype({"every_draw": "float64", "expectation": "float64"})
    points["every_low"], points["every_high"] = intervals(points["every_draw"], points["samples"])
    points["low"], points["high"] = intervals(points["expectation"], points["samples"])
    columns = ["draws", "every_draw", "every_low", "every_high", "expectation", "low", "high", "samples"]
    return points[[*by, *columns]]


class Outcomes:
    """A table of outcomes.

    Attributes:
        frame: columns target, defense, n, seed, threat (clean, whitebox, blackbox, transfer), surrogate, attack,
            loss, eps, cell, sample (index in the test set), member (``ensemble`` or ``1`` .. ``N``: who was judged),
            restart (the first that succeeded, else the last), label, prediction, correct, margin (z_y − max z_c),
            linf, zero_gradient (of the source's loss at the adversarial image), part (of an attack in parts that
            which fooled the ensemble; else empty), expected (in which part of its draws a model that draws at
            inference is right; correct is: in all), draws (how many). A table without the last two is of one draw.
        checks: what was found while it was measured: of the models, the surrogates and a few survivors.
        cells: what the rows are of, by key; of a table that was not read or measured by robench there may be none.
        evaluations: the complete ones that the rows were made for.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        checks: Iterable[Finding] = (),
        cells: Mapping[str, Cell] | None = None,
        evaluations: Iterable[Evaluation] = (),
    ) -> None:
        if "correct" in frame:
            frame = of_one_draw(frame)
        missing = [name for name in (*CELL_COLUMNS, *ROW_COLUMNS) if name not in frame]
        if missing:
            raise RobenchError(
                f"expected outcomes with columns {', '.join(missing)} too, got {', '.join(map(str, frame.columns))}"
            )
        self.frame = frame
        self.checks = tuple(checks)
        self.cells = dict(cells or {})
        self.evaluations = tuple(evaluations)

    def __repr__(self) -> str:
        from robench.evaluation import display

        return display.text(self)

    def _repr_html_(self) -> str:
        from robench.evaluation import display

        return display.html(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy in percent against ε, with bands of 95 %, on ``ax`` or on new axes; returns them."""
        from robench.evaluation import display

        return display.plot(self, ax)

    def to_latex(self) -> str:
        """The table of accuracies as a ``tabular`` for LaTeX with booktabs."""
        from robench.evaluation import display

        return display.latex(self)

    @classmethod
    def join(cls, rows: pd.DataFrame, cells: Mapping[str, Cell]) -> Outcomes:
        """Rows, and by key the cells that they belong to."""
        table = pd.DataFrame(
            [{"cell": key, **{name: getattr(cell, name) for name in CELL_COLUMNS}} for key, cell in cells.items()],
            columns=["cell", *CELL_COLUMNS],
        )
        frame = of_one_draw(rows).merge(table, on="cell", how="inner", validate="many_to_one")
        frame = frame[[*CELL_COLUMNS, *ROW_COLUMNS]].astype(_OF_CELL | _OF_ROW)
        keys = ["threat", "target", "surrogate", "attack", "loss", "eps", "cell", "member", "sample"]
        return cls(frame.sort_values(keys, kind="stable", ignore_index=True), cells=cells)

    @classmethod
    def concat(cls, parts: Iterable[Outcomes]) -> Outcomes:
        """All parts; a row or a check that several have counts once."""
        parts = list(parts)
        if not parts:
            return cls.join(empty_rows(), {})
        frame = pd.concat([part.frame for part in parts], ignore_index=True)
        checks = dict.fromkeys(check for part in parts for check in part.checks)
        cells = {key: cell for part in parts for key, cell in part.cells.items()}
        evaluations = dict.fromkeys(each for part in parts for each in part.evaluations)
        # Two runs of the same weights have the same cells.
        keys = ["target", "cell", "member", "sample"]
        return cls(frame.drop_duplicates(keys, ignore_index=True), checks, cells, evaluations)

    def with_checks(self, checks: Iterable[Finding]) -> Outcomes:
        """The same rows, and these checks instead."""
        return Outcomes(self.frame, checks, self.cells, self.evaluations)

    def where(self, **values: Any) -> Outcomes:
        """Rows whose columns have these values; a list means any of them."""
        mask = np.ones(len(self.frame), dtype=bool)
        for name, value in values.items():
            if name not in self.frame:
                raise unknown("column", name, self.frame.columns)
            column = self.frame[name]
            mask &= (column.isin(value) if isinstance(value, (list, tuple, set)) else column == value).to_numpy()
        return Outcomes(self.frame[mask].reset_index(drop=True), self.checks, self.cells, self.evaluations)

    def called(self, target: str) -> Outcomes:
        """The same rows, of one target, under the name that it has now."""
        return Outcomes(self.frame.assign(target=target), self.checks, self.cells, self.evaluations)

    def of_cells(self, wanted: Callable[[Cell], bool]) -> Outcomes:
        """The rows of the cells that are wanted, and of those of which nothing is known; no checks."""
        others = {key for key, cell in self.cells.items() if not wanted(cell)}
        return Outcomes(self.frame[~self.frame["cell"].isin(others)].reset_index(drop=True), (), self.cells)

    def by_data(self) -> dict[str, Outcomes]:
        """The rows of each data set, by its identity, see `robench.core.data.Data.identity`."""
        judged = self.frame["cell"].map({key: cell.data for key, cell in self.cells.items()})
        parts = self.frame.groupby(judged)
        return {str(data): Outcomes(rows.reset_index(drop=True), self.checks, self.cells) for data, rows in parts}

    def verdicts(self, by: Sequence[str]) -> pd.DataFrame:
        """`robust` of all rows."""
        for name in by:
            if name not in self.frame:
                raise unknown("column", name, self.frame.columns)
        return robust(self.frame, by)

    def accuracy(self, by: Sequence[str] = ("target", "threat", "eps")) -> pd.DataFrame:
        """Share of samples right in every row of their group, with its 95 % Wilson interval.

        Returns:
            Columns ``by``, accuracy, low, high, samples; accuracies in [0, 1].
        """
        return accuracies(self.verdicts(by), by)[[*by, "accuracy", "low", "high", "samples"]]

    def over_draws(self, by: Sequence[str] = ("target", "threat", "eps")) -> pd.DataFrame:
        """`over_draws` of these rows."""
        return over_draws(self.frame, by)

    def transferability(self) -> pd.DataFrame:
        """`transferability` of these rows."""
        return transferability(self.frame)


def transferability(frame: pd.DataFrame) -> pd.DataFrame:
    """Success of examples crafted on one member against each member and the ensemble.

    Returns:
        Columns target, defense, n, seed, source (int), member, eps, success, samples; a sample counts as a success
        where any attack or restart fooled the judge.
    """
    who = ["target", "defense", "n", "seed"]
    rows = frame[frame["threat"] == "transfer"]
    by = [*who, "surrogate", "member", "eps"]
    table = accuracies(robust(rows, by), by)
    table["success"] = 1 - table["accuracy"]
    table["source"] = table["surrogate"].astype(int)
    return table[[*who, "source", "member", "eps", "success", "samples"]]


def of_one_draw(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that do not say over how many draws they are, as older ones, say one draw; others are as they were."""
    if "expected" in rows:
        return rows
    return rows.assign(expected=rows["correct"].astype("float32"), draws=np.int16(1))


def empty_rows() -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in _OF_ROW.items()})
