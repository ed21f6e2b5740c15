"""The tables of results/defenses-digits from the folder of `robench run defenses-digits`: accuracies, and the papers'
claims one by one.

    robench run defenses-digits --out FOLDER
    python benchmarks/defenses_digits.py FOLDER

Seeds whose judgements are not all there are left out of both tables, which say how many are in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from robench.core.files import write_text
from robench.evaluation.outcomes import transferability, wilson
from robench.evaluation.statistics import accuracy_interval, bootstrap_difference, difference_over_seeds
from robench.evaluation.worst import verdicts
from robench.reports import style
from robench.reports._queries import survived
from robench.reports.document import Table, TableCell, markdown
from robench.session import stored
from robench.studies.plan import expand
from robench.studies.state import StudyFolder, StudyStatus
from robench.studies.study import find, parse

TRANSFER_EPS = 0.2
#: Columns: title, threat, ε, and how the attack's label begins where one threat has several.
COLUMNS = {
    "clean": ("clean", 0.0, ""),
    "black-box .1": ("blackbox", 0.1, ""),
    "black-box .2": ("blackbox", 0.2, ""),
    "white-box .1": ("whitebox", 0.1, ""),
    "white-box .2": ("whitebox", 0.2, ""),
    "strongest .1": ("convergence", 0.1, "strongest"),
    "everything .1": ("worst", 0.1, ""),
}
TRANSFER = "transfer .2"


@dataclass(frozen=True)
class Claim:
    """``left`` is above ``right`` in ``column``; under transfer, below it."""

    source: str
    left: str
    right: str
    column: str


def _white(source: str, left: str, *rights: str) -> tuple[Claim, ...]:
    """White-box, at either ε: which of the digits' is which of the paper's, nobody knows."""
    return tuple(Claim(source, left, right, column) for right in rights for column in ("white-box .1", "white-box .2"))


CLAIMS = (
    *(Claim("DVERGE, figure 3", "dverge", other, TRANSFER) for other in ("baseline", "adp", "gal")),
    *(Claim("DVERGE, table 4", "dverge", other, "black-box .2") for other in ("baseline", "adp", "gal")),
    *_white("DVERGE, table 5", "dverge", "baseline", "adp", "gal"),
    Claim("DVERGE, table 4, with AdvT", "dverge-advt", "advt", "black-box .1"),
    Claim("DVERGE, table 5, with AdvT", "dverge-advt", "advt", "clean"),
    *_white("ADP", "adp", "baseline"),
    Claim("GAL, transfer", "gal", "baseline", TRANSFER),
    Claim("GAL, black-box", "gal", "baseline", "black-box .1"),
    *_white("TRS, and FASTEN, table III", "trs", "baseline", "adp", "gal", "dverge"),
    Claim("TRS, transfer", "trs", "baseline", TRANSFER),
    *_white("FASTEN, table III", "fasten", "baseline", "dverge", "trs"),
    *_white("LOTOS, white-box", "lotos", "baseline"),
    Claim("LOTOS, black-box", "lotos", "baseline", "black-box .1"),
    Claim("LOTOS, transfer", "lotos", "baseline", TRANSFER),
    *_white("FASTEN, table VII, PGD-DVERGE", "dverge-advt", "advt"),
    *_white("FASTEN, table VII, FAT-ADP", "adp-advt", "advt"),
    *_white("FASTEN, table VII, FAT-GAL falls behind", "advt", "gal-advt"),
    *_white("AdvOAP adds to AdvT", "advoap", "advt"),
    *_white("iGAT, on ADP", "igat", "adp"),
    *_white("iGAT, on DVERGE", "igat-dverge", "dverge"),
    *_white("MRBoost adds to AdvT", "mrboost", "advt"),
)


def judged(frame: pd.DataFrame) -> dict[tuple[str, str], npt.NDArray[np.bool_]]:
    """By defense and column verdicts (seeds, images), seeds and images ascending."""
    found = {}
    for column, (threat, eps, attack) in COLUMNS.items():
        if threat == "worst":
            rows = verdicts(frame)
        else:
            rows = survived(frame[frame["attack"].str.startswith(attack) | (frame["threat"] == "clean")], threat)
        for defense, own in rows[rows["eps"] == eps].groupby("defense", observed=True):
            table = own.pivot(index="seed", columns="sample", values="correct").astype(bool)
            found[str(defense), column] = table.to_numpy()
    return found


@dataclass(frozen=True)
class Rates:
    """Mean success between two members, by seed, and on how many images of each."""

    by_seed: npt.NDArray[np.float64]
    images: int

    def interval(self) -> tuple[float, float]:
        """95 %: Student's over seeds; of one seed Wilson's over images."""
        if len(self.by_seed) == 1:
            return wilson(round(self.by_seed[0] * self.images), self.images)
        half = float(stats.t.ppf(0.975, len(self.by_seed) - 1) * stats.sem(self.by_seed))
        return max(0.0, self.by_seed.mean() - half), min(1.0, self.by_seed.mean() + half)

    def less(self, other: Rates) -> tuple[float, float, float]:
        """This less the other, with its 95 % interval: Welch's over seeds, of one seed Newcombe's over images."""
        value = float(self.by_seed.mean() - other.by_seed.mean())
        if min(len(self.by_seed), len(other.by_seed)) > 1:
            low, high = stats.ttest_ind(self.by_seed, other.by_seed, equal_var=False).confidence_interval()
            return value, float(low), float(high)
        (low, high), (least, most) = self.interval(), other.interval()
        mean, over = self.by_seed.mean(), other.by_seed.mean()
        return value, value - math.hypot(mean - low, most - over), value + math.hypot(high - mean, over - least)


def transfer(frame: pd.DataFrame) -> dict[str, Rates]:
    """By defense."""
    rates = transferability(frame)
    between = (rates["member"] != "ensemble") & (rates["member"] != rates["source"].astype(str))
    rates = rates[between & (rates["eps"] == TRANSFER_EPS)]
    return {
        str(name): Rates(own.groupby("seed")["success"].mean().to_numpy(), int(own["samples"].min()))
        for name, own in rates.groupby("defense", observed=True)
    }


def whole(frame: pd.DataFrame) -> list[int]:
    """Seeds that have every defense under every threat."""
    cells = frame[["seed", "defense", "threat"]].drop_duplicates().groupby("seed").size()
    return [int(seed) for seed in cells.index[cells == frame["defense"].nunique() * frame["threat"].nunique()]]


def accuracies(frame: pd.DataFrame) -> Table:
    """A row per defense: mean ± sd over seeds, and the 95 % interval over seeds and images together."""
    found, rates = judged(frame), transfer(frame)
    rows = []
    for defense in style.order(frame["defense"]):
        tables = [found[defense, column] for column in COLUMNS]
        cells = [_measured(table.mean(axis=1), *accuracy_interval(table)) for table in tables]
        own = rates[defense]
        rows.append([TableCell.of(style.label(defense)), *cells, _measured(own.by_seed, *own.interval())])
    return Table(["N = 3, %", *COLUMNS, TRANSFER], rows)


def claims(frame: pd.DataFrame) -> Table:
    """A row per claim: left less right in points, its 95 % interval, and whether the claim shows."""
    found, rates = judged(frame), transfer(frame)
    rows = []
    for claim in CLAIMS:
        left, right = style.label(claim.left), style.label(claim.right)
        if claim.column == TRANSFER:
            what, (value, low, high) = f"{left} below {right}", rates[claim.right].less(rates[claim.left])
        else:
            what = f"{left} above {right}"
            value, low, high = _difference(found[claim.left, claim.column], found[claim.right, claim.column])
        verdict = "shows" if low > 0 else "reversed" if high < 0 else "undecided"
        cells = [TableCell.of(claim.source), TableCell.of(what), TableCell.of(claim.column)]
        rows.append([*cells, TableCell.measured(value, low, high), TableCell.of(verdict)])
    return Table(["Claim", "What should be", "Where", "Difference, points", "Verdict"], rows)


def _difference(left: npt.NDArray[np.bool_], right: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """Left less right with its interval: over seeds and images together, or of one seed over images, paired."""
    if min(len(left), len(right)) > 1:
        return difference_over_seeds(left, right)[:3]
    return float(left.mean() - right.mean()), *bootstrap_difference(left, right)


def _measured(by_seed: npt.NDArray[np.float64], low: float, high: float) -> TableCell:
    mean = 100 * by_seed.mean()
    spread = f" ± {100 * by_seed.std(ddof=1):.1f}" if len(by_seed) > 1 else ""
    return TableCell(f"{mean:.1f}{spread}", mean, f"[{100 * low:.1f}, {100 * high:.1f}]")


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--out", default="results/defenses-digits", show_default=True, type=click.Path(path_type=Path))
def main(folder: Path, out: Path) -> None:
    plan, place = expand("defenses-digits", parse(*find("defenses-digits"))), StudyFolder(folder)
    done = [place.runs.get(name) for name in plan.main if name in place.runs.names()]
    frame = stored(done, StudyStatus(plan, place).basis().evaluations).frame
    seeds = whole(frame)
    if not seeds:
        raise click.ClickException(f"no seed is whole in {folder}; the same robench run goes on")
    frame = frame[frame["seed"].isin(seeds)]
    over = "seeds and images together" if len(seeds) > 1 else "images alone: one training of each"
    about = f"Training seeds {', '.join(map(str, seeds))}; {plan.study.samples} test images."
    said = f"{about} Intervals of 95 % over {over}.\n\n"
    for name, table in (("accuracies", accuracies(frame)), ("claims", claims(frame))):
        write_text(out / f"{name}.md", said + markdown(table))
    click.echo(f"{out}/accuracies.md, claims.md")


if __name__ == "__main__":
    main()
