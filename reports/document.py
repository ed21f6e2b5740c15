"""Tables in documents: described once; written as Markdown or LaTeX here, as HTML by `templates/table.html.j2`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from robench.evaluation.findings import Finding
from robench.evaluation.words import radius


@dataclass(frozen=True)
class TableCell:
    """A cell of a table. Every format escapes its text.

    Attributes:
        sort: what it is sorted by. A column of numbers is set to the right, any other to the left.
        interval: digits in brackets, behind the text or below it; they need no escape.
        best: set bold.
        href: where it leads, in HTML.
        look: its CSS classes, in HTML.
    """

    text: str
    sort: float | str
    interval: str = ""
    best: bool = False
    href: str = ""
    look: str = ""

    @classmethod
    def of(cls, value: Any, *, rate: bool = False, look: str = "") -> TableCell:
        """A value as it is; a fraction with three digits, or where it is a rate in percent; NaN as `MISSING`."""
        if isinstance(value, (bool, np.bool_)):
            return cls("yes" if value else "no", float(value), look=look)
        if isinstance(value, (int, np.integer)):
            return cls(str(value), float(value), look=look)
        if isinstance(value, (float, np.floating)):
            if np.isnan(value):
                return MISSING
            return cls(f"{100 * value:.1f}" if rate else f"{value:.3g}", float(value), look=look)
        return cls(str(value), str(value).lower(), look=look)

    @classmethod
    def radius(cls, eps: float) -> TableCell:
        """An ε, see `robench.evaluation.words.radius`."""
        return cls(radius(eps), float(eps))

    @classmethod
    def measured(
        cls,
        value: float,
        low: float,
        high: float,
        *,
        best: bool = False,
        href: str = "",
        scale: float = 100,
        digits: int = 1,
    ) -> TableCell:
        """``scale * value`` with the ends of its interval; by default a rate in percent."""
        middle, *ends = (f"{scale * number:.{digits}f}" for number in (value, low, high))
        return cls(middle, float(value), f"[{', '.join(ends)}]", best, href)


#: Of a number that was not measured.
MISSING = TableCell("–", -1e9)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: above it, in HTML; note: below it, in Markdown and LaTeX.
    """

    headers: list[str]
    rows: list[list[TableCell]]
    caption: str = ""
    note: str = ""

    def numeric(self) -> list[bool]:
        """Whether each column holds numbers alone."""
        columns = [[row[place] for row in self.rows] for place in range(len(self.headers))]
        return [bool(column) and not any(isinstance(cell.sort, str) for cell in column) for column in columns]


#: How names of columns begin that hold rates in [0, 1], and others that do.
RATES = ("accuracy", "low", "high", "sd", "rate", "share", "ours", "published", "difference")
OTHER_RATES = ("clean", "clean_low", "clean_high", "least", "most", "alone", "transferability")


def of_frame(frame: pd.DataFrame, caption: str = "") -> Table:
    """Every value of ``frame``, rates in percent, an ``eps`` with all that tells it from another."""
    rows = [
        [
            TableCell.radius(value)
            if name == "eps"
            else TableCell.of(value, rate=str(name).startswith(RATES) or name in OTHER_RATES)
            for name, value in row.items()
        ]
        for _, row in frame.iterrows()
    ]
    return Table([str(name).replace("_", " ") for name in frame.columns], rows, caption)


def of_findings(findings: Iterable[Finding], headers: list[str], caption: str) -> Table:
    """What was asked, its status and what was seen."""
    rows = [
        [
            TableCell.of(each.name, look="name"),
            TableCell.of(each.status, look=f"text status {each.status}"),
            TableCell.of(each.said, look="long"),
        ]
        for each in findings
    ]
    return Table(headers, rows, caption)


def markdown(table: Table) -> str:
    """For GitHub: the interval behind its number, and **best**."""

    def shown(cell: TableCell) -> str:
        text = escape_markdown(cell.text)
        return f"{f'**{text}**' if cell.best else text} {cell.interval}".rstrip()

    lines = [
        [escape_markdown(header) for header in table.headers],
        ["--:" if numeric else "---" for numeric in table.numeric()],
        *([shown(cell) for cell in row] for row in table.rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + (f"\n{table.note}\n" if table.note else "")


def latex(table: Table) -> str:
    """For LaTeX with booktabs, at most as wide as a NeurIPS page: the interval under its number."""

    def shown(cell: TableCell) -> str:
        text = escape_latex(cell.text)
        return rf"\textbf{{{text}}}" if cell.best else text

    def line(cells: list[str]) -> str:
        return " ".join(" & ".join(cells).split())

    body = ""
    for row in table.rows:
        under = [rf"{{\tiny {cell.interval}}}" if cell.interval else "" for cell in row]
        body += f"    {line([shown(cell) for cell in row])} \\\\"
        body += f"[-3pt]\n    {line(under)} \\\\[1pt]\n" if any(under) else "\n"
    return (
        "% \\usepackage{booktabs}\n"
        "\\begingroup\\setlength{\\tabcolsep}{2pt}\\small\n"
        f"  \\begin{{tabular}}{{{''.join('r' if numeric else 'l' for numeric in table.numeric())}}}\n    \\toprule\n"
        f"    {line([escape_latex(header) for header in table.headers])} \\\\\n    \\midrule\n{body}    \\bottomrule\n"
        f"  \\end{{tabular}}\n\\endgroup\n" + (f"% {table.note}\n" if table.note else "")
    )


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
