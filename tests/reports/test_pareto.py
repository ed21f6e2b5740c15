"""Clean and robust accuracy: points, intervals, the front and the costs beside them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from robench.defenses import DEFENSES
from robench.evaluation.statistics import accuracy_interval
from robench.reports import build, pareto, style
from robench.reports.sheet import Inputs, Sheet, Skipped
from tests.reports.frames import rows, share

#: Right of 100: clean, white-box, black-box.
RIGHT = {"baseline": (98, 10, 30), "adp": (97, 20, 20), "dverge": (95, 60, 90), "advt": (90, 50, 95)}


def outcomes(sizes: tuple[int, ...] = (3,), eps: float = 0.1) -> pd.DataFrame:
    parts = [
        part
        for defense, (clean, white, black) in RIGHT.items()
        for n in sizes
        for part in (
            rows(share(clean), threat="clean", defense=defense, n=n),
            rows(share(white), eps=eps, defense=defense, n=n),
            rows(share(black), threat="blackbox", surrogate="s", eps=eps, defense=defense, n=n),
        )
    ]
    return pd.concat(parts, ignore_index=True)


def test_points_and_front() -> None:
    points = pareto.values(outcomes(), 0.1).set_index(["under", "defense"])
    for defense, (clean, white, black) in RIGHT.items():
        assert points.loc[("blackbox", defense), "accuracy"] == black / 100
        # Verdicts are nested: what the weaker attack takes, the stronger one takes too.
        assert points.loc[("worst", defense), "accuracy"] == min(white, black) / 100
        assert points.loc[("worst", defense), "clean"] == clean / 100
    front = {under: set(part.index.get_level_values(1)) for under, part in points[points["front"]].groupby("under")}
    assert front == {"blackbox": {"baseline", "dverge", "advt"}, "worst": {"baseline", "adp", "dverge"}}


def test_equal_points_are_both_on_the_front() -> None:
    twins = pd.concat(
        [outcomes()[lambda f: f["defense"] == "dverge"].assign(defense=name, target=name) for name in ("gal", "trs")]
    )
    assert pareto.values(twins, 0.1)["front"].all()


def test_seeds_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    alike = rng.random((1, 200)) < 0.7
    low, high = accuracy_interval(alike)
    assert accuracy_interval(np.repeat(alike, 3, axis=0)) == pytest.approx((low, high), abs=0.01)
    apart = np.stack([rng.random(200) < p for p in (0.5, 0.7, 0.9)])
    wide = accuracy_interval(apart)
    assert wide.high - wide.low > 2 * (high - low)
    assert 0 <= wide.low < apart.mean() < wide.high <= 1


@pytest.mark.parametrize("right", [0, 20])
def test_all_or_none_right_is_still_uncertain(right: int) -> None:
    """Three trainings that agree on every image say nothing of other images."""
    verdicts = np.zeros((3, 20), dtype=bool)
    verdicts[:, :right] = True
    low, high = accuracy_interval(verdicts)
    assert high - low > 0.1


def test_the_interval_covers() -> None:
    """Accuracies that vary over trainings and images: of 300 intervals for .7 about 95 % hold it, not fewer than 92."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(300):
        seeds = rng.normal(0, 0.04, (3, 1))
        images = np.where(rng.random((1, 150)) < 0.5, 0.2, -0.2)
        low, high = accuracy_interval(rng.random((3, 150)) < 0.7 + seeds + images)
        held += low <= 0.7 <= high
    assert held >= 0.92 * 300


def test_costs_stand_beside_the_accuracies() -> None:
    frame = outcomes()
    costs = pd.DataFrame(
        [{"target": "dverge-3-s0", "passes": 1200.0, "seconds": 81.0, "flops": 1.5}],
    )
    table = pareto.described(pareto.values(frame, 0.1, costs))
    by_name = {row[0].text: [cell.text for cell in row[-3:]] for row in table.rows}
    assert by_name["DVERGE"] == ["1,200", "81", "1.5"]
    assert by_name["ADP"] == ["–", "–", "–"]


def test_every_defense_that_ships_is_told_apart_in_colour_and_in_grey() -> None:
    names = [name for name in DEFENSES.names() if DEFENSES.get(name).__module__.startswith("robench.")]
    assert len({style.marker(name) for name in names}) == len(names) == 15
    assert len({style.color(name) for name in names}) == len(names)


def test_the_figure_has_a_point_bars_and_a_name_on_the_front() -> None:
    points = pareto.values(outcomes(), 0.1)
    with style.context():
        ax = pareto.pareto(points[points["under"] == "worst"], style.figure().subplots())
        drawn = [c for c in ax.collections if len(c.get_offsets()) == len(RIGHT)]
        assert {to_hex(color) for color in drawn[0].get_facecolors()} == {style.color(n).lower() for n in RIGHT}
        assert sorted(name for text in ax.texts for name in text.get_text().split("\n")) == [
            "ADP/3", "Baseline/3", "DVERGE/3",
        ]  # fmt: skip
        assert len(ax.containers) == len(RIGHT)


def test_names_of_points_that_coincide_do_not() -> None:
    twins = pd.concat(
        [outcomes()[lambda f: f["defense"] == "dverge"].assign(defense=n, target=n) for n in ("gal", "trs")]
    )
    points = pareto.values(twins, 0.1)
    with style.context():
        ax = pareto.pareto(points[points["under"] == "worst"], style.figure().subplots())
    assert [text.get_text() for text in ax.texts] == ["GAL/3\nTRS/3"]


def test_a_legend_is_no_wider_than_its_figure() -> None:
    parts = [outcomes()[lambda f: f["defense"] == "dverge"].assign(defense=n, target=n) for n in DEFENSES.names()]
    for frame in (pd.concat(parts, ignore_index=True), outcomes(sizes=(3, 5, 8))):
        with style.context():
            sheet = next(each for each in build.sheets(Inputs(frame)) if each.name == "fig_pareto")
            assert isinstance(sheet, Sheet)
            sheet.figure.draw_without_rendering()
            (legend,) = sheet.figure.legends
            box = legend.get_window_extent()
            assert box.x0 >= 0
            assert box.x1 <= sheet.figure.bbox.width


def test_seeds_without_a_common_image_are_no_point() -> None:
    parts = [
        rows(share(5), threat=name, seed=seed, first=100 * seed) for name in ("clean", "whitebox") for seed in (0, 1)
    ]
    assert pareto.values(pd.concat(parts), 0.01).empty


def test_nothing_attacked_is_named() -> None:
    clean = rows(share(90), threat="clean")
    with style.context():
        assert "fig_pareto skipped: no ensemble was judged" in " ".join(
            str(each) for each in build.sheets(Inputs(clean)) if isinstance(each, Skipped)
        )
