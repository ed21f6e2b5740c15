"""What single surrogates and versions take, against a plain count."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pandas as pd
import pytest

from robench.core.errors import RobenchError
from robench.reports import build, curves, style, versions
from robench.reports.sheet import Inputs
from tests.reports.frames import rows, share, study

#: Right under each version, by image.
HELD = {
    ("three", "pgd", "ce", 0): "11110000",
    ("three", "pgd", "ce", 1): "01110000",
    ("three", "sgm", "cw", 0): "11100011",
    ("five", "pgd", "ce", 0): "11101111",
    ("eight", "pgd", "ce", 0): "10111111",
}


def frame(eps: float = 0.03, **who: object) -> pd.DataFrame:
    return pd.concat(
        [
            rows(
                [bit == "1" for bit in held], threat="blackbox", eps=eps, surrogate=surrogate, attack=attack, loss=loss,
                restart=restart, **who,
            )
            for (surrogate, attack, loss, restart), held in HELD.items()
        ],
        ignore_index=True,
    )  # fmt: skip


def left(*surrogates: str) -> float:
    """Share of images that are right under every version of these surrogates."""
    own = [held for (surrogate, *_), held in HELD.items() if surrogate in surrogates]
    return sum(all(bit == "1" for bit in bits) for bits in zip(*own, strict=True)) / 8


def test_every_choice_of_surrogates_counts_once() -> None:
    points = versions.by_surrogates(frame(), 0.03).set_index("surrogates")
    for count in (1, 2, 3):
        rates = [left(*chosen) for chosen in combinations(("three", "five", "eight"), count)]
        row = points.loc[count]
        assert row["accuracy"] == pytest.approx(sum(rates) / len(rates))
        assert (row["least"], row["most"], row["choices"], row["samples"]) == (min(rates), max(rates), len(rates), 8)
        assert row["low"] < row["accuracy"] < row["high"]


def test_a_version_counts_with_all_its_starts_and_alone() -> None:
    points = versions.by_version(frame(), 0.03).set_index(["surrogate", "attack", "loss"])
    assert points["accuracy"].to_dict() == {
        ("three", "pgd", "ce"): 3 / 8,
        ("three", "sgm", "cw"): 5 / 8,
        ("five", "pgd", "ce"): 7 / 8,
        ("eight", "pgd", "ce"): 7 / 8,
    }
    # Image 0 falls to the second start of one version alone, image 1 to `eight`, 6 and 7 to PGD on `three`.
    assert points["alone"].to_dict() == {
        ("three", "pgd", "ce"): 3 / 8,
        ("three", "sgm", "cw"): 0,
        ("five", "pgd", "ce"): 0,
        ("eight", "pgd", "ce"): 1 / 8,
    }
    assert points.index[0] == ("three", "pgd", "ce"), "the strongest first"
    assert points.loc[("three", "pgd", "ce"), "versions"] == 2


def test_trainings_are_averaged() -> None:
    two = pd.concat([frame(seed=0), frame(seed=1)], ignore_index=True)
    for made, key in ((versions.by_surrogates, "surrogates"), (versions.by_version, "surrogate")):
        one, both = made(frame(), 0.03), made(two, 0.03)
        assert both["seeds"].eq(2).all()
        assert both[[key, "accuracy", "samples"]].equals(one[[key, "accuracy", "samples"]])


def test_other_radii_members_and_threats_are_left_out() -> None:
    more = [frame(eps=0.07), rows([False] * 8, threat="whitebox", eps=0.03), rows([False] * 8, threat="clean")]
    member = frame().assign(member="1", correct=False)
    assert versions.by_version(pd.concat([frame(), *more, member]), 0.03).equals(versions.by_version(frame(), 0.03))
    with pytest.raises(RobenchError, match=r"no blackbox accuracy at ε 0.01"):
        versions.by_version(frame(), 0.01)


def test_the_report_has_both_where_there_are_several_surrogates() -> None:
    few: dict[str, Any] = {"defenses": ("gal", "dverge"), "sizes": (2, 3), "radii": (0.03,), "samples": 10}
    one = study(**few, versions=(("surrogate-3", "pgd", "ce"),))
    with style.context():
        assert "figA_surrogates" in {sheet.name for sheet in build.sheets(Inputs(study(**few)))}
        assert "figA_surrogates" not in {sheet.name for sheet in build.sheets(Inputs(one))}
    table = versions.described(versions.by_version(one, 0.03), 0.03)
    assert len(table.rows) == 4


def test_the_radius_shown_is_where_ensembles_differ() -> None:
    held = {0.01: 96, 0.05: 90, 0.1: 55, 0.2: 3}
    parts = [rows(share(98), threat="clean")]
    parts += [rows(share(right), threat="blackbox", eps=eps, surrogate="s") for eps, right in held.items()]
    parts += [rows(share(right - 3), threat="whitebox", eps=eps) for eps, right in ((0.01, 50), (0.05, 20))]
    outcomes = pd.concat(parts, ignore_index=True)
    assert curves.telling_eps(outcomes, "blackbox", "whitebox") == 0.1
    assert curves.telling_eps(outcomes, "whitebox") == 0.01
    assert curves.telling_eps(outcomes[outcomes["threat"] != "clean"], "blackbox") == 0.1
    assert curves.telling_eps(outcomes, "blackbox-own") is None
