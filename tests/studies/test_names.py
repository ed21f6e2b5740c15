"""Runs that were renamed or copied, and runs and surrogates that were judged on several data sets."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from robench.cli import run
from robench.core.data import Data, load
from robench.evaluation.checks import SURVIVORS, check
from robench.evaluation.outcomes import ENSEMBLE
from robench.evaluation.settings import Settings
from robench.evaluation.words import attacks
from robench.session import Session, stored
from robench.store.runs import Runs
from robench.studies.drawing import surrogates
from tests.small import ensemble
from tests.studies.conftest import SAMPLES

WHITE = {"eps": (0.1,), "restarts": 1, "attacks": attacks("whitebox", steps=1)}
BLACK = {"eps": (0.1,), "restarts": 1, "attacks": attacks("blackbox", ["pgd"], ["ce"], steps=1)}


def on(place: Path, name: str, labels: np.ndarray) -> Session:
    """A session on the same images but for their last bit, with other labels of the test images."""
    with np.load(place / "noise.npz") as arrays:
        train = np.concatenate([labels[:-2], [0, 3]])  # as many classes as outputs
        changed = {**arrays, "x_test": arrays["x_test"] ^ 1, "y_test": labels, "y_train": train}
    np.savez(place / name, **changed)
    data: Data = load(f"npz:{place / name}")
    return Session(Runs(place / "runs"), data, Settings(torch.device("cpu"), batch_size=8), SAMPLES)


def labels(place: Path) -> np.ndarray:
    with np.load(place / "noise.npz") as arrays:
        return np.asarray(arrays["y_test"])


def test_a_run_goes_by_the_name_that_it_has_now(place: Path, judged: Session) -> None:
    before = judged.whitebox([judged.store.get("base")], **WHITE)
    shutil.move(place / "runs" / "base", place / "runs" / "renamed")
    session = Session(judged.store, judged.data, judged.settings, SAMPLES)
    after = session.whitebox([session.store.get("renamed")], **WHITE)
    assert set(after.frame["target"]) == {"renamed"}
    assert after.frame["correct"].tolist() == before.frame["correct"].tolist()
    (found,) = (each for each in after.checks if each.name == SURVIVORS)
    assert "survivors of renamed" in found.evidence
    assert set(stored([session.store.get("renamed")]).frame["target"]) == {"renamed"}


def test_two_runs_of_the_same_weights_are_two(place: Path, judged: Session) -> None:
    shutil.copytree(place / "runs" / "base", place / "runs" / "copy")
    both = [judged.store.get(name) for name in ("base", "copy")]
    found = judged.whitebox(both, **WHITE)
    assert found.accuracy(["target", "threat"])["target"].tolist() == ["base", "base", "copy", "copy"]
    told = [each.evidence for each in found.checks if each.name == SURVIVORS]
    assert [text.replace("copy", "base") for text in told] == [told[0]] * 2
    assert "survivors of" in told[0]
    assert set(stored(both).frame["target"]) == {"base", "copy"}


def test_images_of_two_data_sets_are_not_compared(
    place: Path, judged: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [judged.store.get("base"), judged.store.get("sub")]
    judged.whitebox(runs, **WHITE)
    other = on(place, "others.npz", (labels(place) + 1) % 4)
    other.whitebox(runs, **WHITE)
    asked = ["compare", "base", "sub", "--threat", "clean", "--format", "csv"]
    assert run(asked) == 2
    assert "were judged on several data sets" in capsys.readouterr().err
    for name, session in (("noise.npz", judged), ("others.npz", other)):
        assert run([*asked, "--dataset", f"npz:{name}"]) == 0
        clean = stored(runs).by_data()[session.data.identity].where(threat="clean").accuracy(["target"])
        header, line = capsys.readouterr().out.strip().splitlines()
        row = dict(zip(header.split(","), line.split(","), strict=True))
        assert [float(row[f"accuracy_{which}"]) for which in "ab"] == clean["accuracy"].tolist()


def test_a_surrogate_that_knows_other_data_is_not_taken_for_one_that_knows_these(place: Path, judged: Session) -> None:
    with torch.no_grad():
        pixels = torch.from_numpy(np.load(place / "noise.npz")["x_test"] ^ 1).float() / 255
        known = ensemble(1)(pixels).argmax(dim=1).numpy()
    base, sub = judged.store.get("base"), judged.store.get("sub")
    knows, guesses = on(place, "known.npz", known), on(place, "unknown.npz", (known + 1) % 4)
    expected = guesses.blackbox([base], [sub], **BLACK).checks
    knows.blackbox([base], [sub], **BLACK)
    again = Session(guesses.store, guesses.data, guesses.settings, SAMPLES).blackbox([base], [sub], **BLACK)
    (found,) = (each for each in again.checks if each.name == "surrogate sub")
    assert found in expected
    assert found.evidence.startswith(f"sub gets 0.0% of {SAMPLES} images right")
    for session, share in ((knows, 1.0), (guesses, 0.0)):
        outcomes = stored([base]).by_data()[session.data.identity]
        assert surrogates(outcomes, [base]) == {"sub": share}


def test_a_result_is_not_held_against_rows_on_other_data(place: Path, judged: Session) -> None:
    base, sub = judged.store.get("base"), judged.store.get("sub")
    other = on(place, "others.npz", labels(place))
    white = other.whitebox([base], **WHITE)
    with_black = stored([base])
    assert (with_black.where(threat="blackbox", member=ENSEMBLE).frame["eps"] == 0.1).any()
    names = [each.name for each in check(white, with_black)]
    assert "white-box at most black-box" not in names
    other.blackbox([base], [sub], **BLACK)
    assert "white-box at most black-box" in [each.name for each in check(white, stored([base]))]
