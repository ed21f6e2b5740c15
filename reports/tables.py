"""Tables: accuracy by defense, size and ε, with intervals, and a mark only where a test allows one."""

from __future__ import annotations

import numpy as np
import pandas as pd

from robench.core.errors import RobenchError
from robench.evaluation import outcomes
from robench.evaluation import worst as worst_of_all
from robench.evaluation.display import named_radii
from robench.evaluation.statistics import LEVEL, holm
from robench.evaluation.threats import ATTACK_BY_ATTACK
from robench.reports import style
from robench.reports._queries import accuracies, differences, paired, survived, tidy
from robench.reports.curves import Link
from robench.reports.document import MISSING, Table, TableCell


def accuracy(frame: pd.DataFrame, threat: str) -> pd.DataFrame:
    """One row per defense, size and ε (0: clean), in the order of the table.

    Returns:
        defense, n, eps, accuracy, low, high in [0, 1], samples, seeds, sd, versions; `best`: the highest of its column
        (ε), where it also differs from the runner-up; `p`: that test, on the best row of each column. The test is
        `robench.reports._queries.paired`, against every other row, with Holm's correction within the column, since the
        data chose the runner-up too.

    Raises:
        RobenchError: nothing was measured under that threat.
    """
    verdicts = survived(frame, threat, "clean")
    if not (verdicts["threat"] == threat).any():
        raise RobenchError(f"no {threat} accuracy in these outcomes; run `robench eval --threat {threat}`")
    verdicts = verdicts[(verdicts["threat"] == "clean") | (verdicts["eps"] > 0)]
    points = accuracies(verdicts).drop(columns="threat")
    points["p"] = np.nan
    points["best"] = False
    by_row = {
        (eps, name, n): rows.set_index(["seed", "sample"])["correct"]
        for (eps, name, n), rows in verdicts.groupby(["eps", "defense", "n"], observed=True)
    }
    for eps, column in points.groupby("eps"):
        ranked = column.sort_values("accuracy", ascending=False, kind="stable")
        if len(ranked) < 2:
            continue
        own, *others = [by_row[eps, row.defense, row.n] for row in ranked.itertuples()]
        p = holm([paired(own, other) for other in others])[0]
        # On the images of the test too, which are not all of each where they were judged on others.
        ahead = ranked["accuracy"].iloc[0] > ranked["accuracy"].iloc[1] and differences(own, others[0]).mean() > 0
        points.loc[ranked.index[0], ["p", "best"]] = [p, bool(ahead and p <= LEVEL)]
    points["best"] = points["best"].astype(bool)
    columns = ["defense", "n", "eps", "accuracy", "low", "high", "best", "p", "samples", "seeds", "sd", "versions"]
    return style.ordered(points, "defense", "n", "eps")[columns]


def csv(table: pd.DataFrame) -> str:
    """Every value of `accuracy`, as it is."""
    return str(table.to_csv(index=False, lineterminator="\n"))


def described(table: pd.DataFrame, caption: str = "", link: Link | None = None) -> Table:
    """`accuracy` for documents: a row per defense and size, a column per ε.

    Args:
        link: the address that a cell leads to, in HTML.
    """
    columns = sorted(table["eps"].unique())
    rows = []
    for (name, n), line in table.groupby(["defense", "n"], sort=False):
        cells = dict.fromkeys(columns, MISSING)
        for row in line.to_dict("records"):
            href = link(str(name), int(str(n)), float(row["eps"])) if link else ""
            cells[row["eps"]] = TableCell.measured(
                row["accuracy"], row["low"], row["high"], best=row["best"], href=href
            )
        rows.append([TableCell.of(style.label(str(name))), TableCell.of(n), *cells.values()])
    names = named_radii(columns)
    return Table(["Defense", "N", *(names[eps] for eps in columns)], rows, caption, _note(table))


def worst(frame: pd.DataFrame) -> pd.DataFrame:
    """`robench.evaluation.worst.worst`, targets named and ordered as in figures; empty where nothing was attacked."""
    return style.ordered(worst_of_all.worst(tidy(frame)), "defense", "n", "seed", "eps")


def worst_described(points: pd.DataFrame, caption: str = "") -> Table:
    """`worst` as a table."""
    rows = [
        [
            TableCell.of(style.label(row["defense"])),
            *(TableCell.of(row[name]) for name in ("n", "seed")),
            TableCell.radius(row["eps"]),
            TableCell.of(row["samples"]),
            TableCell.measured(row["accuracy"], row["low"], row["high"]),
            TableCell.of(row["by"], look="long"),
        ]
        for row in points.to_dict("records")
    ]
    headers = ["Defense", "N", "Seed", "ε", "Images", "Accuracy", "What took how much of the images"]
    note = (
        "Right as they are and under every threat, attack and restart that was tried at that ε or a smaller one, in "
        "percent, with the 95 percent Wilson interval."
    )
    return Table(headers, rows, caption, note)


def over_draws(frame: pd.DataFrame) -> pd.DataFrame:
    """`robench.evaluation.outcomes.over_draws` by target, threat and ε, targets named and ordered as in figures; empty
    where nothing was judged over several draws."""
    rows = tidy(frame)
    alone = rows["threat"].isin(ATTACK_BY_ATTACK)
    rows = rows.assign(alone=rows["attack"].where(alone, ""))
    points = outcomes.over_draws(rows[rows["threat"] != "transfer"], ["defense", "n", "seed", "threat", "alone", "eps"])
    return style.ordered(points.rename(columns={"alone": "attack"}), "defense", "n", "seed", "eps")


def over_draws_described(points: pd.DataFrame, caption: str = "") -> Table:
    """`over_draws` as a table."""
    rows = [
        [
            TableCell.of(style.label(row["defense"])),
            *(TableCell.of(row[name]) for name in ("n", "seed")),
            TableCell.of(f"{row['threat']} {row['attack']}".strip()),
            TableCell.radius(row["eps"]),
            *(TableCell.of(row[name]) for name in ("draws", "samples")),
            TableCell.measured(row["every_draw"], row["every_low"], row["every_high"]),
            TableCell.measured(row["expectation"], row["low"], row["high"]),
        ]
        for row in points.to_dict("records")
    ]
    headers = ["Defense", "N", "Seed", "Threat", "ε", "Draws", "Images", "In every draw", "In expectation"]
    note = (
        "Models that draw at inference, in percent, with 95 percent Wilson intervals. In every draw: right in all "
        "draws of all attacks, which is the accuracy of the other tables. In expectation: the mean part of the draws "
        "that is right under the attack that is survived in the fewest."
    )
    return Table(headers, rows, caption, note)


def _note(table: pd.DataFrame) -> str:
    samples, seeds = sorted(table["samples"].unique()), sorted(table["seeds"].unique())
    interval, test = "Wilson interval", "an exact McNemar test"
    if seeds[-1] > 1:
        interval = "interval, as other images and, of several training runs, others of these would move it,"
        test = "a test on the same images, as these and training runs vary,"
    return (
        f"Accuracy in percent by radius, with the 95 percent {interval} for {_range(samples)} images; "
        f"mean of {_range(seeds)} training run(s). Bold: best of its column by {test} with Holm's "
        f"correction, p at most {LEVEL}."
    )


def _range(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
