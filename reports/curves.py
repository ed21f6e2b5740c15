"""Figures 4 and 5: accuracy against ε."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial

import pandas as pd
from matplotlib.axes import Axes

from robench.core.errors import RobenchError
from robench.defenses.base import DEFENSES
from robench.evaluation.outcomes import ENSEMBLE
from robench.evaluation.threats import BLACKBOX
from robench.reports import style
from robench.reports._queries import accuracies, survived
from robench.reports.lines import by_defense, lines
from robench.reports.sheet import FIGURES, Inputs, Sheet, Skipped

#: ε at which ensembles are compared where there is room for one, or the nearest that was measured.
EPS = 0.03
_TITLE = "Accuracy against ε"

#: The link of a point, from (defense, n, ε).
Link = Callable[[str, int, float], str]


def values(frame: pd.DataFrame, threat: str) -> pd.DataFrame:
    """One row per defense, size and ε: accuracy in [0, 1] under ``threat``, and at ε = 0 the clean one.

    Raises:
        RobenchError: nothing was measured under that threat.
    """
    verdicts = survived(frame, threat, "clean")
    attacked = verdicts[verdicts["threat"] == threat]
    if attacked.empty:
        raise RobenchError(f"no {threat} accuracy in these outcomes; run `robench eval --threat {threat}`")
    # A clean accuracy alone is no curve.
    clean = verdicts[(verdicts["threat"] == "clean") & verdicts["target"].isin(attacked["target"].unique())]
    # An attack at ε = 0 is no second clean accuracy.
    attacked = attacked[attacked["eps"] > 0]
    points = accuracies(pd.concat([clean, attacked]))
    points["defense"] = points["defense"].astype(object)
    columns = ["threat", "defense", "n", "eps", "accuracy", "low", "high", "sd", "seeds", "samples", "versions"]
    return style.ordered(points, "defense", "n", "eps")[columns]


def curves(frame: pd.DataFrame, ax: Axes, *, threat: str, link: Link | None = None) -> Axes:
    """Accuracy in percent against ε: defense by colour and marker, N by dash; the 95 % interval as a band, one
    standard deviation over seeds as bars.

    Args:
        frame: outcomes of ``threat`` and "clean".
        link: the address that a point leads to, for SVG.
    """
    points = values(frame, threat)
    lines(points, ax, x="eps", y="accuracy", looks=by_defense(points))
    if link is not None:
        # Larger than the marker, and not seen: what a mouse can hit.
        places = zip(points["defense"], points["n"], points["eps"], strict=True)
        ax.scatter(
            points["eps"], 100 * points["accuracy"], s=40, alpha=0, zorder=5, urls=[link(*each) for each in places]
        )
    ax.set_ylim(-2, 102)
    ax.set_xlim(left=-0.02 * float(points["eps"].max()))
    ax.set_xlabel("perturbation ε (ℓ∞, pixels in [0, 1])")
    ax.set_ylabel("accuracy, %")
    ax.set_title(style.THREATS[threat].title if threat in style.THREATS else threat)
    return ax


def telling_eps(frame: pd.DataFrame, *threats: str) -> float | None:
    """Of the first of these threats that was evaluated, and of the ε at which the most ensembles were, the one at which
    accuracies are nearest to half the clean ones, on average over ensembles: where all stand, or all have fallen, none
    differs from another. None where there is none."""
    threat = next((name for name in threats if (frame["threat"] == name).any()), None)
    if threat is None:
        return None
    points = values(frame, threat)
    clean = points.loc[points["eps"] == 0, "accuracy"].mean()
    each = points[points["eps"] > 0].groupby("eps")["accuracy"]
    means = each.mean()[each.size() == each.size().max()]
    half = (1.0 if pd.isna(clean) else float(clean)) / 2
    return min(map(float, means.index), key=lambda eps: (abs(float(means[eps]) - half), eps), default=None)


def nearest_eps(frame: pd.DataFrame) -> float:
    """`EPS`, or the nearest ε at which these ensembles were attacked."""
    attacked = frame.loc[(frame["eps"] > 0) & (frame["member"] == ENSEMBLE), "eps"].unique()
    return min(map(float, attacked), key=lambda value: (abs(value - EPS), value), default=EPS)


@FIGURES.register("fig4_accuracy")
def without_adversarial_training(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Figure 4: accuracy against ε, of defenses without adversarial training."""
    yield from _accuracy(inputs, inputs.frame[~_adversarial(inputs.frame)], "fig4_accuracy", _TITLE)


@FIGURES.register("fig5_adversarial_training")
def with_adversarial_training(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Figure 5: accuracy against ε, of defenses with adversarial training."""
    own, title = inputs.frame[_adversarial(inputs.frame)], f"{_TITLE}, with adversarial training"
    yield from _accuracy(inputs, own, "fig5_adversarial_training", title)


@FIGURES.register("figA_blackbox_own")
def own_surrogates(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Accuracy against ε, black-box from surrogates of the target's own defense."""
    yield from _appendix(inputs, "blackbox-own")


@FIGURES.register("figA_blackbox_related")
def related_surrogates(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Accuracy against ε from related networks, which is no black-box result."""
    yield from _appendix(inputs, "blackbox-related")


def _adversarial(frame: pd.DataFrame) -> pd.Series:
    defenses = frame["registered" if "registered" in frame else "defense"]
    return defenses.isin([name for name in defenses.unique() if _trains_adversarially(name)])


def _trains_adversarially(defense: str) -> bool:
    """What the defense declares; False of one that is not installed here or does not load, as of an imported model."""
    try:
        return DEFENSES.get(defense).adversarial_training
    except RobenchError:
        return False


def _appendix(inputs: Inputs, threat: str) -> Iterator[Sheet | Skipped]:
    if inputs.has(threat):
        name = f"figA_{threat.replace('-', '_')}"
        yield from _accuracy(inputs, inputs.frame, name, f"{_TITLE}, {style.THREATS[threat].label}", (threat,))


def _accuracy(
    inputs: Inputs, own: pd.DataFrame, name: str, title: str, panels: Collection[str] = ("blackbox", "whitebox")
) -> Iterator[Sheet | Skipped]:
    threats = [threat for threat in panels if (own["threat"] == threat).any()]
    if not threats:
        yield Skipped(name, "no black-box or white-box accuracy in these outcomes")
        return
    figure = style.figure(style.TEXT if len(threats) > 1 else style.TEXT / 2 + 0.6, 2.4)
    axes = figure.subplots(1, len(threats), squeeze=False, sharey=True)[0]
    for ax, threat in zip(axes, threats, strict=True):
        link = None if inputs.links is None else partial(inputs.links.point, threat)
        curves(own, ax, threat=threat, link=link)
        ax.label_outer()
        ax.xaxis.set_tick_params(labelbottom=True)
    shown = pd.concat([values(own, threat) for threat in threats], keys=threats, names=["panel", None])
    shown = shown.reset_index("panel")
    style.legend(figure, shown["defense"], shown["n"], loc="outside lower center", ncols=9 if len(threats) > 1 else 4)
    surrogates = sorted(set(own.loc[own["threat"].isin(BLACKBOX) & own["threat"].isin(threats), "surrogate"]))
    alt = f"{title}, for {', '.join(map(style.label, style.order(shown['defense'])))}; the values are in the table."
    if surrogates:
        alt += f" Black-box surrogates: {', '.join(surrogates)}."
    yield Sheet(name, title, figure, shown, alt, "points")
