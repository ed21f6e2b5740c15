"""A published result, tried again: random cells are crafted anew from their manifests and their rows compared."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from pydantic import InstanceOf

from robench.attacks import ATTACKS
from robench.core.data import Data, has_name, load
from robench.core.errors import RobenchError
from robench.core.files import content_key
from robench.evaluation.cells import Cell
from robench.evaluation.engine import Evaluator
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.findings import Finding
from robench.evaluation.outcomes import CELL_COLUMNS, ROW_COLUMNS, Outcomes
from robench.evaluation.schema import Count, Radii
from robench.evaluation.settings import Settings
from robench.evaluation.threats import BLACKBOX, Job, Threat
from robench.session import OUTCOMES, Session
from robench.store.runs import Run, Runs
from robench.studies.intact import SUMMARY, UNREADABLE, ResultFolder, guarded, summary

log = logging.getLogger(__name__)

#: Beyond this, a margin or a distance is another one: rounding moves margins by a few millionths.
CLOSE = 1e-4
_KEYS = ["member", "sample"]


class _Again(Threat):
    """One job of a threat."""

    name: ClassVar[str] = "again"
    clean: ClassVar[bool] = False

    job: InstanceOf[Job]
    restarts: Count = 1

    def jobs(self, target: EvaluatedModel) -> Iterator[Job]:
        yield self.job


class _Clean(Threat):
    """No attack at all."""

    name: ClassVar[str] = "whitebox"

    restarts: Count = 1
    eps: Radii = (1.0,)

    def jobs(self, target: EvaluatedModel) -> Iterator[Job]:
        yield from ()


def verify(
    result: Path,
    *,
    cells: int = 20,
    seed: int = 0,
    tolerance: float = 0.0,
    dataset: str | None = None,
    data_dir: str = "data",
    device: torch.device | None = None,
    only: Collection[str] | None = None,
) -> Iterator[Finding]:
    """Tries ``cells`` random cells again; nothing is written, and no code but registered plug-ins is imported.

    Cells of attacks whose images depend on their batch are left out: a cell alone makes other batches.

    Args:
        result: see `robench.studies.intact.ResultFolder.at`.
        seed: draws the cells.
        tolerance: share of a cell's rows that may differ; another machine, or a GPU, rounds otherwise.
        dataset: by default the one that each run was trained on.
        only: names of runs, by default all.

    Raises:
        RobenchError: there are no rows at all.
    """
    found = ResultFolder.at(result)
    store, kept = found.store, found.rows()
    told = [each for name, each in found.intact(kept) if name and each.status != "pass"] if only is None else []
    yield from told
    rows = {name: each.parts() for name, each in kept.items()}
    chosen = [(name, str(cell)) for name in (rows if only is None else only) for cell in rows[name]["cell"].unique()]
    if not chosen:
        return
    sessions: dict[str, Session] = {}
    if dataset is not None:
        sessions[dataset] = _session(store, dataset, data_dir, device)
        chosen = _of_data(store, chosen, sessions[dataset].data)
    chosen.sort(key=lambda pair: content_key([seed, *pair]))
    possible = _possible(store, chosen, cells)

    def tried(name: str, cell: str) -> Finding:
        run = store.get(name)
        own = rows[name][rows[name]["cell"] == cell]
        return _tried(sessions[dataset or run.dataset], run, cell, own, tolerance)

    for label in [] if dataset else _labels(store, {name for name, _ in possible}):
        sessions[label] = _session(store, label, data_dir, device)
    # What is wrong with a run is told once, and not of each of its cells.
    names = dict.fromkeys(name for name, _ in possible)
    broken = {name: guarded(f"{name} files", partial(_readable, store, name)) for name in names}
    yield from (each for each in broken.values() if each and each.evidence not in {one.evidence for one in told})
    for name, cell in possible:
        if broken[name] is None:
            yield guarded(f"{name} {cell}", partial(tried, name, cell))
    if only is None and (result / SUMMARY).exists():
        yield guarded(SUMMARY, lambda: summary(result, kept))


def _readable(store: Runs, name: str) -> None:
    """Refuses, as `Run.load` does and without its code, a run whose manifest or weights are not what was written."""
    store.get(name).tensors()


def _labels(store: Runs, names: Collection[str]) -> list[str]:
    """The data sets that these runs were trained on, sorted; RobenchError where one is not registered."""
    labels = set()
    for name in names:
        # Of a manifest that is damaged, the findings of its cells tell.
        with suppress(*UNREADABLE):
            labels.add(store.get(name).dataset)
    for label in sorted(labels):
        if not has_name(label):
            raise RobenchError(
                f"data set {label!r} is not a registered one; say where it is: --dataset; or take --files alone"
            )
    return sorted(labels)


def _session(store: Runs, dataset: str, data_dir: str, device: torch.device | None) -> Session:
    return Session(store, load(dataset, data_dir), Settings(device or torch.device("cpu")))


def _of_data(store: Runs, chosen: Sequence[tuple[str, str]], data: Data) -> list[tuple[str, str]]:
    """Those of ``chosen``, pairs of run and key, that were judged on ``data``; how many were not is told.

    Raises:
        RobenchError: there is none.
    """
    own = [pair for pair in chosen if _identity(store, *pair) in (data.identity, "")]
    if not own:
        raise RobenchError(f"nothing in {store.root} was judged on {data.label}; choose another --dataset")
    if left := len(chosen) - len(own):
        log.warning(f"{left} of {len(chosen)} cells were judged on other data than {data.label}, and are left out")
    return own


def _identity(store: Runs, name: str, key: str) -> str:
    """Of the data of a cell; nothing where it is damaged: its finding tells."""
    with suppress(*UNREADABLE):
        return _cell(store.get(name), key).data
    return ""


def _possible(store: Runs, chosen: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """The first ``count`` of these cells, pairs of run and key, whose images do not depend on their batch.

    Raises:
        RobenchError: there is none.
    """
    possible: list[tuple[str, str]] = []
    passed: set[str] = set()
    for name, key in chosen:
        if len(possible) == count:
            break
        if attack := _batch_dependent(store, name, key):
            passed.add(attack)
        else:
            possible.append((name, key))
    if passed:
        attacks = ", ".join(sorted(passed))
        log.warning(f"cells of {attacks} are left out: an image there depends on the others in its batch")
    if passed and not possible:
        raise RobenchError(f"no cell of {store.root} can be tried again: images of all depend on their batch")
    return possible


def _batch_dependent(store: Runs, name: str, key: str) -> str:
    """The attack of a cell whose images depend on their batch, by its own word and not by the manifest's; else nothing,
    as of a manifest that is damaged: its finding tells."""
    with suppress(*UNREADABLE):
        craft = _cell(store.get(name), key).craft
        attack = str(craft.attack["name"]) if craft else ""
        return attack if attack and ATTACKS.get(attack).batch_dependent else ""
    return ""


def _tried(session: Session, run: Run, key: str, rows: pd.DataFrame, tolerance: float) -> Finding:
    cell = _cell(run, key)
    what = f"{run.name} {cell.threat} {cell.attack} {cell.loss} ε {cell.eps:g} ({key})"
    again = _rows_again(session, run, cell, sorted(set(rows["sample"].tolist())))
    true = again.frame[list(CELL_COLUMNS)].iloc[0].to_dict()
    renamed = _renamed(session.store, cell, true)
    wrong = [name for name in CELL_COLUMNS if name not in renamed and getattr(cell, name) != true[name]]
    if wrong:
        told = getattr(cell, wrong[0])
        return Finding(what, "fail", f"its manifest says {wrong[0]} {told!r}, and it is {true[wrong[0]]!r}")
    both = rows.merge(again.frame, on=_KEYS, how="outer", suffixes=("", "_again"), indicator=True)
    if len(rows) != len(again.frame) or not (both["_merge"] == "both").all():
        return Finding(what, "fail", f"it has {len(rows)} rows, and {len(again.frame)} are made")
    differs = pd.Series(False, index=both.index)
    for name in (name for name in ROW_COLUMNS if name not in (*_KEYS, "cell")):
        apart = both[name] != both[f"{name}_again"]
        if name in ("margin", "linf"):
            apart = ~((both[name] - both[f"{name}_again"]).abs() <= CLOSE)
        differs |= apart
    share = float(differs.mean())
    if share > tolerance:
        first = both[differs].iloc[0]
        return Finding(
            what, "fail",
            f"{int(differs.sum())} of {len(both)} rows differ, such as sample {first['sample']} of {first['member']}: "
            f"margin {first['margin']:.4g}, again {first['margin_again']:.4g}",
        )  # fmt: skip
    since = "".join(f"; its {name} {true[name]} was called {getattr(cell, name)} then" for name in sorted(renamed))
    return Finding(what, "pass", f"{len(both)} rows, {int(differs.sum())} differ{since}")


def _renamed(store: Runs, cell: Cell, true: Mapping[Any, Any]) -> set[str]:
    """Which of target and surrogate, known by their weights, go by another name than a cell says. A surrogate's is what
    reports show, so that of another run that is here is a false one."""
    apart = {name for name in ("target", "surrogate") if getattr(cell, name) != true[name]}
    false = cell.threat not in BLACKBOX or cell.surrogate in store.names()
    return apart - {"surrogate"} if false else apart


def _rows_again(session: Session, run: Run, cell: Cell, samples: list[int]) -> Outcomes:
    """The rows of a cell, crafted anew in memory; RobenchError where it is not of this run or these data."""
    target = session.load(run)
    if cell.identity != target.identity:
        raise RobenchError(f"cell {cell.key} is of other weights than run {run.name!r} has")
    if cell.data != session.data.identity:
        raise RobenchError(f"cell {cell.key} was judged on other data than {session.data.name!r}; name it: --dataset")
    threat: Threat = _Clean(draws=max(cell.draws, 1))
    drawing: tuple[str, ...] = ()
    settings = Settings(session.settings.device, "float64" if cell.double else "float32")
    if cell.craft is not None:
        job = session.job(target, cell)
        threat = _Again(eps=(cell.eps,), attacks=(job.attack,), job=job, draws=job.draws)
        drawing = (cell.craft.source.partition("/")[0],) if cell.craft.draws else ()
        precision: Any = cell.craft.precision
        settings = Settings(session.settings.device, precision, cell.craft.batch, cell.craft.seed)
    outcomes = Evaluator(session.data, settings, drawing=drawing).run([target], threat, torch.tensor(samples))
    if set(outcomes.frame["cell"]) != {cell.key}:
        raise RobenchError(f"cell {cell.key} is not what its manifest says, or a plug-in has another version")
    return outcomes


def _cell(run: Run, key: str) -> Cell:
    return Cell.read(run.folder / OUTCOMES, key)
