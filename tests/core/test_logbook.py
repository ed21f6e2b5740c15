"""`--log-to`: every step once, whatever interrupts it; another package adds its own log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest

from robench.core import logbook, registry
from robench.core.errors import RobenchError
from robench.core.logbook import LOGS, flat, opened

ENTRIES = [{"epoch": n, "lr": 0.1 / n, "terms": {"ce": 1.0 / n}, "note": "text", "flag": True} for n in (1, 2, 3)]
WANTED = [{"step": n, "epoch": float(n), "lr": 0.1 / n, "terms/ce": 1.0 / n} for n in (1, 2, 3)]


def lines(run: Path, part: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log" / "jsonl" / part / "log.jsonl").read_text().splitlines()]


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "log" / "tensorboard" / "train")).Reload()
    return {name: [(each.step, each.value) for each in found.Scalars(name)] for name in found.Tags()["scalars"]}


def mlflow_steps(run: Path) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'log/mlflow/train/mlflow.db'}")
    experiment = client.get_experiment_by_name("robench")
    assert experiment is not None
    (made,) = client.search_runs([experiment.experiment_id])
    return {
        name: [(each.step, each.value) for each in client.get_metric_history(made.info.run_id, name)]
        for name in made.data.metrics
    }


def grow(run: Path, kinds: list[str]) -> None:
    """Three epochs, with a process that ends after each, and one that has seen them all already."""
    for until in (1, 2, 3, 3):
        with opened(kinds, run, "train", {"seed": 0}) as book:
            book.history(ENTRIES[:until])


def test_numbers_alone_are_logged() -> None:
    assert flat(ENTRIES[0]) == {"epoch": 1.0, "lr": 0.1, "terms/ce": 1.0}


def test_each_step_is_logged_once_as_lines(tmp_path: Path) -> None:
    grow(tmp_path, ["jsonl"])
    assert lines(tmp_path) == WANTED


def test_each_step_is_logged_once_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    grow(tmp_path, ["tensorboard", "jsonl"])
    found = scalars(tmp_path)
    assert found.keys() == {"epoch", "lr", "terms/ce"}
    assert [step for step, _ in found["lr"]] == [1, 2, 3]
    assert [value for _, value in found["terms/ce"]] == pytest.approx([1, 1 / 2, 1 / 3])
    assert len(lines(tmp_path)) == 3


def test_each_step_is_logged_once_for_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    grow(tmp_path, ["mlflow"])
    assert mlflow_steps(tmp_path)["terms/ce"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    grow(tmp_path, ["wandb"])
    assert list((tmp_path / "log" / "wandb" / "train").rglob("*.wandb"))


class Stand:
    """As much of a package's API as is asked for; two processes find the same."""

    kept: ClassVar[dict[str, list[tuple[int, dict[str, float]]]]] = {}

    def __init__(self, **options: Any) -> None:
        self.name = options["id"]
        self.kept.setdefault(self.name, [])
        assert (options["resume"], options["config"]) == ("allow", {"seed": 0})
        assert Path(options["dir"]).is_dir()

    def log(self, values: dict[str, float], step: int) -> None:
        self.kept[self.name].append((step, values))

    def finish(self) -> None:
        pass


def test_wandb_gets_each_step_once_under_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type("wandb", (), {"init": Stand})
    monkeypatch.setattr(logbook, "import_module", lambda name: module)
    monkeypatch.setattr(Stand, "kept", {})
    grow(tmp_path, ["wandb"])
    (steps,) = Stand.kept.values()
    assert steps == [(line["step"], {key: line[key] for key in line if key != "step"}) for line in WANTED]


def test_a_step_of_a_process_that_was_killed_at_once_is_forgotten(tmp_path: Path) -> None:
    grow(tmp_path, ["jsonl"])
    path = tmp_path / "log" / "jsonl" / "train" / "log.jsonl"
    # Written, and the record of it not yet; half of a line too.
    path.write_text(path.read_text() + '{"step": 4, "lr": 9}\n{"st')
    with opened(["jsonl"], tmp_path, "train", {}) as book:
        book.history([*ENTRIES, {"lr": 0.5}])
    assert lines(tmp_path) == [*WANTED, {"step": 4, "lr": 0.5}]


def test_a_result_is_logged_once(tmp_path: Path) -> None:
    for values in ({"clean/accuracy": 0.5}, {"clean/accuracy": 0.5}, {"clean/accuracy": 0.6}, {"clean/accuracy": 0.5}):
        with opened(["jsonl"], tmp_path, "eval", {}) as book:
            book.result(values)
    assert lines(tmp_path, "eval") == [{"step": 1, "clean/accuracy": 0.5}, {"step": 2, "clean/accuracy": 0.6}]


def test_no_kind_writes_nothing(tmp_path: Path) -> None:
    with opened([], tmp_path, "train", {}) as book:
        book.history(ENTRIES)
    assert list(tmp_path.iterdir()) == []


def test_what_is_unknown_or_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RobenchError, match="unknown log 'jsonnl'; did you mean jsonl"):
        logbook.require(["jsonl", "jsonnl"])

    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(logbook, "import_module", absent)
    with pytest.raises(RobenchError, match=r"--log-to wandb needs its package.*pip install robench\[wandb\]"):
        logbook.require(["wandb"])
    assert list(tmp_path.iterdir()) == []


class Own:
    """What a package of one's own has."""

    steps: ClassVar[list[int]] = []

    def __init__(self, about: logbook.About) -> None:
        assert about.folder.is_dir()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)

    def close(self) -> None:
        self.steps.append(-1)


def test_another_package_adds_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("own", f"{__name__}:Own", "robench.logs")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "robench.logs" else [])
    monkeypatch.setattr(LOGS, "_items", dict(LOGS._items))
    monkeypatch.setattr(LOGS, "_loaded", set())
    monkeypatch.setattr(Own, "steps", [])
    with opened(["own"], tmp_path, "train", {}) as book:
        book.history(ENTRIES)
    assert Own.steps == [1, 2, 3, -1]
