"""`--require`: exit code and JSON for CI, and what cannot be judged is an error."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from robench.cli import run
from robench.commands import _gate
from robench.core.errors import RobenchError
from robench.session import Session


@pytest.fixture
def shown(judged: Session, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """`robench show base --require ...`: exit code, and what is said."""
    before = Path.cwd()
    os.chdir(judged.store.root.parent)

    def show(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = run(["show", "base", *arguments])
        printed = capsys.readouterr()
        return code, printed.err if code == 2 else printed.out

    yield show
    os.chdir(before)


@pytest.fixture
def row(shown: Any) -> dict[str, Any]:
    """A white-box accuracy of `base` whose interval is no point."""
    rows = json.loads(shown("--format", "json")[1])["scores"]
    return next(row for row in rows if row["threat"] == "whitebox" and row["low"] < row["accuracy"] < 1)


def require(row: dict[str, Any], percent: float) -> str:
    where = f"{row['threat']}@{row['eps']:g}"
    return f"{where}>={percent:.3f}"


def test_the_number_decides_or_its_lower_bound(shown: Any, row: dict[str, Any]) -> None:
    just = require(row, 100 * (row["accuracy"] + row["low"]) / 2)
    code, said = shown("--require", just)
    assert code == 0
    assert f"met   {just}: base on " in said
    assert said.rstrip().endswith("judged by the accuracy")
    code, said = shown("--require", just, "--lower-bound")
    assert code == 1
    assert f"FAIL  {just}: base on " in said
    assert said.rstrip().endswith("judged by the lower end of the interval")


def test_every_requirement_must_be_met(shown: Any, row: dict[str, Any]) -> None:
    met, missed = require(row, 0), require(row, 100 * row["accuracy"] + 0.1)
    code, said = shown("--require", met, "--require", missed, "--format", "json")
    assert code == 1
    verdicts = json.loads(said)["requirements"]
    assert [(each["require"], each["met"]) for each in verdicts] == [(met, True), (missed, False)]
    assert verdicts[0]["accuracy"] == row["accuracy"]
    assert verdicts[0]["judged_by"] == "accuracy"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("whitebox@0.9>=1", r"base has no such number; there are .*clean, whitebox@0.1, whitebox@0.3"),
        ("nonsense@0.1>=1", "base has no such number; there are"),
        ("whitebox>=60", "expected --require as THREAT@EPS>=PERCENT"),
        ("whitebox@0.1<=60", "expected --require as"),
        ("clean@0.1>=60", "expected --require as"),
        ("clean>=600", "expected --require as"),
        ("clean>=0.6", "got the fraction 0.6; type 60, or 0.6% where that is meant"),
        ("whitebox@0.1,0.2>=60", "expected one ε"),
        ("whitebox@x>=60", "expected `eps`"),
    ],
)
def test_what_cannot_be_judged_is_an_error(text: str, said: str, shown: Any) -> None:
    code, told = shown("--require", text)
    assert code == 2
    assert re.search(said, told), told


def test_a_bound_without_a_requirement_has_no_effect(shown: Any) -> None:
    code, told = shown("--lower-bound")
    assert code == 2
    assert "has an effect only with --require" in told


def test_no_row_is_no_pass() -> None:
    """A requirement that nothing was held against would else be met."""
    wanted = _gate.requirements(["whitebox@8/255>=10"])
    rows = [{"target": "x", "threat": "whitebox", "eps": 8 / 255, "success": 0.5}]
    with pytest.raises(RobenchError, match="there are none"):
        _gate.judge(wanted, rows, "x", by_low=False)
    rows = [{"target": "x", "threat": "whitebox", "eps": 8 / 255, "accuracy": 0.1, "low": 0.05, "high": 0.2}]
    assert _gate.judge(wanted, rows, "x", by_low=False)[0].met
