"""`Outcomes` as text, as HTML in a notebook, on axes, and in LaTeX: the numbers that `Outcomes.accuracy` gives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pandas as pd

from robench.core.errors import RobenchError
from robench.core.terminal import drawn, interval
from robench.evaluation.threats import ATTACK_BY_ATTACK, BLACKBOX
from robench.evaluation.words import steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from robench.evaluation.outcomes import Outcomes

_WORDS = ("target", "threat", "clean", "images")
#: Of threats, for readers; others go by their own.
NAMES = {"whitebox": "white-box", "blackbox": "black-box", "blackbox-own": "black-box, own defense"}


#: By ε, the number as text and the images that it rests on; clean images are ε = 0.
_Line = dict[float, tuple[str, int]]


def table(outcomes: Outcomes) -> pd.DataFrame:
    """Accuracies in percent with their 95 % interval, as text: a row per target and threat, a column per ε.

    Columns target, threat, then ``clean`` and each ε as ``0.1``, and images, of those that were attacked. Under
    transfer, where a number is of a pair, the mean success between different members, without an interval. A model that
    was judged over several draws is right where it is in every one; a row of its own is in expectation. Empty text
    where nothing was measured.
    """
    clean, lines = _lines(_accuracies(outcomes), "accuracy", " {attack}")
    drawn = outcomes.where(threat=["clean", "whitebox", *BLACKBOX]).over_draws().sort_values("eps", kind="stable")
    lines |= _lines(drawn, "expectation", ", in expectation over {draws} draws")[1]
    pairs: Any = _rates(outcomes).groupby(["target", "eps"])
    for (target, eps), rates in pairs:
        said = f"{100 * rates['success'].mean():.1f}", int(rates["samples"].iloc[0])
        lines.setdefault((str(target), "transfer, success"), dict(clean.get(str(target), {})))[float(eps)] = said
    lines |= {(target, ""): line for target, line in clean.items() if not any(of == target for of, _ in lines)}
    names = named_radii(eps for line in lines.values() for eps in line)
    return pd.DataFrame(
        [
            {"target": target, "threat": threat, **{names[eps]: said for eps, (said, _) in line.items()},
             "images": _counts(line)}
            for (target, threat), line in lines.items()
        ],
        columns=["target", "threat", *names.values(), "images"],
        dtype=object,
    ).fillna("")  # fmt: skip


def named_radii(radii: Iterable[float]) -> dict[float, str]:
    """Columns by ε, clean images first: six digits of it, or all where two have those in common."""
    found = sorted({float(eps) for eps in radii} - {0.0})
    short = [f"{eps:g}" for eps in found]
    named = {eps: text if short.count(text) == 1 else repr(eps) for eps, text in zip(found, short, strict=True)}
    return {0.0: "clean", **named}


def _counts(line: _Line) -> str:
    counts = {images for eps, (_, images) in line.items() if eps > 0} or {images for _, images in line.values()}
    return " or ".join(map(str, sorted(counts)))


def by_radius(outcomes: Outcomes) -> pd.DataFrame:
    """`table` for readers: its columns of radii are called ``ε 0.1``."""
    shown = table(outcomes)
    shown.columns = [name if name in _WORDS else f"ε {name}" for name in shown.columns]
    return shown


def _lines(rows: pd.DataFrame, value: str, more: str) -> tuple[dict[str, _Line], dict[tuple[str, str], _Line]]:
    """Clean accuracies by target, and by target and threat what `table` has of them, clean ones included.

    Args:
        rows: clean ones first; value: the column that is shown; more: what follows the threat's name, a format of a
            row.
    """
    clean: dict[str, _Line] = {}
    lines: dict[tuple[str, str], _Line] = {}
    for row in rows.to_dict("records"):
        said = interval(row, value), int(row["samples"])
        if row["threat"] == "clean":
            clean[row["target"]] = {0.0: said}
        elif row["eps"] > 0:
            threat = f"{NAMES.get(row['threat'], row['threat'])}{more.format_map(row)}".strip()
            lines.setdefault((row["target"], threat), dict(clean.get(row["target"], {})))[row["eps"]] = said
    return clean, lines


def _accuracies(outcomes: Outcomes) -> pd.DataFrame:
    """Of clean images, these first, of white-box and black-box; of threats of growing effort per attack, from the
    fewest steps on, elsewhere the attack is empty."""
    clean, judged = (outcomes.where(threat=names).accuracy() for names in (["clean"], ["whitebox", *BLACKBOX]))
    each = outcomes.where(threat=list(ATTACK_BY_ATTACK)).accuracy(["target", "threat", "eps", "attack"])
    effort = each["attack"].map(steps).astype("int64")
    each = each.assign(effort=effort).sort_values(["target", "threat", "effort", "eps"], kind="stable")
    parts = [part for part in (clean.assign(attack=""), judged.assign(attack=""), each) if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else each


def _rates(outcomes: Outcomes) -> pd.DataFrame:
    """Success between different members."""
    rates = outcomes.transferability()
    return rates[(rates["member"] != "ensemble") & (rates["member"] != rates["source"].astype(str))]


def _doubts(outcomes: Outcomes) -> list[str]:
    return [str(check) for check in outcomes.checks if check.status != "pass"]


def _checked(outcomes: Outcomes) -> str:
    passed = len(outcomes.checks) - len(_doubts(outcomes))
    return f"{passed} of {len(outcomes.checks)} checks pass" if outcomes.checks else "nothing was checked"


def text(outcomes: Outcomes) -> str:
    """For the terminal: the table, and what speaks against it."""
    shown = by_radius(outcomes)
    head = f"Outcomes of {len(outcomes.frame)} rows, {_checked(outcomes)}; accuracy in % [95 % interval] by ε"
    return "\n".join([drawn(head, list(shown.columns), shown.to_numpy().tolist()), *_doubts(outcomes)])


def html(outcomes: Outcomes) -> str:
    """The same for a notebook."""
    from html import escape

    shown = by_radius(outcomes)
    doubts = "".join(f"<li>{escape(doubt)}</li>" for doubt in _doubts(outcomes))
    return (
        f"<p>Accuracy in % [95 % interval]; {escape(_checked(outcomes))}.</p>"
        f"{shown.to_html(index=False, border=0, escape=True)}{f'<ul>{doubts}</ul>' if doubts else ''}"
    )


def latex(outcomes: Outcomes) -> str:
    """The same as a ``tabular`` for LaTeX with booktabs."""
    shown = table(outcomes)
    body: str = shown.to_latex(index=False, escape=True, column_format=f"ll{'r' * (len(shown.columns) - 2)}")
    return f"% \\usepackage{{booktabs}}; accuracy in percent [95 percent interval] by radius\n{body}"


def plot(outcomes: Outcomes, ax: Axes | None) -> Axes:
    """Accuracy in percent against ε on ``ax``, by default on new axes: a line per target and threat, its 95 % interval
    as a band; clean images are ε = 0.

    Raises:
        RobenchError: there is no accuracy, as under transfer alone.
    """
    rows = outcomes.where(threat=["clean", "whitebox", *BLACKBOX]).accuracy()
    clean, attacked = rows[rows["threat"] == "clean"], rows[rows["threat"] != "clean"]
    if attacked.empty:
        raise RobenchError(
            "expected outcomes under Whitebox or Blackbox to plot; there are none: transferability() is a matrix"
        )
    if ax is None:
        from matplotlib import pyplot as plt

        ax = plt.figure().add_subplot()
    keys: Any = attacked.groupby(["target", "threat"], sort=False)
    for (target, threat), line in keys:
        points = pd.concat([clean[clean["target"] == target], line]).sort_values("eps")
        (drawn,) = ax.plot(
            points["eps"], 100 * points["accuracy"], marker="o", label=f"{target}, {NAMES.get(threat, threat)}"
        )
        ax.fill_between(points["eps"], 100 * points["low"], 100 * points["high"], alpha=0.2, color=drawn.get_color())
    ax.set(xlabel="ε", ylabel="accuracy in %", ylim=(0, 100))
    ax.legend()
    return ax
