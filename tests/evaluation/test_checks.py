"""Every fault that makes a number false is named by one check, and by no other."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from robench.attacks import Attack
from robench.attacks.pgd import PGD
from robench.core.data import Data
from robench.core.errors import RobenchError
from robench.core.rng import Draws
from robench.evaluation.cells import Cell
from robench.evaluation.checks import check, kin
from robench.evaluation.engine import Evaluator
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.findings import Finding, failed
from robench.evaluation.outcomes import ENSEMBLE, Outcomes
from robench.evaluation.rows import FolderRows
from robench.evaluation.settings import Settings
from robench.evaluation.threats import Blackbox, Threat, Transfer, Whitebox
from tests.small import Rounds

CPU = torch.device("cpu")
MakeModel = Callable[[int], EvaluatedModel]


def outcomes(threat: str, right: dict[float, int], total: int = 200, **changes: Any) -> Outcomes:
    """The first so many samples are right at each ε; 0 is clean."""
    cells, rows = {}, []
    for eps, standing in right.items():
        kind = threat if eps else "clean"
        cell = f"{kind}{eps}"
        constants = {"target": "t", "defense": "d", "n": 2, "seed": 0, "surrogate": "s" * (threat == "blackbox")}
        of: dict[str, Any] = {**constants, "threat": kind, "attack": "pgd", "loss": "ce", "eps": eps}
        cells[cell] = Cell(**of, identity="t", data="d")
        for sample in range(total):
            correct = sample < standing
            row = {"cell": cell, "sample": sample, "member": ENSEMBLE, "restart": 0, "label": 0}
            row |= {"prediction": int(not correct), "correct": correct, "margin": 1.0 if correct else -1.0}
            rows.append({**row, "linf": eps, "zero_gradient": False, "part": ""})
    frame = Outcomes.join(pd.DataFrame(rows), cells).frame
    return Outcomes(frame.assign(**{name: values(frame) for name, values in changes.items()}))


def named(checks: list[Finding]) -> dict[str, str]:
    return {each.name: each.status for each in checks if each.status != "pass"}


WHITE = {0.0: 190, 0.1: 120, 0.2: 40}


def test_a_sound_result_passes_every_check() -> None:
    checks = check(outcomes("whitebox", WHITE), outcomes("blackbox", {0.1: 150, 0.2: 100}))
    assert named(checks) == {}
    assert [each.name for each in checks] == [
        "rows possible",
        "images moved",
        "gradients there",
        "accuracy falls with ε",
        "white-box at most black-box",
    ]
    assert not failed(checks)


@pytest.mark.parametrize(("excess", "status"), [(1, {}), (4, "warn"), (30, "fail")])
def test_whitebox_above_blackbox(excess: int, status: Any) -> None:
    found = named(check(outcomes("blackbox", {0.1: 120 - excess}), outcomes("whitebox", WHITE)))
    assert found == ({"white-box at most black-box": status} if status else {})


@pytest.mark.parametrize(("excess", "status"), [(0, {}), (30, "fail")])
def test_whitebox_above_surrogates_of_the_own_kind(excess: int, status: Any) -> None:
    """It is held against all black-box rows together: the least of both settings."""
    own = Outcomes(outcomes("blackbox", {0.1: 120 - excess}).frame.assign(threat="blackbox-own", cell="own"))
    found = named(check(outcomes("whitebox", WHITE), Outcomes.concat([own, outcomes("blackbox", {0.1: 150})])))
    assert found == ({"white-box at most black-box": status} if status else {})


@pytest.mark.parametrize(
    ("right", "status"), [((150, 100, 99), None), ((150, 100, 97), "warn"), ((20, 100, 60), "fail"), ((99, 60), "none")]
)
def test_more_steps_that_take_more(right: tuple[int, ...], status: str | None) -> None:
    attacks = ("fgsm", "pgd", "pgd:steps=500")
    parts = [
        Outcomes(outcomes("convergence", {0.1: standing}).frame.assign(attack=attack, cell=attack))
        for attack, standing in zip(attacks, right, strict=False)
    ]
    found = {each.name: each for each in check(Outcomes.concat(parts))}
    if status == "none":
        assert "attack converged" not in found
    else:
        assert found["attack converged"].status == (status or "pass")
        assert f"pgd {right[1] / 2:.1f}%, pgd:steps=500 {right[2] / 2:.1f}%" in found["attack converged"].evidence


def test_the_result_itself_is_held_against_known_rows_of_the_other_threat() -> None:
    """A weak white-box result is not hidden by a strong one that was measured before."""
    weak = outcomes("whitebox", {0.1: 190})
    before = Outcomes.concat([outcomes("whitebox", {0.1: 60}), outcomes("blackbox", {0.1: 100})])
    assert named(check(weak, before)) == {"white-box at most black-box": "fail"}


def test_accuracy_that_rises_or_never_falls() -> None:
    rising = check(outcomes("blackbox", {0.0: 190, 0.1: 100, 0.2: 130}))
    assert named(rising) == {"accuracy falls with ε": "fail"}
    assert "from 50.0% at ε 0.1 to 65.0% at 0.2" in str(rising[3])
    assert named(check(outcomes("blackbox", {0.0: 190, 0.1: 100, 0.2: 103}))) == {"accuracy falls with ε": "warn"}
    flat = check(outcomes("whitebox", {0.0: 190, 0.1: 190, 0.2: 190}))
    assert named(flat) == {"accuracy falls with ε": "warn"}


@pytest.mark.parametrize(
    ("column", "values", "evidence"),
    [
        ("linf", lambda frame: frame["eps"] * 1.01, "400 beyond ε"),
        ("margin", lambda frame: frame["margin"].where(frame["sample"] > 0), "3 NaN"),
        ("margin", lambda frame: -frame["margin"], "600 margin against the verdict"),
        ("prediction", lambda frame: 1 - frame["prediction"], "600 correct against prediction"),
        ("label", lambda frame: (frame["eps"] > 0.1).astype(int), "two labels"),
    ],
)
def test_impossible_rows(column: str, values: Any, evidence: str) -> None:
    found = check(outcomes("whitebox", WHITE, **{column: values}))
    assert found[0].status == "fail"
    assert evidence in found[0].evidence


def test_clean_accuracy_at_chance() -> None:
    def label(frame: pd.DataFrame) -> pd.Series:
        return frame["sample"] % 4

    def prediction(frame: pd.DataFrame) -> pd.Series:
        return label(frame).where(frame["correct"], label(frame) + 1)

    values = {"label": label, "prediction": prediction}
    assert named(check(outcomes("whitebox", {0.0: 55, 0.1: 20}, **values))) == {"clean above chance": "warn"}
    assert named(check(outcomes("whitebox", {0.0: 80, 0.1: 20}, **values))) == {}


def test_a_few_survivors_do_not_fail_a_result() -> None:
    def flag(frame: pd.DataFrame) -> pd.Series:
        return frame["sample"] < 2

    few = outcomes("whitebox", {0.0: 190, 0.1: 2}, zero_gradient=flag)
    assert named(check(few)) == {"gradients there": "warn"}


@pytest.mark.parametrize(("tied", "status"), [(1, {}), (6, "warn"), (40, "fail")])
def test_verdicts_that_the_order_of_classes_decides(tied: int, status: Any) -> None:
    def margin(frame: pd.DataFrame) -> pd.Series:
        level = (frame["eps"] == 0.1) & (frame["sample"] < tied)
        return frame["margin"].where(~level, 0.0)

    found = named(check(outcomes("whitebox", WHITE, margin=margin)))
    assert found == ({"one class highest": status} if status else {})


@dataclass(frozen=True, kw_only=True)
class Clean(Attack):
    """Returns what it was given."""

    name: ClassVar[str] = "clean"

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        return images


def evaluated(data: Data, threat: Threat, target: EvaluatedModel, **options: Any) -> Outcomes:
    return Evaluator(data, Settings(CPU), **options).run([target], threat, torch.arange(40))


def test_an_attack_that_returns_clean_images(make_model: MakeModel, data: Data) -> None:
    checks = check(evaluated(data, Whitebox(eps=(0.1, 0.2), attacks=(Clean(),)), make_model(0)))
    assert named(checks) == {"images moved": "fail", "accuracy falls with ε": "warn"}
    (unmoved,) = (str(each) for each in checks if each.name == "images moved")
    assert unmoved.startswith("fail  images moved: 40 of 40 samples still right less than 0.5 ε away")


@pytest.mark.parametrize(("threat", "status"), [("whitebox", "warn"), ("blackbox", "fail")])
def test_torchattacks_may_give_clean_images_back_but_not_to_transfer_them(threat: str, status: str) -> None:
    unmoved = {"attack": lambda frame: "torchattacks/Square", "linf": lambda frame: 0.0 * frame["eps"]}
    assert named(check(outcomes(threat, WHITE, **unmoved))) == {"images moved": status}


def test_cw_leaves_alone_what_the_surrogate_gets_wrong_as_it_is() -> None:
    unmoved = {"loss": lambda frame: "cw", "linf": lambda frame: 0.0 * frame["eps"]}
    flat = {**unmoved, "zero_gradient": lambda frame: frame["eps"] > 0}
    assert named(check(outcomes("blackbox", WHITE, **flat))) == {}
    assert named(check(outcomes("blackbox", WHITE, **unmoved))) == {"images moved": "fail"}
    assert named(check(outcomes("whitebox", WHITE, **flat)))["images moved"] == "fail"


def test_a_defense_without_gradients(make_model: MakeModel, data: Data) -> None:
    target = EvaluatedModel.of_model(Rounds(make_model(0).ensemble, 16), CPU)
    found = evaluated(data, Whitebox(eps=(0.03,), attacks=(PGD(steps=2),)), target)
    assert named(check(found)) == {"gradients there": "fail", "gradient true": "fail"}


@pytest.mark.parametrize("threat", ["transfer", "blackbox", "whitebox"])
def test_an_ordinary_result_passes(make_model: MakeModel, data: Data, threat: str) -> None:
    kinds: dict[str, Threat] = {
        "transfer": Transfer(eps=(0.05,), attacks=(PGD(steps=5),)),
        "whitebox": Whitebox(eps=(0.02, 0.05), attacks=(PGD(steps=5),)),
        "blackbox": Blackbox(eps=(0.05,), attacks=(PGD(steps=5), PGD(steps=5, loss="cw")), surrogates=(make_model(7),)),
    }
    # The surrogate is a random network.
    doubts = {"surrogate model7": "fail"} if threat == "blackbox" else {}
    assert named(check(evaluated(data, kinds[threat], make_model(0)))) == doubts


def test_a_surrogate_that_is_related_is_refused_or_labels_the_result(make_model: MakeModel, data: Data) -> None:
    target, stranger = make_model(0), make_model(7)
    twin = EvaluatedModel.of_model(copy.deepcopy(target.ensemble), CPU, name="twin")
    with pytest.raises(RobenchError, match="twin and model0 share a member"):
        evaluated(data, Blackbox(eps=(0.1,), attacks=(Clean(),), surrogates=(twin,)), target)
    assert kin([target], [stranger]).status == "pass"
    label = kin([target], [stranger, twin])
    assert str(label) == "warn  surrogates unrelated: no black-box result, for twin and model0 share a member"


def test_a_full_disk_is_one_line_and_leaves_nothing(
    make_model: MakeModel, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("robench.core.files.os.fsync", full)
    with pytest.raises(RobenchError, match=r"^cannot write .* \(No space left on device\); [^\n]*$"):
        evaluated(
            data,
            Whitebox(eps=(0.1,), attacks=(PGD(steps=2),)),
            make_model(0),
            rows=lambda model: FolderRows(tmp_path / model.name),
        )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def tried(attack: str, right: set[int], images: int, threat: str = "whitebox", eps: float = 0.1) -> Outcomes:
    """An attack on the first so many images, of which these stay right."""
    of: dict[str, Any] = {"target": "t", "defense": "d", "n": 2, "seed": 0, "surrogate": "", "threat": threat}
    cell = Cell(**of, attack=attack, loss="ce", eps=eps, identity="t", data="d")
    rows = [
        {"cell": f"{attack}{eps}", "sample": sample, "member": ENSEMBLE, "restart": 0, "label": 0}
        | {"prediction": int(sample not in right), "correct": sample in right, "zero_gradient": False, "part": ""}
        | {"margin": 1.0 if sample in right else -1.0, "linf": eps}
        for sample in range(images)
    ]
    return Outcomes.join(pd.DataFrame(rows), {f"{attack}{eps}": cell})


@pytest.mark.parametrize(
    ("images", "right", "status"),
    [
        (60, range(30), "fail"),  # takes 30 of the 60 that count as right
        (60, range(58), "warn"),  # 3 points, which may be chance
        (60, range(60), "pass"),
        (90, range(60, 90), "fail"),  # others than before
    ],
)
def test_an_attack_that_is_stronger_than_the_one_reported_is_named(images: int, right: range, status: str) -> None:
    """It was tried on too few images to count, as a trial is."""
    both = Outcomes.concat([outcomes("whitebox", WHITE), tried("mora", set(right), images)])
    found = {each.name: each for each in check(both)}
    assert found["strongest attack counts"].status == status
    assert f"mora ce on {images} images of t at ε 0.1: " in found["strongest attack counts"].evidence
    assert "the 100.0% that whitebox says" in found["strongest attack counts"].evidence
    assert ("--attacks" in found["strongest attack counts"].fix) == (status != "pass")
    of_trial = check(tried("mora", set(right), images), outcomes("whitebox", WHITE))
    assert {each.name: each.status for each in of_trial}["strongest attack counts"] == status


@pytest.mark.parametrize(
    ("right", "status", "the_other_way"),
    [(range(60), "fail", "pass"), (range(120), "pass", "pass"), (range(200), "pass", "fail")],
)
def test_a_known_attack_on_all_images_that_is_stronger_is_named(right: range, status: str, the_other_way: str) -> None:
    """The command prints the number of its own attacks, whatever lies beside their rows."""
    reported, known = outcomes("whitebox", WHITE), tried("strongest", set(right), 200)
    found = {each.name: each for each in check(reported, known)}["strongest attack counts"]
    assert found.status == status
    assert "strongest ce on 200 images of t at ε 0.1: " in found.evidence
    assert {each.name: each.status for each in check(known, reported)}["strongest attack counts"] == the_other_way
    # What other surrogates take is no matter of this result.
    black = tried("mdi2", set(range(150)), 200, "blackbox")
    others = tried("sgm", set(range(50)), 200, "blackbox")
    assert "strongest attack counts" not in {each.name for each in check(black, others)}


def test_attacks_that_count_are_asked_nothing() -> None:
    """Of more than half of the images: the number rests on what both judged."""
    for images in (200, 120):
        both = Outcomes.concat([outcomes("whitebox", WHITE), tried("mora", set(range(10)), images)])
        assert "strongest attack counts" not in {each.name for each in check(both)}
    elsewhere = Outcomes.concat([outcomes("whitebox", WHITE), tried("mora", set(), 20, eps=0.3)])
    assert "strongest attack counts" not in {each.name for each in check(elsewhere)}
