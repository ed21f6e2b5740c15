"""One HTML file that holds the whole report: offline, usable without scripts, by keyboard and by screen reader."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from robench.core.errors import RobenchError
from robench.core.files import write_text
from robench.evaluation.findings import Finding
from robench.evaluation.threats import BLACKBOX
from robench.reports import against, document, published, style
from robench.reports.build import Drawn
from robench.reports.document import Table, TableCell
from robench.reports.drills import Row
from robench.reports.pictures import Picture, Pixels
from robench.reports.sheet import Links, Sheet

#: Bytes that a report must stay below, and what images may take of them.
LIMIT = 5_000_000
_IMAGE_LIMIT = 2_000_000
#: Samples named for each attack of a drill-down: the most that keeps the file below `LIMIT`.
_NAMED = (1_000_000, 300, 100, 30, 10, 0)


def write(
    drawn: Drawn,
    path: Path,
    provenance: Mapping[str, object],
    *,
    checks: Sequence[Finding] = (),
    trainings: Table | None = None,
    pictures: Sequence[Picture] = (),
    title: str = "Robustness of ensembles",
    paper: str | None = None,
    data: against.SameData = "different",
    others: Collection[str] = (),
) -> Path:
    """Writes the report: same rows, same bytes.

    Args:
        provenance: what made the outcomes, as JSON values.
        checks: what was found of these results.
        trainings: how the ensembles were trained.
        pictures: shown where their rows are listed; those that do not fit are left out.
        paper: of `robench.reports.published.names`, to compare with.
        data, others: see `robench.reports.against.against`.

    Raises:
        RobenchError: a report that cannot be kept below `LIMIT`.
    """
    style.provenance_json(provenance)
    encoded = _encoded(pictures)
    with style.context():
        figures = [_figure(sheet, drawn.drills.links) for sheet in drawn.sheets]
    notices = list(drawn.notices)
    if len(encoded) < len(pictures):
        missing = len(pictures) - len(encoded)
        notices.append(f"{missing} pictures left out: the report holds what fits in {_IMAGE_LIMIT // 1_000_000} MB")
    found = document.of_findings(checks, ["Check", "Status", "Evidence"], "Checks on these results")
    values: dict[str, Any] = {
        "title": title,
        "summary": _summary(drawn.frame),
        "notices": notices,
        "checks": found if checks else None,
        "trainings": trainings,
        "tables": [each.table for each in drawn.tables],
        "paper": _paper(drawn.frame, paper, data, others) if paper is not None else None,
        "figures": figures,
        "provenance": dict(provenance),
        "provenance_lines": [(str(name), style.words(provenance[name])) for name in sorted(provenance)],
    }
    write_text(path, _rendered(values, list(drawn.drills.contents(encoded))))
    return path


def _rendered(values: Mapping[str, Any], contents: Sequence[Mapping[str, Any]]) -> str:
    """The page, with as many samples named in each list as fit."""
    template = environment().get_template("report.html.j2")
    for limit in _NAMED:
        text = template.render(**values, drills=contents, limit=limit)
        if len(text.encode()) < LIMIT:
            return text
    raise RobenchError(
        f"the report would be larger than {LIMIT // 1_000_000} MB; report fewer targets, ε values or pictures at a time"
    )


def environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("robench.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["csp"] = csp
    environment.globals["lines"] = _lines
    return environment


def csp(script: str) -> str:
    """The hash by which the content policy admits our script, and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def _lines(lines: Sequence[Mapping[str, Any]], limit: int) -> Table:
    """The attacks of a drill-down, with as many samples named."""
    rows = []
    for line in lines:
        samples, more = line["samples"][:limit], len(line["samples"]) - limit
        named = (" ".join(map(str, samples)) or "–") + (f" and {more} more" if more > 0 else "")
        about = [*line["about"], line["restart"], line["took"]]
        rows.append([*map(TableCell.of, about), TableCell.of(named, look="long")])
    headers = ["Target", "Surrogate", "Attack", "Loss", "Restart", "Took", "Samples it took first"]
    return Table(headers, rows)


def _summary(frame: pd.DataFrame) -> list[tuple[str, str]]:
    surrogates = sorted(set(frame.loc[frame["threat"].isin(BLACKBOX), "surrogate"]))
    radii = sorted(set(frame.loc[frame["eps"] > 0, "eps"]))
    return [
        ("Ensembles", ", ".join(sorted(frame["target"].unique()))),
        ("Test images", f"{frame['sample'].nunique():,}"),
        ("Threats", ", ".join(sorted(frame["threat"].unique()))),
        ("ε", ", ".join(f"{eps:g}" for eps in radii) or "none"),
        ("Attacks", ", ".join(sorted(set(frame["attack"]) - {""})) or "none"),
        ("Black-box surrogates", ", ".join(surrogates) or "none"),
        ("Verdicts", f"{len(frame):,}"),
    ]


def _paper(frame: pd.DataFrame, paper: str, data: against.SameData, others: Collection[str]) -> dict[str, Any]:
    numbers = against.against(frame, paper, data=data, others=others)
    rows = []
    for row in numbers.to_dict("records"):
        rates = [TableCell.measured(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in _COMPARED]
        about = [row["threat"], style.label(row["defense"]), row["n"]]
        eps = TableCell.radius(row["eps"])
        rows.append([*map(TableCell.of, about), eps, *rates, TableCell.of(row["verdict"])])
    verdicts = numbers["verdict"].value_counts()
    return {
        "title": published.read(paper).title,
        "count": ", ".join(f"{verdicts[name]} {name}" for name in sorted(verdicts.index)) or "nothing in common",
        "numbers": Table(
            ["Threat", "Defense", "N", "ε", *map(str.capitalize, _COMPARED), "Verdict"],
            rows,
            "Ours and the published numbers, %, with 95 % intervals for the images",
        ),
        "orderings": document.of_frame(
            against.orderings(frame, paper), "What a reproduction must show: left above right (difference in %)"
        ),
    }


_COMPARED = ("ours", "published", "difference")


def _values(sheet: Sheet, links: Links) -> Table:
    """What a figure shows, where rows of a curve or of a matrix lead to their drill-down."""
    table = document.of_frame(sheet.values, f"Values of: {sheet.title}")
    shown = next((place for place, name in enumerate(sheet.values.columns) if name in ("accuracy", "rate")), None)
    if sheet.rows_are == "" or shown is None:
        return table
    for cells, row in zip(table.rows, sheet.values.to_dict("records"), strict=True):
        if sheet.rows_are == "cells":
            href = links.cell(row["target"], float(row["eps"]), row["source"], row["member"])
        else:
            href = links.point(row["panel"], row["defense"], int(row["n"]), float(row["eps"]))
        cells[shown] = replace(cells[shown], href=href)
    return table


def _figure(sheet: Sheet, links: Links) -> dict[str, Any]:
    buffer = io.StringIO()
    # An empty dictionary of metadata would still hold a date.
    sheet.figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Several figures share a page: ids must not. Links to drill-downs stay as they are.
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)(?!drill-)', rf"\g<1>{sheet.name}-", svg)
    # The table below has the same links, in order and with names: the keyboard goes there. matplotlib would open
    # each in a new tab.
    svg = re.sub(r'<a xlink:href="(#drill-\d+)"[^>]*>', r'<a tabindex="-1" xlink:href="\1">', svg)
    alt = Markup('role="img" aria-label="{}"').format(sheet.alt)
    return {
        "name": sheet.name,
        "title": sheet.title,
        "width": 10 * sheet.figure.get_figwidth(),
        "svg": Markup(svg.replace("<svg ", f"<svg {alt} ", 1)),
        "table": _values(sheet, links),
    }


def _encoded(pictures: Sequence[Picture]) -> dict[Row, dict[str, Any]]:
    """By row, what the page shows of each picture: the first ones, as many as fit."""
    encoded, size = {}, 0
    for picture in pictures:
        urls = {title: _png(pixels) for title, pixels in picture.panels().items()}
        size += sum(map(len, urls.values()))
        if size > _IMAGE_LIMIT:
            break
        encoded[picture.cell, picture.member, picture.sample] = {"caption": picture.caption, "urls": urls}
    return encoded


def _png(picture: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
