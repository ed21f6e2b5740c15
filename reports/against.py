"""Our numbers against published ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib.resources import files
from itertools import pairwise
from typing import Literal, cast

import numpy as np
import pandas as pd

from robench.evaluation.outcomes import intervals
from robench.evaluation.statistics import LEVEL, interval_of_mean
from robench.evaluation.words import steps
from robench.reports import style
from robench.reports._queries import POINT, accuracies, differences, paired, survived, tidy
from robench.reports.published import Claim, Published, read

#: Whether our images are the paper's: they are; they are on the user's word; they are not.
SameData = Literal["same", "vouched", "different"]


#: defense, n, ε
Judged = tuple[str, int, float]
#: Below this accuracy a defense has fallen: the paper prints 0.
FALLEN = 0.01


def published(paper: str) -> pd.DataFrame:
    """The paper's numbers: threat (the title of the table, or clean), defense, n, eps, published in [0, 1], and its
    interval for the paper's images, of no length where it does not say how many.

    Raises:
        RobenchError: unknown paper.
    """
    source = read(paper)
    parts = []
    for each in source.tables:
        with files("robench.reports.published").joinpath(each.file).open(encoding="utf-8") as file:
            wide = pd.read_csv(file).rename(columns={"method": "defense", "n_models": "n"})
        long = wide.melt(["defense", "n"], var_name="column", value_name="published").dropna(subset="published")
        clean = long["column"] == "clean"
        long["eps"] = long["column"].str.removeprefix("eps").where(~clean, "0").astype(float)
        long["threat"] = np.where(clean, "clean", each.title)
        parts.append(long.drop(columns="column"))
    table = pd.concat(parts, ignore_index=True).drop_duplicates(["threat", "defense", "n", "eps"], ignore_index=True)
    table["defense"] = table["defense"].map(source.defenses)
    table["published"] /= 100
    table["published_low"] = table["published_high"] = table["published"]
    if source.images is not None:
        count = np.full(len(table), source.images)
        table["published_low"], table["published_high"] = intervals(table["published"], count)
    return table[["threat", "defense", "n", "eps", "published", "published_low", "published_high"]]


def against(frame: pd.DataFrame, paper: str, *, data: SameData, others: Collection[str] = ()) -> pd.DataFrame:
    """Every accuracy that both have, in [0, 1].

    Rows count only where they are of the paper's attack and loss, as far as it names them.

    Args:
        paper: one of `robench.reports.published.names`.
        data: where our images are others, numbers are shown side by side and not judged.
        others: targets whose members are other networks than the paper's; neither are these judged.

    Returns:
        threat, defense, n, eps, ours, ours_low, ours_high, published, published_low, published_high, difference,
        difference_low, difference_high (Newcombe 1998, 95 %), verdict ("inside": that interval holds 0; "outside";
        "weaker attack" than the paper's, in steps or in number; "different data", "different network" or both),
        samples, seeds, versions.

    Raises:
        RobenchError: unknown paper.
    """
    source = read(paper)
    own = pd.concat([_own(frame, each) for each in source.tables]).drop_duplicates(POINT)
    both = own.merge(published(paper), on=["threat", "defense", "n", "eps"], how="inner")
    both["difference"] = both["ours"] - both["published"]
    down = np.hypot(both["ours"] - both["ours_low"], both["published_high"] - both["published"])
    up = np.hypot(both["ours_high"] - both["ours"], both["published"] - both["published_low"])
    both["difference_low"], both["difference_high"] = both["difference"] - down, both["difference"] + up
    inside = (both["difference_low"] <= 0) & (both["difference_high"] >= 0)
    # What takes every image needs no more effort.
    enough = both["threat"].map({each.title: each.tries for each in source.tables}).astype("float64")
    weaker = (both["tries"].fillna(0).astype("float64") < enough) & (both["ours"] > 0)
    judged = np.where(weaker, "weaker attack", np.where(inside, "inside", "outside"))
    if data == "vouched":
        judged = judged.astype(object) + " (data vouched for)"
    network = _of(frame, others, both)
    if data == "different":
        both["verdict"] = np.where(network, "different data and network", "different data")
    else:
        both["verdict"] = np.where(network, "different network", judged)
    titles = ["clean", *(each.title for each in source.tables)]
    both = style.ordered(both, "threat", "defense", "n", "eps", threats=titles)
    return both[
        [
            "threat", "defense", "n", "eps", "ours", "ours_low", "ours_high", "published", "published_low",
            "published_high", "difference", "difference_low", "difference_high", "verdict", "samples", "seeds",
            "versions",
        ]
    ]  # fmt: skip


def _of(frame: pd.DataFrame, targets: Collection[str], points: pd.DataFrame) -> pd.Series:
    """Whether each point, of a defense and a size, is of some of these targets."""
    rows = tidy(frame)
    own = set(rows.loc[rows["target"].isin(list(targets)), ["defense", "n"]].itertuples(index=False, name=None))
    return pd.Series([(row.defense, row.n) in own for row in points.itertuples()], points.index, dtype=bool)


def _own(frame: pd.DataFrame, table: Published) -> pd.DataFrame:
    """Our accuracies that are comparable with a table, under its title, and clean ones, with ``tries``."""
    frame = _comparable(frame, table)
    own = accuracies(survived(frame, "clean", table.threat)).join(_tries(frame, table), on=POINT)
    own = own.rename(columns={"accuracy": "ours", "low": "ours_low", "high": "ours_high"})
    # Radii are typed, not computed, but 7 * 0.01 is not 0.07.
    own["eps"] = own["eps"].round(6)
    return own.assign(threat=own["threat"].astype(str).replace(table.threat, table.title))


def orderings(frame: pd.DataFrame, paper: str) -> pd.DataFrame:
    """The shape that a reproduction of the paper must show, claim by claim, on whatever data.

    Returns:
        claim; left and right, what is compared; difference, left − right in [-1, 1]; p, of the test of
        `robench.reports.tables.accuracy`; verdict: "holds", "reversed", or "undecided" where p is above 0.05; that a
        defense has fallen is not reversed by a "weaker attack". A claim without its two sides is left out.
    """
    found = []
    for claim in read(paper).claims:
        tables = [each for each in read(paper).tables if claim.threat in ("clean", each.title)]
        found += _of_claim(claim, frame, tables[0])
    return pd.DataFrame(found, columns=["claim", "left", "right", "difference", "p", "verdict"])


def _of_claim(claim: Claim, frame: pd.DataFrame, table: Published) -> list[dict[str, object]]:
    frame = _comparable(frame, table)
    verdicts = survived(frame, "clean" if claim.threat == "clean" else table.threat)
    cells = {
        cast("Judged", key): rows.set_index(["seed", "sample"])["correct"]
        for key, rows in verdicts.assign(eps=verdicts["eps"].round(6)).groupby(["defense", "n", "eps"], observed=True)
    }
    sizes = sorted({n for _, n, _ in cells})
    if claim.kind == "fallen":
        tries = _tries(frame, table).rename(lambda eps: round(eps, 6), level="eps")
        keys = [(claim.defense, n, claim.eps) for n in sizes]
        return [_fell(claim, key, cells[key], table, tries) for key in keys if key in cells]
    if claim.kind in ("rises", "falls"):
        own = [(claim.defense, n, claim.eps) for n in sizes if (claim.defense, n, claim.eps) in cells]
        pairs = [(large, small) if claim.kind == "rises" else (small, large) for small, large in pairwise(own)]
    else:
        pairs = [
            ((claim.defense, n, eps), (claim.over, n, eps))
            for n in sizes
            for eps in sorted({eps for *_, eps in cells if _meant(claim, n, eps)})
        ]
    return [_compared(claim, pair, cells) for pair in pairs if pair[0] in cells and pair[1] in cells]


def _meant(claim: Claim, n: int, eps: float) -> bool:
    """Whether a claim is about N members at this radius."""
    if not claim.eps_from:
        return eps == claim.eps
    known = [size for size in claim.eps_from if size <= n]
    return bool(known) and eps >= claim.eps_from[max(known)]


def _compared(claim: Claim, pair: tuple[Judged, Judged], cells: Mapping[Judged, pd.Series]) -> dict[str, object]:
    """Whether the left of a pair is above its right."""
    left, right = (cells[key] for key in pair)
    p = paired(left, right)
    difference = float(differences(left, right).mean())
    verdict = "undecided" if p > LEVEL else "holds" if difference > 0 else "reversed"
    names = {"left": _name(pair[0]), "right": _name(pair[1])}
    return {"claim": claim.claim, **names, "difference": difference, "p": p, "verdict": verdict}


def _fell(claim: Claim, key: Judged, correct: pd.Series, table: Published, tries: pd.Series) -> dict[str, object]:
    """Whether a defense has fallen to about 0."""
    verdict = _fallen(correct)
    if verdict == "reversed" and tries.get((table.threat, *key), 0) < table.tries:
        verdict = "weaker attack"
    names = {"left": _name(key), "right": "0"}
    return {"claim": claim.claim, **names, "difference": _mean(correct), "p": np.nan, "verdict": verdict}


def _mean(correct: pd.Series) -> float:
    """The mean over seeds of their accuracies."""
    return float(correct.groupby("seed").mean().mean())


def _comparable(frame: pd.DataFrame, table: Published) -> pd.DataFrame:
    """Without the rows of the table's threat that are of another attack or loss."""
    same = pd.Series(True, index=frame.index)
    if table.attack:
        same &= frame["attack"].isin([name for name in frame["attack"].unique() if name.split(":")[0] == table.attack])
    if table.loss:
        same &= frame["loss"] == table.loss
    return frame[(frame["threat"] != table.threat) | same]


def _tries(frame: pd.DataFrame, table: Published) -> pd.Series:
    """Attacks of at least the table's steps that an image had to survive, by threat, defense, size and ε."""
    effort = frame["attack"].map({label: steps(label) for label in frame["attack"].unique()})
    rows = tidy(frame)[(frame["threat"] == table.threat) & (effort >= table.steps)]
    # A white-box cell pools its starts, and survivors have seen the last.
    rows = rows.assign(tries=np.where(rows["threat"] == "whitebox", rows["restart"] + 1, 1))
    rows = rows[(rows["threat"] != "whitebox") | rows["correct"]]
    cells = rows.groupby([*POINT, "target", "cell"], observed=True)["tries"].max()
    return cells.groupby([*POINT, "target"], observed=True).sum().groupby(POINT, observed=True).min().rename("tries")


def _fallen(correct: pd.Series) -> str:
    """Whether the accuracy is below `FALLEN`; undecided while its interval holds both."""
    by_seed, by_image = (correct.groupby(level).mean().to_numpy() for level in ("seed", "sample"))
    low, high = interval_of_mean(by_seed, by_image, int(correct.groupby("seed").size().min()))
    if high <= FALLEN:
        return "holds"
    return "reversed" if low > FALLEN else "undecided"


def _name(key: Judged) -> str:
    defense, n, eps = key
    return f"{style.label(defense)}/{n}" + (f", ε = {eps:g}" if eps else "")
