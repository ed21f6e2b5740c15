"""`robench board`: who tampered is told in words, and several results of the same weights count together."""

from __future__ import annotations

import html as escaping
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from robench.cli import run
from robench.core.files import read_frame, write_frame
from robench.evaluation.rows import CHECKS
from robench.evaluation.worst import worst
from robench.reports import board as page_of
from robench.reports import html
from robench.session import OUTCOMES, Session, stored
from robench.studies.intact import ResultFolder
from tests.reports.test_build import CHROMIUM, browse


@pytest.fixture
def folders(judged: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`alice` and `bob`, the same result, in the working folder."""
    for name in ("alice", "bob"):
        shutil.copytree(judged.store.root, tmp_path / name / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(folder: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Changes the rows of run "base" in ``folder``, under names that fit."""
    for path in sorted((folder / "runs" / "base" / OUTCOMES).glob("part-*.parquet")):
        frame = read_frame(path)
        assert frame is not None
        path.unlink()
        write_frame(path.parent, change(frame))


def lines(page: Path) -> list[dict[str, str]]:
    """The board's lines, by column."""
    body = page.read_text().split("<tbody>")[1].split("</tbody>")[0]
    found = []
    for row in body.split("<tr>")[1:]:
        cells = [escaping.unescape(re.sub("<[^>]*>", "", cell)).strip() for cell in re.findall("<td.*?</td>", row)]
        found.append(dict(zip(page_of.HEADERS, cells, strict=True)))
    return found


def rounded(frame: pd.DataFrame) -> set[str]:
    left = worst(frame)
    return {f"{100 * a:.1f} [{100 * b:.1f}, {100 * c:.1f}]" for a, b, c in left[["accuracy", "low", "high"]].values}


def test_numbers_are_the_worst_of_each_threat_and_of_all(folders: Path, judged: Session) -> None:
    assert run(["board", "alice", "--out", "out.html"]) == 0
    found = lines(folders / "out.html")
    outcomes = stored([judged.store.get("base")])
    assert {line["Threat"] for line in found} == {"white-box", "black-box", page_of.EVERYTHING}
    for name, threats in (
        ("white-box", ["clean", "whitebox"]),
        (page_of.EVERYTHING, list(outcomes.frame["threat"].unique())),
    ):
        shown = {line["Accuracy"] for line in found if line["Threat"] == name}
        assert shown == rounded(outcomes.where(threat=threats).frame)
    assert {line["Verified"] for line in found} == {"files agree"}
    assert {line["Clean"][:5] for line in found} == {"100.0"}
    assert {line["N"] for line in found} == {"2"}


def test_who_tampered_is_told_in_words_and_joins_nobody(folders: Path) -> None:
    rows(folders / "bob", lambda frame: frame.assign(correct=True))
    assert run(["board", "alice", "bob"]) == 0
    found = lines(folders / "board.html")
    mine, theirs = ([line for line in found if line["Result"] == name] for name in ("alice", "bob"))
    assert {line["Verified"] for line in theirs} == {"NO: does not verify"}
    assert all(line["Accuracy"].startswith("claimed ") for line in theirs)
    assert {line["Verified"] for line in mine} == {"files agree"}
    assert len(mine) == len(theirs) == len(found) / 2
    text = (folders / "board.html").read_text()
    assert "bob: <span" in text
    assert "correct against prediction and label" in text


def test_the_same_weights_of_two_results_count_together(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def without(threat: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
        result = ResultFolder.at(folders / "alice").rows()["base"]
        return lambda frame: frame[[result.cell(cell).threat != threat for cell in frame["cell"]]]

    assert run(["board", "alice", "--out", "all.html"]) == 0
    rows(folders / "alice", without("blackbox"))
    rows(folders / "bob", without("whitebox"))
    assert run(["board", "alice", "bob"]) == 0
    one, two = lines(folders / "all.html"), lines(folders / "board.html")
    assert {line["Result"] for line in two} == {"alice and bob"}
    assert [{**line, "Result": ""} for line in one] == [{**line, "Result": ""} for line in two]
    assert "differ" not in capsys.readouterr().err


def test_a_verdict_that_two_results_see_differently_is_told_and_counts_as_wrong(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(frame: pd.DataFrame) -> pd.DataFrame:
        """Consistently so: nothing but the images made again could tell."""
        at = frame.index[frame["correct"] & (frame["member"] == "ensemble")][:3]
        frame.loc[at, ["correct", "prediction", "margin"]] = [False, 0, -1.0]
        frame.loc[at, "prediction"] = (frame.loc[at, "label"] + 1) % 10
        return frame

    rows(folders / "bob", wrong)
    assert run(["board", "alice", "bob"]) == 0
    assert "differ in 3 of" in capsys.readouterr().err
    best = {line["Accuracy"] for line in lines(folders / "board.html")}
    assert run(["board", "alice"]) == 0
    assert best != {line["Accuracy"] for line in lines(folders / "board.html")}


def test_with_the_data_cells_are_made_again(folders: Path) -> None:
    data = ["--dataset", "npz:noise.npz", "--cells", "50", "--device", "cpu"]

    def consistent(frame: pd.DataFrame) -> pd.DataFrame:
        right = ~frame["correct"] & (frame["member"] == "ensemble")
        frame.loc[right, "prediction"] = frame.loc[right, "label"]
        frame.loc[right, ["margin", "correct"]] = [1.0, True]
        return frame

    rows(folders / "bob", consistent)
    assert run(["board", "alice", "bob"]) == 0
    assert {line["Verified"] for line in lines(folders / "board.html")} == {"files agree"}
    assert run(["board", "alice", "bob", *data]) == 0
    found = lines(folders / "board.html")
    assert {line["Verified"] for line in found if line["Result"] == "alice"} == {"made again"}
    assert {line["Verified"] for line in found if line["Result"] == "bob"} == {"NO: does not verify"}


def test_a_run_and_runs_are_results_too(folders: Path) -> None:
    assert run(["board", "alice/runs", "--out", "runs.html"]) == 0
    assert run(["board", "alice/runs/base", "--out", "run.html"]) == 0
    named = [{**line, "Result": ""} for line in lines(folders / "runs.html")]
    assert named == [{**line, "Result": ""} for line in lines(folders / "run.html")]
    assert run(["board", "alice/runs", "bob/runs", "--out", "both.html"]) == 0
    assert {line["Result"] for line in lines(folders / "both.html")} == {"alice/runs and bob/runs"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["alice", "./alice"], "is named twice"),
        (["empty"], "empty holds no rows"),
        (["alice", "--cells", "3"], "--cells has an effect only with --dataset"),
        (["alice", "--out", "bob"], "expected --out as a file, bob is a folder"),
        (["alice", "--dataset", "npz:nothing.npz"], "nothing.npz does not exist"),
        ([], "Missing argument"),
        (["noise.npz"], "is no folder"),
    ],
)
def test_wrong_words_are_one_line(
    folders: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (folders / "empty").mkdir()
    assert run(["board", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium (apt-get install chromium)")
def test_filters_in_a_browser(folders: Path) -> None:
    rows(folders / "bob", lambda frame: frame.assign(correct=True))
    assert run(["board", "alice", "bob"]) == 0
    probe = """
      addEventListener("load", () => {
        const [data, threat, eps, ensemble, n, verified] = document.querySelectorAll(".filters select");
        const rows = document.querySelector("[data-filters]").tBodies[0].rows;
        const shown = () => [...rows].filter((row) => row.offsetHeight);
        const choose = (select, value) => { select.value = value; select.dispatchEvent(new Event("change")); };
        const seen = {all: shown().length, radii: [...eps.options].map((option) => option.text)};
        choose(threat, "white-box"); seen.white = shown().length;
        choose(eps, "0.3"); seen.one = shown().length;
        choose(verified, "files agree"); seen.mine = shown().map((row) => row.cells[9].textContent);
        seen.said = document.querySelector(".filters output").textContent;
        document.body.dataset.seen = JSON.stringify(seen);
      });
    """
    text = (folders / "board.html").read_text()
    admitted = text.replace("script-src '", f"script-src '{html.csp(probe)}' '")
    (folders / "probe.html").write_text(admitted.replace("</body>", f"<script>{probe}</script></body>"))
    dom, console = browse(folders / "probe.html", folders)
    seen = json.loads(escaping.unescape(dom.split('data-seen="')[1].split('"')[0]))
    count = len(lines(folders / "board.html"))
    assert seen == {
        "all": count, "radii": ["all", "0.1", "0.3"], "white": 4, "one": 2, "mine": ["alice"],
        "said": f"1 of {count} lines",
    }  # fmt: skip
    assert console == []


def spoil_weights(folder: Path) -> None:
    shutil.copy(folder / "runs/sub/weights.safetensors", folder / "runs/base/weights.safetensors")


def spoil_bytes(folder: Path) -> None:
    path = next((folder / "runs/base" / OUTCOMES).glob("part-*.parquet"))
    path.write_bytes(path.read_bytes()[:-1])


def spoil_cell(folder: Path) -> None:
    path = next((folder / "runs/base" / OUTCOMES / "cells").glob("*.json"))
    path.write_text(path.read_text().replace("base", "best"))


def spoil_evaluation(folder: Path) -> None:
    path = next((folder / "runs/base" / OUTCOMES / "evaluations").glob("*.json"))
    path.write_text(path.read_text().replace('"whitebox"', '"blackbox"').replace("0,\n", "1,\n", 1))


def spoil_manifest(folder: Path) -> None:
    (folder / "runs/base/manifest.json").write_text("{}")


def spoil_ball(folder: Path) -> None:
    rows(folder, lambda frame: frame.assign(linf=frame["linf"] + 1))


def spoil_twice(folder: Path) -> None:
    rows(folder, lambda frame: pd.concat([frame, frame.iloc[[0]].assign(restart=7)]))


@pytest.mark.parametrize(
    "spoil",
    [spoil_weights, spoil_bytes, spoil_cell, spoil_evaluation, spoil_manifest, spoil_ball, spoil_twice],
)
def test_files_that_were_changed_are_found_without_data(
    folders: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None]
) -> None:
    assert run(["check", "result", "alice", "--files"]) == 0
    assert "the files agree: 5 of 5" in capsys.readouterr().out
    spoil(folders / "alice")
    assert run(["check", "result", "alice", "--files"]) == 1
    assert "refused: " in capsys.readouterr().out
    assert run(["check", "result", "alice", "--files", "--cells", "3"]) == 2


def test_what_is_missing_is_told_and_no_refusal(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "alice/runs/base/weights.safetensors").unlink()
    one = ["cell", "sample"]  # a cell of transfer has a row of every member
    rows(folders / "alice", lambda frame: frame[(frame[one] != frame[one].iloc[-1]).any(axis=1)])
    assert run(["check", "result", "alice", "--files"]) == 0
    said = capsys.readouterr().out
    assert "warn  base: weights: are not here" in said
    assert "lack 1 verdicts" in said
    assert said.splitlines()[-1] == "the files agree: 3 of 5"  # what warns was counted too


def test_a_damaged_manifest_is_told_once_and_a_reader_is_not_told_to_remove_it(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check result` said it of every file and cell that needs the manifest, with advice for its owner."""
    spoil_manifest(folders / "alice")
    for options in (["--files"], ["--dataset", "npz:noise.npz", "--device", "cpu"]):
        assert run(["check", "result", "alice", *options]) == 1
        said = [line for line in capsys.readouterr().out.splitlines() if "manifest.json" in line]
        assert len(said) == 1
        assert "ask whoever made it" in said[0]
        assert "remove" not in said[0]


def test_what_was_found_of_rows_cannot_be_removed_unnoticed(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folders / "alice/runs/base" / OUTCOMES / CHECKS
    path.write_text(path.read_text().replace('"pass"', '"warn"', 1))
    assert run(["check", "result", "alice", "--files"]) == 1
    assert f"{CHECKS} was changed" in capsys.readouterr().out
    path.unlink()
    assert run(["show", "base", "--runs", "alice/runs"]) == 0
    assert "warn  checks kept: " in capsys.readouterr().out


def test_rows_that_count_nowhere_are_told(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A result without the record of its strongest attack, or without a manifest, passed in silence."""
    shutil.rmtree(folders / "alice/runs/base" / OUTCOMES / "evaluations")
    assert run(["check", "result", "alice", "--files"]) == 0
    assert "warn  base: evaluations: " in capsys.readouterr().out
    (folders / "alice/runs/base/manifest.json").rename(folders / "manifest.json")
    shutil.copytree(folders / "bob/runs/base", folders / "alice/runs/other")
    assert run(["check", "result", "alice", "--files"]) == 0
    assert "warn  base: manifest: is not here" in capsys.readouterr().out


def test_files_of_rows_that_are_gone_are_told(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (folders / "alice/runs/base" / OUTCOMES).glob("part-*.parquet"):
        path.unlink()
    assert run(["check", "result", "alice", "--files"]) == 2
    assert "says that base was evaluated: the files outcomes/part-*.parquet are gone" in capsys.readouterr().err


def test_outcomes_of_nobody_are_an_error(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folders / "alice/runs/base" / OUTCOMES / "evaluations")
    assert run(["board", "alice"]) == 2
    assert "no result has rows under an attack" in capsys.readouterr().err


def test_a_result_without_rows_is_refused_before_others_are_read(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robench.studies.board._read", lambda *_: pytest.fail("read for nothing"))
    (folders / "empty").mkdir()
    assert run(["board", "alice", "empty"]) == 2
    assert "empty holds no rows" in capsys.readouterr().err
