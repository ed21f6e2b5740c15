"""The few queries that figures and tables share, on the tidy frame of outcomes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pandas as pd

from robench.core.errors import RobenchError
from robench.evaluation import outcomes
from robench.evaluation.statistics import sign_test

COLUMNS = (
    "target", "defense", "n", "seed", "threat", "surrogate", "attack", "loss", "eps", "cell", "restart", "member",
    "sample", "correct",
)  # fmt: skip
#: What makes a point of a curve, and a run of it.
POINT = ["threat", "defense", "n", "eps"]
_RUN = [*POINT, "seed", "target"]


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """``frame``, checked; targets that share defense, size and seed go under their own names, never averaged: what
    they are then is in the column ``registered``.

    Raises:
        RobenchError: a column is missing.
    """
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise RobenchError(f"expected a table of outcomes, got one without the column {missing[0]!r}")
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
    ``point``, the mean over seeds."""
    return outcomes.accuracies(verdicts, point, ["seed", "target"])


def differences(left: pd.Series, right: pd.Series) -> pd.Series:
    """By image that both have, the mean over seeds of ``left`` less that of ``right``; as for `paired`."""
    means = pd.concat([left.groupby("sample").mean(), right.groupby("sample").mean()], axis=1, join="inner")
    return means.iloc[:, 0] - means.iloc[:, 1]


def paired(left: pd.Series, right: pd.Series) -> float:
    """The exact p-value, two-sided, that two accuracies differ, on the images that both have; `differences` says which
    of them is higher there.

    McNemar's test for one seed each. Several seeds: the sign test on each image's mean over seeds, since verdicts of
    one image by several seeds are not independent.

    Args:
        left, right: correct, indexed by (seed, sample).
    """
    difference = differences(left, right)
    wins, losses = int((difference > 1e-9).sum()), int((difference < -1e-9).sum())
    return sign_test(wins, losses)


def transfer_rates(frame: pd.DataFrame) -> pd.DataFrame:
    """`robench.evaluation.outcomes.transferability`, with targets named by `tidy`; the success is called ``rate``."""
    rates = outcomes.transferability(tidy(frame)).rename(columns={"success": "rate"})
    columns = ["defense", "n", "seed", "target", "eps", "source", "member", "rate", "samples"]
    return rates.assign(source=rates["source"].astype(str))[columns]
