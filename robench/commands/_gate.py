"""`--require`: what an accuracy must be, for CI."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click

from robench.commands._shared import refuse_given
from robench.core.errors import RobenchError

_FORM = re.compile(r"\s*([a-z-]+)\s*(?:@\s*([^<>=\s]+))?\s*>=\s*([0-9.]+)\s*(%?)\s*")


@dataclass(frozen=True)
class Requirement:
    """At least ``percent`` of accuracy under ``threat`` at ``eps``; 0 for clean images."""

    text: str
    threat: str
    eps: float
    percent: float

    def of(self, threat: str, eps: float) -> bool:
        return threat == self.threat and math.isclose(eps, self.eps, rel_tol=1e-6, abs_tol=1e-9)


@dataclass(frozen=True)
class Verdict:
    """A requirement held against one accuracy; fractions in [0, 1]."""

    require: str
    target: str
    accuracy: float
    low: float
    high: float
    judged_by: str
    met: bool

    def __str__(self) -> str:
        value = f"{100 * self.accuracy:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}] %"
        said = "met " if self.met else "FAIL"
        return f"{said}  {self.require}: {self.target} has {value}, judged by the {self.judged_by}"


def gated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options."""
    require = click.option(
        "--require",
        multiple=True,
        metavar="THREAT@EPS>=PERCENT",
        help="Exit code 1 where an accuracy is lower: whitebox@0.01>=60, blackbox@8/255>=20, clean>=90.",
    )
    low = click.option(
        "--lower-bound",
        is_flag=True,
        help="Judge --require by the lower end of the 95 % interval; by default by the accuracy itself.",
    )
    return require(low(function))


def requirements(texts: Sequence[str]) -> list[Requirement]:
    """What the user typed, understood; RobenchError where it cannot be."""
    from robench.evaluation import words

    if not texts:
        refuse_given({"lower_bound"}, "has an effect only with --require")
    found = []
    for text in texts:
        match = _FORM.fullmatch(text)
        if match is None or (match[1] == "clean") != (match[2] is None) or not _percent(match[3]):
            raise RobenchError(
                f"expected --require as THREAT@EPS>=PERCENT, such as whitebox@0.01>=60, or clean>=90; got {text!r}"
            )
        if 0 < float(match[3]) < 1 and not match[4]:
            raise RobenchError(
                f"expected percent in --require {text!r}, got the fraction {match[3]}; type {100 * float(match[3]):g}, "
                f"or {match[3]}% where that is meant"
            )
        eps = words.radii(match[2]) if match[2] else (0.0,)
        if len(eps) != 1:
            raise RobenchError(f"expected one ε in --require {text!r}; say it several times")
        found.append(Requirement(text, match[1], eps[0], float(match[3])))
    return found


def _percent(text: str) -> bool:
    try:
        return 0 <= float(text) <= 100
    except ValueError:
        return False


def refuse_unmeasured(wanted: Sequence[Requirement], measured: Iterable[tuple[str, float]], what: str) -> None:
    """RobenchError where no number is of a requirement.

    Args:
        measured: threats and ε; what: who was, or will be, measured.
    """
    there = sorted(set(measured))
    for each in wanted:
        if not any(each.of(*point) for point in there):
            listed = ", ".join(threat if threat == "clean" else f"{threat}@{eps:g}" for threat, eps in there)
            raise RobenchError(f"--require {each.text}: {what} has no such number; there are {listed or 'none'}")


def judge(wanted: Sequence[Requirement], rows: Sequence[dict[str, Any]], what: str, *, by_low: bool) -> list[Verdict]:
    """Each requirement held against each accuracy that it is of.

    Args:
        rows: objects with target, threat, eps and, where they are accuracies, accuracy, low, high.
        what: whose rows they are; by_low: the lower end of the interval must suffice.

    Raises:
        RobenchError: a requirement that no accuracy is of.
    """
    accuracies = [row for row in rows if "accuracy" in row and "attack" not in row]
    refuse_unmeasured(wanted, [(row["threat"], row["eps"]) for row in accuracies], what)
    by = "lower end of the interval" if by_low else "accuracy"
    return [
        Verdict(
            each.text,
            str(row["target"]),
            row["accuracy"],
            row["low"],
            row["high"],
            by,
            bool(100 * row["low" if by_low else "accuracy"] >= each.percent - 1e-9),
        )
        for each in wanted
        for row in accuracies
        if each.of(row["threat"], row["eps"])
    ]


def plain(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(each) for each in verdicts]
