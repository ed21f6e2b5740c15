"""Writes every figure and table that the outcomes have data for."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from robench.core.errors import RobenchError
from robench.core.files import atomic, checked_name, write_text
from robench.defenses.base import DEFENSES
from robench.evaluation.outcomes import ENSEMBLE, left_out
from robench.evaluation.threats import BLACKBOX
from robench.reports import (
    against,
    appendix,
    curves,
    document,
    pareto,
    regions,
    style,
    tables,
    transferability,
    trend,
    versions,
)
from robench.reports._queries import ambiguous, tidy, transfer_rates

FORMATS = ("pdf", "png", "svg")
#: The threats that have a table of accuracy, and its file name.
TABLES = {threat: shown.table for threat, shown in style.THREATS.items() if shown.table}
#: ε of the paper's Figure 3.
TRANSFER_EPS = 0.03
#: ε at which settings of a defense are compared, or the nearest that was measured.
STUDY_EPS = 0.03


@dataclass(frozen=True)
class Sheet:
    """A figure that is ready to be written.

    Attributes:
        values: every value that it shows.
        alt: what a reader who cannot see it should know.
    """

    name: str
    title: str
    figure: Figure
    values: pd.DataFrame
    alt: str


@dataclass(frozen=True)
class Links:
    """Addresses that matrix cells (target, ε, source, member) and points (threat, defense, n, ε) lead to, for SVG."""

    cell: Callable[[str, float, str, str], str]
    point: Callable[[str, str, int, float], str]


@dataclass(frozen=True)
class Skipped:
    """A figure that is not drawn, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} skipped: {self.reason}"


@dataclass(frozen=True)
class Studies:
    """Ablations.

    Attributes:
        frame: outcomes of all their targets, which the other figures leave out.
        settings: by name ("lambda", "layer"), the value of that setting for each target.
    """

    frame: pd.DataFrame
    settings: Mapping[str, Mapping[str, float | str]]


def write(
    frame: pd.DataFrame,
    out: Path,
    provenance: Mapping[str, object],
    *,
    history: pd.DataFrame | None = None,
    images: regions.Regions | None = None,
    studies: Studies | None = None,
    costs: pd.DataFrame | None = None,
    surrogates: Mapping[str, float] | None = None,
    paper: str | None = None,
    data: against.SameData = "different",
    formats: Collection[str] = ("pdf", "png"),
) -> tuple[list[Path], list[str]]:
    """Every figure as a file per format, with a CSV of what it shows and the provenance beside it; every table.

    Same rows, same bytes: nothing holds a date or a path.

    Args:
        frame: outcomes.
        provenance: what made them, as JSON values.
        history: the training of DVERGE, see `robench.reports.trend.trend`, for Figure 2.
        images: decision regions, for Figure 1.
        studies: one setting of a defense varied; a figure each.
        costs: of training and decision, see `robench.reports.pareto.values`; surrogates: clean accuracies, by name.
        paper, data: published numbers to set beside ours, see `robench.reports.against.against`.
        formats: of "pdf", "png", "svg".

    Returns:
        The files, and notices: what was left out and why, what should be known of what was not.

    Raises:
        RobenchError: no outcomes at all, an unknown format, or a folder that cannot be written.
    """
    for kind in formats:
        if kind not in FORMATS:
            raise RobenchError(f"expected `formats` of {', '.join(FORMATS)}, got {kind!r}")
    if tidy(frame).empty:
        raise RobenchError("there are no outcomes to report; robench eval makes some")
    files: list[Path] = []
    notices = cautions(frame)
    with style.context():
        for sheet in sheets(frame, history=history, images=images, studies=studies, costs=costs, surrogates=surrogates):
            if isinstance(sheet, Skipped):
                notices.append(str(sheet))
                continue
            files += _figure(sheet, out, formats, provenance)
    for name, points, table in _tables(frame, costs, surrogates):
        texts = {"md": document.markdown(table), "tex": document.latex(table)}
        files += _table(out, name, points, texts, provenance)
    notices += [
        f"{name} skipped: no {threat} accuracy in these outcomes"
        for threat, name in TABLES.items()
        if not name.startswith("tableA") and not (frame["threat"] == threat).any()
    ]
    if paper is not None:
        numbers, claims = against.against(frame, paper, data=data), against.orderings(frame, paper)
        text = "\n".join(document.markdown(document.of_frame(each)) for each in (numbers, claims))
        files += _table(out, f"against_{paper}", numbers, {"md": text}, provenance)
    return files, notices


def _tables(
    frame: pd.DataFrame, costs: pd.DataFrame | None, surrogates: Mapping[str, float] | None
) -> Iterator[tuple[str, pd.DataFrame, document.Table]]:
    """Name, values and description of each table: accuracy under each threat, under everything, and at what cost."""
    for threat, name in TABLES.items():
        if (frame["threat"] == threat).any():
            points = tables.accuracy(frame, threat)
            yield name, points, tables.described(points)
    if eps := telling_eps(frame, "blackbox"):
        took = versions.by_version(frame, eps)
        yield "table_versions", took, versions.described(took, eps)
        if surrogates:
            each = versions.by_surrogate(frame, eps, surrogates)
            yield "table_surrogates", each, versions.by_surrogate_described(each, eps)
    left = tables.worst(frame)
    if not left.empty:
        yield "table_worst", left, tables.worst_described(left)
    drawn = tables.over_draws(frame)
    if not drawn.empty:
        yield "table_draws", drawn, tables.over_draws_described(drawn)
    points = trade_offs(frame, costs)
    if not points.empty:
        yield "table_pareto", points, pareto.described(points)


def trade_offs(frame: pd.DataFrame, costs: pd.DataFrame | None) -> pd.DataFrame:
    """`robench.reports.pareto.values` at `telling_eps`; empty where no image was judged both ways."""
    return pareto.values(frame, telling_eps(frame, *BLACKBOX, "whitebox") or _nearest(frame), costs)


def _nearest(frame: pd.DataFrame) -> float:
    """`STUDY_EPS`, or the nearest ε at which these ensembles were attacked."""
    attacked = frame.loc[(frame["eps"] > 0) & (frame["member"] == ENSEMBLE), "eps"].unique()
    return min(map(float, attacked), key=lambda value: (abs(value - STUDY_EPS), value), default=STUDY_EPS)


def sheets(
    frame: pd.DataFrame,
    *,
    history: pd.DataFrame | None = None,
    images: regions.Regions | None = None,
    studies: Studies | None = None,
    costs: pd.DataFrame | None = None,
    surrogates: Mapping[str, float] | None = None,
    links: Links | None = None,
) -> Iterator[Sheet | Skipped]:
    """Every figure that there is data for, within `style.context`, and which are skipped."""
    if images is None:
        yield Skipped("fig1_regions", "no decision regions were computed")
    else:
        yield _regions(images)
    if history is None or history.empty:
        yield Skipped("fig2_trend", "no diversity was recorded in training")
    else:
        yield _trend(history)
    yield from _transferability(frame, links)
    main, title = ("blackbox", "whitebox"), "Accuracy against ε"
    adversarial = [name for name in DEFENSES.names() if DEFENSES.get(name).adversarial_training]
    combined = tidy(frame)["defense"].isin(adversarial)
    yield from _accuracy(frame[~combined], "fig4_accuracy", title, main, links)
    yield from _accuracy(
        frame[combined], "fig5_adversarial_training", f"{title}, with adversarial training", main, links
    )
    yield _pareto(trade_offs(frame, costs))
    for threat in ("blackbox-own", "blackbox-related"):
        if (frame["threat"] == threat).any():
            name = f"figA_{threat.replace('-', '_')}"
            yield from _accuracy(frame, name, f"{title}, {style.THREATS[threat].label}", (threat,), links)
    for threat, what in _EFFORT.items():
        if (frame["threat"] == threat).any():
            yield _by_attack(frame, threat, *what)
    if (eps := telling_eps(frame, "blackbox")) and frame.loc[frame["threat"] == "blackbox", "surrogate"].nunique() > 1:
        yield _surrogates(frame, eps)
        if surrogates:
            yield _each_surrogate(frame, eps, surrogates)
    if not (frame["threat"] == "convergence").any():
        yield Skipped("figA_convergence", "no convergence check in these outcomes")
    if studies is not None:
        for name, settings in studies.settings.items():
            yield _study(studies.frame, checked_name(name, "study"), settings)


def cautions(frame: pd.DataFrame) -> list[str]:
    """What a reader of these numbers should know."""
    notices = [
        f"{', '.join(rivals)} share defense, size and seed: each is shown under its own name"
        for rivals in [ambiguous(frame)]
        if rivals
    ]
    notices += left_out(frame)
    for threat in TABLES:
        if not (frame["threat"] == threat).any():
            continue
        points = curves.values(frame, threat)
        points = points[points["eps"] > 0]
        for column, what in (("versions", "attacks per image"), ("samples", "images")):
            low, high = points[column].min(), points[column].max()
            if low != high:
                notices.append(f"{threat} points rest on {low} to {high} {what}: not all are comparable")
    return notices


def _regions(images: regions.Regions) -> Sheet:
    across = min(4, len(images.classes))
    down = -(-len(images.classes) // across)
    side = min(2.2, style.TEXT / across)
    figure = style.figure(max(style.COLUMN, side * across), down * (side + 0.1) + 0.3)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for place, (ax, title) in enumerate(zip(axes, images.classes, strict=False)):
        regions.regions(images, ax, title=title)
        if place % across == 0:
            ax.set_ylabel("random direction")
    for ax in axes[len(images.classes) :]:
        ax.set_axis_off()
    regions.legend(images, figure)
    return Sheet(
        "fig1_regions", "Decision regions", figure, images.values(),
        f"The predicted class around one image of class {images.label}, for {', '.join(images.classes)}.",
    )  # fmt: skip


def _trend(history: pd.DataFrame) -> Sheet:
    figure = style.figure(style.TEXT, 2.1)
    drawn = trend.there(history)
    for ax, quantity in zip(figure.subplots(1, len(drawn)), drawn, strict=True):
        trend.trend(history, ax, quantity=quantity)
    style.legend(figure, history["defense"], history["n"], loc="outside lower center", ncols=6)
    return Sheet(
        "fig2_trend", "Diversity and transferability along training", figure, trend.values(history),
        "Rolling means over epochs: diversity, transferability within the ensemble and, where it was recorded, clean "
        "accuracy.",
    )  # fmt: skip


def _transferability(frame: pd.DataFrame, links: Links | None) -> Iterator[Sheet | Skipped]:
    rates = transfer_rates(frame) if (frame["threat"] == "transfer").any() else pd.DataFrame()
    if rates.empty:
        yield Skipped("fig3_transferability", "no transferability in these outcomes")
        return
    radii = sorted(rates["eps"].unique(), key=lambda eps: (abs(eps - TRANSFER_EPS), eps))
    sizes = sorted(rates["n"].unique())
    for eps in radii:
        for n in sizes:
            part = rates[(rates["eps"] == eps) & (rates["n"] == n)]
            if part.empty:
                continue
            main = eps == radii[0] and n == sizes[0]
            name = "fig3_transferability" if main else f"figA_transferability_n{n}_eps{eps:g}"
            yield Sheet(
                name, f"Transferability within ensembles of {n}, ε = {eps:g}",
                transferability.panels(frame, n=int(n), eps=float(eps), link=_cells(links, float(eps))), part,
                "Percentage of samples that an attack on one member (row) takes from another or from the ensemble "
                f"(column), at ε = {eps:g}; the values are in the table.",
            )  # fmt: skip


def _accuracy(
    own: pd.DataFrame,
    name: str,
    title: str,
    panels: Collection[str],
    links: Links | None,
) -> Iterator[Sheet | Skipped]:
    threats = [threat for threat in panels if (own["threat"] == threat).any()]
    if not threats:
        yield Skipped(name, "no black-box or white-box accuracy in these outcomes")
        return
    figure = style.figure(style.TEXT if len(threats) > 1 else style.TEXT / 2 + 0.6, 2.4)
    axes = figure.subplots(1, len(threats), squeeze=False, sharey=True)[0]
    values = [curves.values(own, threat) for threat in threats]
    for ax, threat in zip(axes, threats, strict=True):
        link = None if links is None else partial(links.point, threat)
        curves.curves(own, ax, threat=threat, link=link)
        ax.label_outer()
        ax.xaxis.set_tick_params(labelbottom=True)
    shown = pd.concat(values, keys=threats, names=["panel", None]).reset_index("panel")
    style.legend(figure, shown["defense"], shown["n"], loc="outside lower center", ncols=9 if len(threats) > 1 else 4)
    surrogates = sorted(set(own.loc[own["threat"].isin(BLACKBOX) & own["threat"].isin(threats), "surrogate"]))
    alt = f"{title}, for {', '.join(map(style.label, style.order(shown['defense'])))}; the values are in the table."
    if surrogates:
        alt += f" Black-box surrogates: {', '.join(surrogates)}."
    yield Sheet(name, title, figure, shown, alt)


def _pareto(points: pd.DataFrame) -> Sheet | Skipped:
    if points.empty:
        return Skipped("fig_pareto", "no ensemble was judged both on clean images and under attack")
    panels = [panel for panel in pareto.PANELS if (points["under"] == panel).any()]
    figure = style.figure(style.TEXT if len(panels) > 1 else style.TEXT / 2 + 0.6, 3.0)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        pareto.pareto(points[points["under"] == panel], ax)
    areas = pareto.areas(points["n"])
    style.legend(figure, points["defense"], areas, areas, loc="outside lower center", ncols=6)
    front = {
        panel: [
            f"{style.label(row.defense)}/{row.n}"
            for row in points[(points["under"] == panel) & points["front"]].itertuples()
        ]
        for panel in panels
    }
    return Sheet(
        "fig_pareto", "Clean and robust accuracy", figure, points,
        "Accuracy under attack against clean accuracy. On the front: "
        + "; ".join(f"{pareto.PANELS[panel]} {', '.join(names)}" for panel, names in front.items())
        + ". The values are in the table.",
    )  # fmt: skip


def _cells(links: Links | None, eps: float) -> Callable[[str, str, str], str] | None:
    return None if links is None else lambda target, source, member: links.cell(target, eps, source, member)


def telling_eps(frame: pd.DataFrame, *threats: str) -> float | None:
    """Of the first of these threats that was evaluated, the ε at which accuracies are nearest to half the clean ones,
    on average over ensembles: where all stand, or all have fallen, none differs from another. None where there is
    none."""
    threat = next((name for name in threats if (frame["threat"] == name).any()), None)
    if threat is None:
        return None
    points = curves.values(frame, threat)
    clean = points.loc[points["eps"] == 0, "accuracy"].mean()
    means = points[points["eps"] > 0].groupby("eps")["accuracy"].mean()
    half = (1.0 if pd.isna(clean) else float(clean)) / 2
    return min(map(float, means.index), key=lambda eps: (abs(float(means[eps]) - half), eps), default=None)


def _surrogates(frame: pd.DataFrame, eps: float) -> Sheet:
    figure = style.figure(style.TEXT / 2 + 0.8, 2.3)
    shown = versions.by_surrogates(frame, eps)
    versions.surrogates(shown.copy(), figure.subplots(), eps)
    style.legend(figure, shown["defense"], shown["n"], loc="outside lower center", ncols=4)
    return Sheet(
        "figA_surrogates", "Accuracy against the number of surrogates", figure, shown,
        f"Black-box accuracy at ε = {eps:g} against the number of surrogates, on average over their choice.",
    )  # fmt: skip


def _each_surrogate(frame: pd.DataFrame, eps: float, clean: Mapping[str, float]) -> Sheet:
    shown = versions.by_surrogate(frame, eps, clean)
    figure = style.figure(style.TEXT, 1.1 + 0.28 * shown["surrogate"].nunique())
    versions.each_surrogate(shown.copy(), figure.subplots(), eps)
    style.legend(figure, shown["defense"], shown["n"], loc="outside lower center", ncols=6)
    return Sheet(
        "figA_each_surrogate", "What each surrogate leaves, and gets right itself", figure, shown,
        f"Black-box accuracy at ε = {eps:g} under each surrogate alone, and its own clean accuracy.",
    )  # fmt: skip


#: Title and description of the figures of threats of growing effort.
_EFFORT = {
    "convergence": (
        "Convergence of the white-box attack",
        "Accuracy under attacks of growing effort; flat lines mean that the attack has converged.",
    ),
    "queries": ("Accuracy against queries", "Accuracy under attacks that see outputs alone, by how many they ask for."),
}


def _by_attack(frame: pd.DataFrame, threat: str, title: str, alt: str) -> Sheet:
    figure = style.figure(style.TEXT / 2 + 0.8, 2.3)
    ax = figure.subplots()
    appendix.convergence(frame, ax, threat)
    shown = appendix.convergence_values(frame, threat)
    style.legend(figure, shown["defense"], shown["n"], loc="outside lower center", ncols=4)
    return Sheet(f"figA_{threat}", title, figure, shown, alt)


def _study(frame: pd.DataFrame, name: str, settings: Mapping[str, float | str]) -> Sheet:
    eps = _nearest(frame[frame["target"].isin(list(settings))])
    figure = style.figure(style.TEXT, 2.2)
    left, right = figure.subplots(1, 2)
    appendix.ablation(frame, left, settings=settings, name=name, eps=eps)
    appendix.trade_off(frame, right, settings=settings, name=name, eps=eps)
    return Sheet(
        f"figA_{name}", f"Accuracy by {name}", figure, appendix.setting_values(frame, settings, eps),
        f"Accuracy by {name} on the left, and accuracy under attack against clean accuracy on the right.",
    )  # fmt: skip


def save(figure: Figure, title: str, path: Path, provenance: Mapping[str, object]) -> None:
    """Writes a figure as its suffix says, within `style.context`: same figure, same bytes."""
    buffer, kind = io.BytesIO(), path.suffix[1:]
    figure.savefig(buffer, format=kind, metadata=style.metadata(provenance, title, kind))
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _figure(sheet: Sheet, out: Path, formats: Collection[str], provenance: Mapping[str, object]) -> list[Path]:
    # Laid out once: every format shows the same figure. With an engine, were it one that does nothing, each is drawn
    # twice.
    sheet.figure.draw_without_rendering()
    sheet.figure.set_layout_engine(None)
    paths = [out / f"{sheet.name}.{kind}" for kind in formats]
    for path in paths:
        save(sheet.figure, sheet.title, path, provenance)
    return [*paths, *_beside(out, sheet.name, tables.csv(sheet.values), provenance)]


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
