"""Tables: accuracy by defense, size and ε, with intervals, and a mark only where a test allows one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from robench.core.errors import RobenchError
from robench.evaluation.statistics import LEVEL, holm
from robench.reports import style
from robench.reports._queries import accuracies, paired, survived


def accuracy(frame: pd.DataFrame, threat: str) -> pd.DataFrame:
    """One row per defense, size and ε (0: clean), in the order of the table.

    Returns:
        defense, n, eps, accuracy, low, high in [0, 1], samples, seeds, sd, versions; `best`: the highest of its column
        (ε), where it also differs from the runner-up; `p`: that test, on the best row of each column. The test is
        McNemar's, exact and paired by image, against every other row, with Holm's correction within the column, since
        the data chose the runner-up too.

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
        ahead = ranked["accuracy"].iloc[0] > ranked["accuracy"].iloc[1]
        points.loc[ranked.index[0], ["p", "best"]] = [p, bool(ahead and p <= LEVEL)]
    points["best"] = points["best"].astype(bool)
    rank = {name: place for place, name in enumerate(style.order(points["defense"]))}
    return points.sort_values(
        ["defense", "n", "eps"], key=lambda s: s.map(rank) if s.name == "defense" else s, ignore_index=True
    )[["defense", "n", "eps", "accuracy", "low", "high", "best", "p", "samples", "seeds", "sd", "versions"]]


def csv(table: pd.DataFrame) -> str:
    """Every value of `accuracy`, as it is."""
    return str(table.to_csv(index=False, lineterminator="\n"))


def markdown(table: pd.DataFrame) -> str:
    """Accuracy in percent with its interval; **best**."""

    def cell(row: pd.Series) -> str:
        number = f"{100 * row['accuracy']:.1f}"
        return f"{f'**{number}**' if row['best'] else number} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"

    header, rows = _grid(table, cell, escape_markdown)
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{_note(table)}\n"


def latex(table: pd.DataFrame) -> str:
    """The same for LaTeX with booktabs, at most as wide as a NeurIPS page: the interval under its number."""

    def number(row: pd.Series) -> str:
        shown = f"{100 * row['accuracy']:.1f}"
        return rf"\textbf{{{shown}}}" if row["best"] else shown

    def interval(row: pd.Series) -> str:
        return rf"{{\tiny [{100 * row['low']:.1f}, {100 * row['high']:.1f}]}}"

    header, numbers = _grid(table, number, escape_latex)
    _, intervals = _grid(table, interval, escape_latex)
    body = "".join(
        f"    {' & '.join(upper)} \\\\[-3pt]\n    & & {' & '.join(lower[2:]).replace('–', '')} \\\\[1pt]\n"
        for upper, lower in zip(numbers, intervals, strict=True)
    )
    return (
        "% \\usepackage{booktabs}\n"
        "\\begingroup\\setlength{\\tabcolsep}{2pt}\\small\n"
        f"  \\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}\n    \\toprule\n"
        f"    {' & '.join(header)} \\\\\n    \\midrule\n{body}    \\bottomrule\n"
        f"  \\end{{tabular}}\n\\endgroup\n% {_note(table)}\n"
    )


def _grid(
    table: pd.DataFrame, cell: Callable[[pd.Series], str], escape: Callable[[str], str]
) -> tuple[list[str], list[list[str]]]:
    columns = sorted(table["eps"].unique())
    header = ["Defense", "N", *("clean" if eps == 0 else f"{eps:g}" for eps in columns)]
    rows = []
    for (name, n), line in table.groupby(["defense", "n"], sort=False):
        cells = {row["eps"]: cell(row) for _, row in line.iterrows()}
        rows.append([escape(style.label(str(name))), str(n), *(cells.get(eps, "–") for eps in columns)])
    return header, rows


def _note(table: pd.DataFrame) -> str:
    samples, seeds = sorted(table["samples"].unique()), sorted(table["seeds"].unique())
    return (
        f"Accuracy in percent by radius, with the 95 percent Wilson interval for {_range(samples)} images; "
        f"mean of {_range(seeds)} training run(s). Bold: best of its column by an exact McNemar test with Holm's "
        f"correction, p at most {LEVEL}."
    )


def _range(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\char34}",
    # At the start of a row, the \\ before it would take these two for its own.
    "[": "{[}",
    "*": "{*}",
    # Alone, so that -- is no dash and ?` no ¿.
    "-": "{-}",
    "`": "{`}",
    **{character: f"\\{character}" for character in "&%$#_"},
    # A line break could end a table row, or a comment.
    **dict.fromkeys("\r\n\t\v\f\x85\u2028\u2029", " "),
}


def escape_latex(text: str) -> str:
    """``text`` such that LaTeX prints it."""
    return "".join(_LATEX.get(character, character) for character in text)


def escape_markdown(text: str) -> str:
    """``text`` such that Markdown, in a table or not, prints it."""
    escaped = "".join(f"\\{character}" if character in r"\`*_{}[]#!|~^$:" else character for character in text)
    return " ".join(escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").split())
