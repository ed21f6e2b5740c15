"""Results as lists of objects, the same for the terminal, CSV and JSON."""

from __future__ import annotations

from typing import Any

import pandas as pd
import scipy

from robench.evaluation.outcomes import Outcomes
from robench.evaluation.threats import ATTACK_BY_ATTACK, BLACKBOX
from robench.evaluation.worst import worst


def objects(outcomes: Outcomes) -> list[dict[str, Any]]:
    """One object per target, threat and ε; for threats of growing effort per attack too; per source, member and ε for
    transfer.

    Fractions in [0, 1]. Keys: target, defense, n, seed, threat, eps, accuracy, low, high, samples (and attack); or, for
    transfer, run, source, target (members from 1, ``"ensemble"`` for the last column), eps, success, samples.
    """
    by = ["target", "defense", "n", "seed", "threat", "eps"]
    rows = _plain(outcomes.where(threat=["clean", "whitebox", *BLACKBOX]).accuracy(by))
    rows += _plain(outcomes.where(threat=list(ATTACK_BY_ATTACK)).accuracy([*by, "attack"]))
    rows += [
        {
            "run": str(row["target"]),
            "source": int(row["source"]),
            "target": row["member"] if row["member"] == "ensemble" else int(row["member"]),
            "eps": float(row["eps"]),
            "success": float(row["success"]),
            "samples": int(row["samples"]),
        }
        for row in outcomes.transferability().to_dict("records")
    ]
    return rows


def expectations(outcomes: Outcomes) -> list[dict[str, Any]]:
    """One object per target, threat and ε of models that were judged over several draws, as `objects` has it, with the
    accuracy in expectation; the threat says so, and clean images are in each of them, at ε 0."""
    by = ["target", "defense", "n", "seed", "threat", "eps"]
    kept = ["clean", "whitebox", *BLACKBOX]
    found = outcomes.where(threat=kept).over_draws(by)
    named = "%s, in expectation over %d draws"
    parts = []
    for (target, threat), rows in found[found["threat"] != "clean"].groupby(["target", "threat"], observed=True):
        clean = found[(found["target"] == target) & (found["threat"] == "clean")]
        parts.append(pd.concat([clean, rows]).assign(threat=named % (threat, rows["draws"].max())))
    if not parts:
        return []
    columns = [*by, "accuracy", "low", "high", "samples"]
    return _plain(pd.concat(parts).rename(columns={"expectation": "accuracy"})[columns])


def left(outcomes: Outcomes) -> list[dict[str, Any]]:
    """One object per target and ε of `robench.evaluation.worst.worst`, its threat called ``worst``."""
    return _plain(worst(outcomes.frame).assign(threat="worst"))


def diversities(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """One object per target of `Session.diversity`: target, defense, n, seed, eps, diversity (mean over images, in
    nats), low, high (95 % t-interval), samples."""
    by = ["target", "defense", "n", "seed", "eps"]
    table = rows.groupby(by)["diversity"].agg(["mean", "sem", "size"]).reset_index()
    half = scipy.stats.t.ppf(0.975, table["size"] - 1) * table["sem"]
    table = table.assign(diversity=table["mean"], low=table["mean"] - half, high=table["mean"] + half)
    return _plain(table.rename(columns={"size": "samples"})[[*by, "diversity", "low", "high", "samples"]])


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of plain Python values, which JSON takes."""
    columns = [table[name].tolist() for name in table]
    return [dict(zip(table.columns, values, strict=True)) for values in zip(*columns, strict=True)]
