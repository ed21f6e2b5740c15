"""What a check found: of a plug-in, a model, a result or the rows of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
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
