"""`benchmarks/defenses_digits.py`: known outcomes give known verdicts."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks import defenses_digits
from robench.reports.document import Table
from tests.reports.frames import rows, share

#: Right of 100 under PGD, where others keep 70; and what transfers, where others have 60.
WHITE, TRANSFER = {"dverge": 95, "trs": 20}, {"dverge": 5, "trs": 58}


def outcomes(seeds: tuple[int, ...]) -> pd.DataFrame:
    names = {name for claim in defenses_digits.CLAIMS for name in (claim.left, claim.right)}
    rng, parts = np.random.default_rng(0), []
    for defense, seed in product(sorted(names), seeds):
        about: dict[str, Any] = {"defense": defense, "seed": seed}
        right = share(WHITE.get(defense, 70) + int(rng.integers(-2, 3)))
        parts.append(rows(share(98), threat="clean", **about))
        for eps in (0.1, 0.2):
            parts.append(rows(right, eps=eps, **about))
            parts.append(rows(right, threat="blackbox", eps=eps, surrogate="s", **about))
        parts.append(rows(right, threat="convergence", eps=0.1, attack="pgd:steps=20", **about))
        parts.append(rows(right, threat="convergence", eps=0.1, attack="strongest:steps=20", **about))
        for source, member in product(("1", "2"), ("1", "2", "ensemble")):
            fell = 100 if source == member else TRANSFER.get(defense, 60) + int(rng.integers(-2, 3))
            held = share(100 - fell)
            parts.append(rows(held, threat="transfer", eps=0.2, surrogate=source, member=member, **about))
    return pd.concat(parts, ignore_index=True)


def verdicts(table: Table) -> dict[tuple[str, str], str]:
    return {(row[1].text, row[2].text): row[4].text for row in table.rows}


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_verdicts_follow_from_the_differences(seeds: tuple[int, ...]) -> None:
    frame = outcomes(seeds)
    found = verdicts(defenses_digits.claims(frame))
    assert len(found) == len(defenses_digits.CLAIMS)
    assert found["DVERGE above Baseline", "white-box .1"] == "shows"
    assert found["DVERGE below Baseline", "transfer .2"] == "shows"
    assert found["TRS above Baseline", "white-box .1"] == "reversed"
    assert found["TRS below Baseline", "transfer .2"] == "undecided"
    assert found["LOTOS above Baseline", "white-box .2"] == "undecided"
    (dverge,) = [row for row in defenses_digits.accuracies(frame).rows if row[0].text == "DVERGE"]
    assert dverge[1].text.startswith("98.0")
    assert ("±" in dverge[1].text) == (len(seeds) > 1)


def test_a_seed_that_is_not_whole_is_left_out() -> None:
    frame = outcomes((0, 1))
    part = frame[~((frame["seed"] == 1) & (frame["defense"] == "trs") & (frame["threat"] == "transfer"))]
    assert defenses_digits.whole(frame) == [0, 1]
    assert defenses_digits.whole(part) == [0]
