"""Figures of the appendix: has the attack converged, and what one setting of a defense does."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes

from robench.core.errors import RobenchError
from robench.evaluation.outcomes import robust
from robench.evaluation.words import steps
from robench.reports import style
from robench.reports._queries import accuracies, survived, tidy
from robench.reports.lines import lines, look

#: Threats whose accuracy a setting of a defense is drawn against, and their lines.
_LOOKS = {threat: shown.look for threat, shown in style.THREATS.items() if shown.look}

#: What the points of these figures say.
_VALUES = ["accuracy", "samples", "seeds", "low", "high"]


def convergence_values(frame: pd.DataFrame, threat: str = "convergence") -> pd.DataFrame:
    """One row per defense, size, attack and ε, attacks by growing steps or queries: accuracy, low, high in [0, 1],
    samples, seeds.

    Raises:
        RobenchError: nothing was measured under that threat.
    """
    rows = tidy(frame)
    rows = rows[rows["threat"] == threat]
    if rows.empty:
        raise RobenchError(f"no {threat} in these outcomes; run `robench eval --threat {threat}`")
    point = ["defense", "n", "eps", "attack"]
    points = accuracies(robust(rows, [*point, "seed", "target"]), point)[[*point, *_VALUES]]
    points["steps"] = points["attack"].map(steps)
    return points.sort_values(["defense", "n", "eps", "steps", "attack"], ignore_index=True)


def convergence(frame: pd.DataFrame, ax: Axes, threat: str = "convergence") -> Axes:
    """Accuracy in percent by attack, from the weakest to the strongest."""
    points = convergence_values(frame, threat)
    attacks = points.sort_values(["steps", "attack"])["attack"].drop_duplicates().tolist()
    points["place"] = points["attack"].map(attacks.index)
    points["line"] = [
        f"{name}/{n} {eps}" for name, n, eps in zip(*(points[c] for c in ("defense", "n", "eps")), strict=True)
    ]
    looks = {
        line: look(name, n)
        for name in style.order(points["defense"])
        for line, n in points.loc[points["defense"] == name, ["line", "n"]].drop_duplicates().itertuples(index=False)
    }
    lines(points, ax, x="place", y="accuracy", looks=looks)
    ax.set_xticks(range(len(attacks)), [_short(attack) for attack in attacks])
    ax.set_xlabel("")
    ax.set_xlim(-0.3, len(attacks) - 0.7)
    ax.set_ylim(-2, 102)
    ax.set_ylabel("accuracy, %")
    ax.set_title(f"{threat.capitalize()} at ε = {', '.join(f'{eps:g}' for eps in sorted(points['eps'].unique()))}")
    return ax


def setting_values(frame: pd.DataFrame, settings: Mapping[str, float | str], eps: float) -> pd.DataFrame:
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
    points = accuracies(verdicts.assign(setting=setting), ["threat", "setting"])[["threat", "setting", *_VALUES]]
    return points.assign(eps=[0.0 if threat == "clean" else eps for threat in points["threat"]])


def ablation(frame: pd.DataFrame, ax: Axes, *, settings: Mapping[str, float | str], name: str, eps: float) -> Axes:
    """Accuracy in percent by a setting of the defense, such as the distillation layer: clean and under each threat."""
    points = setting_values(frame, settings, eps)
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
    wide = setting_values(frame, settings, eps).pivot(index="setting", columns="threat")
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


def _short(attack: str) -> str:
    name, count = attack.split(":")[0].upper(), steps(attack)
    return name if count == 1 else f"{name}-{count}"
