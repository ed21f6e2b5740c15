"""Results as lists of objects, the same for the terminal, CSV and JSON."""

from __future__ import annotations

from typing import Any

from robench.evaluation.outcomes import Outcomes


def objects(outcomes: Outcomes) -> list[dict[str, Any]]:
    """One object per target, threat and ε; per source, member and ε for transfer. Fractions in [0, 1].

    Keys: target, defense, n, seed, threat, eps, accuracy, low, high, samples; or, for transfer, run, source, target
    (members from 1, ``"ensemble"`` for the last column), eps, success, samples.
    """
    judged = outcomes.where(threat=["clean", "whitebox", "blackbox"])
    table = judged.accuracy(["target", "defense", "n", "seed", "threat", "eps"])
    rows: list[dict[str, Any]] = [
        {
            **{name: str(row[name]) for name in ("target", "defense", "threat")},
            **{name: int(row[name]) for name in ("n", "seed", "samples")},
            **{name: float(row[name]) for name in ("eps", "accuracy", "low", "high")},
        }
        for row in table.to_dict("records")
    ]
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
