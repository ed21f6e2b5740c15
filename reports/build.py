"""Draws every figure and table that the outcomes have data for, and writes them."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from robench.core.errors import RobenchError, in_a_line
from robench.core.files import atomic, checked_name, write_text
from robench.evaluation.outcomes import left_out
from robench.reports import against, curves, document, pareto, sheet, style, tables, versions
from robench.reports._queries import ambiguous, survived, tidy
from robench.reports.drills import Drills
from robench.reports.sheet import FIGURES, Inputs, Sheet, Skipped

FORMATS = ("pdf", "png", "svg")
#: The threats that have a table of accuracy, and its file name.
TABLES = {threat: shown.table for threat, shown in style.THREATS.items() if shown.table}


@dataclass(frozen=True)
class Tabulated:
    """A table, its values and the name of its files."""

    name: str
    values: pd.DataFrame
    table: document.Table


@dataclass(frozen=True)
class Drawn:
    """Figures and tables of one report, ready to be written.

    Attributes:
        frame: the outcomes; drills: what points and cells of the figures lead to.
        notices: what was left out and why, what should be known of what was not.
    """

    frame: pd.DataFrame
    drills: Drills
    sheets: tuple[Sheet, ...]
    tables: tuple[Tabulated, ...]
    notices: tuple[str, ...]


def draw(frame: pd.DataFrame, **inputs: Any) -> Drawn:
    """Every figure and table that there is data for.

    Args:
        frame: outcomes.
        inputs: what else `robench.reports.sheet.Inputs` has: history, regions, studies, costs, surrogates.

    Raises:
        RobenchError: no outcomes at all.
    """
    notices = cautions(frame)  # before rivals get names of their own
    frame = tidy(frame).reset_index(drop=True)
    if frame.empty:
        raise RobenchError("there are no outcomes to report; robench eval makes some")
    drills = Drills(frame)
    given = Inputs(frame, links=drills.links, **inputs)
    with style.context():
        found = list(sheets(given))
        drawn = [each for each in found if isinstance(each, Sheet)]
        for each in drawn:
            # Laid out once: every format shows the same figure. With an engine, were it one that does nothing, each
            # is drawn twice.
            each.figure.draw_without_rendering()
            each.figure.set_layout_engine(None)
    notices += [str(each) for each in found if isinstance(each, Skipped)]
    notices += [
        f"{name} skipped: no {threat} accuracy in these outcomes"
        for threat, name in TABLES.items()
        if not name.startswith("tableA") and not given.has(threat)
    ]
    return Drawn(frame, drills, tuple(drawn), tuple(tabulated(given)), tuple(notices))


def sheets(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Every figure that there is data for, within `style.context`, and which are skipped."""
    taken: set[str] = set()
    for name in sorted(FIGURES.names(), key=sheet.order):
        for each in _drawn(name, inputs):
            if isinstance(each, Sheet):
                if checked_name(each.name, "figure") in taken:
                    raise RobenchError(f"two figures are called {each.name!r}; figure {name!r} needs another name")
                taken.add(each.name)
            yield each


def _drawn(name: str, inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """One of `FIGURES`; where it comes from another package and fails, the report goes on without it."""
    try:
        drawing = FIGURES.get(name)
    except RobenchError as error:
        yield Skipped(name, str(error))
        return
    try:
        yield from drawing(inputs)
    except Exception as error:
        if drawing.__module__.startswith("robench."):
            raise
        yield Skipped(name, in_a_line(error))


def tabulated(inputs: Inputs) -> Iterator[Tabulated]:
    """Accuracy under each threat, what each surrogate and version took, under everything, and at what cost."""
    frame, links = inputs.frame, inputs.links
    for threat, name in TABLES.items():
        if inputs.has(threat):
            points = tables.accuracy(frame, threat)
            caption = f"Accuracy by ε, {style.THREATS[threat].label}, %, with 95 % intervals"
            link = None if links is None else partial(links.point, threat)
            yield Tabulated(name, points, tables.described(points, caption, link))
    if eps := curves.telling_eps(frame, "blackbox"):
        if inputs.surrogates:
            each = versions.by_surrogate(frame, eps, inputs.surrogates)
            caption = "Black-box accuracy in %, by surrogate"
            yield Tabulated("table_surrogates", each, versions.by_surrogate_described(each, eps, caption))
        took = versions.by_version(frame, eps)
        caption = "Black-box accuracy in %, by surrogate, attack and loss"
        yield Tabulated("table_versions", took, versions.described(took, eps, caption))
    left = tables.worst(frame)
    if not left.empty:
        caption = "Under everything that was tried, %, with 95 % Wilson intervals"
        yield Tabulated("table_worst", left, tables.worst_described(left, caption))
    drawn = tables.over_draws(frame)
    if not drawn.empty:
        caption = "Models that draw, in every draw and in expectation, %"
        yield Tabulated("table_draws", drawn, tables.over_draws_described(drawn, caption))
    points = pareto.trade_offs(frame, inputs.costs)
    if not points.empty:
        caption = "Clean and robust accuracy, %, with 95 % intervals, and what they cost"
        yield Tabulated("table_pareto", points, pareto.described(points, caption))


def write(
    drawn: Drawn,
    out: Path,
    provenance: Mapping[str, object],
    *,
    paper: str | None = None,
    data: against.SameData = "different",
    others: Collection[str] = (),
    formats: Collection[str] = ("pdf", "png"),
) -> list[Path]:
    """Every figure as a file per format, with a CSV of what it shows and the provenance beside it; every table.

    Same rows, same bytes: nothing holds a date or a path.

    Args:
        provenance: what made the outcomes, as JSON values.
        paper, data, others: published numbers to set beside ours, see `robench.reports.against.against`.
        formats: of `FORMATS`.

    Returns:
        The files.

    Raises:
        RobenchError: a folder that cannot be written.
    """
    files: list[Path] = []
    with style.context():
        for each in drawn.sheets:
            paths = [out / f"{each.name}.{kind}" for kind in formats]
            for path in paths:
                save(each.figure, each.title, path, provenance)
            files += [*paths, *_beside(out, each.name, tables.csv(each.values), provenance)]
    for made in drawn.tables:
        texts = {"md": document.markdown(made.table), "tex": document.latex(made.table)}
        files += _table(out, made.name, made.values, texts, provenance)
    if paper is not None:
        numbers, claims = (
            against.against(drawn.frame, paper, data=data, others=others),
            against.orderings(drawn.frame, paper),
        )
        text = "\n".join(document.markdown(document.of_frame(each)) for each in (numbers, claims))
        files += _table(out, f"against_{paper}", numbers, {"md": text}, provenance)
    return files


def cautions(frame: pd.DataFrame) -> list[str]:
    """What a reader of these numbers should know."""
    notices = [
        f"{', '.join(rivals)} share defense, size and seed: each is shown under its own name"
        for rivals in [ambiguous(frame)]
        if rivals
    ]
    notices += left_out(frame)
    for threat in TABLES:
        notices += _uneven(frame, threat)
    return notices


def _uneven(frame: pd.DataFrame, threat: str) -> Iterator[str]:
    """What the accuracies under a threat rest on that is not the same for all."""
    verdicts = survived(frame, threat)
    verdicts = verdicts[verdicts["eps"] > 0]
    images = verdicts.groupby(["eps", "target"], observed=True)["sample"].agg(frozenset)
    for counts, what in ((verdicts["versions"], "attacks per image"), (images.map(len), "images")):
        if counts.nunique() > 1:
            yield f"{threat} points rest on {counts.min()} to {counts.max()} {what}: not all are comparable"
    others = [float(str(eps)) for eps, own in images.groupby(level="eps") if own.nunique() > 1]
    if others and images.map(len).nunique() == 1:
        radii = ", ".join(f"{eps:g}" for eps in others)
        yield (
            f"{threat} points at ε {radii} rest on as many images, and not on the same ones: not all are comparable; "
            f"judge all on the same (--subset), or see robench compare"
        )
    for (defense, n), own in verdicts.groupby(["defense", "n"], observed=True):
        seeds = own.groupby("eps", observed=True)["target"].nunique()
        if seeds.nunique() > 1:
            rest = f"rest on {seeds.min()} to {seeds.max()} trainings"
            yield f"{threat} points of {style.label(str(defense))}/{n} {rest}: not all are comparable"


def save(figure: Figure, title: str, path: Path, provenance: Mapping[str, object]) -> None:
    """Writes a figure as its suffix says, within `style.context`: same figure, same bytes."""
    buffer, kind = io.BytesIO(), path.suffix[1:]
    with _without_links(figure):
        figure.savefig(buffer, format=kind, metadata=style.metadata(provenance, title, kind))
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


@contextmanager
def _without_links(figure: Figure) -> Iterator[None]:
    """What leads to a drill-down of the page leads nowhere from a file; what is there for the mouse alone is hidden."""
    hit: list[Any] = figure.findobj(lambda artist: any(getattr(artist, "get_urls", list)()))
    before = [(artist, artist.get_urls(), artist.get_visible()) for artist in hit]
    for artist in hit:
        artist.set_urls([None])
        artist.set_visible(artist.get_visible() and artist.get_alpha() != 0)
    try:
        yield
    finally:
        for artist, urls, visible in before:
            artist.set_urls(urls)
            artist.set_visible(visible)


def _table(
    out: Path, name: str, table: pd.DataFrame, texts: Mapping[str, str], provenance: Mapping[str, object]
) -> list[Path]:
    """A table, in each way that it is written, by suffix."""
    for suffix, text in texts.items():
        write_text(out / f"{name}.{suffix}", text)
    return [*(out / f"{name}.{suffix}" for suffix in texts), *_beside(out, name, tables.csv(table), provenance)]


def _beside(out: Path, name: str, csv: str, provenance: Mapping[str, object]) -> list[Path]:
    paths = [out / f"{name}.csv", out / f"{name}.provenance.json"]
    write_text(paths[0], csv)
    write_text(paths[1], style.provenance_json(provenance) + "\n")
    return paths
