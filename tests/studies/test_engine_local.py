"""The local engine: a whole study, again, interrupted, with failures, within a budget."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from robench.cli import run
from robench.commands import run as command
from robench.core.files import read_record, write_record
from robench.evaluation import words
from robench.evaluation.cost import Pace
from robench.evaluation.settings import Settings
from robench.session import Session
from robench.store.runs import Runs
from robench.studies import engines
from robench.studies.plan import Plan
from robench.studies.state import StudyFolder, StudyStatus
from robench.studies.study import find
from tests.core.chores import running
from tests.studies import small
from tests.studies.small import planned

pytestmark = pytest.mark.slow


@pytest.fixture
def study(whole: Path) -> Path:
    return whole / "small.toml"


@pytest.fixture
def complete(whole: Path) -> Path:
    """The study, done in one process."""
    return whole / "out"


@dataclass
class Copy:
    """A study that is done, to spoil: its file and folder."""

    study: Path
    out: Path

    @property
    def main(self) -> tuple[str, ...]:
        return planned(self.study).main

    @property
    def page(self) -> str:
        return (self.out / "report" / "study.md").read_text()

    def again(self, *more: str) -> int:
        return run(["run", str(self.study), "--out", str(self.out), "--workers", "1", "--device", "cpu", *more])


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Copy:
    """Of the plain study."""
    shutil.copytree(plain / "out", tmp_path / "out")
    return Copy(plain / "small.toml", tmp_path / "out")


def test_the_demo_is_the_study_of_that_name(
    complete: Path, study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def found(name: str) -> tuple[str, str]:
        asked.append(name)
        return find(str(study))

    monkeypatch.setattr("robench.studies.study.find", found)
    assert run(["demo", "--out", str(complete)]) == 0
    assert asked == ["demo"]
    printed = capsys.readouterr().out
    assert "row = source" in printed
    assert "whitebox: accuracy in %" in printed
    assert "blackbox: accuracy in %" in printed
    assert str(complete / "report" / "fig4_accuracy.pdf") in printed.splitlines()


def test_the_report_and_the_rows_are_there(complete: Path, study: Path) -> None:
    report = {path.name for path in (complete / "report").iterdir()}
    assert {"report.html", "study.md", "summary.json", "fig1_regions.pdf", "fig3_transferability.pdf",
            "fig4_accuracy.pdf", "figA_distillation.pdf", "table4_blackbox.csv"} <= report  # fmt: skip
    rows = small.rows(complete)
    assert set(rows["threat"]) == {"clean", "transfer", "whitebox", "blackbox"}
    # The runs of the axis are in its own figure, and in no other.
    main = set(planned(study).main)
    axis = pd.read_csv(complete / "report" / "figA_distillation.csv")
    assert sorted(axis["setting"].unique()) == [1, 2]
    drawn = json.loads((complete / "report" / "fig4_accuracy.provenance.json").read_text())
    assert set(drawn["weights"]) == main < set(rows["target"])
    assert "Incomplete" not in (complete / "report" / "study.md").read_text()
    assert "diversity" in (complete / "report" / "study.md").read_text()


def test_rows_are_those_of_the_eval_command(complete: Path, study: Path, tmp_path: Path) -> None:
    """The runs of the study, judged again by the words of `robench eval`: every cell has the same key and rows."""
    shutil.copytree(complete / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("outcomes", ".*"))
    plan = planned(study)
    session = Session(Runs(tmp_path / "runs"), plan.data, Settings(batch_size=16), samples=8)
    main = [session.store.get(name) for name in plan.main]
    surrogates = session.train(
        session.surrogate_tasks((1, 2), "baseline", models=["resnet8"], overrides={"epochs": 8, "batch_size": 16})
    )
    black = words.attacks("blackbox", ["pgd", "mdi2"], ["ce"], 1)
    session.blackbox(main, surrogates, eps=(0.3,), attacks=black, restarts=1)
    session.transfer(main, eps=(0.3,), attacks=words.attacks("transfer", steps=1), restarts=1)
    session.whitebox(main, eps=(0.1, 0.3), attacks=words.attacks("whitebox", steps=2), restarts=2)
    theirs = small.rows(complete)
    theirs = theirs[theirs["target"].isin(plan.main)].reset_index(drop=True)
    pd.testing.assert_frame_equal(small.rows(tmp_path), theirs)


def test_again_it_does_nothing(complete: Path, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in complete.rglob("*")}
    assert run(["run", str(study), "--out", str(complete)]) == 0
    assert "nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in complete.rglob("*")} == before


def test_what_is_lost_is_done_again_and_nothing_else(
    complete: Path, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    name = planned(study).main[1]
    shutil.rmtree(out / "runs" / name / "outcomes")
    assert run(["status", str(study), "--out", str(out)]) == 0
    left = capsys.readouterr().out.splitlines()[3]
    assert run(["run", str(study), "--out", str(out), "--workers", "1"]) == 0
    done = capsys.readouterr().err.splitlines()
    # Three threats of this run and the report; the cells are those of before, so that the report stands in the end.
    assert left.split() == ["left", "4"]
    assert sorted(line.split("] ")[1].split(":")[0] for line in done) == [
        f"{threat} of {name}" for threat in ("blackbox", "transfer", "whitebox")
    ]
    pd.testing.assert_frame_equal(small.rows(out), small.rows(complete))


def test_two_processes_with_one_killed_give_the_same_rows(
    complete: Path, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    killed: list[int] = []
    killer = threading.Thread(target=small.kill_a_training, args=(out, killed))
    killer.start()
    assert run(["run", str(study), "--out", str(out), "--workers", "2", "--device", "cpu"]) == 0
    killer.join()
    assert len(killed) == 1
    assert "a worker died during train" in capsys.readouterr().err
    pd.testing.assert_frame_equal(small.rows(out), small.rows(complete))


def children(pid: int) -> list[int]:
    """Processes that ``pid`` began and that run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = entry.read_text().rpartition(")")
        except OSError:  # gone meanwhile
            continue
        state, parent = rest.split()[:2]
        if int(parent) == pid and state != "Z":
            found.append(int(name.split()[0]))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_no_worker_outlives_a_killed_parent(seconds: float, study: Path, tmp_path: Path) -> None:
    """Killed as soon as it has begun its workers, and in the first seconds of a task."""
    command = [sys.executable, "-m", "robench", "run", str(study), "--out", str(tmp_path / "out"), "--workers", "2"]
    parent = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while len(children(parent.pid)) < 2 and time.monotonic() - began < 60 and parent.poll() is None:
        time.sleep(0.02)
    time.sleep(seconds)
    workers = children(parent.pid)
    assert len(workers) >= 2
    parent.kill()
    parent.wait()
    began = time.monotonic()
    while left := [pid for pid in workers if running(pid)]:
        assert time.monotonic() - began < 60, f"{left} go on"
        time.sleep(0.2)


def test_there_is_a_worker_for_every_gpu_or_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert (command._workers("auto"), command._workers("cuda:1")) == (2, 1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert command._workers("auto") == len(os.sched_getaffinity(0))


class Script:
    """An engine that answers as told, and notes who asked."""

    def __init__(self, slots: int = 2, clock: dict[str, float] | None = None, **answers: list[Any]) -> None:
        self.slots, self.answers, self.asked = slots, answers, list[str]()
        self.clock = clock or {}

    def submit(self, call: tuple[Any, ...]) -> Future[dict[str, Any]]:
        (title,) = call
        self.asked.append(title)
        for start, replies in self.answers.items():
            if title.startswith(start) and replies:
                reply = replies.pop(0)
                break
        else:
            reply = {"state": "done", "seconds": self.clock.get(title, 1.0)}
        future: Future[dict[str, Any]] = Future()
        if isinstance(reply, Exception):
            future.set_exception(reply)
        else:
            future.set_result(reply)
        return future


def scripted(study: Path, tmp_path: Path, script: Script, **options: Any) -> tuple[Plan, engines.RunResult]:
    plan = planned(study)
    status = StudyStatus(plan, StudyFolder(tmp_path))
    return plan, engines.run(plan, status, script, lambda key: (plan.steps[key].title,), **options)


def test_a_failure_stops_those_alone_that_need_it(study: Path, tmp_path: Path, told: list[str]) -> None:
    failure = {"state": "failed", "error": "the disk is full", "seconds": 1.0}
    script = Script(transfer=[failure])
    plan, result = scripted(study, tmp_path, script)
    (failed,) = result.failed
    assert plan.steps[failed].threat == "transfer"
    assert [plan.steps[key].kind for key in result.left] == ["report"]
    assert len(result.done) == len(plan.steps) - 2
    assert f"failed: {plan.steps[failed].title}" in told
    assert result.failed[failed] == "the disk is full"


def test_whose_worker_dies_is_tried_three_times(study: Path, tmp_path: Path) -> None:
    plan, result = scripted(study, tmp_path, Script(whitebox=[BrokenProcessPool()] * 2))
    assert result.done == set(plan.steps)
    plan, result = scripted(study, tmp_path, Script(whitebox=[BrokenProcessPool()] * 20))
    assert {plan.steps[key].threat for key in result.failed} == {"whitebox"}
    assert set(result.failed.values()) == {"its worker died 3 times"}


def test_nothing_is_begun_that_would_end_after_the_budget(study: Path, tmp_path: Path) -> None:
    plan = planned(study)
    costs = sorted(step.passes for step in plan.steps.values() if step.kind == "train")
    limit = costs[len(costs) // 2]
    # A second per pass, in which the script does its tasks; its clock stands still.
    script = Script(slots=1, clock={step.title: step.passes for step in plan.steps.values()})
    _, result = scripted(study, tmp_path, script, budget=limit + 0.5, pace=Pace(1.0, 1.0))
    begun = {step.passes for step in plan.steps.values() if step.title in script.asked}
    assert 0 < max(begun) <= limit
    # Twice as slow as was thought: a task of half the limit may be begun first, none of more than half later.
    script = Script(slots=1, clock={step.title: 2 * step.passes for step in plan.steps.values()})
    scripted(study, tmp_path, script, budget=limit + 0.5, pace=Pace(1.0, 1.0))
    begun_late = [step.passes for title in script.asked[1:] for step in plan.steps.values() if step.title == title]
    assert max(begun_late) <= limit / 2
    assert "beyond the budget" in result.left.values()
    assert not result.failed
    assert scripted(study, tmp_path, Script(slots=1), budget=1e9, pace=Pace(1.0, 1.0))[1].left == {}


def test_only_what_was_asked_for(study: Path, tmp_path: Path) -> None:
    plan, result = scripted(study, tmp_path, Script(), only=("train",))
    assert {plan.steps[key].kind for key in result.done} == {"train"}
    plan, result = scripted(study, tmp_path, Script(), only=("craft", "judge"))
    assert result.done == set()
    assert "waits for what failed or is left" in result.left.values()


def test_a_task_that_fails_leaves_a_log_and_is_tried_again(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    name = copy.main[0]
    manifest = copy.out / "runs" / name / "manifest.json"
    good = manifest.read_text()
    write_record(manifest, {**read_record(manifest), "key": "f"})
    assert copy.again() == 1
    error = capsys.readouterr().err
    assert f"failed: train {name}: run {name!r} exists with other settings" in error
    log = Path(next(line for line in error.splitlines() if "log: " in line).rpartition("log: ")[2])
    assert "Traceback" in log.read_text()
    assert run(["status", str(copy.study), "--out", str(copy.out)]) == 0
    assert f"failed: train {name}" in capsys.readouterr().out
    manifest.write_text(good)
    assert copy.again() == 0


def test_a_report_of_an_incomplete_study_says_so(copy: Copy) -> None:
    lost = next(step for step in planned(copy.study).steps.values() if step.threat == "whitebox")
    (copy.out / "tasks" / f"{lost.key}.json").unlink()
    assert copy.again("--only", "report") == 0
    assert "Incomplete: 1 of the study's judgements" in copy.page
    assert copy.again() == 0
    assert "Incomplete" not in copy.page


def test_a_report_of_nothing_is_refused_before_it_computes_anything(
    copy: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("robench.studies.publish.decision_regions", lambda *args, **options: pytest.fail("computed"))
    for step in planned(copy.study).steps.values():
        if step.kind == "judge":
            (copy.out / "tasks" / f"{step.key}.json").unlink()
    assert copy.again("--only", "report") == 1
    error = capsys.readouterr().err
    assert "no judgement of this study is done" in error
    assert "--only eval" in error


def test_a_report_shows_what_was_asked_for_and_nothing_beside_it(copy: Copy) -> None:
    def summary() -> str:
        return (copy.out / "report" / "summary.json").read_text()

    first = summary()
    assert copy.again("--set", "samples=20", "--set", "threats.whitebox.steps=1") == 0
    assert summary() != first
    assert copy.again() == 0
    assert summary() == first
    assert copy.again("--set", 'title="Another title"') == 0
    assert "# Another title" in copy.page
    assert copy.again("--set", "track.transfer_eps=0.3") == 0
    assert "not tracked" in (copy.out / "report" / "report.html").read_text()


def test_a_report_on_lost_rows_says_so(copy: Copy, plain: Path) -> None:
    shutil.rmtree(copy.out / "runs" / copy.main[1] / "outcomes")
    assert copy.again("--only", "report") == 0
    assert "Incomplete: 1 of the study's judgements" in copy.page
    assert copy.again() == 0
    assert "Incomplete" not in copy.page
    pd.testing.assert_frame_equal(small.rows(copy.out), small.rows(plain / "out"))


def test_damaged_rows_and_cells_are_named_and_made_again(
    copy: Copy, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = next((copy.out / "runs" / copy.main[0] / "outcomes").glob("part-*.parquet"))
    cell = next((copy.out / "runs" / copy.main[1] / "outcomes" / "cells").iterdir())
    with part.open("ab") as file:
        file.write(b"x")
    cell.write_text("{")
    for asked in (["status"], ["run", "--dry-run"]):
        assert run([asked[0], str(copy.study), "--out", str(copy.out), *asked[1:]]) == 0
        assert f"{part} is damaged: its rows do not count here" in capsys.readouterr().err
        assert part.exists()
    assert copy.again() == 0
    pd.testing.assert_frame_equal(small.rows(copy.out), small.rows(plain / "out"))


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "gone"])
def test_a_damaged_report_is_drawn_again(copy: Copy, damage: str) -> None:
    path = copy.out / "report" / "summary.json"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:-9], "empty": b"", "flip": whole.replace(b"0", b"1", 1)}[damage])
    assert copy.again() == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "changes", [{"eps": 0.31}, {"threat": "blackbox"}, {"target": "other"}, {"defense": "adp"}, {"attack": "fgsm"}]
)
@pytest.mark.parametrize("signed", [True, False])
def test_a_cell_that_was_edited_changes_no_number(
    study: Path,
    complete: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    signed: bool,
) -> None:
    """Cells of before there were checksums are held against their recipes alone, which say nothing of names."""
    if not signed and not changes.keys() & {"eps", "threat"}:
        pytest.skip("an old cell's name is its own word")
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    name = planned(study).main[0]
    for path in (out / "runs" / name / "outcomes" / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        if cell["threat"] == "whitebox":
            if not signed:
                del cell["checksum"]
            path.write_text(json.dumps({**cell, **changes}))
    runs = ["--runs", str(out / "runs")]
    for asked in (["show", name], ["compare", name, planned(study).main[1], "--threat", "whitebox"], ["report"]):
        capsys.readouterr()
        assert run([*asked, *runs]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert "was changed after it was written" in line
        assert "cells/" in line


def test_rows_that_are_gone_are_told(
    study: Path, complete: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(complete, out)
    name = planned(study).main[0]
    for path in (out / "runs" / name / "outcomes").glob("part-*.parquet"):
        path.rename(path.with_suffix(".old"))
    assert run(["show", name, "--runs", str(out / "runs")]) == 0
    assert " is incomplete: " in capsys.readouterr().err


class Pool(Script):
    """Where the worker of one task dies, so do all others that run, as when a machine lacks memory."""

    def __init__(self, deadly: str) -> None:
        super().__init__(slots=4)
        self.deadly, self.begun = deadly, list[tuple[str, Future[dict[str, Any]]]]()

    def submit(self, call: tuple[Any, ...]) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        self.begun.append((call[0], future))
        if len(self.begun) == 1:
            threading.Timer(0.2, self.end).start()
        return future

    def end(self) -> None:
        begun, self.begun = self.begun, []
        died = any(title.startswith(self.deadly) for title, _ in begun)
        for _, future in begun:
            if died:
                future.set_exception(BrokenProcessPool())
            else:
                future.set_result({"state": "done", "seconds": 1.0})


def test_who_dies_takes_no_other_task_along(study: Path, tmp_path: Path) -> None:
    title = f"whitebox of {planned(study).main[1]}"
    plan, result = scripted(study, tmp_path, Pool(title))
    (failed,) = result.failed
    assert plan.steps[failed].title == title
    assert [plan.steps[key].kind for key in result.left] == ["report"]
    assert "its worker died 3 times" in StudyFolder(tmp_path).log(plan.steps[failed]).read_text()
    assert StudyStatus(plan, StudyFolder(tmp_path)).state(plan.steps[failed]) == "failed"


def test_wrong_options_end_in_one_line(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["run", "dmeo"], "did you mean demo"),
        (["run", "demo", "--budget", "2 weeks"], "--budget such as"),
        (["run", "demo", "--address", "x"], "only with --engine ray"),
        (["run", "demo", "--set", "sample=3"], "did you mean samples"),
        (["status", "demo", "--set", "samples"], "KEY=VALUE"),
        (["status", "demo", "--out", "nowhere"], "nowhere is no folder"),
        (["run", "demo", "--dry-run", "--device", "foo"], "device 'foo' is not available"),
    ):
        assert run(arguments) == 2, arguments
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(("lacking", "done"), [(2, True), (3, False)])
def test_a_task_that_lacked_memory_beside_others_is_begun_again(
    study: Path, tmp_path: Path, lacking: int, done: bool
) -> None:
    plan = planned(study)
    first = next(step.key for step in plan.steps.values() if not step.needs)
    begun: list[str] = []

    class Crowded:
        """Of the one task that has no memory at first; all others are done at once."""

        slots = 1

        def submit(self, call: tuple[Any, ...]) -> Future[dict[str, Any]]:
            begun.append(call[0])
            tight = call[0] == first and begun.count(first) <= lacking
            error = {"state": "failed", "error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"}
            future: Future[dict[str, Any]] = Future()
            future.set_result(error if tight else {"state": "done", "seconds": 0.1})
            return future

    result = engines.run(plan, StudyStatus(plan, StudyFolder(tmp_path / "out")), Crowded(), lambda key: (key,))
    assert begun.count(first) == 3
    assert (first in result.done) is done
    assert (first in result.failed) is not done
