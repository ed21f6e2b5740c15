"""`robench eval --log-to`: what was found of each run, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robench.cli import run
from robench.session import Session, stored
from robench.studies.summary import objects


def lines(judged: Session) -> list[dict[str, float]]:
    path = judged.store.folder("base") / "log" / "jsonl" / "eval" / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def judge(folder: Path, *more: str) -> int:
    data = ["--dataset", f"npz:{folder / 'noise.npz'}", "--runs", str(folder / "runs"), "--device", "cpu"]
    return run(["eval", "base", *data, "--samples", "16", "--restarts", "2", "--steps", "2", *more])


def test_accuracies_are_logged_and_not_twice(judged: Session, tmp_path: Path) -> None:
    for _ in range(2):
        assert judge(tmp_path, "--threat", "whitebox", "--eps", "0.1,0.3", "--log-to", "jsonl") == 0
    (line,) = lines(judged)
    rows = objects(stored([judged.store.get("base")]).where(threat=["clean", "whitebox"]))
    for row in rows:
        assert line[f"{row['threat']}/eps {row['eps']:g}/accuracy"] == row["accuracy"]
    assert len(line) == 1 + 3 * len(rows)


def test_success_between_members_is_logged(judged: Session, tmp_path: Path) -> None:
    assert judge(tmp_path, "--threat", "transfer", "--eps", "0.3", "--log-to", "jsonl") == 0
    (line,) = lines(judged)
    assert {name for name in line if name != "step"} == {
        f"transfer/{source} to {target}/eps 0.3/success" for source in (1, 2) for target in (1, 2, "ensemble")
    }


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--threat", "whitebox", "--log-to", "nowhere"], "unknown log 'nowhere'"),
        (["--threat", "whitebox", "--log-to", "jsonl", "--dry-run"], "--log-to has no effect with --dry-run"),
        (["--threat", "diversity", "--log-to", "jsonl"], "--log-to has no effect under --threat diversity"),
    ],
)
def test_wrong_words_are_one_line(
    judged: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    data = ["--dataset", f"npz:{tmp_path / 'noise.npz'}", "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    assert run(["eval", "base", *data, "--samples", "16", *more]) == 2
    assert said in capsys.readouterr().err
    assert not (judged.store.folder("base") / "log").exists()
