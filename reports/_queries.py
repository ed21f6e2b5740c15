"""The few queries that figures and tables share, on the tidy frame of outcomes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pandas as pd

from robench.evaluation import outcomes
from robench.evaluation.statistics import Interval, difference_over_seeds, interval_of_mean, sign_test

#: What makes a point of a curve, and a run of it.
POINT = ["threat", "defense", "n", "eps"]
#: What tells trainings of a defense apart.
RUNS = ["seed", "target"]
_RUN = [*POINT, *RUNS]


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame``, in which targets that share defense, size and seed go under their own names, never averaged: what they
    are then is in the column ``registered``."""
    rivals = ambiguous(frame)
    return by_own_names(frame, rivals) if rivals else frame


def by_own_names(frame: pd.DataFrame, targets: Collection[str]) -> pd.DataFrame:
    """``frame`` with these targets under their own names; what they were is in the column ``registered``."""
    own = frame["defense"].astype(object)
    shown = own.where(~frame["target"].isin(list(targets)), frame["target"])
    return frame.assign(defense=shown, registered=frame.get("registered", own))


def ambiguous(frame: pd.DataFrame) -> list[str]:
    """Targets that share defense, size and seed with another one, sorted."""
    targets = frame[["target", "defense", "n", "seed"]].drop_duplicates()
    return sorted(targets.loc[targets.duplicated(["defense", "n", "seed"], keep=False), "target"])


def survived(frame: pd.DataFrame, *threats: str) -> pd.DataFrame:
    """One row per run, ε and sample: `correct` under every attack of the threat, and `versions`, how many they were.

    Only rows that are `robench.evaluation.outcomes.counted`.
    """
    rows = tidy(frame)
    judged = outcomes.robust(rows[rows["threat"].isin(threats)], _RUN)
    # Of no rows at all, pandas makes columns of strings.
    return judged.astype({"n": "int64", "seed": "int64", "eps": "float64", "correct": "bool", "versions": "int64"})


def accuracies(verdicts: pd.DataFrame, point: Sequence[str] = POINT) -> pd.DataFrame:
    """`robench.evaluation.outcomes.accuracies` of `survived`: one row per threat, defense, size and ε, or per
    ``point``, the mean over seeds. Of several seeds low and high are what other images and other trainings would
    change (`robench.evaluation.statistics.interval_of_mean`)."""
    points = outcomes.accuracies(verdicts, point, RUNS)
    if (points["seeds"] > 1).any():
        own = dict(iter(verdicts.groupby(list(point), observed=True)))
        keys = points[list(point)].itertuples(index=False, name=None)
        ends = [_interval(own[key]) for key in keys]
        points["low"], points["high"] = (pd.Series(each, points.index) for each in zip(*ends, strict=True))
    return points


def _interval(verdicts: pd.DataFrame) -> Interval:
    """Of the mean over the trainings of one point."""
    by_seed, by_image = (verdicts.groupby(key, observed=True)["correct"] for key in (RUNS, "sample"))
    return interval_of_mean(by_seed.mean().to_numpy(), by_image.mean().to_numpy(), int(by_seed.size().min()))


def differences(left: pd.Series, right: pd.Series) -> pd.Series:
    """By image that all seeds of both have, the mean over seeds of ``left`` less that of ``right``; as for `paired`."""
    one, other = _aligned(left, right)
    return one.mean() - other.mean()


def _aligned(left: pd.Series, right: pd.Series) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both by seed and by image, on the images that all seeds of both have."""
    one, other = (side.unstack("sample").dropna(axis="columns").astype("float64") for side in (left, right))
    both = one.columns.intersection(other.columns)
    return one[both], other[both]


def paired(left: pd.Series, right: pd.Series) -> float:
    """The exact p-value, two-sided, that two accuracies differ, on the images that both have; `differences` says which
    of them is higher there.

    McNemar's test for one seed each. Several seeds: `difference_over_seeds`, as other seeds and other images would move
    the difference, and no less than the sign test on each image's mean over seeds; 1 where most images are against the
    difference, which is then of a few.

    Args:
        left, right: correct, indexed by (seed, sample).
    """
    one, other = _aligned(left, right)
    by_image = (one.mean() - other.mean()).to_numpy()
    wins, losses = int((by_image > 1e-9).sum()), int((by_image < -1e-9).sum())
    p = sign_test(wins, losses)
    if max(len(one), len(other)) == 1 or len(by_image) < 2:
        return p
    if (wins - losses) * by_image.mean() <= 0:
        return 1.0
    return max(p, difference_over_seeds(one.to_numpy(), other.to_numpy()).p)


def transfer_rates(frame: pd.DataFrame) -> pd.DataFrame:
    """`robench.evaluation.outcomes.transferability`, with targets named by `tidy`; the success is called ``rate``."""
    rates = outcomes.transferability(tidy(frame)).rename(columns={"success": "rate"})
    columns = ["defense", "n", "seed", "target", "eps", "source", "member", "rate", "samples"]
    return rates.assign(source=rates["source"].astype(str))[columns]
