"""What a click on a cell or a point of a report leads to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from robench.evaluation.outcomes import that_count
from robench.reports import style
from robench.reports.pictures import VERSION
from robench.reports.sheet import Links

#: Cell, member and sample.
Row = tuple[str, str, int]


class Drills:
    """What a click on a cell or a point leads to, of the rows that count; only what is linked is written."""

    def __init__(self, frame: pd.DataFrame) -> None:
        frame = that_count(frame).sort_values([*VERSION, "sample"], kind="stable", ignore_index=True)
        self._codes, versions = pd.MultiIndex.from_frame(frame[VERSION]).factorize()
        self._versions: list[Any] = versions.tolist()
        self._samples, self._correct = frame["sample"].to_numpy(), frame["correct"].to_numpy(dtype=bool)
        self._targets = pd.factorize(frame["target"])[0]
        transfer = np.flatnonzero(frame["threat"] == "transfer")
        self._points = frame.groupby(["threat", "defense", "n", "eps"], observed=True).indices
        cells = frame.iloc[transfer].groupby(["target", "eps", "surrogate", "member"], observed=True).indices
        self._cells = {key: transfer[np.asarray(found)] for key, found in cells.items()}
        self._frame = frame
        self._ids: dict[tuple[object, ...], str] = {}
        self._found: list[tuple[str, str, npt.NDArray[np.intp]]] = []

    def point(self, threat: str, defense: str, n: int, eps: float) -> str:
        threat = threat if eps else "clean"
        title = f"{style.label(defense)}/{n}, {style.THREATS[threat].label}" + (f", ε = {eps:g}" if eps else "")
        return self._add(("point", threat, defense, n, eps), title, self._points.get((threat, defense, n, eps)))

    def cell(self, target: str, eps: float, source: str, member: str) -> str:
        judged = "the ensemble" if member == "ensemble" else f"member {member}"
        title = f"{target}, ε = {eps:g}: crafted on member {source}, judged on {judged}"
        return self._add(("cell", target, eps, source, member), title, self._cells.get((target, eps, source, member)))

    def _add(self, key: tuple[object, ...], title: str, rows: Any) -> str:
        if rows is None:
            return ""
        if key not in self._ids:
            self._ids[key] = f"drill-{len(self._ids) + 1}"
            self._found.append((self._ids[key], title, np.asarray(rows)))
        return f"#{self._ids[key]}"

    @property
    def links(self) -> Links:
        return Links(cell=self.cell, point=self.point)

    def contents(self, pictures: Mapping[Row, dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """For every attack, how many samples it took, and those that it was the first to take; pictures of some."""
        near = self._frame[self._frame["cell"].isin({cell for cell, _, _ in pictures})]
        keys = zip(near["cell"], near["member"], near["sample"], strict=True)
        known = {row: pictures[key] for row, key in zip(near.index, keys, strict=True) if key in pictures}
        for name, title, rows in self._found:
            fallen = rows[~self._correct[rows]]
            took: Counter[int] = Counter(self._codes[fallen].tolist())
            first: dict[int, list[int]] = {code: [] for code in took}
            seen: set[tuple[int, int]] = set()
            for code, target, sample in zip(
                self._codes[fallen].tolist(),
                self._targets[fallen].tolist(),
                self._samples[fallen].tolist(),
                strict=True,
            ):
                if (target, sample) not in seen:
                    seen.add((target, sample))
                    first[code].append(sample)
            lines = []
            for code, samples in first.items():
                _, run, surrogate, attack, loss, restart = self._versions[code]
                about = [run, surrogate or "–", attack or "none", loss or "–"]
                lines.append({"about": about, "restart": restart, "took": took[code], "samples": samples})
            judged = len(set(zip(self._targets[rows].tolist(), self._samples[rows].tolist(), strict=True)))
            shown = [known[row] for row in rows[np.isin(rows, list(known))].tolist()]
            yield {
                "id": name, "title": title, "lines": lines, "fallen": len(seen), "judged": judged, "pictures": shown,
            }  # fmt: skip
