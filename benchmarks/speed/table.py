"""The bench: how many times faster each variant is, and a DVERGE step by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from robench.reports import build, document, style

HEADINGS = ("part", "variant", "s", "images/s", "times faster", "of the roof, %", "accuracy, %", "")
_TITLES = {
    "pgd": "PGD step",
    "mdi2": "M-DI² step",
    "sgm": "SGM step",
    "whitebox": "white-box protocol",
    "dverge": "DVERGE step",
}
_COLORS = {
    "authors' way": "#555555",
    "no early exit": "#BBBBBB",
    "torchattacks": "#E69F00",
    "foolbox": "#CC79A7",
    "robench float32": "#56B4E9",
    "robench bfloat16": "#0072B2",
}

Report = Mapping[str, Any]


def title(report: Report) -> str:
    """What was measured, where, and what the columns mean."""
    return (
        f"{report['what']} ({report['members']} members), {report['data']}, {report['machine']}, {report['clock']}; "
        f"a step on {report['images']} images at ε {report['eps']:g}, of DVERGE on {report['batch_size']}; medians of "
        f"{report['rounds']} rounds in turns. Seconds per step, of the protocol in all."
    )


def lines(report: Report) -> list[list[str]]:
    """The cells of the table under `HEADINGS`."""
    return [
        [
            _part(row),
            row["variant"],
            _number(row["seconds"]),
            _number(row["per_second"]),
            _number(row["ratio"]),
            "" if row["roof"] is None else f"{100 * row['roof']:.0f}",
            " ".join(f"{100 * value:.1f}" for value in row["accuracy"].values()),
            row["note"],
        ]
        for row in report["rows"]
    ]


def markdown(report: Report) -> str:
    table = document.Table(list(HEADINGS), [[document.TableCell.of(text) for text in line] for line in lines(report)])
    return f"{title(report)}\n\n{document.markdown(table)}"


def speedups(report: Report, ax: Axes) -> Axes:
    """A bar per variant of every part: times faster than the authors' way; of DVERGE the mean over layers."""
    rows = [row for row in report["rows"] if row["ratio"] is not None and not row["layer"]]
    places, labels = [], []
    for place, row in enumerate(rows):
        gap = 0.6 * list(dict.fromkeys(each["part"] for each in rows)).index(row["part"])
        places.append(place + gap)
        labels.append(
            f"{_TITLES[row['part']]}, {row['variant']}" if row["variant"] == "authors' way" else row["variant"]
        )
    bars = ax.barh(places, [row["ratio"] for row in rows], color=[_color(row["variant"]) for row in rows], height=0.8)
    ax.bar_label(bars, [f"{row['ratio']:.1f}" for row in rows], padding=2, fontsize=6)
    ax.set_yticks(places, labels)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.margins(x=0.1)
    ax.set_xlabel("times faster than the authors' way")
    return ax


def layers(report: Report, ax: Axes) -> Axes:
    """Seconds of a DVERGE step against the layer that is distilled, a line per variant."""
    rows = [row for row in report["rows"] if row["part"] == "dverge" and row["layer"]]
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        points = [row["layer"] for row in own], [row["seconds"] for row in own]
        ax.plot(*points, color=_color(name), marker="o", markeredgewidth=0, label=name)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("feature layer l")
    ax.set_ylabel("seconds per DVERGE step")
    ax.legend()
    return ax


def write(report: Report, out: Path, formats: Sequence[str] = ("pdf", "png")) -> list[Path]:
    """The figure as ``bench.<format>`` in ``out``; its values are in bench.json."""
    stepwise = any(row["layer"] for row in report["rows"])
    count = sum(row["ratio"] is not None and not row["layer"] for row in report["rows"])
    if not count:
        return []
    paths = []
    with style.context():
        figure = style.figure(style.TEXT, max(2.0, 0.17 * count + 0.6))
        axes = figure.subplots(1, 2 if stepwise else 1, squeeze=False)[0]
        speedups(report, axes[0])
        if stepwise:
            layers(report, axes[1])
        for kind in formats:
            paths.append(out / f"bench.{kind}")
            build.save(figure, "robench bench", paths[-1], report["versions"])
    return paths


def _part(row: Mapping[str, Any]) -> str:
    if row["layer"] is None:
        return str(row["part"])
    return f"{row['part']}, layer {row['layer']}" if row["layer"] else f"{row['part']}, mean"


def _number(value: float | None) -> str:
    """Three digits, and no exponent."""
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _color(variant: str) -> str:
    return next(color for name, color in _COLORS.items() if variant.startswith(name))
