"""Two ensembles, or two defenses, judged on the same images under the same versions of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from robench.core.errors import RobenchError, unknown
from robench.evaluation.findings import Finding
from robench.evaluation.outcomes import ENSEMBLE, Outcomes, robust, wilson
from robench.evaluation.statistics import (
    LEVEL,
    accuracy_interval,
    bootstrap_difference,
    difference_over_seeds,
    holm,
    mcnemar,
)
from robench.evaluation.threats import ATTACK_BY_ATTACK
from robench.evaluation.words import radius, steps
from robench.store.runs import Run

log = logging.getLogger(__name__)

#: Trainings of each that a claim about defenses, not ensembles, rests on.
SEEDS = 3
NO_DIFFERENCE = "not significant"


@dataclass(frozen=True)
class Measured:
    """What was measured on one ensemble.

    Attributes:
        frame: rows on the whole ensemble, as `Outcomes.frame` has them, their ``version`` and their ``data``.
    """

    name: str
    frame: pd.DataFrame

    @classmethod
    def of(cls, name: str, outcomes: Outcomes) -> Measured:
        """Rows with their cells.

        Raises:
            RobenchError: rows of several models under one name.
        """
        frame = outcomes.where(member=ENSEMBLE).frame
        cells = {key: outcomes.cells[key] for key in frame["cell"].unique()}
        if len({cell.identity for cell in cells.values()}) > 1:
            raise RobenchError(
                f"the rows of {name!r} are of several models, since its weights were replaced; remove its folder "
                f"`outcomes` and run robench eval {name} again"
            )
        about = {name: {key: getattr(cell, name) for key, cell in cells.items()} for name in ("version", "data")}
        return cls(name, frame.assign(**{column: frame["cell"].map(values) for column, values in about.items()}))


@dataclass(frozen=True)
class _Point:
    """Verdicts at one ε, of a threat that judges every attack by itself under one attack, on common images and
    versions: (S,M) and (T,M)."""

    eps: float
    attack: str
    versions: int
    first: npt.NDArray[np.bool_]
    second: npt.NDArray[np.bool_]


def compare(first: Measured, second: Measured, threat: str, eps: Sequence[float] = ()) -> list[dict[str, Any]]:
    """Two ensembles on the images, ε and versions of images that both were judged on; one object per ε,
    and per attack where the threat is judged so.

    Args:
        threat: clean, whitebox, blackbox, queries or convergence.
        eps: all that both have by default.

    Returns:
        Objects with a, b, threat, eps, attack (under queries and convergence), samples, versions; accuracy_a, low_a,
        high_a and the same of b (Wilson); difference a − b, low, high (bootstrap over images); p (McNemar, exact),
        p_adjusted (Holm, over this table) and verdict, which names the better one, or is ``not significant``.

    Raises:
        RobenchError: nothing in common.
    """
    points = _common([first], [second], threat, eps)
    rows = []
    for point in points:
        one, other = point.first[0], point.second[0]
        rows.append(
            {
                **_head(first.name, second.name, threat, point),
                **_accuracy("a", float(one.mean()), *wilson(int(one.sum()), one.size)),
                **_accuracy("b", float(other.mean()), *wilson(int(other.sum()), other.size)),
                "difference": float(one.mean() - other.mean()),
                **dict(zip(("low", "high"), bootstrap_difference(one, other), strict=True)),
                "p": mcnemar(one, other),
            }
        )
    return _judged(rows)


def compare_defenses(
    first: tuple[str, Sequence[Measured]],
    second: tuple[str, Sequence[Measured]],
    threat: str,
    eps: Sequence[float] = (),
) -> list[dict[str, Any]]:
    """Two defenses over their training seeds: each a name and at least three ensembles.

    Returns:
        As `compare`, but accuracies are means over seeds with `accuracy_interval`, and sd_a, sd_b, seeds_a,
        seeds_b; the difference's interval and p are over seeds and images (`difference_over_seeds`), low_images and
        high_images over images alone (bootstrap).

    Raises:
        RobenchError: fewer seeds, or nothing in common.
    """
    for name, ensembles in (first, second):
        if len(ensembles) < SEEDS:
            raise RobenchError(
                f"a claim about defenses needs at least {SEEDS} seeds of each, and {name} has {len(ensembles)} "
                f"({', '.join(each.name for each in ensembles)}); robench train with another --seed, or compare two "
                f"ensembles without --defenses"
            )
    rows = []
    for point in _common(first[1], second[1], threat, eps):
        value, low, high, p = difference_over_seeds(point.first, point.second)
        row = _head(first[0], second[0], threat, point)
        for which, verdicts in (("a", point.first), ("b", point.second)):
            by_seed = verdicts.mean(axis=1)
            row |= _accuracy(which, float(by_seed.mean()), *accuracy_interval(verdicts))
            row |= {f"sd_{which}": float(by_seed.std(ddof=1)), f"seeds_{which}": len(by_seed)}
        row |= {"difference": value, "low": low, "high": high}
        row |= dict(zip(("low_images", "high_images"), bootstrap_difference(point.first, point.second), strict=True))
        rows.append({**row, "p": p})
    return _judged(rows)


def trained_alike(first: Run, second: Run) -> Finding:
    """Whether two runs differ in their defense alone: else a difference of accuracies may be of something else."""
    one, other = first.training, second.training
    untold = [run.name for run in (first, second) if not run.manifest.get("recipe")]
    names = one.keys() & other.keys() if untold else one.keys() | other.keys()
    apart = [
        f"{name} {one.get(name)} and {other.get(name)}"
        for name in dict.fromkeys([*one, *other])
        if name in names and one.get(name) != other.get(name)
    ]
    apart += [f"how {name} was trained is not known" for name in untold]
    if not apart:
        return Finding(
            "trained alike", "pass", f"{first.name} and {second.name}: the same data, members, seed, start and recipe"
        )
    fix = f"not the defense alone sets {first.name} and {second.name} apart: say so, or train both alike"
    return Finding("trained alike", "warn", "; ".join(apart), fix)


def of_defense(runs: Sequence[Run], defense: str, n: int | None = None) -> list[Run]:
    """The target runs of a defense that differ in their seed alone, by seed.

    Raises:
        RobenchError: none; several sizes, settings or data sets; two runs of one seed.
    """
    own = [run for run in runs if run.role == "target" and run.defense == defense]
    if not own:
        raise unknown("defense among target runs", defense, {run.defense for run in runs if run.role == "target"})
    chosen = sorted((run for run in own if n in (None, run.n)), key=lambda run: run.seed)
    sizes = sorted({run.n for run in chosen or own})
    if len(sizes) > 1 or not chosen:
        raise RobenchError(f"runs of {defense} have {', '.join(map(str, sizes))} members; choose with --n")
    for run in chosen[1:]:
        for what in ("defense", "recipe", "data", "members", "rule"):
            if run.manifest.get(what) != chosen[0].manifest.get(what):
                raise RobenchError(
                    f"runs {chosen[0].name} and {run.name} of {defense} differ in `{what}`, not in the seed alone; "
                    f"keep the others under another --runs"
                )
    for one, other in pairwise(chosen):
        if one.seed == other.seed:
            raise RobenchError(
                f"runs {one.name} and {other.name} of {defense} have seed {one.seed} both; "
                f"keep one of them under another --runs"
            )
    return chosen


def _common(first: Sequence[Measured], second: Sequence[Measured], threat: str, eps: Sequence[float]) -> list[_Point]:
    """What all ensembles have in common; what some have beyond it is said."""
    everyone = [*first, *second]
    twice = {each.name for each in first} & {each.name for each in second}
    if twice:
        raise RobenchError(f"expected two different sides of a comparison, got {min(twice)!r} on both")
    frames = [each.frame[each.frame["threat"] == threat] for each in everyone]
    names = " ".join(each.name for each in everyone)
    how = f"robench eval {{}} --threat {'whitebox' if threat == 'clean' else threat}"
    for each, frame in zip(everyone, frames, strict=True):
        if frame.empty:
            raise RobenchError(f"no {threat} rows of {each.name!r}; {how.format(each.name)}")
        absent = sorted(set(eps) - set(frame["eps"]))
        if absent:
            at = radius(absent[0])
            raise RobenchError(f"no {threat} rows of {each.name!r} at ε {at}; {how.format(each.name)} --eps {at}")
    data = sorted(set.intersection(*(set(frame["data"]) for frame in frames)))
    if len(data) > 1:  # of which an index is another image in each
        raise RobenchError(
            f"{names.replace(' ', ', ')} were judged on several data sets, {', '.join(data)}; choose one with --dataset"
        )
    radii = sorted(set(eps) or set.intersection(*(set(frame["eps"]) for frame in frames)))
    if not radii:
        raise RobenchError(f"{names.replace(' ', ', ')} share no ε under {threat}; {how.format(names)} --eps ...")
    points: list[_Point] = []
    told: dict[str, list[float]] = {}
    for point_eps, attack in product(radii, _attacks(frames, threat)):
        here = [
            frame[(frame["eps"] == point_eps) & (frame["attack"] == (attack or frame["attack"]))] for frame in frames
        ]
        versions = set.intersection(*(set(frame["version"]) for frame in here))
        shared = [frame[frame["version"].isin(versions)] for frame in here]
        samples = _everywhere(shared, len(versions))
        complete = [
            robust(frame[frame["sample"].isin(samples)], ["target"]).set_index("sample")["correct"] for frame in shared
        ]
        for each, frame in zip(everyone, here, strict=True):
            for text in _left_out(each.name, frame, versions, samples):
                told.setdefault(text, []).append(point_eps)
        if samples:
            table = np.stack([verdicts.loc[samples].to_numpy(dtype=bool) for verdicts in complete])
            points.append(_Point(point_eps, attack, len(versions), table[: len(first)], table[len(first) :]))
    if not points:
        raise RobenchError(
            f"no {threat} rows in common: {'; '.join(told) or 'other images'}; one command judges all on the same: "
            f"{how.format(names)}"
        )
    for text, where in told.items():
        at = "" if threat == "clean" else f" at ε {', '.join(map(radius, where))}"
        log.warning(f"{text}: left out{at}")
    return points


def _attacks(frames: Sequence[pd.DataFrame], threat: str) -> list[str]:
    """Those that all have, by effort, where each is judged by itself; else a name for all of them, which is empty."""
    if threat not in ATTACK_BY_ATTACK:
        return [""]
    tried = [set(frame["attack"]) for frame in frames]
    common = set.intersection(*tried)
    if alone := sorted(set.union(*tried) - common):
        log.warning(f"attacks that not all have, {', '.join(alone)}: left out")
    return sorted(common, key=lambda name: (steps(name), name))


def _everywhere(frames: Sequence[pd.DataFrame], versions: int) -> list[int]:
    """The samples that every frame has all versions of."""
    counts = [frame.groupby("sample")["version"].nunique() for frame in frames]
    return sorted(set.intersection(*(set(each.index[each == versions]) for each in counts)))


def _left_out(name: str, frame: pd.DataFrame, versions: set[str], samples: Sequence[int]) -> list[str]:
    """What one ensemble has and the comparison cannot use."""
    texts = []
    alone = frame[~frame["version"].isin(versions)]
    if len(alone):
        kinds = alone[["surrogate", "attack", "loss"]].drop_duplicates().agg(" ".join, axis=1).str.strip()
        some = ", ".join(sorted(filter(None, kinds))[:3])
        texts.append(
            f"{alone['version'].nunique()} of {frame['version'].nunique()} versions of {name} that not all have"
            + (f" ({some}{', ...' if len(kinds) > 3 else ''})" if some else "")
        )
    if versions and frame["sample"].nunique() > len(samples):
        texts.append(f"{frame['sample'].nunique() - len(samples)} of {frame['sample'].nunique()} images of {name}")
    return texts


def _head(a: str, b: str, threat: str, point: _Point) -> dict[str, Any]:
    samples = point.first.shape[1]
    attack = {"attack": point.attack} if point.attack else {}
    return {
        "a": a,
        "b": b,
        "threat": threat,
        "eps": point.eps,
        **attack,
        "samples": samples,
        "versions": point.versions,
    }


def _accuracy(which: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {f"accuracy_{which}": value, f"low_{which}": low, f"high_{which}": high}


def _judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with the p-value adjusted for all of them, and what it allows to say."""
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        better = row["a"] if row["difference"] > 0 else row["b"]
        row |= {"p_adjusted": p, "verdict": f"{better} is better" if p <= LEVEL else NO_DIFFERENCE}
    return rows
