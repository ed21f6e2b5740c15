"""Bars: one output in a notebook, nothing where nobody looks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import robench
from robench.attacks import ATTACKS
from robench.core import progress
from robench.core.data import Data
from robench.core.progress import bar, duration, silent
from tests.small import ensemble


class Handle:
    """What IPython's `display` returns; keeps every state."""

    def __init__(self) -> None:
        self.shown: list[dict[str, str]] = []

    def update(self, content: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.shown.append(content)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """A kernel, whose outputs are kept."""
    IPython = pytest.importorskip("IPython")
    outputs: list[Handle] = []

    def display(content: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        assert display_id
        outputs.append(Handle())
        outputs[-1].update(content, raw=raw)
        return outputs[-1]

    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr("IPython.display.display", display)
    return outputs


def test_a_bar_is_one_output_that_vanishes(notebook: list[Handle], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.1, 3.0, 4.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with bar(terminal=False) as shown:
        shown(2, 10, "a <b>")
        shown(1, 10, "too early to be shown")
        shown(5, 10, "pgd")
        shown(0, 0, "nothing to do")
    (output,) = notebook
    assert [state["text/plain"] for state in output.shown] == [
        "a <b>: 20 %", "pgd: 50 %, 3 seconds left", "nothing to do: 0 %", "",
    ]  # fmt: skip
    assert output.shown[0]["text/html"] == '<progress value="2" max="10"></progress> a &lt;b&gt;: 20 %'
    assert output.shown[-1]["text/html"] == ""


def test_a_job_without_a_step_and_one_that_fails_leave_nothing(notebook: list[Handle]) -> None:
    with bar():
        pass
    assert notebook == []
    with suppress(ZeroDivisionError), bar() as shown:
        shown(1, 3, "pgd")
        raise ZeroDivisionError
    assert notebook[0].shown[-1]["text/html"] == ""


def test_an_evaluation_shows_one(notebook: list[Handle], data: Data) -> None:
    threat = robench.Whitebox(eps=(0.1,), restarts=2, attacks=(ATTACKS.get("pgd")(steps=2),))
    robench.evaluate(ensemble(0), data, threat, samples=8, probe=False)
    (output,) = notebook
    assert output.shown[0]["text/plain"].startswith("whitebox: pgd:steps=2")


def test_nothing_elsewhere(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with bar(terminal=False) as shown:
        assert shown is silent
    with bar() as shown:  # pytest's stderr is no terminal
        shown(1, 2, "pgd")
    assert capfd.readouterr() == ("", "")
    IPython = pytest.importorskip("IPython")
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace())  # a terminal's
    with bar(terminal=False) as shown:
        assert shown is silent


@pytest.mark.parametrize(("seconds", "said"), [(1, "1 seconds"), (150, "2 minutes"), (9000, "2 hours")])
def test_a_duration_has_a_unit_of_which_there_are_two(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_a_training_shows_one(notebook: list[Handle], tmp_path: Path) -> None:
    from robench.cli import run

    line: list[Any] = ["train", "baseline", "--dataset", "digits", "--n", "1", "--epochs", "1", "--model", "resnet8"]
    assert run([*line, "--name", "it", "--runs", str(tmp_path)]) == 0
    (output,) = notebook
    assert output.shown[0]["text/plain"].startswith("it: ")
