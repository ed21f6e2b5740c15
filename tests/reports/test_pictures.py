"""Pictures: which ones, and what their pixels are."""

from __future__ import annotations

import numpy as np
import pandas as pd

from robench.reports import style
from robench.reports.pictures import EACH, Picture, choose, sheet
from tests.reports.frames import rows, share, study


def picture(clean: float = 0.5, adversarial: float = 0.52, shape: tuple[int, ...] = (3, 4, 4)) -> Picture:
    images = [np.full(shape, value, dtype=np.float32) for value in (clean, adversarial)]
    return Picture("cell", "ensemble", 7, *images, "sample 7: a → b")


def test_every_point_and_cell_has_its_share() -> None:
    frame = study(defenses=("dverge",), sizes=(2,), radii=(0.01, 0.03), samples=20)
    chosen = choose(frame, 1000)
    assert not chosen["correct"].any()
    assert set(chosen["threat"]) == {"blackbox", "whitebox", "transfer"}
    points = chosen[chosen["threat"] != "transfer"].groupby(["threat", "eps"])["sample"].agg(["size", "nunique"])
    assert points["size"].tolist() == points["nunique"].tolist() == [EACH] * 4
    cells = chosen[chosen["threat"] == "transfer"].groupby(["surrogate", "member"]).size()
    fell = frame[(frame["threat"] == "transfer") & ~frame["correct"]].groupby(["surrogate", "member"]).size()
    assert cells.to_dict() == fell.clip(upper=EACH).to_dict()
    for count in (0, 1, 5):
        assert len(choose(frame, count)) == count
    # With few, points of the whole report are shown, not the first ones alone.
    assert set(choose(frame, 5)["threat"]) == {"blackbox", "whitebox", "transfer"}


def test_attacks_take_turns_and_a_sample_comes_once() -> None:
    first = rows([False] * 4, threat="blackbox", surrogate="a", attack="mdi2")
    second = rows([False] * 8, threat="blackbox", surrogate="a", attack="pgd")
    chosen = choose(pd.concat([second, first], ignore_index=True), EACH)
    assert list(zip(chosen["attack"], chosen["sample"], strict=True)) == [("mdi2", 0), ("pgd", 4), ("mdi2", 1)]


def test_nothing_fell() -> None:
    assert choose(rows(share(10, 10)), 10).empty


def test_the_difference_is_ten_times_and_grey_where_there_is_none() -> None:
    panels = picture(0.5, 0.52).panels()
    assert list(panels) == ["clean", "adversarial", "difference × 10"]
    assert [each[0, 0].tolist() for each in panels.values()] == [[128] * 3, [133] * 3, [178] * 3]
    same = picture(0.2, 0.2, (1, 4, 6)).panels()["difference × 10"]
    assert same.shape == (4, 6)
    assert set(same.ravel().tolist()) == {128}
    assert set(picture(0.9, 0.1).panels()["difference × 10"].ravel().tolist()) == {0}


def test_a_sheet_has_a_row_per_picture() -> None:
    with style.context():
        figure = sheet([picture(), picture(0.1, 0.2, (1, 4, 4))])
    assert len(figure.axes) == 6
    assert [ax.get_title() for ax in figure.axes] == ["clean", "adversarial", "difference × 10", "", "", ""]
    np.testing.assert_array_equal(figure.axes[5].images[0].get_array(), np.full((4, 4), 255))
    assert figure.axes[2].texts[0].get_text() == "sample 7: a → b"
