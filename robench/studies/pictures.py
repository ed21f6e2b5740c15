"""The images behind stored rows: from the cache, or crafted again."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from robench.core.errors import RobenchError
from robench.core.fast import Precision, attackable, crafting_dtype
from robench.core.frozen import full_float32
from robench.core.threads import fitting_batch, fitting_threads
from robench.evaluation.cells import Cell
from robench.evaluation.craft import craft
from robench.evaluation.evaluated import EvaluatedModel
from robench.evaluation.images import Images
from robench.evaluation.outcomes import ENSEMBLE, Outcomes
from robench.evaluation.predict import classes
from robench.reports.pictures import Picture, choose
from robench.session import CRAFTED, Session
from robench.store.runs import Run

log = logging.getLogger(__name__)


def pictures(session: Session, outcomes: Outcomes, runs: Sequence[Run], count: int) -> list[Picture]:
    """At most ``count`` images that fell, see `robench.reports.pictures.choose`; what is left out is told.

    An image that no cache has is crafted again, which gives the same one up to rounding. All are judged again, and
    shown only where the prediction is that of the row.

    Args:
        outcomes: rows of ``runs`` on the data of ``session``.
    """
    rows = choose(outcomes.frame, count)
    cells, cache = outcomes.cells, Images(session.store.root / CRAFTED)
    # What one call of an attack gives, whatever its ε values; one target judges it.
    same = rows["cell"].map({key: cells[key].attacked.at_any_eps for key in rows["cell"].unique()})
    numel = session.data.numel
    size = fitting_batch(session.settings.device, numel, session.settings.batch_size)
    groups = [
        part.iloc[start : start + size]
        for _, part in rows.groupby([same, "target", "restart"], sort=False)
        for start in range(0, len(part), size)
    ]
    found: dict[int, Picture] = {}
    left_out: Counter[str] = Counter()
    with session.bar() as progress, fitting_threads(session.settings.device, size * numel):
        for done, part in enumerate(groups):
            progress(done, len(groups), "pictures")
            try:
                found |= _seen(session, part, [cells[cell] for cell in part["cell"]], cache)
            except RobenchError as error:
                left_out[str(error)] += len(part)
    missing = len(rows) - len(found) - left_out.total()
    if missing:
        left_out["made again here, they get another prediction than their rows have (other hardware?)"] = missing
    for reason, number in left_out.items():
        log.warning(f"{number} of {len(rows)} pictures left out: {reason}")
    return [found[row] for row in range(len(rows)) if row in found]


def _seen(session: Session, rows: pd.DataFrame, cells: Sequence[Cell], cache: Images) -> dict[int, Picture]:
    """By index of ``rows``, those whose image still gets the prediction that they have."""
    target = session.load(session.store.get(str(rows["target"].iloc[0])))
    if cells[0].identity != target.identity:
        raise RobenchError(f"the weights of run {target.name!r} are no longer those that were judged")
    precision = cast(Precision, cells[0].attacked.precision)
    pixels = session.data.test.images[torch.from_numpy(rows["sample"].to_numpy(np.int64))].to(session.settings.device)
    clean = pixels.to(crafting_dtype(precision)) / 255
    images = _cached(rows, cells, clean, cache)
    if images is None:
        images = _crafted(session, target, rows, cells[0], clean)
    judge = copy.deepcopy(target.ensemble).double() if precision == "float64" else target.ensemble
    predictions = classes(judge, images, members=True).cpu()
    places = [target.n if member == ENSEMBLE else int(member) - 1 for member in rows["member"]]
    right = predictions[places, range(len(rows))].numpy() == rows["prediction"].to_numpy()
    shown = [part.float().cpu().numpy() for part in (clean, images)]
    found: dict[int, Picture] = {}
    for at, (index, row) in enumerate(zip(rows.index, rows.to_dict("records"), strict=True)):
        if right[at]:
            key = (row["cell"], row["member"], int(row["sample"]))
            found[int(index)] = Picture(*key, shown[0][at], shown[1][at], _caption(row, session.data.classes))
    return found


def _cached(rows: pd.DataFrame, cells: Sequence[Cell], clean: Tensor, cache: Images) -> Tensor | None:
    """The images, (B,C,H,W), where the cache has all of them."""
    samples = rows["sample"].to_numpy(np.int64)
    if not all(sample in cache.kept(cell.attacked) for sample, cell in zip(samples.tolist(), cells, strict=True)):
        return None
    loaded = [
        cache.load(cell.attacked, samples[at : at + 1], clean[at : at + 1]).images for at, cell in enumerate(cells)
    ]
    return torch.cat(loaded)


def _crafted(session: Session, target: EvaluatedModel, rows: pd.DataFrame, cell: Cell, clean: Tensor) -> Tensor:
    """The images, (B,C,H,W), crafted as one of their cells says."""
    made = cell.attacked
    if made.batch is not None:
        raise RobenchError(f"images of {cell.attack} depend on the batch that they were crafted in")
    job, precision = session.job(target, cell), cast(Precision, made.precision)
    with full_float32():
        model = attackable(job.source, clean[:1], precision)
    labels, samples = (rows[name].to_numpy(np.int64) for name in ("label", "sample"))
    eps, restart = rows["eps"].to_numpy(np.float64), int(rows["restart"].iloc[0])
    how = {"seed": made.seed, "restart": restart, "draws": made.draws}
    return craft(model, job.attack, clean, labels, samples, eps, **how).images


def _caption(row: Mapping[Any, Any], classes: Sequence[str]) -> str:
    judge = "" if row["member"] == ENSEMBLE else f", seen by member {row['member']}"
    source = f"member {row['surrogate']}" if row["threat"] == "transfer" else row["surrogate"]
    return (
        f"sample {row['sample']}, ε {row['eps']:g}: {classes[row['label']]} → {classes[row['prediction']]}{judge}\n"
        f"{row['attack']} {row['loss']}, restart {row['restart']}" + (f", crafted on {source}" if source else "")
    )
