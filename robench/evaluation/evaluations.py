"""Evaluations: which rows were asked for together; a number rests on evaluations that are complete."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from robench.core.errors import RobenchError
from robench.core.files import Damaged, content_key, read_record, write_record

#: Folder of the records, beside the rows.
FOLDER = "evaluations"


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    threat: str
    identity: str
    cells: list[str]
    samples: list[int]
    part: bool = False


@dataclass(frozen=True)
class Evaluation:
    """What one threat asked of one target. It is complete when every cell has rows of every sample.

    Attributes:
        threat: its name; identity: of the target.
        cells: keys of `Cell`, clean images included where the threat has them, sorted.
        samples: indices in the test set, sorted.
        part: whether it makes rows for an evaluation to come, such as those of one of several attacks, which count in
            no number by themselves.
    """

    threat: str
    identity: str
    cells: tuple[str, ...]
    samples: tuple[int, ...]
    part: bool = False

    @cached_property
    def key(self) -> str:
        return content_key(self.record())

    def record(self) -> dict[str, object]:
        """As JSON."""
        about = {"threat": self.threat, "identity": self.identity, **({"part": True} if self.part else {})}
        return {**about, "cells": list(self.cells), "samples": list(self.samples)}

    def write(self, folder: Path) -> None:
        """Into the folder of the rows."""
        path = folder / FOLDER / f"{self.key}.json"
        with suppress(RobenchError):
            if Evaluation.read(path) == self:
                return
        write_record(path, self.record())

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """What `write` wrote; RobenchError where the file is damaged, was changed, is of another name, or is absent."""
        told = read_record(path, _Record)
        found = cls(**{**told, "cells": tuple(told["cells"]), "samples": tuple(told["samples"])})
        if found.key != path.stem:
            raise Damaged(f"{path} is of evaluation {found.key}", "remove it and run the same robench eval again")
        return found
