"""All-or-nothing against brute force, intervals against closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robench.core.errors import RobenchError
from robench.evaluation.cells import Cell
from robench.evaluation.outcomes import CELL_COLUMNS, ENSEMBLE, Outcomes, left_out, that_count, wilson
from robench.reports._queries import transfer_rates


def outcomes(verdicts: dict[tuple[str, float, int, int], bool], threat: str = "blackbox") -> Outcomes:
    """(attack, ε, restart, sample) -> correct, as one target's rows, crafted on surrogate or member 1."""
    cells, rows = {}, []
    for (attack, eps, restart, sample), correct in verdicts.items():
        cell = f"{attack}/{eps}/{restart}"
        of: dict[str, Any] = {"target": "t", "defense": "d", "n": 3, "seed": 0, "threat": threat, "surrogate": "1"}
        cells[cell] = Cell(**of, attack=attack, loss="ce", eps=eps, identity="t", data="d")
        rows.append(
            {
                "cell": cell,
                "sample": sample,
                "member": ENSEMBLE,
                "restart": restart,
                "label": 0,
                "prediction": int(not correct),
                "correct": correct,
                "margin": 1.0 if correct else -1.0,
                "linf": eps,
                "zero_gradient": False,
                "part": "",
            }
        )
    return Outcomes.join(pd.DataFrame(rows), cells)


VERDICTS = st.lists(st.booleans(), min_size=2 * 2 * 2 * 5, max_size=2 * 2 * 2 * 5)


@settings(max_examples=25, deadline=None)
@given(VERDICTS, st.sampled_from([("eps",), ("attack", "eps"), ("threat", "eps", "restart")]))
def test_all_or_nothing_equals_brute_force(values: list[bool], by: tuple[str, ...]) -> None:
    axes = list(itertools.product(["a", "b"], [0.1, 0.2], [0, 1], range(5)))
    verdicts = dict(zip(axes, values, strict=True))
    table = outcomes(verdicts).accuracy(by)
    for row in table.to_dict("records"):
        standing = 0
        for sample in range(5):
            relevant = [
                correct
                for (attack, eps, restart, s), correct in verdicts.items()
                if s == sample
                and row.get("attack", attack) == attack
                and row["eps"] == eps
                and row.get("restart", restart) == restart
            ]
            standing += all(relevant)
        assert row["accuracy"] == standing / 5
        assert row["samples"] == 5
        assert row["low"] <= row["accuracy"] <= row["high"]


@given(st.integers(1, 3000), st.floats(0, 1))
def test_wilson_equals_its_formula(total: int, share: float) -> None:
    successes = round(share * total)
    p, z = successes / total, 1.959963984540054
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    low, high = wilson(successes, total)
    assert low == pytest.approx(max(0.0, centre - half), abs=1e-9)
    assert high == pytest.approx(min(1.0, centre + half), abs=1e-9)


def test_wilson_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_unknown_column_names_the_nearest() -> None:
    rows = outcomes({("a", 0.1, 0, 0): True})
    with pytest.raises(RobenchError, match="did you mean attack"):
        rows.accuracy(["atack"])
    with pytest.raises(RobenchError, match="did you mean eps"):
        rows.where(epss=0.1)


def test_concat_counts_a_row_once() -> None:
    rows = outcomes({("a", 0.1, 0, 0): True, ("a", 0.1, 0, 1): False})
    assert len(Outcomes.concat([rows, rows]).frame) == 2


def test_no_rows_give_an_empty_table() -> None:
    empty = Outcomes.concat([])
    assert empty.frame.empty
    assert set(CELL_COLUMNS) <= set(empty.frame)
    assert empty.accuracy().empty
    assert empty.transferability().empty


def test_a_sample_that_some_cell_has_not_judged_does_not_count() -> None:
    weak_everywhere = {("weak", 0.1, 0, sample): True for sample in range(4)}
    rows = outcomes({**weak_everywhere, ("strong", 0.1, 0, 0): False, ("strong", 0.1, 0, 1): True})
    (row,) = rows.accuracy(["eps"]).to_dict("records")
    assert (row["accuracy"], row["samples"]) == (0.5, 2)


def test_a_few_images_do_not_stand_for_many() -> None:
    many = {("full", 0.1, 0, sample): sample < 3 for sample in range(10)}
    few = {("tried", 0.1, 0, sample): True for sample in range(4)}
    for threat in ("blackbox", "transfer"):
        rows = outcomes({**many, **few}, threat)
        (row,) = rows.accuracy(["eps"]).to_dict("records")
        assert (row["accuracy"], row["samples"]) == (0.3, 10)
        assert left_out(rows.frame) == [
            f"1 of 2 cells of t, {threat}, are left out: they judged 4 images or fewer, others 10; judge all on the "
            f"same (--samples, --subset)"
        ]
        assert set(that_count(rows.frame)["attack"]) == {"full"}
    (drawn,) = transfer_rates(rows.frame).to_dict("records")
    assert (drawn["rate"], drawn["samples"]) == (pytest.approx(0.7), 10)
    half = {("tried", 0.1, 0, sample): False for sample in range(5)}
    (row,) = outcomes({**many, **half}).accuracy(["eps"]).to_dict("records")
    assert (row["accuracy"], row["samples"]) == (0.0, 5)
    assert left_out(outcomes({**many, **half}).frame) == [
        "numbers of t, blackbox, rest on as few as 5 images, those that all attacks judged, of 10"
    ]
    assert left_out(outcomes(many).frame) == []
    apart = {("first", 0.1, 0, i): True for i in range(4)} | {("second", 0.1, 0, i): True for i in range(4)}
    apart |= {("elsewhere", 0.1, 0, 10 + i): True for i in range(4)}
    assert left_out(outcomes(apart).frame) == [
        "1 of 3 cells of t, blackbox, are left out: they judged other images than most; judge all on the same "
        "(--samples, --subset)"
    ]


def test_transferability_is_all_or_nothing_over_attacks() -> None:
    standing = {"a": (True, True, False, True), "b": (True, False, True, True)}
    verdicts = {(attack, 0.1, 0, i): correct for attack, each in standing.items() for i, correct in enumerate(each)}
    rows = outcomes(verdicts, "transfer")
    (row,) = rows.transferability().to_dict("records")
    who = {"target": "t", "defense": "d", "n": 3, "seed": 0}
    assert row == {**who, "source": 1, "member": ENSEMBLE, "eps": 0.1, "success": 0.5, "samples": 4}
    (drawn,) = transfer_rates(rows.frame).to_dict("records")
    assert (drawn["rate"], drawn["samples"]) == (0.5, 4)


def test_transferability_counts_samples_that_every_attack_judged() -> None:
    weak_everywhere = {("weak", 0.1, 0, sample): True for sample in range(4)}
    rows = outcomes({**weak_everywhere, ("strong", 0.1, 0, 0): False, ("strong", 0.1, 0, 1): True}, "transfer")
    (row,) = rows.transferability().to_dict("records")
    assert (row["success"], row["samples"]) == (0.5, 2)
    (drawn,) = transfer_rates(rows.frame).to_dict("records")
    assert (drawn["rate"], drawn["samples"]) == (0.5, 2)
