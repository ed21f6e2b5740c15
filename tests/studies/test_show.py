"""`robench show` and what `robench report` says of data, pictures and published numbers, as users type them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robench.cli import run
from robench.core.data import Data, at_hand, load
from robench.core.files import read_frame, write_frame
from robench.evaluation.findings import Finding
from robench.evaluation.fingerprint import judged_identity
from robench.evaluation.rows import FolderRows
from robench.evaluation.words import attacks
from robench.reports import published
from robench.session import OUTCOMES, Session, stored
from tests import forged
from tests.small import SPEC
from tests.studies.conftest import judge

pytestmark = pytest.mark.slow


@pytest.fixture
def others(judged: Session) -> Data:
    """A second data set, on which the run is judged too."""
    with np.load(judged.store.root.parent / "noise.npz") as arrays:
        changed = {**arrays, "x_test": 255 - arrays["x_test"]}
    np.savez(judged.store.root.parent / "others.npz", **changed)
    return load(f"npz:{judged.store.root.parent / 'others.npz'}")


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What a command prints; of a failure the one line on stderr."""
    capsys.readouterr()
    assert run(arguments) == code
    printed = capsys.readouterr()
    if code:
        assert printed.err.count("\n") == 1
    return printed.err if code else printed.out


def test_show_as_json_is_what_was_recorded(place: Path, judged: Session, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = place / "runs" / "base" / "manifest.json"
    history = [
        {"epoch": 1, "lr": 0.1, "terms": {"ce": 2.0}, "track": {"diversity": 1.5, "every": 1}},
        {"epoch": 2, "lr": 0.1, "terms": {"ce": 1.0}},
    ]
    forged.record(manifest, history=history)
    shown = json.loads(said(capsys, "show", "base", "--format", "json"))
    assert shown["run"]["n"] == 2
    assert shown["run"]["members"] == ["2 x resnet8"]
    assert shown["run"]["weights"] == judged.store.get("base").weights
    assert shown["history"] == [
        {"epoch": 1, "lr": 0.1, "ce": 2.0, "diversity": 1.5, "every": 1},
        {"epoch": 2, "lr": 0.1, "ce": 1.0},
    ]
    scores = {(row["threat"], row["eps"]): row for row in shown["scores"]}
    attacked = [(name, eps) for name in ("whitebox", "blackbox") for eps in (0.1, 0.3)]
    worst = [("worst", eps) for eps in (0.1, 0.3)]
    assert set(scores) == {("clean", 0.0), ("transfer", 0.3), *attacked, *worst}
    for eps in (0.1, 0.3):
        assert scores["worst", eps]["accuracy"] <= min(
            scores[name, eps]["accuracy"] for name in ("whitebox", "blackbox")
        )
    assert {row["data"] for row in shown["scores"]} == {judged.data.identity}
    assert scores["clean", 0.0]["accuracy"] == 1.0
    black = scores["blackbox", 0.3]
    assert black["low"] <= black["accuracy"] <= black["high"]
    # Two starts of PGD and one version of M-DI².
    assert (black["cells"], black["surrogates"], black["samples"]) == (3, ["sub"], 16)
    frame = stored([judged.store.get("base")]).where(threat="transfer").frame
    pairs = frame[(frame["member"] != "ensemble") & (frame["member"] != frame["surrogate"])]
    assert scores["transfer", 0.3]["success"] == pytest.approx(1 - pairs["correct"].mean())


def test_show_in_the_terminal(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = place / "runs" / "base" / "manifest.json"
    entries = [{"epoch": epoch, "lr": 0.1, "terms": {"ce": 1 / epoch}} for epoch in range(1, 201)]
    for entry in entries[::50]:
        entry["track"] = {"diversity": 1.25, "diversity_eps": 0.07, "every": 50}
    forged.record(manifest, history=entries)
    text = said(capsys, "show", "base")
    for part in ("2 x resnet8", "seed", "target", "cifar10", "5 of 200 epochs", "diversity, ε 0.07", "surrogates: sub"):
        assert part in text
    epochs = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│") and "0.1 " in line]
    assert [epoch for epoch in epochs if epoch.isdigit()] == ["1", "51", "101", "151", "200"]
    for entry in entries:
        entry.pop("track", None)
    forged.record(manifest, history=entries)
    assert "12 of 200 epochs" in said(capsys, "show", "base")
    bare = said(capsys, "show", "sub")
    assert "nothing was measured; robench eval sub" in bare
    assert "epochs" not in bare


def test_compare_and_board_say_what_show_says_against_numbers(
    place: Path, judged: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    """compare said which run is better on rows whose checks had failed, and show looked at no row itself."""
    base = judged.store.get("base")
    rows = FolderRows(base.folder / OUTCOMES)
    chance = Finding("surrogate sub", "fail", "it knows no more of the data than chance")
    rows.remember(judged_identity(base), "blackbox", [chance])
    for path in rows.folder.glob("part-*.parquet"):
        frame = read_frame(path)
        path.unlink()
        write_frame(rows.folder, frame.assign(linf=frame["linf"] + 1))
    shutil.copytree(base.folder, base.folder.with_name("other"))
    shown = [line for line in said(capsys, "show", "base").splitlines() if line.startswith("fail")]
    assert str(chance) in shown
    assert any(line.startswith("fail  rows possible: ") for line in shown)
    compared = said(capsys, "compare", "base", "other", "--threat", "blackbox")
    assert compared.count("knows no more of the data than chance") == 2
    assert said(capsys, "board", "runs") == "board.html\n"
    page = (place / "board.html").read_text()
    for line in shown:
        assert line.replace("fail  ", "fail  base: ") in compared
        assert f"base: {line.removeprefix('fail  ').split(': ')[0]}" in page


def test_show_writes_a_sheet(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png"):
        said(capsys, "show", "base", "--images", name, "--count", "3", "--dataset", "npz:noise.npz")
    assert (place / "a.png").read_bytes() == (place / "b.png").read_bytes()
    with Image.open(place / "a.png") as image:
        assert image.width > image.height > 300
        facts = json.loads(image.text["Description"])
    assert facts["seeds"] == {"training": [0], "attacks": [0]}
    assert str(place) not in json.dumps(facts)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nobody"], "unknown run 'nobody'"),
        (["base", "--images", "a.pdf"], ".png file, got 'a.pdf'"),
        (["base", "--images", "a.png"], "--dataset npz:PATH or folder:PATH"),
        (["base", "--images", "a.png", "--dataset", "digits"], "nothing was measured on digits"),
        (["sub", "--images", "a.png", "--dataset", "npz:noise.npz"], "nothing was measured on these runs"),
        (["base", "--images", "noise.npz/a.png", "--dataset", "npz:noise.npz"], "cannot write"),
        (["base", "--count", "3"], "only with --images"),
    ],
)
def test_show_says_in_a_line_what_is_wrong(
    place: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reason in said(capsys, "show", *arguments, code=2)
    assert not (place / "a.png").exists()


def test_a_report_shows_what_fell_where_the_data_are_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["report", "--out", "figures"]
    page = place / "figures" / "report.html"
    assert run([*out, "--dataset", "npz:noise.npz", "--images", "5"]) == 0
    assert page.read_text().count("<figcaption>") == 5
    assert run(out) == 0
    assert page.read_text().count("<figcaption>") == 0
    assert "--dataset or --data-dir says where it is" in capsys.readouterr().err
    assert "--dataset npz:PATH" in said(capsys, *out, "--images", "2", code=2)


def test_verdicts_beside_the_paper_depend_on_what_was_judged(
    place: Path, judged: Session, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The run says cifar10, as an import does for its classes; the images are noise.
    out = ["report", "--images", "0", "--out", "figures", "--against", "dverge2020"]
    table, folder = place / "figures" / "against_dverge2020.md", place / "runs" / "base" / OUTCOMES
    shutil.rmtree(folder)
    judged.whitebox([judged.store.get("base")], eps=(0.03,), attacks=attacks("whitebox"), restarts=1)
    forged.cells(folder, lambda cell: cell.update(n=3))  # the paper has no ensembles of two
    assert run(out) == 0
    told = capsys.readouterr().err
    assert "its images are cifar10, ours " in told
    assert "its members are resnet20, not those of base: side by side, not judged" in told
    assert "| clean | baseline | 3 | 0 | 100.0 |" in table.read_text()
    assert "different data and network" in table.read_text()
    said(capsys, *out, "--same-data")
    assert "different network" in table.read_text()
    of_such = published.read("dverge2020").model_copy(update={"model": SPEC.name})
    monkeypatch.setattr(published, "read", lambda paper: of_such)
    said(capsys, *out, "--same-data")
    assert "(data vouched for)" in table.read_text()
    assert "different data" not in table.read_text()
    forged.cells(folder, lambda cell: cell["recipe"].get("craft", cell["recipe"]).update(data="cifar10"))
    said(capsys, *out)
    assert "inside |" in table.read_text()
    facts = json.loads((place / "figures" / "against_dverge2020.provenance.json").read_text())
    assert facts["data"] == ["cifar10"]
    assert set(facts) == {"config", "data", "seeds", "versions", "weights"}
    assert "--same-data has an effect only" in said(capsys, "report", "--same-data", code=2)
    assert "are those of the paper already" in said(capsys, *out, "--same-data", code=2)


def test_rows_on_two_data_sets_are_never_mixed(
    place: Path, judged: Session, others: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    judge(Session(judged.store, others, judged.settings, 16))
    assert "several data sets" in said(capsys, "report", "--images", "0", code=2)
    said(capsys, "report", "--out", "figures", "--images", "0", "--dataset", "npz:others.npz")
    facts = json.loads((place / "figures" / "fig4_accuracy.provenance.json").read_text())
    assert facts["data"] == [others.identity]
    # Noise is labelled as the run sees it, its negative is not.
    assert "| Baseline | 2 | 100.0 " not in (place / "figures" / "table5_whitebox.md").read_text()
    shown = json.loads(said(capsys, "show", "base", "--format", "json"))
    assert {row["data"] for row in shown["scores"]} == {judged.data.identity, others.identity}
    assert len(shown["scores"]) == 2 * 8


def test_only_what_needs_no_download_is_at_hand(tmp_path: Path) -> None:
    (tmp_path / "svhn").mkdir()
    names = ("digits", "cifar10", "svhn", "0123456789abcdef")
    assert [at_hand(name, tmp_path) for name in names] == [True, False, True, False]


def test_a_trial_on_a_few_images_changes_no_score(
    place: Path, judged: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads(said(capsys, "show", "base", "--format", "json"))["scores"]
    few = replace(judged, samples=4)
    few.whitebox([few.store.get("base")], eps=(0.1,), attacks=attacks("whitebox", steps=1), restarts=1)
    assert run(["show", "base", "--format", "json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["scores"] == before
    assert "1 of 3 cells of base, whitebox, are left out: they judged 4 images or fewer, others 16" in printed.err


@pytest.mark.parametrize("command", [["show", "base"], ["report"], ["compare", "base", "base", "--threat", "whitebox"]])
def test_what_only_reads_leaves_damaged_rows_where_they_are(
    place: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (part,) = (place / "runs" / "base" / "outcomes").glob("part-*.parquet")
    part.write_bytes(part.read_bytes() + b"x")
    run(command)
    assert f"{part.relative_to(place)} is damaged: its rows do not count here" in capsys.readouterr().err
    assert part.exists()


def test_a_report_without_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(place / "runs" / "base" / OUTCOMES)
    assert "nothing was measured" in said(capsys, "report", code=2)
