"""Pictures show what the rows say: from the cache or crafted again, judged again, or left out with a reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robench.attacks.pgd import PGD
from robench.core.data import to_images
from robench.core.files import read_record
from robench.core.logs import Lines, logged
from robench.evaluation.outcomes import ENSEMBLE, Outcomes
from robench.evaluation.settings import Settings
from robench.reports.pictures import Picture
from robench.session import CRAFTED, OUTCOMES, Session, stored
from robench.studies.pictures import pictures
from robench.studies.plane import decision_regions
from tests import forged
from tests.studies.conftest import judge


def seen(session: Session, outcomes: Outcomes | None = None, count: int = 1000) -> tuple[list[Picture], list[str]]:
    lines: list[str] = []
    run = session.store.get("base")
    with logged(Lines(lines)):
        return pictures(session, outcomes or stored([run]), [run], count), lines


def test_a_picture_is_what_its_row_says(judged: Session) -> None:
    frame = stored([judged.store.get("base")]).frame.set_index(["cell", "member", "sample"])
    found, lines = seen(judged)
    assert lines == []
    ensemble = judged.store.get("base").load()
    rows = [frame.loc[each.cell, each.member, each.sample] for each in found]
    assert {row["threat"] for row in rows} == {"whitebox", "blackbox", "transfer"}
    assert {row["eps"] for row in rows} == {0.1, 0.3}
    assert {row["restart"] for row in rows} == {0, 1}
    for picture, row in zip(found, rows, strict=True):
        with torch.no_grad():
            image = torch.from_numpy(picture.adversarial)[None]
            logits = ensemble(image) if picture.member == ENSEMBLE else ensemble.members[int(picture.member) - 1](image)
        assert int(logits.argmax()) == row["prediction"] != row["label"]
        np.testing.assert_array_equal(picture.clean, to_images(judged.data.test.images[picture.sample]).numpy())
        distance = np.abs(picture.adversarial - picture.clean).max()
        assert 0 < distance <= row["eps"] + 1e-6
        assert f"sample {picture.sample}, ε {row['eps']:g}: {row['label']} → {row['prediction']}" in picture.caption
        assert f"{row['attack']} ce, restart {row['restart']}" in picture.caption


def test_the_cache_and_crafting_again_give_the_same(judged: Session) -> None:
    kept, _ = seen(judged)
    for part in (judged.store.root / CRAFTED).glob("*/part-*"):
        part.write_bytes(b"damaged")
    again, lines = seen(judged)
    assert any("damaged" in text for text in lines)
    assert [each.caption for each in again] == [each.caption for each in kept]
    for one, other in zip(kept, again, strict=True):
        np.testing.assert_allclose(one.adversarial, other.adversarial, atol=1e-6)


def test_double_precision(judged: Session) -> None:
    shutil.rmtree(judged.store.root / "base" / OUTCOMES)
    double = Settings(torch.device("cpu"), precision="float64", batch_size=8)
    judge(Session(judged.store, judged.data, double, 16))
    # The session that draws need not be set up as the one that judged.
    found, lines = seen(judged)
    assert lines == []
    assert len(found) > 10


def test_another_prediction_is_left_out(judged: Session) -> None:
    measured = stored([judged.store.get("base")])
    frame = measured.frame
    lie = (frame["threat"] == "whitebox") & ~frame["correct"]
    frame.loc[lie, "prediction"] = (frame.loc[lie, "prediction"] + 1) % 4
    found, lines = seen(judged, Outcomes(frame, cells=measured.cells))
    assert {each.cell for each in found} & set(frame.loc[lie, "cell"]) == set()
    assert {each.cell for each in found} & set(frame["cell"])
    (line,) = lines
    assert "another prediction than their rows have" in line


def test_what_cannot_be_made_again_is_told(judged: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = seen(judged)
    monkeypatch.setattr(PGD, "version", PGD.version + 1)
    found, lines = seen(judged)
    # Black-box images are in the cache, whatever became of the attack.
    assert 0 < len(found) < len(whole)
    assert all("has changed since" in text for text in lines)
    assert lines[0].startswith(f"{len(whole) - len(found)} of {len(whole)} pictures left out")
    monkeypatch.undo()

    def batched(cell: dict[str, Any]) -> None:
        if cell["threat"] == "whitebox":
            cell["recipe"]["craft"]["batch"] = 8

    forged.cells(judged.store.root / "base" / OUTCOMES, batched)
    assert any("depend on the batch" in text for text in seen(judged)[1])


def test_replaced_weights_are_noticed(judged: Session) -> None:
    shutil.rmtree(judged.store.root / CRAFTED)
    replace(judged.store.root / "sub", judged.store.root / "base")
    found, lines = seen(judged)
    assert found
    assert any("surrogate 'sub' is not among the runs" in text for text in lines)
    shutil.rmtree(judged.store.root / "sub")
    assert any("surrogate 'sub' is not among the runs" in text for text in seen(judged)[1])


def replace(run: Path, other: Path) -> None:
    """Gives a run the weights of another one."""
    theirs = read_record(other / "manifest.json")
    shutil.copy(other / "weights.safetensors", run / "weights.safetensors")
    forged.record(run / "manifest.json", weights=theirs["weights"])


def test_decision_regions_are_in_the_order_of_the_other_figures(judged: Session) -> None:
    """That of the paper, however the runs are named."""
    store, base = judged.store, judged.store.get("base")
    for name, defense in (("a", "dverge"), ("b", "adp")):
        store.save(
            name, base.load(), members=base.specs, defense={"name": defense}, seed=0, role="target", data=None,
            more={"dataset": "cifar10"},
        )  # fmt: skip
    found = decision_regions(judged, [store.get(name) for name in ("a", "b", "base")], base, resolution=3)
    assert list(found.classes) == ["Baseline/2", "ADP/2", "DVERGE/2"]
