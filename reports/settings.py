"""What one setting of a defense does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd
from matplotlib.axes import Axes

from robench.core.errors import RobenchError
from robench.core.files import checked_name
from robench.reports import style
from robench.reports._queries import accuracies, survived
from robench.reports.curves import nearest_eps
from robench.reports.lines import lines
from robench.reports.sheet import FIGURES, Inputs, Sheet, Skipped

#: Threats whose accuracy a setting of a defense is drawn against, and their lines.
_LOOKS = {threat: shown.look for threat, shown in style.THREATS.items() if shown.look}


def values(frame: pd.DataFrame, settings: Mapping[str, float | str], eps: float) -> pd.DataFrame:
    """One row per setting and threat: accuracy at ε (clean: at 0), low, high in [0, 1], seeds.

    Args:
        settings: the value of the setting for each target, such as λ or the layer: numbers, or words.

    Raises:
        RobenchError: none of these targets was attacked at ε.
    """
    verdicts = survived(frame[frame["target"].isin(list(settings))], *_LOOKS)
    verdicts = verdicts[(verdicts["threat"] == "clean") | (verdicts["eps"] == eps)]
    if (verdicts["threat"] == "clean").all():
        raise RobenchError(f"none of these targets was attacked at ε = {eps:g}: {', '.join(sorted(settings))}")
    setting = [settings[target] for target in verdicts["target"]]
    points = accuracies(verdicts.assign(setting=setting), ["threat", "setting"])[
        ["threat", "setting", "accuracy", "samples", "seeds", "low", "high"]
    ]
    return points.assign(eps=[0.0 if threat == "clean" else eps for threat in points["threat"]])


def ablation(frame: pd.DataFrame, ax: Axes, *, settings: Mapping[str, float | str], name: str, eps: float) -> Axes:
    """Accuracy in percent by a setting of the defense, such as the distillation layer: clean and under each threat."""
    points = values(frame, settings, eps)
    labels = {
        threat: style.THREATS[threat].label + (f", ε = {eps:g}" if threat != "clean" else "") for threat in _LOOKS
    }
    points["line"] = points["threat"].astype(str).map(labels)
    lines(points, ax, x="setting", y="accuracy", looks={labels[threat]: _LOOKS[threat] for threat in labels})
    ax.set_xlabel(name)
    ax.set_ylabel("accuracy, %")
    ax.set_ylim(-2, 102)
    ax.legend(loc="best")
    return ax


def trade_off(frame: pd.DataFrame, ax: Axes, *, settings: Mapping[str, float | str], name: str, eps: float) -> Axes:
    """Accuracy under attack against clean accuracy, both in percent, each point with the value of its setting."""
    wide = values(frame, settings, eps).pivot(index="setting", columns="threat")
    points = 100 * wide[["accuracy", "low", "high"]]
    if "clean" not in points["accuracy"]:
        raise RobenchError("expected clean outcomes of these targets for a trade-off, got none")
    x, across = points["accuracy", "clean"], _reach(points, "clean")
    for threat in [threat for threat in ("blackbox", "whitebox") if threat in points["accuracy"]]:
        y, drawn = points["accuracy", threat], _LOOKS[threat]
        label = f"{style.THREATS[threat].label}, ε = {eps:g}"
        ax.plot(x.to_numpy(), y.to_numpy(), color=drawn.color, marker=drawn.marker, markeredgewidth=0, label=label)
        ax.errorbar(
            x, y, xerr=across, yerr=_reach(points, threat), fmt="none", ecolor=drawn.color, elinewidth=0.5, alpha=0.5
        )
        for value in points.index:
            ax.annotate(
                value if isinstance(value, str) else f"{value:g}", (x[value], y[value]),
                xytext=(0, 4), textcoords="offset points", ha="center", fontsize=5.5, color="#333333",
            )  # fmt: skip
    ax.margins(0.12, 0.2)
    ax.set_xlabel(f"clean accuracy, % (numbers: {name})")
    ax.set_ylabel("accuracy under attack, %")
    ax.legend(loc="best")
    return ax


def _reach(points: pd.DataFrame, threat: str) -> list[pd.Series]:
    """How far an interval reaches below and above its accuracy."""
    low, middle, high = (points[name, threat] for name in ("low", "accuracy", "high"))
    return [middle - low, high - middle]


@FIGURES.register("figA_settings")
def sheets(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Accuracy by a setting of a defense; a figure of each study, under the setting's name."""
    if inputs.studies is not None:
        for name, settings in inputs.studies.settings.items():
            yield _sheet(inputs.studies.frame, checked_name(name, "study"), settings)


def _sheet(frame: pd.DataFrame, name: str, settings: Mapping[str, float | str]) -> Sheet:
    eps = nearest_eps(frame[frame["target"].isin(list(settings))])
    figure = style.figure(style.TEXT, 2.2)
    left, right = figure.subplots(1, 2)
    ablation(frame, left, settings=settings, name=name, eps=eps)
    trade_off(frame, right, settings=settings, name=name, eps=eps)
    return Sheet(
        f"figA_{name}", f"Accuracy by {name}", figure, values(frame, settings, eps),
        f"Accuracy by {name} on the left, and accuracy under attack against clean accuracy on the right.",
    )  # fmt: skip
