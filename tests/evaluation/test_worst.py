"""What is left under everything that was tried, against a plain count."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robench.evaluation.worst import worst
from tests.reports.frames import rows

IMAGES = 8


def frame(**verdicts: list[bool]) -> pd.DataFrame:
    """``threat_eps`` -> verdicts."""
    parts = []
    for name, right in verdicts.items():
        threat, _, eps = name.partition("_")
        parts.append(rows(right, threat=threat, eps=float(f"0.{eps}") if eps else 0.0))
    return pd.concat(parts, ignore_index=True)


def bits(text: str) -> list[bool]:
    return [letter == "1" for letter in text]


def test_an_image_counts_where_everything_left_it_right() -> None:
    found = worst(frame(clean=bits("11110111"), whitebox_1=bits("11000111"), blackbox_1=bits("10100011")))
    (row,) = found.to_dict("records")
    assert (row["accuracy"], row["samples"]) == (3 / 8, 8)
    assert row["by"] == "wrong as they are 12.5%, blackbox pgd ce 37.5%, whitebox pgd ce 12.5%"
    assert row["low"] < 3 / 8 < row["high"]


def test_of_an_attack_in_parts_the_part_is_named() -> None:
    strong = rows(bits("0011"), threat="whitebox", eps=0.1, attack="strongest")
    strong.loc[strong["sample"] == 0, "part"] = "apgd ce"
    strong.loc[strong["sample"] == 1, "part"] = "mora ce"
    (row,) = worst(strong).to_dict("records")
    assert row["by"] == "whitebox strongest (mora ce) 25.0%, whitebox strongest (apgd ce) 25.0%"


def test_smaller_radii_count_and_larger_ones_do_not() -> None:
    found = worst(frame(whitebox_1=bits("10111111"), whitebox_2=bits("11011111"), whitebox_3=bits("00000000")))
    assert found["accuracy"].tolist() == [7 / 8, 6 / 8, 0]


def test_images_are_those_of_the_whitebox_threat() -> None:
    """A thousand images that a surrogate attacked say little of images that no white-box attack was tried on."""
    found = worst(frame(clean=[True] * 8, whitebox_1=bits("1000"), blackbox_1=bits("11111110"), blackbox_2=[True] * 8))
    (row,) = found.to_dict("records")
    assert (row["accuracy"], row["samples"], row["eps"]) == (1 / 4, 4, 0.1)


def test_images_that_were_chosen_by_being_right_are_no_accuracy() -> None:
    """Three of four images are wrong as they are, and an attack on a member leaves the fourth."""
    chosen = rows([True], threat="transfer", eps=0.1, surrogate="1")
    assert worst(pd.concat([frame(clean=bits("1000")), chosen])).empty
    (row,) = worst(pd.concat([frame(clean=bits("1000"), whitebox_1=bits("1000")), chosen])).to_dict("records")
    assert row["accuracy"] == 1 / 4


def test_members_alone_and_no_attack_are_no_row() -> None:
    assert worst(frame(clean=[True] * 8)).empty
    members = rows([False] * 8, threat="transfer", eps=0.1, member="1")
    assert worst(members).empty


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=4 * IMAGES, max_size=4 * IMAGES))
def test_shares_add_up_to_what_is_lost(values: list[bool]) -> None:
    table = np.array(values).reshape(4, IMAGES)
    names = ("clean", "whitebox_1", "blackbox_1", "convergence_1")
    (row,) = worst(frame(**{name: list(map(bool, part)) for name, part in zip(names, table, strict=True)})).to_dict(
        "records"
    )
    assert row["accuracy"] == pytest.approx(table.all(axis=0).mean())
    shares = [float(part.rpartition(" ")[2].rstrip("%")) for part in row["by"].split(", ") if part]
    assert sum(shares) == pytest.approx(100 * (1 - row["accuracy"]), abs=0.3)
