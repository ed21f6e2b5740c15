"""Comparisons on what both sides have, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from robench.attacks.pgd import PGD
from robench.core.data import Data
from robench.core.errors import RobenchError
from robench.core.files import content_key
from robench.evaluation.cells import Cell, Craft
from robench.evaluation.engine import Evaluator
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.outcomes import ENSEMBLE, Outcomes
from robench.evaluation.rows import FolderRows
from robench.evaluation.settings import Settings
from robench.evaluation.statistics import bootstrap_difference, holm, mcnemar
from robench.evaluation.threats import Blackbox, Threat, Whitebox
from robench.store.runs import Run
from robench.validity.comparison import Measured, compare, compare_defenses, of_defense, trained_alike

#: (version, eps) -> verdicts by sample
Verdicts = dict[tuple[str, float], Sequence[bool]]


def measured(
    name: str, verdicts: Verdicts, samples: Iterable[int] | None = None, data: str = "d", threat: str = "blackbox"
) -> Measured:
    """An ensemble of which black-box rows are known."""
    cells: dict[str, Any] = {}
    rows = []
    for (attack, eps), right in verdicts.items():
        craft = Craft(data, "s" if threat == "blackbox" else name, {"name": attack}, (0,), 0, "float32", eps)
        of: dict[str, Any] = {"target": name, "defense": "x", "n": 2, "seed": 0, "threat": threat}
        made = Cell(**of, identity=name, data=data, surrogate="s", attack=attack, loss="ce", eps=eps, craft=craft)
        cell = made.key
        cells[cell] = made
        for sample, correct in zip(samples or range(len(right)), right, strict=True):
            rows.append(
                {
                    "cell": cell,
                    "sample": sample,
                    "member": ENSEMBLE,
                    "restart": 0,
                    "label": 0,
                    "prediction": int(not correct),
                    "correct": correct,
                    "margin": 1.0,
                    "linf": eps,
                    "zero_gradient": False,
                    "part": "",
                }
            )
    return Measured.of(name, Outcomes.join(pd.DataFrame(rows), cells))


def bits(right: int, total: int = 40) -> list[bool]:
    return [index < right for index in range(total)]


def test_numbers_are_those_of_the_statistics() -> None:
    a, b = ({0.1: bits(30), 0.2: bits(21)}, {0.1: bits(20), 0.2: bits(20)})
    first = measured("one", {("pgd", eps): right for eps, right in a.items()})
    second = measured("two", {("pgd", eps): right for eps, right in b.items()})
    rows = compare(first, second, "blackbox")
    p_values = [mcnemar(a[eps], b[eps]) for eps in (0.1, 0.2)]
    for row, eps, p, adjusted in zip(rows, (0.1, 0.2), p_values, holm(p_values), strict=True):
        assert row["eps"] == eps
        assert row["p"] == p
        assert row["p_adjusted"] == adjusted
        assert (row["low"], row["high"]) == bootstrap_difference(a[eps], b[eps])
        assert row["low_a"] < row["accuracy_a"] < row["high_a"]
    assert [row["verdict"] for row in rows] == ["one is better", "not significant"]
    assert [row["verdict"] for row in compare(second, first, "blackbox")] == ["one is better", "not significant"]
    assert len(compare(first, second, "blackbox", (0.2,))) == 1


def test_only_common_images_and_versions_count_and_the_rest_is_said(told: list[str]) -> None:
    first = measured("one", {("pgd", 0.1): bits(30), ("sgm", 0.1): bits(0)})
    second = measured("two", {("pgd", 0.1): bits(20, 30)}, samples=range(10, 40))
    (row,) = compare(first, second, "blackbox")
    assert (row["samples"], row["versions"]) == (30, 1)
    assert (row["accuracy_a"], row["accuracy_b"]) == (pytest.approx(20 / 30), pytest.approx(20 / 30))
    assert row["verdict"] == "not significant"
    assert told == [
        "1 of 2 versions of one that not all have (s sgm ce): left out at ε 0.1",
        "10 of 40 images of one: left out at ε 0.1",
    ]


def test_an_image_counts_where_every_version_judged_it() -> None:
    first = measured("one", {("pgd", 0.1): bits(40), ("sgm", 0.1): bits(40)})
    second = measured("two", {("pgd", 0.1): bits(40), ("sgm", 0.1): bits(5, 10)})
    (row,) = compare(first, second, "blackbox")
    assert (row["samples"], row["versions"], row["accuracy_b"]) == (10, 2, 0.5)


@pytest.mark.parametrize(
    ("other", "eps", "match"),
    [
        ({("sgm", 0.1): bits(3)}, (), "1 of 1 versions of one .* robench eval one two --threat blackbox"),
        ({("pgd", 0.2): bits(3)}, (), "share no ε"),
        ({("pgd", 0.1): bits(3)}, (0.3,), "no blackbox rows of 'one' at ε 0.3; robench eval one --threat blackbox"),
    ],
)
def test_nothing_in_common_is_an_error_that_says_what_to_run(other: Verdicts, eps: Any, match: str) -> None:
    with pytest.raises(RobenchError, match=match):
        compare(measured("one", {("pgd", 0.1): bits(3)}), measured("two", other), "blackbox", eps)


def test_the_same_index_of_another_data_set_is_another_image() -> None:
    one, two = measured("one", {("pgd", 0.1): bits(3)}), measured("two", {("pgd", 0.1): bits(3)}, data="other")
    with pytest.raises(RobenchError, match="rows in common"):
        compare(one, two, "blackbox")
    with pytest.raises(RobenchError, match="no whitebox rows of 'one'; robench eval one --threat whitebox"):
        compare(one, two, "whitebox")
    with pytest.raises(RobenchError, match="'one' on both"):
        compare(one, one, "blackbox")


def seeds(name: str, shares: Sequence[float]) -> list[Measured]:
    rng = np.random.default_rng(sum(map(ord, name)))
    return [
        measured(f"{name}{seed}", {("pgd", 0.1): (rng.random(300) < share).tolist()})
        for seed, share in enumerate(shares)
    ]


def test_defenses_need_three_seeds_and_get_their_spread() -> None:
    good, bad = seeds("good", (0.8, 0.82, 0.79)), seeds("bad", (0.5, 0.53, 0.52))
    (row,) = compare_defenses(("good", good), ("bad", bad), "blackbox")
    assert row["verdict"] == "good is better"
    assert (row["seeds_a"], row["seeds_b"], row["samples"]) == (3, 3, 300)
    assert row["low"] < row["low_images"] < row["difference"] < row["high_images"] < row["high"]
    assert row["sd_a"] > 0
    with pytest.raises(RobenchError, match="at least 3 seeds of each, and bad has 2"):
        compare_defenses(("good", good), ("bad", bad[:2]), "blackbox")
    # One training that is far better than the others proves nothing about the defense.
    lucky = seeds("lucky", (0.5, 0.52, 0.95))
    (row,) = compare_defenses(("lucky", lucky), ("bad", bad), "blackbox")
    assert row["verdict"] == "not significant"
    assert row["low_images"] > 0


def run(name: str, seed: int, **changes: Any) -> Run:
    defense = {"name": "gal", **changes.pop("defense", {})}
    manifest = {"defense": defense, "seed": seed, "role": "target", "members": [{}] * 3, "data": {}, **changes}
    return Run(Path(name), manifest)


def test_runs_of_a_defense_differ_in_their_seed_alone() -> None:
    own = [run("b", 1), run("a", 0)]
    others = [run("s", 0, role="surrogate"), run("x", 0, defense={"name": "adp"})]
    assert [each.name for each in of_defense([*own, *others], "gal")] == ["a", "b"]
    with pytest.raises(RobenchError, match="differ in `defense`"):
        of_defense([*own, run("c", 2, defense={"strength": 2})], "gal")
    with pytest.raises(RobenchError, match="differ in `members`"):
        of_defense([*own, run("c", 2, members=[{"name": "wrn"}] * 3)], "gal")
    with pytest.raises(RobenchError, match="differ in `rule`"):
        of_defense([*own, run("c", 2, rule="vote")], "gal")
    with pytest.raises(RobenchError, match="seed 1 both"):
        of_defense([*own, run("c", 1)], "gal")
    with pytest.raises(RobenchError, match="--n"):
        of_defense([*own, run("c", 2, members=[{}] * 5)], "gal")
    with pytest.raises(RobenchError, match="did you mean gal"):
        of_defense(own, "gall")


def trained(name: str, **changes: Any) -> Run:
    recipe = {"epochs": 10, "lr": 0.1, **changes.pop("recipe", {})}
    alike = {"members": [{"name": "resnet8"}] * 2, "data": {"fingerprint": "f"}, "ancestors": [], "recipe": recipe}
    return run(name, changes.pop("seed", 0), **{**alike, **changes})


def test_what_sets_two_trainings_apart_beside_the_defense_is_told() -> None:
    one = trained("one", defense={"name": "adp"})
    assert trained_alike(one, trained("two")).status == "pass"
    for changes, said in (
        ({"recipe": {"epochs": 5}}, "epochs 10 and 5"),
        ({"seed": 1}, "seed 0 and 1"),
        ({"members": [{"name": "resnet8"}] * 3}, "members 2 x resnet8 and 3 x resnet8"),
        ({"data": {"fingerprint": "g"}}, "data f and g"),
        ({"ancestors": [{"run": "parent"}]}, "start from scratch and parent"),
        ({"rule": "vote"}, "rule softmax and vote"),
        ({"recipe": {"flip": True}}, "flip None and True"),
    ):
        found = trained_alike(one, trained("two", **changes))
        assert (found.status, found.evidence) == ("warn", said)


def test_of_imported_weights_it_is_told_that_their_training_is_not_known() -> None:
    imported = run("theirs", 4, members=[{"name": "resnet8"}] * 2, data=None, ancestors=[])
    found = trained_alike(trained("mine"), imported)
    assert (found.status, found.evidence) == ("warn", "how theirs was trained is not known")


def test_rows_of_the_evaluator_are_paired_by_what_crafted_them(
    make_model: Callable[[int], EvaluatedModel], data: Data, tmp_path: Path
) -> None:
    """White-box versions match across targets; black-box ones only from the same surrogate, attack and draws."""
    targets = [make_model(0), make_model(1)]

    def read(threat: Threat, seed: int = 0, target: int = 0) -> Measured:
        folder = tmp_path / f"{threat.name}{seed}{target}{content_key(list(threat.eps))}"
        settings = Settings(torch.device("cpu"), seed=seed)
        evaluator = Evaluator(data, settings, rows=lambda model: FolderRows(folder / model.name))
        evaluator.run([targets[target]], threat, torch.arange(12))
        return Measured.of(targets[target].name, FolderRows(folder / targets[target].name, repair=False).outcomes())

    attack = PGD(steps=2)
    white = Whitebox(eps=(0.05, 0.1), attacks=(attack,), restarts=2)
    rows = compare(read(white), read(white, target=1), "whitebox")
    assert [(row["eps"], row["samples"], row["versions"]) for row in rows] == [(0.05, 12, 1), (0.1, 12, 1)]
    (clean,) = compare(read(white), read(white, target=1), "clean")
    assert clean["accuracy_a"] == 1
    black = Blackbox(eps=(0.1,), attacks=(attack,), restarts=2, surrogates=(make_model(7),))
    (row,) = compare(read(black), read(black, target=1), "blackbox")
    assert row["versions"] == 2
    for other in (read(black, seed=1, target=1), read(Whitebox(eps=(0.1,), attacks=(attack,)), target=1)):
        with pytest.raises(RobenchError, match="rows"):
            compare(read(black), other, "blackbox")


def test_rows_of_several_models_are_not_one_ensemble() -> None:
    cells = [Cell("x", "x", 2, 0, "clean", each, "d") for each in "12"]
    row = {"sample": 0, "member": ENSEMBLE, "restart": 0, "label": 0, "prediction": 0, "correct": True, "margin": 1.0}
    frame = pd.DataFrame([{"cell": cell.key, **row, "linf": 0.0, "zero_gradient": False, "part": ""} for cell in cells])
    both = Outcomes.join(frame, {cell.key: cell for cell in cells})
    with pytest.raises(RobenchError, match="the rows of 'x' are of several models, since its weights were replaced"):
        Measured.of("x", both)


def test_queries_are_compared_attack_by_attack(told: list[str]) -> None:
    many, few = ("square:queries=1000", 0.1), ("square:queries=100", 0.1)
    first = measured("one", {many: bits(20), few: bits(38), ("square:queries=50", 0.1): bits(40)}, threat="queries")
    second = measured("two", {many: bits(5), few: bits(30)}, threat="queries")
    rows = compare(first, second, "queries")
    assert told == ["attacks that not all have, square:queries=50: left out"]
    assert [(row["attack"], row["accuracy_a"], row["accuracy_b"]) for row in rows] == [
        ("square:queries=100", 38 / 40, 30 / 40), ("square:queries=1000", 20 / 40, 5 / 40)
    ]  # fmt: skip
    assert [row["p_adjusted"] for row in rows] == holm([mcnemar(bits(38), bits(30)), mcnemar(bits(20), bits(5))])


def test_trainings_that_agree_are_uncertain_for_other_images() -> None:
    """Student's interval of three equal accuracies has no length."""
    sides = [
        (f"d{side}", [measured(f"{side}{seed}", {("pgd", 0.1): bits(right)}) for seed in range(3)])
        for side, right in (("a", 30), ("b", 20))
    ]
    (row,) = compare_defenses(*sides, "blackbox")
    assert (row["accuracy_a"], row["sd_a"]) == (0.75, 0.0)
    assert row["low_a"] < 0.65 < 0.85 < row["high_a"]
