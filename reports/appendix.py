"""Figures of the appendix: has the attack converged, and what one setting of a defense does."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes

from robench.core.errors import RobenchError
from robench.evaluation.words import steps
from robench.reports import style
from robench.reports._queries import survived, tidy, verdicts, wilson

_LOOKS = {
    "clean": ("#555555", "o", "clean"),
    "blackbox": ("#0072B2", "D", "black-box"),
    "whitebox": ("#D55E00", "s", "white-box"),
}


def convergence_values(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per defense, size, attack and ε, attacks by growing steps: accuracy, low, high in [0, 1], samples, seeds.

    Raises:
        RobenchError: no convergence check in these outcomes.
    """
    rows = tidy(frame)
    rows = rows[rows["threat"] == "convergence"]
    if rows.empty:
        raise RobenchError("no convergence check in these outcomes; run `robench eval --threat convergence`")
    point = ["defense", "n", "eps", "attack"]
    runs = (
        verdicts(rows, [*point, "seed", "target"])
        .groupby([*point, "seed"], observed=True)["correct"]
        .agg(["mean", "size"])
        .reset_index()
    )
    points = (
        runs.groupby(point, observed=True)
        .agg(accuracy=("mean", "mean"), samples=("size", "min"), seeds=("seed", "size"))
        .reset_index()
    )
    points["low"], points["high"] = wilson(points["accuracy"], points["samples"])
    points["steps"] = points["attack"].map(steps)
    return points.sort_values(["defense", "n", "eps", "steps", "attack"], ignore_index=True)


def convergence(frame: pd.DataFrame, ax: Axes) -> Axes:
    """Accuracy in percent by attack, from the weakest to the strongest."""
    points = convergence_values(frame)
    attacks = points.sort_values(["steps", "attack"])["attack"].drop_duplicates().tolist()
    for name in style.order(points["defense"]):
        for n, eps in points.loc[points["defense"] == name, ["n", "eps"]].drop_duplicates().itertuples(index=False):
            line = points[(points["defense"] == name) & (points["n"] == n) & (points["eps"] == eps)]
            ax.plot(
                [attacks.index(attack) for attack in line["attack"]], 100 * line["accuracy"].to_numpy(),
                color=style.color(name), linestyle=style.dash(n), marker=style.marker(name), markeredgewidth=0,
            )  # fmt: skip
    ax.set_xticks(range(len(attacks)), [_short(attack) for attack in attacks])
    ax.set_xlim(-0.3, len(attacks) - 0.7)
    ax.set_ylim(-2, 102)
    ax.set_ylabel("accuracy, %")
    ax.set_title(f"Convergence at ε = {', '.join(f'{eps:g}' for eps in sorted(points['eps'].unique()))}")
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
    runs = verdicts.groupby(["threat", "target"], observed=True)["correct"].agg(["mean", "size"]).reset_index()
    runs["setting"] = [settings[target] for target in runs["target"]]
    points = (
        runs.groupby(["threat", "setting"], observed=True)
        .agg(accuracy=("mean", "mean"), samples=("size", "min"), seeds=("target", "size"))
        .reset_index()
    )
    points["low"], points["high"] = wilson(points["accuracy"], points["samples"])
    return points.assign(eps=[0.0 if threat == "clean" else eps for threat in points["threat"]])


def ablation(frame: pd.DataFrame, ax: Axes, *, settings: Mapping[str, float | str], name: str, eps: float) -> Axes:
    """Accuracy in percent by a setting of the defense, such as the distillation layer: clean and under each threat."""
    points = setting_values(frame, settings, eps)
    for threat, (color, marker, label) in _LOOKS.items():
        line = points[points["threat"] == threat]
        if not line.empty:
            ax.plot(
                line["setting"].to_numpy(), 100 * line["accuracy"].to_numpy(), color=color, marker=marker,
                markeredgewidth=0, label=label if threat == "clean" else f"{label}, ε = {eps:g}",
            )  # fmt: skip
    ax.set_xlabel(name)
    ax.set_ylabel("accuracy, %")
    ax.set_ylim(-2, 102)
    ax.legend(loc="best")
    return ax


def trade_off(frame: pd.DataFrame, ax: Axes, *, settings: Mapping[str, float | str], name: str, eps: float) -> Axes:
    """Accuracy under attack against clean accuracy, both in percent, each point with the value of its setting."""
    points = setting_values(frame, settings, eps).pivot(index="setting", columns="threat", values="accuracy")
    if "clean" not in points:
        raise RobenchError("expected clean outcomes of these targets for a trade-off, got none")
    for threat in [threat for threat in ("blackbox", "whitebox") if threat in points]:
        color, marker, label = _LOOKS[threat]
        ax.plot(
            100 * points["clean"].to_numpy(), 100 * points[threat].to_numpy(), color=color, marker=marker,
            markeredgewidth=0, label=f"{label}, ε = {eps:g}",
        )  # fmt: skip
        for value, row in points.iterrows():
            ax.annotate(
                value if isinstance(value, str) else f"{value:g}", (100 * row["clean"], 100 * row[threat]),
                xytext=(0, 4), textcoords="offset points", ha="center", fontsize=5.5, color="#333333",
            )  # fmt: skip
    ax.margins(0.12, 0.2)
    ax.set_xlabel(f"clean accuracy, % (numbers: {name})")
    ax.set_ylabel("accuracy under attack, %")
    ax.legend(loc="best")
    return ax


def _short(attack: str) -> str:
    name, count = attack.split(":")[0].upper(), steps(attack)
    return name if count == 1 else f"{name}-{count}"
