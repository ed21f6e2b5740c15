"""Our numbers against published ones."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Literal, cast

import numpy as np
import pandas as pd

from robench.core.errors import unknown
from robench.evaluation.outcomes import intervals
from robench.evaluation.statistics import LEVEL
from robench.evaluation.words import steps
from robench.reports import style
from robench.reports._queries import POINT, accuracies, paired, survived, tidy

#: Whether our images are the paper's: they are; they are on the user's word; they are not.
SameData = Literal["same", "vouched", "different"]


@dataclass(frozen=True)
class Paper:
    """A source of published numbers.

    Attributes:
        threats: file in `robench.reports.published` per threat.
        data: its test images; images: how many each number rests on.
        steps, tries: per threat, gradient steps of its attacks, and how many an image had to survive: black-box
            versions, white-box starts.
        defenses: our name for each of the paper's methods.
    """

    title: str
    threats: dict[str, str]
    data: str
    images: int
    steps: dict[str, int]
    tries: dict[str, int]
    defenses: dict[str, str]


PAPERS = {
    "dverge2020": Paper(
        title="Yang et al. 2020, Tables 4 and 5",
        threats={"blackbox": "dverge2020_blackbox.csv", "whitebox": "dverge2020_whitebox.csv"},
        data="cifar10",
        images=1000,
        steps={"blackbox": 100, "whitebox": 50},
        tries={"blackbox": 30, "whitebox": 5},
        defenses={
            "baseline": "baseline",
            "ADP": "adp",
            "GAL": "gal",
            "DVERGE": "dverge",
            "AdvT": "advt",
            "DVERGE+AdvT": "dverge-advt",
        },
    )
}

#: threat, defense, n, ε
Cell = tuple[str, str, int, float]
#: Below this accuracy a defense has fallen: the paper prints 0.
FALLEN = 0.01


def published(paper: str = "dverge2020") -> pd.DataFrame:
    """The paper's numbers: threat, defense, n, eps, published in [0, 1], and its interval for the paper's images.

    Raises:
        RobenchError: unknown paper.
    """
    if paper not in PAPERS:
        raise unknown("paper", paper, PAPERS)
    source = PAPERS[paper]
    parts = []
    for threat, name in source.threats.items():
        with files("robench.reports.published").joinpath(name).open(encoding="utf-8") as file:
            wide = pd.read_csv(file).rename(columns={"method": "defense", "n_models": "n"})
        long = wide.melt(["defense", "n"], var_name="column", value_name="published")
        clean = long["column"] == "clean"
        long["eps"] = long["column"].str.removeprefix("eps").where(~clean, "0").astype(float)
        long["threat"] = np.where(clean, "clean", threat)
        parts.append(long.drop(columns="column"))
    table = pd.concat(parts, ignore_index=True).drop_duplicates(["threat", "defense", "n", "eps"], ignore_index=True)
    table["defense"] = table["defense"].map(source.defenses)
    table["published"] /= 100
    table["published_low"], table["published_high"] = intervals(table["published"], np.full(len(table), source.images))
    return table[["threat", "defense", "n", "eps", "published", "published_low", "published_high"]]


def against(frame: pd.DataFrame, paper: str = "dverge2020", *, data: SameData) -> pd.DataFrame:
    """Every accuracy that both have, in [0, 1].

    White-box rows count only where they are the paper's attack, PGD with cross-entropy.

    Args:
        data: where our images are others, numbers are shown side by side and not judged.

    Returns:
        threat, defense, n, eps, ours, ours_low, ours_high, published, published_low, published_high, difference,
        difference_low, difference_high (Newcombe 1998, 95 %), verdict ("inside": that interval holds 0; "outside";
        "weaker attack" than the paper's, in steps or in number; "different data"), samples, seeds, versions.

    Raises:
        RobenchError: unknown paper.
    """
    theirs = published(paper)
    frame = _comparable(frame)
    own = accuracies(survived(frame, "clean", "blackbox", "whitebox")).join(_tries(frame, PAPERS[paper]), on=POINT)
    own = own.rename(columns={"accuracy": "ours", "low": "ours_low", "high": "ours_high"})
    # Radii are typed, not computed, but 7 * 0.01 is not 0.07.
    own["eps"] = own["eps"].round(6)
    both = own.merge(theirs, on=["threat", "defense", "n", "eps"], how="inner")
    both["difference"] = both["ours"] - both["published"]
    down = np.hypot(both["ours"] - both["ours_low"], both["published_high"] - both["published"])
    up = np.hypot(both["ours_high"] - both["ours"], both["published"] - both["published_low"])
    both["difference_low"], both["difference_high"] = both["difference"] - down, both["difference"] + up
    inside = (both["difference_low"] <= 0) & (both["difference_high"] >= 0)
    # What takes every image needs no more effort.
    enough = both["threat"].map(PAPERS[paper].tries).astype("float64")
    weaker = (both["tries"].fillna(0).astype("float64") < enough) & (both["ours"] > 0)
    judged = np.where(weaker, "weaker attack", np.where(inside, "inside", "outside"))
    both["verdict"] = "different data" if data == "different" else judged
    if data == "vouched":
        both["verdict"] += " (data vouched for)"
    both = style.ordered(both, "threat", "defense", "n", "eps")
    return both[
        [
            "threat", "defense", "n", "eps", "ours", "ours_low", "ours_high", "published", "published_low",
            "published_high", "difference", "difference_low", "difference_high", "verdict", "samples", "seeds",
            "versions",
        ]
    ]  # fmt: skip


def orderings(frame: pd.DataFrame) -> pd.DataFrame:
    """The shape that a reproduction of the DVERGE study must show, claim by claim, on whatever data.

    Returns:
        claim; left and right, what is compared; difference, left − right in [-1, 1]; p, of the paired exact test of
        `robench.reports.tables.accuracy`; verdict: "holds", "reversed", or "undecided" where p is above 0.05; that a
        defense has fallen is not reversed by a "weaker attack". A claim without its two sides is left out.
    """
    paper = PAPERS["dverge2020"]
    tries = _tries(_comparable(frame), paper).rename(lambda eps: round(eps, 6), level="eps")
    verdicts = survived(_comparable(frame), "clean", "blackbox", "whitebox")
    verdicts = verdicts.assign(eps=verdicts["eps"].round(6))
    cells = {
        cast("Cell", key): rows.set_index(["seed", "sample"])["correct"]
        for key, rows in verdicts.groupby(["threat", "defense", "n", "eps"], observed=True)
    }
    mean = {key: float(correct.groupby("seed").mean().mean()) for key, correct in cells.items()}
    found: list[dict[str, object]] = []

    def compare(claim: str, left: Cell, right: Cell) -> None:
        """Claims that ``left`` is above ``right``."""
        if left not in cells or right not in cells:
            return
        difference, p = mean[left] - mean[right], paired(cells[left], cells[right])
        verdict = "undecided" if p > LEVEL else "holds" if difference > 0 else "reversed"
        found.append(
            {"claim": claim, "left": _name(left), "right": _name(right), "difference": difference, "p": p,
             "verdict": verdict}
        )  # fmt: skip

    sizes = sorted({n for _, _, n, _ in cells})
    for defense, claim in (("dverge", "black-box DVERGE rises with N"), ("gal", "black-box GAL falls with N")):
        own = [n for n in sizes if ("blackbox", defense, n, 0.03) in cells]
        for small, large in pairwise(own):
            pair = (large, small) if defense == "dverge" else (small, large)
            compare(claim, ("blackbox", defense, pair[0], 0.03), ("blackbox", defense, pair[1], 0.03))
    for defense in ("baseline", "adp"):
        for n in sizes:
            key = ("blackbox", defense, n, 0.03)
            if key in cells:
                verdict = _fallen(mean[key], cells[key])
                if verdict == "reversed" and tries.get(key, 0) < paper.tries["blackbox"]:
                    verdict = "weaker attack"
                found.append(
                    {"claim": f"black-box {style.label(defense)} has fallen", "left": _name(key), "right": "0",
                     "difference": mean[key], "p": np.nan, "verdict": verdict}
                )  # fmt: skip
    for n in sizes:
        compare("DVERGE+AdvT beats AdvT on clean images", ("clean", "dverge-advt", n, 0.0), ("clean", "advt", n, 0.0))
        compare(
            "DVERGE+AdvT beats AdvT black-box at small ε",
            ("blackbox", "dverge-advt", n, 0.01), ("blackbox", "advt", n, 0.01),
        )  # fmt: skip
        for eps in sorted({key[3] for key in cells if key[0] == "whitebox" and key[3] >= (0.02 if n >= 8 else 0.03)}):
            left, right = ("whitebox", "advt", n, eps), ("whitebox", "dverge-advt", n, eps)
            compare("DVERGE+AdvT loses to AdvT white-box", left, right)
    return pd.DataFrame(found, columns=["claim", "left", "right", "difference", "p", "verdict"])


def _comparable(frame: pd.DataFrame) -> pd.DataFrame:
    pgd = frame["attack"].isin([name for name in frame["attack"].unique() if name.split(":")[0] == "pgd"])
    return frame[(frame["threat"] != "whitebox") | (pgd & (frame["loss"] == "ce"))]


def _tries(frame: pd.DataFrame, paper: Paper) -> pd.Series:
    """Attacks of at least the paper's steps that an image had to survive, by threat, defense, size and ε."""
    effort = frame["attack"].map({label: steps(label) for label in frame["attack"].unique()})
    rows = tidy(frame)[effort >= frame["threat"].map(paper.steps)]
    # A white-box cell pools its starts, and survivors have seen the last.
    rows = rows.assign(tries=np.where(rows["threat"] == "whitebox", rows["restart"] + 1, 1))
    rows = rows[(rows["threat"] != "whitebox") | rows["correct"]]
    cells = rows.groupby([*POINT, "target", "cell"], observed=True)["tries"].max()
    return cells.groupby([*POINT, "target"], observed=True).sum().groupby(POINT, observed=True).min().rename("tries")


def _fallen(accuracy: float, correct: pd.Series) -> str:
    """Whether the accuracy is below `FALLEN`; undecided while its interval holds both."""
    low, high = intervals([accuracy], [correct.index.get_level_values("sample").nunique()])
    if high[0] <= FALLEN:
        return "holds"
    return "reversed" if low[0] > FALLEN else "undecided"


def _name(key: Cell) -> str:
    _, defense, n, eps = key
    return f"{style.label(defense)}/{n}" + (f", ε = {eps:g}" if eps else "")
