"""Figures: known outcomes give exact artists."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import ClassVar

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from robench.core.errors import RobenchError
from robench.defenses.advt import AdvT
from robench.defenses.base import DEFENSES
from robench.evaluation.outcomes import intervals
from robench.reports import curves, effort, pareto, regions, settings, style, transferability, trend
from robench.reports._queries import survived
from tests.reports.frames import history, rows, share


def test_the_style_leaves_no_trace() -> None:
    before = dict(mpl.rcParams)
    with style.context():
        assert mpl.rcParams["pdf.fonttype"] == 42
    assert dict(mpl.rcParams) == before


def test_every_known_defense_has_a_look_of_its_own() -> None:
    names = ["baseline", "adp", "gal", "dverge", "advt", "dverge-advt"]
    assert len({style.color(name) for name in names}) == len({style.marker(name) for name in names}) == 6
    assert style.color("mine") == style.color("mine")
    assert style.order(["zeta", "dverge", "alpha", "baseline"]) == ["baseline", "dverge", "alpha", "zeta"]


def test_a_defense_may_declare_its_color_and_those_that_extend_it_get_another(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(AdvT):
        color: ClassVar[str] = "#123456"

    class Yours(Mine):
        pass

    class Bad(Mine):
        color: ClassVar[str] = "bleu"

    monkeypatch.setattr(DEFENSES, "_items", {**DEFENSES._items, "mine": Mine, "yours": Yours})
    style._look.cache_clear()
    assert style.color("mine") == "#123456"
    assert style.marker("mine") != style.marker("advt")
    assert style.color("yours") not in ("#123456", style.color("advt"))
    monkeypatch.setattr(DEFENSES, "_items", {**DEFENSES._items, "bad": Bad})
    style._look.cache_clear()
    with pytest.raises(RobenchError, match="`color` of defense 'bad'"):
        style.color("advt")
    style._look.cache_clear()


def test_all_versions_must_be_survived() -> None:
    frame = pd.concat(
        [
            rows([True, True, False, True], threat="blackbox", surrogate="a"),
            rows([True, False, True, True], threat="blackbox", surrogate="b"),
        ]
    )
    verdicts = survived(frame, "blackbox")
    assert verdicts["correct"].tolist() == [True, False, False, True]
    assert verdicts["versions"].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (7, 10), (532, 1000)])
def test_wilson_is_that_of_scipy(right: int, total: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(right, total).proportion_ci(method="wilson")
    low, high = intervals([right / total], [total])
    assert (low[0], high[0]) == pytest.approx((expected.low, expected.high))


def test_curve_starts_at_the_clean_accuracy() -> None:
    frame = pd.concat([rows(share(90), threat="clean"), rows(share(40)), rows(share(10), eps=0.02)])
    with style.context():
        ax = curves.curves(frame, style.figure().subplots(), threat="whitebox")
    (line,) = ax.get_lines()
    np.testing.assert_allclose(line.get_xdata(), [0, 0.01, 0.02])
    np.testing.assert_allclose(line.get_ydata(), [90, 40, 10])
    assert to_hex(line.get_color()) == style.color("dverge").lower()
    assert not ax.containers
    # The band is Wilson's interval over the images.
    (band,) = ax.collections
    low, high = intervals([0.9, 0.4, 0.1], [100, 100, 100])
    corners = band.get_paths()[0].vertices
    for eps, bottom, top in zip([0, 0.01, 0.02], 100 * low, 100 * high, strict=True):
        ends = corners[np.isclose(corners[:, 0], eps), 1]
        np.testing.assert_allclose([ends.min(), ends.max()], [bottom, top])


def test_lines_are_told_apart_in_grey() -> None:
    frame = pd.concat(
        [rows(share(40), defense=name, n=n, target=f"{name}-{n}") for name in ("adp", "dverge") for n in (3, 5)]
    )
    with style.context():
        ax = curves.curves(frame, style.figure().subplots(), threat="whitebox")
    looks = {(line.get_marker(), line.get_linestyle(), str(line._dash_pattern)) for line in ax.get_lines()}  # type: ignore[attr-defined]
    assert len(looks) == 4
    assert [line.get_label() for line in ax.get_lines()] == ["ADP/3", "ADP/5", "DVERGE/3", "DVERGE/5"]


def test_a_trend_has_the_interval_of_its_images() -> None:
    frame = history(epochs=3, sizes=(3,))
    with style.context():
        plain, banded = style.figure().subplots(1, 2)
        trend.trend(frame, plain, quantity="transferability")
        trend.trend(frame.assign(images=68), banded, quantity="transferability")
    assert (len(plain.collections), len(banded.collections)) == (0, 1)


def test_clean_accuracy_along_training_is_drawn_where_it_was_recorded() -> None:
    frame = history(epochs=3, sizes=(3, 5))
    assert trend.there(frame.assign(clean=None, clean_images=None)) == ["diversity", "transferability"]
    recorded = frame["run"] == frame["run"].iloc[0]
    frame = frame.assign(clean=[0.5 if own else None for own in recorded], clean_images=200.0)
    with style.context():
        ax = trend.trend(frame, style.figure().subplots(), quantity="clean")
    assert ax.get_title() == "Clean accuracy"
    (line,) = ax.get_lines()
    assert list(line.get_ydata()) == [50.0, 50.0, 50.0]  # type: ignore[arg-type]
    assert len(ax.collections) == 1


def test_several_seeds_have_error_bars() -> None:
    frame = pd.concat([rows(share(40), seed=0), rows(share(50), seed=1), rows(share(60), seed=2)])
    with style.context():
        ax = curves.curves(frame, style.figure().subplots(), threat="whitebox")
    (bars,) = ax.containers
    (segment,) = bars[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 1], [40, 60])
    values = curves.values(frame, "whitebox")
    assert values[["accuracy", "sd", "seeds"]].to_numpy().tolist() == [[0.5, pytest.approx(0.1), 3]]


def test_curve_without_its_threat_says_what_to_type() -> None:
    with pytest.raises(RobenchError, match="robench eval --threat blackbox"):
        curves.values(rows(share(40)), "blackbox")


def test_targets_of_one_defense_size_and_seed_are_not_averaged() -> None:
    frame = pd.concat([rows(share(40), target="mine"), rows(share(60), target="theirs")])
    values = curves.values(frame, "whitebox")
    assert dict(zip(values["defense"], values["accuracy"], strict=True)) == {"mine": 0.4, "theirs": 0.6}


def transfer(n: int) -> pd.DataFrame:
    """Source i takes 10·i + j percent from member j, all of its own, and 5 percent of the ensemble."""
    parts = []
    for i in range(1, n + 1):
        for j in range(1, n + 1):
            taken = 100 if i == j else 10 * i + j
            parts.append(rows(share(100 - taken), threat="transfer", n=n, eps=0.03, surrogate=str(i), member=str(j)))
        parts.append(rows(share(95), threat="transfer", n=n, eps=0.03, surrogate=str(i)))
    return pd.concat(parts)


@pytest.mark.parametrize("n", [1, 3, 8, 11])
def test_matrix_shows_its_rates(n: int) -> None:
    if n == 11:  # members are sorted as numbers
        frame = pd.concat([rows([False], threat="transfer", n=11, surrogate=str(i), member="1") for i in range(1, 12)])
        assert list(transferability.matrix(frame, "dverge-11-s0", 0.01).index) == [str(i) for i in range(1, 12)]
        return
    with style.context():
        ax = transferability.transferability(transfer(n), style.figure().subplots(), target=f"dverge-{n}-s0", eps=0.03)
    texts = [text.get_text() for text in ax.texts]
    expected = [["100" if i == j else str(10 * i + j) for j in range(1, n + 1)] + ["5"] for i in range(1, n + 1)]
    assert texts == [text for row in expected for text in row]
    assert [text.get_text() for text in ax.get_xticklabels()] == [*map(str, range(1, n + 1)), "ens."]
    assert [text.get_text() for text in ax.get_yticklabels()] == list(map(str, range(1, n + 1)))


def test_a_sample_is_transferred_if_any_start_takes_it() -> None:
    frame = pd.concat(
        [
            rows([True, False], threat="transfer", surrogate="1", member="2", restart=0),
            rows([False, True], threat="transfer", surrogate="1", member="2", restart=1),
        ]
    )
    assert transferability.matrix(frame, "dverge-3-s0", 0.01).to_numpy().tolist() == [[1.0]]


def test_matrix_of_an_unmeasured_eps() -> None:
    with pytest.raises(RobenchError, match=r"ε = 0\.05"):
        transferability.matrix(transfer(3), "dverge-3-s0", 0.05)


def test_trend_is_a_rolling_mean() -> None:
    frame = history(epochs=4, sizes=(3,)).assign(transferability=[0.4, 0.2, 0.0, 0.2])
    with style.context():
        ax = trend.trend(frame, style.figure().subplots(), quantity="transferability", share=0.5)
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [40, 30, 10, 10])


def test_the_rolling_mean_is_that_of_the_paper_and_shrinks_with_the_training() -> None:
    long, short = history(epochs=200, sizes=(3,)), history(epochs=5, sizes=(3,))
    assert trend.values(long)["diversity"].iloc[-1] == pytest.approx(long["diversity"].iloc[-30:].mean())
    assert trend.values(short)["diversity"].tolist() == short["diversity"].tolist()


def test_trend_keeps_runs_apart() -> None:
    a = history(epochs=3, sizes=(3,)).assign(diversity=[1.0, 1.0, 1.0])
    b = a.assign(run="other", seed=1, diversity=[3.0, 3.0, 3.0])
    assert trend.values(pd.concat([a, b]))["diversity"].tolist() == [2.0, 2.0, 2.0]


def test_a_trend_does_not_average_runs_of_one_seed() -> None:
    one = history(10, (3,))
    found = trend.values(pd.concat([one, one.assign(run="again", diversity=10 * one["diversity"])]))
    assert found["seeds"].eq(1).all()
    assert set(found["defense"]) == {"dverge-3-s0", "again"}
    seeds = trend.values(pd.concat([one, one.assign(run="other", seed=1)]))
    assert seeds["seeds"].eq(2).all()


def test_a_trend_says_the_radii_that_were_measured_or_none() -> None:
    plain = history(epochs=3, sizes=(3,))
    titles = [
        trend.trend(rows, style.figure().subplots(), quantity="transferability").get_title()
        for rows in (plain, plain.assign(transferability_eps=0.2))
    ]
    assert titles == ["Transferability", "Transferability (ε = 0.2)"]


def test_regions_of_a_linear_model() -> None:
    """Class 1 where the first direction is taken by more than 0.05."""
    image = torch.full((1, 2, 2), 0.5)
    first = torch.ones(1, 2, 2)
    second = torch.tensor([[[1.0, -1.0], [1.0, -1.0]]])

    def model(images: torch.Tensor) -> torch.Tensor:
        level = images.mean(dim=(1, 2, 3)) - 0.55
        return torch.stack([-level, level], dim=1)

    found = regions.compute({"m": model}, image, first, second, label=0, resolution=21, batch_size=7, names=["a", "b"])
    grid = found.classes["m"]
    assert grid.shape == (21, 21)
    assert (grid == grid[0]).all()
    assert grid[0].tolist() == [0] * 15 + [1] * 6 or grid[0].tolist() == [0] * 16 + [1] * 5
    with style.context():
        ax = regions.regions(found, style.figure().subplots(), title="m")
    np.testing.assert_array_equal(ax.images[0].get_array(), grid)
    assert found.values()["name"].tolist() == ["a", "b"]


def test_regions_are_of_some_ensemble() -> None:
    with pytest.raises(RobenchError, match="at least one grid"):
        regions.Regions({}, 0.1, 0)


def test_convergence_sorts_attacks_by_effort() -> None:
    frame = pd.concat(
        [
            rows(share(right), threat="convergence", attack=attack)
            for attack, right in (("pgd:steps=1000", 40), ("fgsm", 70), ("pgd:steps=50", 41))
        ]
    )
    with style.context():
        ax = effort.convergence(frame, style.figure().subplots())
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [70, 41, 40])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["FGSM", "PGD-50", "PGD-1000"]


def test_trade_off_by_setting() -> None:
    parts = []
    for target, clean, attacked in (("a", 90, 20), ("b", 80, 40)):
        parts += [rows(share(clean), threat="clean", target=target), rows(share(attacked), target=target, eps=0.03)]
    given = {"a": 0.5, "b": 2.0}
    with style.context():
        left, right = style.figure().subplots(1, 2)
        settings.ablation(pd.concat(parts), left, settings=given, name="λ", eps=0.03)
        settings.trade_off(pd.concat(parts), right, settings=given, name="λ", eps=0.03)
    clean, attacked = left.get_lines()
    np.testing.assert_allclose(clean.get_xydata(), [[0.5, 90], [2, 80]])
    np.testing.assert_allclose(attacked.get_xydata(), [[0.5, 20], [2, 40]])
    np.testing.assert_allclose(right.get_lines()[0].get_xydata(), [[90, 20], [80, 40]])
    with pytest.raises(RobenchError, match="none of these targets"):
        settings.values(pd.concat(parts), given, 0.07)


@pytest.mark.parametrize(("n", "count"), [(2, 1), (3, 4), (3, 7), (5, 3), (5, 4), (8, 2)])
def test_no_title_of_a_matrix_is_cut_off(n: int, count: int) -> None:
    defenses = ["baseline", "adp", "gal", "dverge", "advt", "dverge-advt", "fasten"][:count]
    with style.context():
        _require_apart(transferability.panels(_transfer(defenses, n), n=n, eps=0.03))


def test_names_of_runs_above_matrices_do_not_cover_each_other() -> None:
    names = [f"digits-resnet8-{defense}-n2-s0-2d676a" for defense in ("baseline", "dverge", "fasten", "lotos")]
    with style.context():
        _require_apart(transferability.panels(_transfer(names, 2), n=2, eps=0.03))


def _transfer(defenses: Sequence[str], n: int) -> pd.DataFrame:
    """One image, which every attack takes."""
    names = [str(i + 1) for i in range(n)]
    return pd.DataFrame(
        [
            {
                "target": defense, "defense": defense, "n": n, "seed": 0, "threat": "transfer", "surrogate": source,
                "source": source, "member": member, "sample": 0, "eps": 0.03, "correct": True, "attack": "pgd",
                "loss": "ce", "restart": 0, "cell": "c",
            }
            for defense in defenses
            for source in names
            for member in [*names, "ensemble"]
        ]
    )  # fmt: skip


def _require_apart(figure: Figure) -> None:
    """Every title lies within the figure, and none on another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [ax.title.get_window_extent(canvas.get_renderer()) for ax in figure.axes if ax.axison]
    assert all(box.y1 < figure.get_window_extent().height for box in boxes)
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_ensembles_are_compared_where_the_most_were_judged() -> None:
    """One alone at ε .02, at half its clean accuracy: the others would be left out of that figure."""
    parts = [rows(share(100), threat="clean", defense=name) for name in ("gal", "dverge")]
    parts += [rows(share(80), threat="blackbox", surrogate="s", defense=name, eps=0.01) for name in ("gal", "dverge")]
    parts.append(rows(share(50), threat="blackbox", surrogate="s", eps=0.02))
    frame = pd.concat(parts, ignore_index=True)
    assert curves.telling_eps(frame, "blackbox") == 0.01
    assert pareto.trade_offs(frame, None)["defense"].unique().tolist() == ["gal", "dverge"]
