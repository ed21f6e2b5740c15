"""Verdicts: what targets say of clean and of adversarial images, as rows."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from robench.attacks import Attack, Crafted
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError, in_a_line, out_of_memory
from robench.core.threads import chunks, judging_batch
from robench.evaluation.cells import Cell
from robench.evaluation.crafter import Crafter, images_of, labels_of
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.outcomes import ENSEMBLE
from robench.evaluation.planning import Planner, Work
from robench.evaluation.predict import Indices, Predictions, predict
from robench.evaluation.rows import Rows
from robench.evaluation.sharing import Tally


class Judge:
    """Judges the images of units, and keeps the rows."""

    def __init__(self, planner: Planner, crafter: Crafter, tally: Tally) -> None:
        self._planner = planner
        self._crafter = crafter
        self._tally = tally
        self._data = planner.data
        self._rows = planner.rows
        self._settings = planner.settings
        self._doubles: dict[str, Ensemble] = {}

    def clean(self, target: EvaluatedModel, wanted: Indices, threat: str, draws: int) -> None:
        """Judges those of the images ``wanted`` that are not judged yet, clean."""
        pending = self._planner.not_judged(target, wanted, threat, draws)
        if not len(pending):
            return
        cell, rows = self._planner.clean_cell(target, draws), self._rows.of(target, threat)
        rows.declare(cell)
        parts = []
        for chunk in chunks(len(pending), judging_batch(self._data.numel, self._settings.batch_size)):
            samples = pending[chunk]
            images, labels = images_of(self._data, samples, self._settings), labels_of(self._data, samples)
            keys = self._keys(target, samples)
            try:
                verdict = predict(self._judge_of(target), images, labels, draws=cell.draws, samples=keys)
            except RobenchError:
                raise
            except Exception as error:  # whatever a user's module may raise
                if out_of_memory(error):
                    raise
                raise RobenchError(
                    f"{target.name} takes a few images and not {len(images)} at once ({in_a_line(error)}); "
                    f"evaluate with a smaller --batch-size"
                ) from error
            nothing = np.zeros(len(images))
            parts.append(_rows(cell, samples, labels, verdict, nothing, nothing, False))
        rows.append(pd.concat(parts, ignore_index=True))

    def pooled(self, work: Work) -> None:
        """All restarts, each on what still stands in some draw; a row says whether any succeeded, and which was the
        first, or of several draws the one that is survived in the fewest."""
        samples, eps = work.pairs
        job, target, draws = work.job, work.parts[0].target, work.parts[0].cell.draws
        judge, labels = self._judge_of(target), labels_of(self._data, samples)
        count, judged = len(samples), (target.n if job.members_too else 0) + 1
        verdict = Predictions.empty(judged, count)
        restart_of = np.zeros((judged, count), dtype=np.int16)
        part_of = np.full(count, "", dtype=object)
        distance, flat = np.zeros((judged, count), dtype=np.float32), np.zeros((judged, count), dtype=bool)
        alive = np.arange(count)
        for restart in job.restarts:
            for chunk, crafted in self._crafter.batches(work, alive, restart):
                found = predict(
                    judge, crafted.images, labels[chunk],
                    members=job.members_too, draws=draws, samples=self._keys(target, samples[chunk]),
                )  # fmt: skip
                update = verdict.correct[:, chunk] | (found.expected < verdict.expected[:, chunk])
                for mine, theirs in zip(verdict.arrays(), found.arrays(), strict=True):
                    mine[:, chunk] = np.where(update, theirs, mine[:, chunk])
                restart_of[:, chunk] = np.where(update, restart, restart_of[:, chunk])
                part_of[chunk] = np.where(update[-1] & ~found.correct[-1], _parts(job.attack, crafted), part_of[chunk])
                distance[:, chunk] = np.where(update, crafted.linf.cpu().numpy(), distance[:, chunk])
                flat[:, chunk] = np.where(update, crafted.zero_gradient.cpu().numpy(), flat[:, chunk])
                self._tally.advance(len(chunk), work)
            fallen = alive[(verdict.expected[:, alive] == 0).all(axis=0)]
            left = len(job.restarts) - 1 - job.restarts.index(restart)
            self._tally.advance(len(fallen) * left, work)
            alive = alive[(verdict.expected[:, alive] > 0).any(axis=0)]
            if not len(alive):
                break
        frames = []
        for part in work.parts:
            at = np.flatnonzero((eps == part.cell.eps) & np.isin(samples, part.samples))
            if len(at):
                rest = distance[:, at], flat[:, at], restart_of[:, at], part_of[at]
                frames.append(_rows(part.cell, samples[at], labels[at], verdict.at(at), *rest))
        self._rows.of(target, work.job.threat).append(pd.concat(frames, ignore_index=True))

    def version(self, work: Work) -> None:
        """One version of every image, judged by all targets that lack it."""
        samples, eps = work.pairs
        (restart,) = work.job.restarts
        made: dict[Rows, list[pd.DataFrame]] = {}
        targets = {part.target.name: part.target for part in work.parts}
        for chunk, crafted in self._crafter.batches(work, np.arange(len(samples)), restart):
            for name, target in targets.items():
                parts = [part for part in work.parts if part.target.name == name]
                order = np.concatenate(
                    [
                        np.flatnonzero((eps[chunk] == part.cell.eps) & np.isin(samples[chunk], part.samples))
                        for part in parts
                    ]
                )
                if not len(order):
                    continue
                at = torch.from_numpy(order).to(crafted.images.device)
                judged, radii = samples[chunk][order], eps[chunk][order]
                labels = labels_of(self._data, judged)
                judge, draws = self._judge_of(target), parts[0].cell.draws
                verdict = predict(judge, crafted.images[at], labels, draws=draws, samples=self._keys(target, judged))
                distance, flat = crafted.linf[at].cpu().numpy(), crafted.zero_gradient[at].cpu().numpy()
                for part in parts:
                    own = np.flatnonzero(radii == part.cell.eps)
                    found = verdict.at(own), distance[own], flat[own], restart
                    made.setdefault(self._rows.of(target, part.cell.threat), []).append(
                        _rows(part.cell, judged[own], labels[own], *found)
                    )
            self._tally.advance(len(chunk), work)
        for rows, frames in made.items():
            rows.append(pd.concat(frames, ignore_index=True))

    def _judge_of(self, target: EvaluatedModel) -> Ensemble:
        """The original weights, in the dtype of verdicts."""
        if self._settings.precision != "float64":
            return target.ensemble
        if target.name not in self._doubles:
            self._doubles[target.name] = copy.deepcopy(target.ensemble).double()
        return self._doubles[target.name]

    def _keys(self, target: EvaluatedModel, samples: Indices) -> Indices | None:
        """What the draws of ``target`` at inference are keyed by: ``samples``; None where it draws nothing."""
        return samples if target.identity in self._planner.drawing else None


def _rows(
    cell: Cell,
    samples: Indices,
    labels: Indices,
    verdict: Predictions,
    distance: npt.NDArray[Any],
    flat: npt.NDArray[Any],
    restart: Any,
    part: Any = "",
) -> pd.DataFrame:
    """Rows of each judge; ``part`` is what took the images of the last, which is the ensemble."""
    judges, count = verdict.correct.shape
    members = [*(str(i) for i in range(1, judges)), ENSEMBLE]
    shape = (judges, count)
    return pd.DataFrame(
        {
            "cell": cell.key,
            "sample": np.tile(samples, judges).astype(np.int32),
            "member": np.repeat(members, count),
            "restart": np.broadcast_to(restart, shape).ravel().astype(np.int16),
            "label": np.tile(labels, judges).astype(np.int16),
            "prediction": verdict.prediction.ravel(),
            "correct": verdict.correct.ravel(),
            "margin": verdict.margin.ravel(),
            "linf": np.broadcast_to(distance, shape).ravel().astype(np.float32),
            "zero_gradient": np.broadcast_to(flat, shape).ravel().astype(bool),
            "part": pd.Series([""] * (judges - 1) * count + np.broadcast_to(part, count).tolist(), dtype="str"),
            "expected": verdict.expected.ravel(),
            "draws": np.full(judges * count, max(cell.draws, 1), dtype=np.int16),
        }
    )


def _parts(attack: Attack, crafted: Crafted) -> npt.NDArray[np.object_]:
    """The name of the part that took each image, (B,); empty where there is none."""
    names = [f"{part.label} {part.loss}" for part in attack.parts(crafted.outputs.shape[1])]
    if not names:  # and nothing is asked of the device
        return np.full(len(crafted.part), "", dtype=object)
    found: npt.NDArray[np.object_] = np.array([*names, ""], dtype=object)[crafted.part.cpu().numpy()]
    return found
