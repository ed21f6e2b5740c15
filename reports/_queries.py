"""The few queries that figures and tables share, on the tidy frame of outcomes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
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
    """``frame``, checked; targets that share defense, size and seed go under their own names, never averaged.

    Raises:
        RobenchError: a column is missing.
    """
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise RobenchError(f"expected a table of outcomes, got one without the column {missing[0]!r}")
    rivals = ambiguous(frame)
    if not rivals:
        return frame
    rival = frame["target"].isin(rivals)
    return frame.assign(defense=frame["defense"].astype(object).where(~rival, frame["target"]))


def ambiguous(frame: pd.DataFrame) -> list[str]:
    """Targets that share defense, size and seed with another one, sorted."""
    targets = frame[["target", "defense", "n", "seed"]].drop_duplicates()
    return sorted(targets.loc[targets.duplicated(["defense", "n", "seed"], keep=False), "target"])


def wilson(accuracy: npt.ArrayLike, samples: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The 95 % interval of each proportion, to the nearest whole number of its samples."""
    pairs = zip(np.ravel(accuracy).tolist(), np.ravel(samples).tolist(), strict=True)
    ends = np.array([outcomes.wilson(round(p * n), int(n)) for p, n in pairs]).reshape(-1, 2)
    return ends[:, 0], ends[:, 1]


def survived(frame: pd.DataFrame, *threats: str) -> pd.DataFrame:
    """One row per run, ε and sample: `correct` under every attack of the threat, and `versions`, how many they were.

    Only rows that are `robench.evaluation.outcomes.counted`.
    """
    rows = tidy(frame)
    judged = outcomes.robust(rows[rows["threat"].isin(threats)], _RUN)
    # Of no rows at all, pandas makes columns of strings.
    return judged.astype({"n": "int64", "seed": "int64", "eps": "float64", "correct": "bool", "versions": "int64"})


def accuracies(verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row per threat, defense, size and ε from `survived`.

    `accuracy` is the mean over seeds; `low` and `high` are Wilson's for that accuracy on `samples` images: what other
    images would change. `sd`, over `seeds`, is what other trainings would; NaN for one seed.
    """
    runs = verdicts.groupby(_RUN, observed=True).agg(
        accuracy=("correct", "mean"), samples=("correct", "size"), versions=("versions", "min")
    )
    points = (
        runs.reset_index()
        .groupby(POINT, observed=True)
        .agg(
            accuracy=("accuracy", "mean"),
            sd=("accuracy", "std"),
            seeds=("accuracy", "size"),
            samples=("samples", "min"),
            versions=("versions", "min"),
        )
        .reset_index()
    )
    points["low"], points["high"] = wilson(points["accuracy"], points["samples"])
    return points


def paired(left: pd.Series, right: pd.Series) -> float:
    """The exact p-value, two-sided, that two accuracies differ, on the images that both have.

    McNemar's test for one seed each. Several seeds: the sign test on each image's mean over seeds, since verdicts of
    one image by several seeds are not independent.

    Args:
        left, right: correct, indexed by (seed, sample).
    """
    means = pd.concat([left.groupby("sample").mean(), right.groupby("sample").mean()], axis=1, join="inner")
    difference = means.iloc[:, 0] - means.iloc[:, 1]
    wins, losses = int((difference > 1e-9).sum()), int((difference < -1e-9).sum())
    return sign_test(wins, losses)


def transfer_rates(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per run, ε, source and member: `rate`, the share of samples that an attack on the source takes from it.

    A sample is taken if any attack or start takes it.
    """
    rows = tidy(frame)
    rows = rows[rows["threat"] == "transfer"]
    pair = ["defense", "n", "seed", "target", "eps", "surrogate", "member"]
    rates = outcomes.robust(rows, pair).groupby(pair, observed=True)["correct"].agg(["mean", "size"]).reset_index()
    rates["rate"] = 1 - rates.pop("mean")
    rates = rates.rename(columns={"surrogate": "source", "size": "samples"})
    return rates[["defense", "n", "seed", "target", "eps", "source", "member", "rate", "samples"]]
