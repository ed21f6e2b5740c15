"""What a check found: of a plug-in, a model, a result or the rows of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One question that was asked, on one line.

    Attributes:
        name: what was asked; status: "warn" is worth knowing and breaks nothing.
        evidence: what was seen; fix: what to do about it, where it is known.
    """

    name: str
    status: Status
    evidence: str
    fix: str = ""

    @property
    def said(self) -> str:
        """The evidence, and the fix behind it."""
        return f"{self.evidence}; {self.fix}" if self.fix else self.evidence

    def __str__(self) -> str:
        return f"{self.status}  {self.name}: {self.said}"


def failed(findings: Iterable[Finding]) -> bool:
    """Whether any of them fails."""
    return any(each.status == "fail" for each in findings)


def brief(findings: Iterable[Finding]) -> list[Finding]:
    """For a terminal: what passes first, a line for each question, however many ensembles it was asked of; then what
    warns, then what fails, next to where one types."""
    by_status: dict[Status, list[Finding]] = {"pass": [], "warn": [], "fail": []}
    for each in findings:
        by_status[each.status].append(each)
    passed: dict[str, list[Finding]] = {}
    for each in by_status["pass"]:
        passed.setdefault(each.name, []).append(each)
    lines = [
        own[0] if len(own) == 1 else replace(own[0], evidence=f"{len(own)} times, such as {own[0].evidence}")
        for own in passed.values()
    ]
    return [*lines, *by_status["warn"], *by_status["fail"]]


def gravest_first(findings: Iterable[Finding]) -> list[Finding]:
    """For a page: what fails, what warns, what passes; each in its order."""
    return sorted(findings, key=lambda each: ("fail", "warn", "pass").index(each.status))
