"""One HTML file that holds the whole report: offline, usable without scripts, by keyboard and by screen reader."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from robench.core.errors import RobenchError
from robench.core.files import write_text
from robench.evaluation.outcomes import that_count
from robench.evaluation.threats import BLACKBOX
from robench.reports import against, build, document, pareto, published, style, tables, versions
from robench.reports._queries import tidy
from robench.reports.document import Table, TableCell
from robench.reports.pictures import VERSION, Picture, Pixels

#: Bytes that a report must stay below, and what images may take of them.
LIMIT = 5_000_000
_IMAGE_LIMIT = 2_000_000
#: Samples named for each attack of a drill-down: the most that keeps the file below `LIMIT`.
_NAMED = (1_000_000, 300, 100, 30, 10, 0)

#: TableCell, member and sample.
_Row = tuple[str, str, int]


class _Drills:
    """What a click on a cell or a point leads to, of the rows that count; only what is linked is written."""

    def __init__(self, frame: pd.DataFrame, pictures: Mapping[_Row, dict[str, Any]]) -> None:
        frame = that_count(frame).sort_values([*VERSION, "sample"], kind="stable", ignore_index=True)
        self._codes, versions = pd.MultiIndex.from_frame(frame[VERSION]).factorize()
        self._versions: list[Any] = versions.tolist()
        self._samples, self._correct = frame["sample"].to_numpy(), frame["correct"].to_numpy(dtype=bool)
        self._targets = pd.factorize(frame["target"])[0]
        transfer = np.flatnonzero(frame["threat"] == "transfer")
        self._points = frame.groupby(["threat", "defense", "n", "eps"], observed=True).indices
        cells = frame.iloc[transfer].groupby(["target", "eps", "surrogate", "member"], observed=True).indices
        self._cells = {key: transfer[np.asarray(found)] for key, found in cells.items()}
        near = frame[frame["cell"].isin({cell for cell, _, _ in pictures})]
        keys = zip(near["cell"], near["member"], near["sample"], strict=True)
        self._pictures = {row: pictures[key] for row, key in zip(near.index, keys, strict=True) if key in pictures}
        self._ids: dict[tuple[object, ...], str] = {}
        self._found: list[tuple[str, str, npt.NDArray[np.intp]]] = []

    def point(self, threat: str, defense: str, n: int, eps: float) -> str:
        threat = threat if eps else "clean"
        title = f"{style.label(defense)}/{n}, {style.THREATS[threat].label}" + (f", ε = {eps:g}" if eps else "")
        return self._add(("point", threat, defense, n, eps), title, self._points.get((threat, defense, n, eps)))

    def cell(self, target: str, eps: float, source: str, member: str) -> str:
        judged = "the ensemble" if member == "ensemble" else f"member {member}"
        title = f"{target}, ε = {eps:g}: crafted on member {source}, judged on {judged}"
        return self._add(("cell", target, eps, source, member), title, self._cells.get((target, eps, source, member)))

    def _add(self, key: tuple[object, ...], title: str, rows: Any) -> str:
        if rows is None:
            return ""
        if key not in self._ids:
            self._ids[key] = f"drill-{len(self._ids) + 1}"
            self._found.append((self._ids[key], title, np.asarray(rows)))
        return f"#{self._ids[key]}"

    def contents(self) -> Iterator[dict[str, Any]]:
        """For every attack, how many samples it took, and those that it was the first to take; pictures of some."""
        for name, title, rows in self._found:
            fallen = rows[~self._correct[rows]]
            took: Counter[int] = Counter(self._codes[fallen].tolist())
            first: dict[int, list[int]] = {code: [] for code in took}
            seen: set[tuple[int, int]] = set()
            for code, target, sample in zip(
                self._codes[fallen].tolist(),
                self._targets[fallen].tolist(),
                self._samples[fallen].tolist(),
                strict=True,
            ):
                if (target, sample) not in seen:
                    seen.add((target, sample))
                    first[code].append(sample)
            lines = []
            for code, samples in first.items():
                _, run, surrogate, attack, loss, restart = self._versions[code]
                about = [run, surrogate or "–", attack or "none", loss or "–"]
                lines.append({"about": about, "restart": restart, "took": took[code], "samples": samples})
            judged = len(set(zip(self._targets[rows].tolist(), self._samples[rows].tolist(), strict=True)))
            pictures = [self._pictures[row] for row in rows[np.isin(rows, list(self._pictures))].tolist()]
            yield {
                "id": name, "title": title, "lines": lines, "fallen": len(seen), "judged": judged, "pictures": pictures,
            }  # fmt: skip


def write(
    frame: pd.DataFrame,
    path: Path,
    provenance: Mapping[str, object],
    *,
    checks: Sequence[Mapping[str, str]] = (),
    pictures: Sequence[Picture] = (),
    title: str = "Robustness of ensembles",
    paper: str | None = None,
    data: against.SameData = "different",
    **more: Any,
) -> Path:
    """Writes the report: same rows, same bytes.

    Args:
        frame: outcomes.
        provenance: what made them, as JSON values.
        checks: name, status and evidence each.
        pictures: shown where their rows are listed; those that do not fit are left out.
        paper: of `robench.reports.published.names`, to compare with.
        data: see `robench.reports.against.against`.
        more: history, images, studies, costs and surrogates of `robench.reports.build.write`.

    Raises:
        RobenchError: no outcomes, or a report that cannot be kept below `LIMIT`.
    """
    frame = tidy(frame).reset_index(drop=True)
    if frame.empty:
        raise RobenchError("there are no outcomes to report; robench eval makes some")
    style.provenance_json(provenance)
    encoded = _encoded(pictures)
    drills = _Drills(frame, encoded)
    links = build.Links(cell=drills.cell, point=drills.point)
    notices = build.cautions(frame)
    with style.context():
        drawn = list(build.sheets(frame, links=links, **more))
        figures = [_figure(sheet, links) for sheet in drawn if isinstance(sheet, build.Sheet)]
    notices += [str(sheet) for sheet in drawn if isinstance(sheet, build.Skipped)]
    if len(encoded) < len(pictures):
        missing = len(pictures) - len(encoded)
        notices.append(f"{missing} pictures left out: the report holds what fits in {_IMAGE_LIMIT // 1_000_000} MB")
    values: dict[str, Any] = {
        "title": title,
        "summary": _summary(frame),
        "notices": notices,
        "checks": _checks(checks) if checks else None,
        "tables": _tables(frame, links, more.get("costs"), more.get("surrogates")),
        "paper": _paper(frame, paper, data) if paper is not None else None,
        "figures": figures,
        "provenance": dict(provenance),
        "provenance_lines": [(str(name), style.words(provenance[name])) for name in sorted(provenance)],
    }
    write_text(path, _rendered(values, drills))
    return path


def _tables(
    frame: pd.DataFrame, links: build.Links, costs: pd.DataFrame | None, surrogates: Mapping[str, float] | None
) -> list[Table]:
    """Accuracies under each threat, under everything, and at what cost."""
    found = [
        tables.described(
            tables.accuracy(frame, threat),
            f"Accuracy by ε, {style.THREATS[threat].label}, %, with 95 % Wilson intervals",
            partial(links.point, threat),
        )
        for threat in build.TABLES
        if (frame["threat"] == threat).any()
    ]
    if eps := build.telling_eps(frame, "blackbox"):
        took = versions.by_version(frame, eps)
        if surrogates:
            each = versions.by_surrogate(frame, eps, surrogates)
            found.append(versions.by_surrogate_described(each, eps, "Black-box accuracy in %, by surrogate"))
        found.append(versions.described(took, eps, "Black-box accuracy in %, by surrogate, attack and loss"))
    left = tables.worst(frame)
    if not left.empty:
        found.append(tables.worst_described(left, "Under everything that was tried, %, with 95 % Wilson intervals"))
    drawn = tables.over_draws(frame)
    if not drawn.empty:
        found.append(tables.over_draws_described(drawn, "Models that draw, in every draw and in expectation, %"))
    points = build.trade_offs(frame, costs)
    if not points.empty:
        found.append(pareto.described(points, "Clean and robust accuracy, %, with 95 % intervals, and what they cost"))
    return found


def _rendered(values: Mapping[str, Any], drills: _Drills) -> str:
    """The page, with as many samples named in each list as fit."""
    template = environment().get_template("report.html.j2")
    contents = list(drills.contents())
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


def _checks(checks: Sequence[Mapping[str, str]]) -> Table:
    rows = []
    for check in checks:
        known = check["status"] if check["status"] in ("pass", "warn", "fail") else ""
        look = f"text status {known}".rstrip()
        shown = (check["name"], "name"), (check["status"], look), (check["evidence"], "long")
        rows.append([TableCell.of(text, look=each) for text, each in shown])
    return Table(["Check", "Status", "Evidence"], rows, "Checks on these results")


def _paper(frame: pd.DataFrame, paper: str, data: against.SameData) -> dict[str, Any]:
    numbers = against.against(frame, paper, data=data)
    rows = []
    for row in numbers.to_dict("records"):
        rates = [TableCell.measured(row[name], row[f"{name}_low"], row[f"{name}_high"]) for name in _COMPARED]
        about = [row["threat"], style.label(row["defense"]), row["n"], row["eps"]]
        rows.append([*map(TableCell.of, about), *rates, TableCell.of(row["verdict"])])
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


def _linked(table: Table, values: pd.DataFrame, links: build.Links) -> Table:
    """The table of ``values``, where rows of a curve or of a matrix lead to their drill-down."""
    shown = next((place for place, name in enumerate(values.columns) if name in ("accuracy", "rate")), None)
    for cells, row in zip(table.rows, values.to_dict("records"), strict=True):
        href = ""
        if {"source", "member"} <= row.keys():
            href = links.cell(row["target"], float(row["eps"]), row["source"], row["member"])
        elif "panel" in row:
            href = links.point(row["panel"], row["defense"], int(row["n"]), float(row["eps"]))
        if href and shown is not None:
            cells[shown] = replace(cells[shown], href=href)
    return table


def _figure(sheet: build.Sheet, links: build.Links) -> dict[str, Any]:
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
        "table": _linked(document.of_frame(sheet.values, f"Values of: {sheet.title}"), sheet.values, links),
    }


def _encoded(pictures: Sequence[Picture]) -> dict[_Row, dict[str, Any]]:
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
