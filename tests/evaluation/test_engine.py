"""The evaluator: same rows whatever the batch, order, cache or interruption."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from robench.attacks import Attack
from robench.attacks.fgsm import FGSM
from robench.attacks.pgd import PGD
from robench.attacks.square import Square
from robench.attacks.strongest import Strongest
from robench.core import threads as cpu
from robench.core.data import Data
from robench.core.errors import RobenchError
from robench.core.files import write_frame
from robench.core.frozen import frozen
from robench.core.rng import Draws
from robench.evaluation import crafter, judging, sharing
from robench.evaluation.engine import Evaluator, correct_for_all
from robench.evaluation.evaluated import EvaluatedModel, kinship
from robench.evaluation.evaluations import FOLDER
from robench.evaluation.images import Images
from robench.evaluation.judging import Judge
from robench.evaluation.outcomes import Outcomes
from robench.evaluation.rows import FolderRows
from robench.evaluation.settings import Settings
from robench.evaluation.threats import Blackbox, Convergence, Queries, Threat, Transfer, Whitebox
from robench.store.claims import Claims
from tests.small import assert_same_rows

CPU = torch.device("cpu")
FAST = PGD(steps=3)
SAMPLES = torch.arange(24)

MakeModel = Callable[[int], EvaluatedModel]


def rows(
    data: Data, threat: Threat, targets: list[EvaluatedModel], samples: Tensor = SAMPLES, **settings: Any
) -> pd.DataFrame:
    return Evaluator(data, Settings(CPU, **settings)).run(targets, threat, samples).frame


def threats(make_model: MakeModel) -> list[Threat]:
    surrogate = make_model(7)
    return [
        Whitebox(eps=(0.02, 0.1), attacks=(FAST,), restarts=3),
        Transfer(eps=(0.05,), attacks=(FAST,), restarts=2),
        Blackbox(eps=(0.05, 0.2), attacks=(FAST, PGD(steps=3, loss="cw")), restarts=2, surrogates=(surrogate,)),
    ]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_batch_size_and_order_change_no_verdict_in_float64(make_model: MakeModel, data: Data, which: int) -> None:
    threat = threats(make_model)[which]
    target = make_model(0)
    whole = rows(data, threat, [target], precision="float64", batch_size=512)
    assert 0 < whole["correct"].mean() < 1
    for size in (16, 5):
        small = rows(data, threat, [target], SAMPLES.flip(0), precision="float64", batch_size=size)
        assert_same_rows(whole, small, 1e-6)


def test_survivors_only_equals_all_restarts(make_model: MakeModel, data: Data) -> None:
    target = make_model(0)
    pooled = rows(data, Whitebox(eps=(0.03,), attacks=(FAST,), restarts=4), [target])
    images = data.test.images[SAMPLES].float() / 255
    labels = data.test.labels[SAMPLES]
    fallen = torch.full((len(SAMPLES),), -1)
    for restart in range(4):
        crafted = FAST(target.ensemble, images, labels, 0.03, Draws.of(SAMPLES, restart=restart)).images
        with torch.no_grad():
            wrong = target.ensemble(crafted).argmax(dim=1) != labels
        fallen[(fallen < 0) & wrong] = restart
    found = pooled[pooled["threat"] == "whitebox"].sort_values("sample")
    np.testing.assert_array_equal(found["correct"], fallen.numpy() < 0)
    np.testing.assert_array_equal(found["restart"], np.where(fallen.numpy() < 0, 3, fallen.numpy()))
    assert 0 < (fallen > 0).sum() < len(SAMPLES)


def test_clean_rows_and_columns(make_model: MakeModel, data: Data) -> None:
    frame = rows(data, threats(make_model)[2], [make_model(0)])
    clean = frame[frame["threat"] == "clean"]
    assert clean["correct"].all()
    assert len(clean) == len(SAMPLES)
    attacked = frame[frame["threat"] == "blackbox"]
    assert len(attacked) == len(SAMPLES) * 2 * 2 * 2
    assert set(attacked["surrogate"]) == {"model7"}
    assert (attacked["linf"] <= attacked["eps"] + 1e-6).all()
    assert ((attacked["prediction"] == attacked["label"]) == attacked["correct"]).all()
    assert ((attacked["margin"] > 0) == attacked["correct"]).all()


def test_transfer_judges_every_member_and_the_ensemble(make_model: MakeModel, data: Data) -> None:
    target = make_model(0)
    chosen = correct_for_all(target, data, data.order("first"), 10, CPU)
    with torch.no_grad():
        predictions = target.ensemble.logits(data.test.images[chosen].float() / 255).argmax(dim=2)
    assert (predictions == data.test.labels[chosen]).all()
    frame = rows(data, threats(make_model)[1], [target], chosen)
    transfer = frame[frame["threat"] == "transfer"]
    assert sorted(transfer["member"].unique()) == ["1", "2", "ensemble"]
    assert len(transfer) == 2 * 3 * len(chosen)
    table = Outcomes(frame).transferability()
    assert set(table["source"]) == {1, 2}
    assert table["success"].between(0, 1).all()


def test_convergence_judges_every_attack_by_itself(make_model: MakeModel, data: Data) -> None:
    attacks = (FGSM(), PGD(steps=2), PGD(steps=6))
    frame = rows(data, Convergence(eps=(0.03,), attacks=attacks), [make_model(0)])
    attacked = frame[frame["threat"] == "convergence"]
    assert attacked["attack"].value_counts().to_dict() == dict.fromkeys(
        ["fgsm", "pgd:steps=2", "pgd:steps=6"], len(SAMPLES)
    )
    assert set(frame["threat"]) == {"clean", "convergence"}
    assert not attacked["restart"].any()


class _Steps(nn.Module):
    """Gives no gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(images)  # type: ignore[no-any-return]


def test_a_model_without_gradients_is_judged_by_queries(make_model: MakeModel, data: Data) -> None:
    """Each count by itself; more of them leave no more images right."""
    ensemble = make_model(0).ensemble
    target = EvaluatedModel.of_model([_Steps(member) for member in ensemble.members], CPU, name="steps")
    threat = Queries(eps=(0.1,), attacks=tuple(Square(queries=count, area=0.01) for count in (1, 40)))
    outcomes = Evaluator(data, Settings(CPU)).run([target], threat, SAMPLES)
    table = outcomes.where(threat="queries").accuracy(["attack"]).set_index("attack")["accuracy"]
    assert table["square:queries=40:area=0.01"] < table["square:queries=1:area=0.01"] <= 1
    assert not [each for each in outcomes.checks if "gradient" in each.name and each.status == "fail"]


def test_surrogates_of_the_target_s_own_defense_are_a_threat_of_their_own(make_model: MakeModel, data: Data) -> None:
    targets = [replace(make_model(0), defense="dverge"), replace(make_model(1), defense="baseline")]
    surrogates = (replace(make_model(7), defense="baseline"), replace(make_model(8), defense="dverge"))
    frame = rows(data, Blackbox(eps=(0.05,), attacks=(FAST,), surrogates=surrogates), targets)
    pairs = frame[["target", "surrogate", "threat"]].drop_duplicates().itertuples(index=False)
    assert {tuple(pair) for pair in pairs if pair.threat != "clean"} == {
        ("model0", "model7", "blackbox"),
        ("model0", "model8", "blackbox-own"),
        ("model1", "model7", "blackbox"),
        ("model1", "model8", "blackbox"),
    }


def test_a_single_sample_is_never_crafted_alone(make_model: MakeModel, data: Data) -> None:
    target = make_model(0)
    threat = Whitebox(eps=(0.05,), attacks=(FAST,), restarts=1)
    alone = rows(data, threat, [target], SAMPLES[3:4])
    together = rows(data, threat, [target])
    mine = together[together["sample"] == 3].reset_index(drop=True)
    assert_same_rows(alone, mine, 1e-5)


class _Counting(nn.Module):
    """Counts the images that pass through."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.images = 0

    def forward(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return self.model(images)  # type: ignore[no-any-return]


def folder_evaluator(data: Data, folder: Path, images: bool = True, **settings: Any) -> Evaluator:
    return Evaluator(
        data,
        Settings(CPU, **settings),
        rows=lambda model: FolderRows(folder / model.name),
        images=Images(folder / ".crafted") if images else None,
    )


def test_nothing_is_computed_twice(make_model: MakeModel, data: Data, tmp_path: Path, monkeypatch: Any) -> None:
    crafted = []
    original = crafter.craft
    monkeypatch.setattr(crafter, "craft", lambda *a, **o: crafted.append(len(a[4])) or original(*a, **o))
    threat = threats(make_model)[2]
    target = make_model(0)
    first = folder_evaluator(data, tmp_path).run([target], threat, SAMPLES[:16]).frame
    assert sum(crafted) == 16 * 2 * 2 * 2
    crafted.clear()
    again = folder_evaluator(data, tmp_path).run([target], threat, SAMPLES[:16]).frame
    assert not crafted
    pd.testing.assert_frame_equal(first, again)
    more = folder_evaluator(data, tmp_path).run([target], threat, SAMPLES).frame
    assert sum(crafted) == 8 * 2 * 2 * 2
    assert len(more) == len(first) * 24 // 16


def test_a_second_target_crafts_nothing_and_gets_the_same_rows(
    make_model: MakeModel, data: Data, tmp_path: Path, monkeypatch: Any
) -> None:
    threat = threats(make_model)[2]
    first, second = make_model(0), make_model(1)
    folder_evaluator(data, tmp_path).run([first], threat, SAMPLES)
    from_memory = rows(data, threat, [second])
    monkeypatch.setattr(crafter, "craft", lambda *a, **o: pytest.fail("crafted again"))
    from_cache = folder_evaluator(data, tmp_path).run([second], threat, SAMPLES).frame
    pd.testing.assert_frame_equal(from_cache, from_memory)


def test_damaged_rows_and_images_are_named_and_made_again(
    make_model: MakeModel, data: Data, tmp_path: Path, told: list[str]
) -> None:
    threat, target = threats(make_model)[2], make_model(0)
    before = folder_evaluator(data, tmp_path).run([target], threat, SAMPLES).frame
    for pattern in ("model0/part-*.parquet", ".crafted/*/part-*.safetensors"):
        path = sorted(tmp_path.glob(pattern))[0]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    told.clear()
    after = folder_evaluator(data, tmp_path).run([target], threat, SAMPLES).frame
    assert sum("damaged" in line for line in told) == 2
    assert len(list(tmp_path.glob("**/part-*.damaged"))) == 2
    pd.testing.assert_frame_equal(before, after)


def test_a_long_wait_for_others_is_told(
    make_model: MakeModel, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, freed = Claims(tmp_path / "claims"), threading.Event()

    def info(text: str) -> None:
        said.append(text)
        freed.set()

    said: list[str] = []
    monkeypatch.setattr(sharing.log, "info", info)
    monkeypatch.setattr(sharing, "PAUSE", 0.01)
    monkeypatch.setattr(sharing, "TOLD_AFTER", 3)
    taken: list[str] = []
    original = Claims.take

    def busy(self: Claims, unit: str) -> Any:
        if not freed.is_set():
            taken.append(unit)
            return nullcontext(False)
        return original(self, unit)

    monkeypatch.setattr(Claims, "take", busy)
    evaluator = Evaluator(data, Settings(CPU), claims=theirs)
    found = evaluator.run([make_model(0)], Whitebox(eps=(0.05,), attacks=(FAST,)), SAMPLES).frame
    assert taken
    assert said == [f"waiting for what other processes have in hand ({theirs.terms})"]
    assert len(found) == 2 * len(SAMPLES)


def test_rows_of_replaced_weights_are_left_out_and_told(
    make_model: MakeModel, data: Data, tmp_path: Path, told: list[str]
) -> None:
    threat = threats(make_model)[0]
    old, new = make_model(0), replace(make_model(1), name="model0")
    wanted = folder_evaluator(data, tmp_path / "other").run([new], threat, SAMPLES).frame
    for target in (old, new):
        folder_evaluator(data, tmp_path).run([target], threat, SAMPLES)
    told.clear()
    found = FolderRows(tmp_path / "model0", repair=False)
    cells = len(threat.eps) + 1
    pd.testing.assert_frame_equal(found.outcomes(new.identity).frame, Outcomes(wanted).frame)
    assert told == [f"{cells} of {2 * cells} cells in {tmp_path / 'model0'} are of other weights: left out"]


def test_whoever_only_reads_leaves_damaged_rows_where_they_are(
    make_model: MakeModel, data: Data, tmp_path: Path, told: list[str]
) -> None:
    folder_evaluator(data, tmp_path).run([make_model(0)], threats(make_model)[0], SAMPLES)
    (path,) = (tmp_path / "model0").glob("part-*.parquet")
    path.write_bytes(path.read_bytes() + b"x")
    told.clear()
    assert FolderRows(tmp_path / "model0", repair=False).outcomes().frame.empty
    assert path.exists()
    damaged, lost = told
    assert damaged == f"{path} is damaged: its rows do not count here"
    assert "an evaluation under whitebox in " in lost
    assert " is incomplete: " in lost


def test_an_interruption_changes_no_row(make_model: MakeModel, data: Data, tmp_path: Path, monkeypatch: Any) -> None:
    threat, target = threats(make_model)[0], make_model(0)
    whole = rows(data, threat, [target], batch_size=5)
    original = crafter.craft
    calls = 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(crafter, "craft", failing)
    with pytest.raises(KeyboardInterrupt):
        folder_evaluator(data, tmp_path, batch_size=5).run([target], threat, SAMPLES)
    kept = FolderRows(tmp_path / "model0")
    assert 0 < (kept.everything().frame["threat"] == "whitebox").sum() < 48
    assert kept.outcomes().frame.empty, "no number rests on an evaluation that was cut off"
    monkeypatch.setattr(crafter, "craft", original)
    resumed = folder_evaluator(data, tmp_path, batch_size=5).run([target], threat, SAMPLES).frame
    assert_same_rows(whole, resumed, 1e-5)


def test_a_unit_that_fails_is_given_back(make_model: MakeModel, data: Data, tmp_path: Path, monkeypatch: Any) -> None:
    """At once, whoever holds the error, so that another process takes it."""
    taken: list[Path] = []

    def failing(*arguments: Any, **options: Any) -> Any:
        taken.extend(tmp_path.glob("*.lock"))
        raise RuntimeError("broken")

    monkeypatch.setattr(crafter, "craft", failing)
    with pytest.raises(RuntimeError, match="broken") as error:
        Evaluator(data, Settings(CPU), claims=Claims(tmp_path)).run([make_model(0)], threats(make_model)[0], SAMPLES)
    assert error.tb is not None
    assert len(taken) == 1
    assert not list(tmp_path.glob("*.lock"))


def test_no_number_rests_on_some_of_the_versions_that_were_asked_for(
    make_model: MakeModel, data: Data, tmp_path: Path, monkeypatch: Any, told: list[str]
) -> None:
    """All-or-nothing over the versions that were done when an evaluation was killed would be too high."""
    threat, target = threats(make_model)[2], make_model(0)
    original = Judge.version

    def killed(self: Judge, *unit: Any) -> Any:
        original(self, *unit)
        raise KeyboardInterrupt

    monkeypatch.setattr(Judge, "version", killed)
    with pytest.raises(KeyboardInterrupt):
        folder_evaluator(data, tmp_path).run([target], threat, SAMPLES)
    kept = FolderRows(tmp_path / "model0", repair=False)
    part = kept.everything().where(threat="blackbox")
    assert part.frame.groupby("cell")["sample"].nunique().tolist() == [len(SAMPLES)] * len(threat.eps), "whole cells"
    told.clear()
    assert kept.outcomes().frame.empty
    (line,) = told
    assert "an evaluation under blackbox" in line
    assert " is incomplete: " in line
    monkeypatch.setattr(Judge, "version", original)
    whole = folder_evaluator(data, tmp_path).run([target], threat, SAMPLES)
    told.clear()
    read = FolderRows(tmp_path / "model0", repair=False).outcomes(target.identity)
    pd.testing.assert_frame_equal(read.frame, whole.frame)
    assert [each.key for each in read.evaluations] == [each.key for each in whole.evaluations]
    assert not told


def test_rows_that_belong_to_no_evaluation_count_in_no_number(
    make_model: MakeModel, data: Data, tmp_path: Path, told: list[str]
) -> None:
    threat, target = threats(make_model)[0], make_model(0)
    folder_evaluator(data, tmp_path).run([target], threat, SAMPLES)
    (record,) = (tmp_path / "model0" / FOLDER).glob("*.json")
    text = record.read_text()
    record.write_text(text.replace('"whitebox"', '"transfer"'))
    told.clear()
    assert FolderRows(tmp_path / "model0", repair=False).outcomes().frame.empty
    assert len(told) == 2
    assert "was changed after it was written" in told[0]
    cells = len(threat.eps) + 1
    assert told[1].startswith(f"{cells} of {cells} cells in {tmp_path / 'model0'} belong to no evaluation")
    folder_evaluator(data, tmp_path).run([target], threat, SAMPLES)
    assert record.read_text() == text
    assert len(FolderRows(tmp_path / "model0").outcomes().frame) == (1 + len(threat.eps)) * len(SAMPLES)


def test_fewer_images_of_the_same_cells_are_an_evaluation_of_their_own(
    make_model: MakeModel, data: Data, tmp_path: Path
) -> None:
    threat, target = threats(make_model)[0], make_model(0)
    few = folder_evaluator(data, tmp_path).run([target], threat, SAMPLES[:8])
    many = folder_evaluator(data, tmp_path).run([target], threat, SAMPLES)
    kept = FolderRows(tmp_path / "model0")
    (own,) = few.evaluations
    pd.testing.assert_frame_equal(kept.outcomes(only=[own.key]).frame, few.frame)
    pd.testing.assert_frame_equal(kept.outcomes().frame, many.frame)


def test_a_part_of_an_evaluation_counts_in_no_number(
    make_model: MakeModel, data: Data, tmp_path: Path, told: list[str]
) -> None:
    """A study makes the images of each attack by itself, before it judges all of them together."""
    threat, target = threats(make_model)[2], make_model(0)
    one = threat.model_copy(update={"attacks": threat.attacks[:1]})
    part = folder_evaluator(data, tmp_path).run([target], one, SAMPLES, part=True)
    assert [each.part for each in part.evaluations] == [True]
    told.clear()
    assert FolderRows(tmp_path / "model0", repair=False).outcomes(target.identity).frame.empty
    assert " belong to no evaluation: left out" in told[0]
    whole = folder_evaluator(data, tmp_path).run([target], threat, SAMPLES)
    told.clear()
    kept = FolderRows(tmp_path / "model0", repair=False).outcomes(target.identity)
    pd.testing.assert_frame_equal(kept.frame, whole.frame)
    assert not told


def test_no_more_images_are_looked_at_than_it_takes(make_model: MakeModel, data: Data) -> None:
    target = make_model(0)
    counting = _Counting(target.ensemble.members[0])
    target.ensemble.members[0] = counting
    order = data.order("first")
    few = correct_for_all(target, data, order, 2, CPU, batch_size=4)
    looked = counting.images
    assert looked < len(order)
    everything = correct_for_all(target, data, order, len(order), CPU, batch_size=4)
    assert counting.images - looked >= len(order)
    assert set(few.tolist()) <= set(everything.tolist())


def test_out_of_memory_halves_the_batch(make_model: MakeModel, data: Data, monkeypatch: Any, told: list[str]) -> None:
    threat, target = threats(make_model)[0], make_model(0)
    whole = rows(data, threat, [target])
    original = crafter.craft

    def small_machine(model: Any, attack: Any, images: Tensor, *rest: Any, **options: Any) -> Any:
        if len(images) > 6:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return original(model, attack, images, *rest, **options)

    monkeypatch.setattr(crafter, "craft", small_machine)
    told.clear()
    evaluator = Evaluator(data, Settings(CPU, batch_size=24))
    assert_same_rows(whole, evaluator.run([target], threat, SAMPLES).frame, 1e-5)
    assert [line.split(": ")[1] for line in told] == ["going on with 12", "going on with 6"]


def test_out_of_memory_in_the_model_reaches_the_evaluator() -> None:
    class Hungry(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    with pytest.raises(RuntimeError, match="allocate memory"):
        FAST(Hungry(), torch.rand(24, 1, 8, 8), torch.zeros(24, dtype=torch.int64), 0.1)


def test_a_batch_that_images_depend_on_is_not_halved(
    make_model: MakeModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows would not be what their key says."""
    original, sizes = crafter.craft, []

    def small_machine(model: Any, attack: Any, images: Tensor, *rest: Any, **options: Any) -> Any:
        if len(images) > 12:
            raise RuntimeError("CUDA error: out of memory")
        sizes.append(len(images))
        return original(model, attack, images, *rest, **options)

    monkeypatch.setattr(crafter, "craft", small_machine)
    with pytest.raises(RobenchError, match="smaller --batch-size"):
        rows(data, Whitebox(eps=(0.05,), attacks=(FAST, _Mixing())), [make_model(0)], batch_size=24)
    assert sizes, "the other attack was halved"
    rows(data, Whitebox(eps=(0.05,), attacks=(_Mixing(),), restarts=1), [make_model(0)], batch_size=12)
    assert sizes[-2:] == [12, 12]


def test_a_model_of_too_few_classes_is_named(data: Data) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(data.test.images[0].numel(), 2))
    labelled = replace(data, test=replace(data.test, labels=torch.full_like(data.test.labels, 3)))
    with pytest.raises(RobenchError, match="model returns 2 outputs and the data have 4 classes"):
        rows(labelled, Whitebox(eps=(0.05,), attacks=(FAST,)), [EvaluatedModel.of_model(model, CPU)])


@dataclass(frozen=True, kw_only=True)
class _Clean(Attack):
    """Returns what it was given."""

    name: ClassVar[str] = "clean"

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        return images


@dataclass(frozen=True, kw_only=True)
class _Mixing(_Clean):
    """Says that its images depend on their company."""

    batch_dependent: ClassVar[bool] = True


@pytest.mark.parametrize(("attack", "expected"), [(FAST, [12, 12]), (_Mixing(), [24])])
def test_a_cpu_is_given_as_many_large_images_as_its_caches_hold(
    make_model: MakeModel, data: Data, monkeypatch: pytest.MonkeyPatch, attack: Attack, expected: list[int]
) -> None:
    """And in equal parts: a small rest takes longer by the image."""
    sizes: list[int] = []
    original = crafter.craft

    def recording(model: Any, attack: Any, images: Tensor, *rest: Any, **options: Any) -> Any:
        sizes.append(len(images))
        return original(model, attack, images, *rest, **options)

    monkeypatch.setattr(crafter, "craft", recording)
    monkeypatch.setattr(cpu, "CACHED", 20 * data.test.images[0].numel())
    rows(data, Transfer(eps=(0.05,), attacks=(attack,)), [make_model(0)], batch_size=24)
    assert sizes[: len(expected)] == expected


def test_clean_images_are_judged_within_the_batch_size(
    make_model: MakeModel, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = judging.predict

    def recording(judge: Any, images: Tensor, *rest: Any, **options: Any) -> Any:
        sizes.append(len(images))
        return original(judge, images, *rest, **options)

    monkeypatch.setattr(judging, "predict", recording)
    rows(data, Whitebox(eps=(0.05,), attacks=(FAST,)), [make_model(0)], batch_size=7)
    assert max(sizes) == 7
    assert cpu.judging_batch(3 * 32 * 32) == 500
    assert cpu.judging_batch(3 * 224 * 224) == 27
    assert cpu.judging_batch(3 * 224 * 224, 2) == 2


def test_an_attack_that_does_nothing_shows_in_the_rows(make_model: MakeModel, data: Data) -> None:
    frame = rows(data, Whitebox(eps=(0.1,), attacks=(_Clean(),)), [make_model(0)])
    attacked = frame[frame["threat"] == "whitebox"]
    assert (attacked["linf"] == 0).all()


def test_related_surrogates_are_refused(make_model: MakeModel, data: Data) -> None:
    target = make_model(0)
    child = EvaluatedModel.of_model(make_model(0).ensemble, CPU, name="copy")
    for related in (target, child):
        threat = Blackbox(eps=(0.1,), attacks=(FAST,), surrogates=(related,))
        with pytest.raises(RobenchError, match="share a member"):
            rows(data, threat, [target])
    allowed = Blackbox(eps=(0.1,), attacks=(FAST,), surrogates=(child,), allow_related=True)
    assert set(rows(data, allowed, [target])["threat"]) == {"clean", "blackbox-related"}


def test_ancestry_is_found_by_weight_similarity(make_model: MakeModel, data: Data) -> None:
    target = make_model(0)
    descendant = EvaluatedModel.of_model(make_model(0).ensemble, CPU).ensemble

    descendant = copy.deepcopy(descendant)
    with torch.no_grad():
        for parameter in descendant.parameters():
            parameter.add_(
                parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            )
    relative = EvaluatedModel.of_model(descendant, CPU, name="descendant")
    with pytest.raises(RobenchError, match="weights of cosine"):
        rows(data, Blackbox(eps=(0.1,), attacks=(FAST,), surrogates=(relative,)), [target])


def test_a_copy_in_another_wrapper_is_still_a_copy(make_model: MakeModel, data: Data) -> None:
    target = make_model(0)
    member = target.ensemble.members[0]
    wrapped = nn.Sequential(nn.Identity(), copy.deepcopy(member))
    with torch.no_grad():
        next(wrapped.parameters()).add_(1e-6)  # no hash shows it
    surrogate = EvaluatedModel.of_model(wrapped, CPU, name="wrapped")
    with pytest.raises(
        RobenchError, match=r"member 1 of wrapped and member 1 of model0 have 10 of 10 layers in common"
    ):
        rows(data, Blackbox(eps=(0.1,), attacks=(FAST,), surrogates=(surrogate,)), [target])


class _Parts(nn.Module):
    """A perceptron whose layers are registered in the order given."""

    def __init__(self, order: Sequence[str], head: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers = {"first": nn.Linear(64, 32), "second": nn.Linear(32, 32), "third": nn.Linear(32, head)}
        self.last = nn.Linear(head, 4)
        for name in order:
            self.add_module(name, layers[name])

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.second(self.first(images.flatten(1)).relu()).relu()
        return self.last(self.third(hidden).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize(("head", "shared", "kin"), [(8, ("first", "second", "third"), True), (24, ("first",), False)])
def test_a_body_in_common_is_kinship_whatever_the_head_and_the_order(
    head: int, shared: Sequence[str], kin: bool
) -> None:
    target = _Parts(("first", "second", "third"), 8, seed=1)
    surrogate = _Parts(("third", "second", "first"), head, seed=2)
    with torch.no_grad():
        for name in shared:
            weight = target.get_submodule(name).get_parameter("weight")
            surrogate.get_submodule(name).get_parameter("weight").copy_(weight + 0.01 * torch.rand_like(weight))
    models = [EvaluatedModel.of_model(model, CPU, name=name) for model, name in ((surrogate, "s"), (target, "t"))]
    found = kinship(*models)
    assert (found is not None) == kin
    if found is not None:
        assert found.startswith(
            "member 1 of s and member 1 of t have 3 of 4 layers in common, with weights of cosine 1"
        )


def test_where_no_image_is_right_nothing_is_transferred(make_model: MakeModel, data: Data) -> None:
    target = make_model(0)
    never = replace(data.test, labels=(data.test.labels + 1) % 4)
    wrong = replace(data, test=never)
    with pytest.raises(RobenchError, match="no image of npz:noise is classified right by every member of 'model0'"):
        correct_for_all(target, wrong, wrong.order("first", 0), 10, CPU)


def test_nan_is_an_error(data: Data) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :4] * float("nan")

    with pytest.raises(RobenchError, match="NaN"):
        rows(data, Whitebox(eps=(0.1,), attacks=(FAST,)), [EvaluatedModel.of_model(Broken(), CPU)])


def test_bfloat16_crafts_and_float32_judges(make_model: MakeModel, data: Data) -> None:
    frame = rows(data, Whitebox(eps=(0.1,), attacks=(FAST,)), [make_model(0)], precision="bfloat16")
    attacked = frame[frame["threat"] == "whitebox"]
    assert 0 < attacked["correct"].mean() < 1


def test_what_hooks_modules_is_not_compiled_and_a_failure_is_told_once(
    make_model: MakeModel, data: Data, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    class Hooking(PGD):
        hooks = True

    asked: list[nn.Module] = []
    told.clear()

    def compiled(model: nn.Module, image: Tensor) -> tuple[nn.Module, str]:
        asked.append(model)
        return model, "no compiler"

    monkeypatch.setattr(crafter, "compiled", compiled)
    evaluator = Evaluator(data, Settings(CPU, compile=True))
    evaluator.run([make_model(0)], Whitebox(eps=(0.1,), attacks=(Hooking(steps=2),)), SAMPLES)
    assert not asked
    evaluator.run([make_model(0), make_model(1)], Whitebox(eps=(0.1,), attacks=(FAST,)), SAMPLES)
    assert len(asked) == 2
    assert told == ["torch.compile failed, going on without: no compiler"]


def test_a_row_says_which_part_of_an_attack_took_its_image(make_model: MakeModel, data: Data, tmp_path: Path) -> None:
    target, attack = make_model(0), Strongest(steps=3, queries=5)
    threat = Whitebox(eps=(0.02, 0.1), attacks=(attack, FAST), restarts=1)
    store = FolderRows(tmp_path)
    frame = Evaluator(data, Settings(CPU), rows=lambda model: store).run([target], threat, SAMPLES).frame
    names = {f"{part.label} {part.loss}" for part in attack.parts(4)}
    own = frame["attack"] == attack.label
    assert set(frame.loc[own & ~frame["correct"], "part"]) <= names
    assert (frame.loc[own & frame["correct"], "part"] == "").all()
    assert (frame.loc[~own, "part"] == "").all()
    images = data.test.images[:24].float() / 255
    with frozen(target.ensemble):
        taken = attack.perturb(
            target.ensemble, images, data.test.labels[:24], torch.full((24,), 0.1), Draws.of(range(24))
        )
    parts = attack.parts(4)
    alone = [f"{parts[number].label} {parts[number].loss}" if number >= 0 else "" for number in taken.part.tolist()]
    strongest = frame[own & (frame["eps"] == 0.1)].sort_values("sample")
    assert (strongest["part"].to_numpy() == np.array(alone)).mean() > 0.9, "but for rounding in float32"
    assert strongest["part"].nunique() > 1
    assert FolderRows(tmp_path).everything().frame["part"].tolist() == frame["part"].tolist()


def test_rows_of_before_parts_were_told_are_read(make_model: MakeModel, data: Data, tmp_path: Path) -> None:
    store = FolderRows(tmp_path)
    threat = Whitebox(eps=(0.1,), attacks=(FAST,), restarts=1)
    frame = Evaluator(data, Settings(CPU), rows=lambda model: store).run([make_model(0)], threat, SAMPLES).frame
    (path,) = tmp_path.glob("part-*.parquet")
    old = pd.read_parquet(path).drop(columns="part")
    path.unlink()
    write_frame(tmp_path, old)
    found = FolderRows(tmp_path).everything().frame
    assert_same_rows(found, frame, 0)
    assert (found["part"] == "").all()
