"""What is left of an ensemble under everything that was tried on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from robench.evaluation.outcomes import ENSEMBLE, intervals, survived
from robench.evaluation.threats import BLACKBOX

_WHO = ["target", "defense", "n", "seed"]
#: The threat whose images and ε count, the first of these that was evaluated; not transfer, whose images are chosen by
#: being right.
_BASE = ("whitebox", "convergence", "queries", *BLACKBOX)
#: What took an image.
_HOW = ["threat", "attack", "part", "loss", "surrogate"]


def worst(frame: pd.DataFrame) -> pd.DataFrame:
    """Per target and ε the share of images that are right as they are and under every threat, attack and restart at
    that ε or a smaller one, whose images lie in the ball as well.

    Images and ε are those of the white-box threat, or where that was not evaluated, of the next that was. Every threat
    counts on these: what was tried on fewer images counts on those. Like any accuracy under attacks, an upper bound.
    Transfer alone gives none: its images are those that all members get right.

    Args:
        frame: as `robench.evaluation.outcomes.Outcomes.frame`.

    Returns:
        Columns target, defense, n, seed, eps, accuracy, low, high (Wilson), samples, and by: what took how much of all
        images, in the order of what it takes that nothing before it took; images that are wrong as they are come first.
    """
    rows = frame[frame["member"] == ENSEMBLE]
    found = [
        {**dict(zip(_WHO, who, strict=True)), **point}
        for who, own in rows.groupby(_WHO, observed=True)
        for point in _points(own)
    ]
    table = pd.DataFrame(found, columns=[*_WHO, "eps", "accuracy", "samples", "by"])
    table["low"], table["high"] = intervals(table["accuracy"], table["samples"])
    return table[[*_WHO, "eps", "accuracy", "low", "high", "samples", "by"]]


def verdicts(frame: pd.DataFrame) -> pd.DataFrame:
    """What `worst` counts, one row per target, ε and image: target, defense, n, seed, eps, sample, correct, and
    versions: how often the image was judged."""
    rows = frame[frame["member"] == ENSEMBLE]
    parts = []
    for who, own in rows.groupby(_WHO, observed=True):
        for eps, _, tried in _bases(own):
            about = pd.DataFrame([[*who, eps]], columns=[*_WHO, "eps"])
            parts.append(about.merge(survived(tried), how="cross"))
    columns = [*_WHO, "eps", "sample", "correct", "versions"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _bases(rows: pd.DataFrame) -> Iterator[tuple[float, set[int], pd.DataFrame]]:
    """For every ε of a target: ε, the images that count, and all rows of these that bear on it."""
    threats = set(rows["threat"])
    base = next((rows[rows["threat"] == name] for name in _BASE if name in threats), rows.iloc[:0])
    for eps, here in base.groupby("eps", observed=True):
        largest = here.groupby("cell", observed=True)["sample"].nunique().idxmax()
        images = set(here.loc[here["cell"] == largest, "sample"])
        yield float(str(eps)), images, rows[(rows["eps"] <= eps) & rows["sample"].isin(images)]


def _points(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """One for every ε of a target."""
    for eps, images, tried in _bases(rows):
        fell = tried[~tried["correct"]]
        took = {tuple(map(str, how)): set(part["sample"]) for how, part in fell.groupby(_HOW, observed=True)}
        left, shares = len(images), []
        for how, count in _in_order(took):
            left -= count
            shares.append(f"{_name(how)} {count / len(images):.1%}")
        yield {"eps": eps, "accuracy": left / len(images), "samples": len(images), "by": ", ".join(shares)}


def _in_order(took: dict[tuple[str, ...], set[int]]) -> Iterator[tuple[tuple[str, ...], int]]:
    """What took images that nothing before it took, and how many: the clean ones first, then always the most."""
    gone: set[int] = set()
    left = dict(took)
    while left:
        how = max(left, key=lambda each: (each[0] == "clean", len(left[each] - gone), each))
        if count := len(left.pop(how) - gone):
            yield how, count
        gone |= took[how]


def _name(how: tuple[str, ...]) -> str:
    threat, attack, part, loss, surrogate = how
    if threat == "clean":
        return "wrong as they are"
    return " ".join(filter(None, (threat, f"{attack} ({part})" if part else f"{attack} {loss}", surrogate)))
