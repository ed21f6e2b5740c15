"""Images that fell, to be looked at: clean, adversarial and the difference."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from robench.evaluation.threats import BLACKBOX
from robench.reports import style

#: What was attacked, in the order in which a sample is ascribed to the first version that took it.
VERSION = ["seed", "target", "surrogate", "attack", "loss", "restart"]
#: Pictures of one point of a curve, or of one cell of a matrix, at most.
EACH = 3
_CLICKED = ["threat", "target", "eps", "source", "member"]

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """One row of the outcomes, seen.

    Attributes:
        cell, member, sample: the row.
        clean, adversarial: (1,H,W) or (3,H,W) in [0, 1].
        caption: what happened to it.
    """

    cell: str
    member: str
    sample: int
    clean: npt.NDArray[np.float32]
    adversarial: npt.NDArray[np.float32]
    caption: str

    def panels(self) -> dict[str, Pixels]:
        """By title: the clean image, the adversarial one, and the difference ten times, grey where there is none;
        uint8 (H,W) or (H,W,3)."""
        difference = 0.5 + 10 * (self.adversarial - self.clean)
        named = {"clean": self.clean, "adversarial": self.adversarial, "difference × 10": difference}
        return {title: _pixels(image) for title, image in named.items()}


def choose(frame: pd.DataFrame, count: int) -> pd.DataFrame:
    """At most ``count`` rows of ``frame`` that fell, spread over all points of curves and cells of matrices.

    A point's rows are of different samples, each at the first version that took it, every attack in turn.
    """
    fell = frame[~frame["correct"] & frame["threat"].isin(["whitebox", "transfer", *BLACKBOX])]
    fell = fell.assign(source=fell["surrogate"].where(fell["threat"] == "transfer", ""))
    fell = fell.sort_values([*VERSION, "sample"], kind="stable").drop_duplicates([*_CLICKED, "sample"])
    turn = fell.groupby([*_CLICKED, "cell"], observed=True).cumcount()
    fell = fell.iloc[np.argsort(turn.to_numpy(), kind="stable")]
    place = fell.groupby(_CLICKED, observed=True).cumcount()
    each = min(EACH, max(1, count // max(1, int((place == 0).sum()))))
    fell = fell[place < each].sort_values(_CLICKED, kind="stable").drop(columns="source")
    evenly = np.linspace(0, len(fell) - 1, min(count, len(fell))).round().astype(int)
    return fell.iloc[evenly].reset_index(drop=True)


def sheet(pictures: Sequence[Picture]) -> Figure:
    """A row per picture: clean, adversarial, difference × 10 and the caption."""
    figure = style.figure(style.TEXT, 0.82 * len(pictures) + 0.2)
    axes = figure.subplots(len(pictures), 3, squeeze=False)
    for row, picture in zip(axes, pictures, strict=True):
        for ax, (title, pixels) in zip(row, picture.panels().items(), strict=True):
            ax.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set_title(title if picture is pictures[0] else "")
            ax.set_axis_off()
        lines = [part for line in picture.caption.split("\n") for part in textwrap.wrap(line, 42)]
        row[-1].text(1.15, 0.5, "\n".join(lines), transform=row[-1].transAxes, va="center")
    return figure


def _pixels(image: npt.NDArray[np.float32]) -> Pixels:
    pixels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
