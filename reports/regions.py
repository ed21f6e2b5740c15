"""Figure 1: what an ensemble predicts on a plane through one image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from robench.core.errors import RobenchError
from robench.reports import style
from robench.reports.sheet import FIGURES, Inputs, Sheet, Skipped

#: The classes' fills: Okabe-Ito, lightened, then more of equal weight.
_FILLS = (
    "#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#BBBBBB", "#882255", "#999933",
)  # fmt: skip


@dataclass(frozen=True)
class Regions:
    """Predicted classes on a grid, one per ensemble.

    Attributes:
        classes: title of each ensemble, and int64 (H, W): row = second direction from −extent up, column = the first.
        extent: half the width of the plane, in pixel units in [0, 1] per unit of direction.
        label: the true class.
        names: of the classes, by index.
    """

    classes: Mapping[str, npt.NDArray[np.int64]]
    extent: float
    label: int
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.classes:
            raise RobenchError("expected `classes` to hold at least one grid of shape (H, W)")

    @property
    def seen(self) -> list[int]:
        """The classes that any ensemble predicts anywhere, the true one first."""
        found = {int(value) for grid in self.classes.values() for value in np.unique(grid)} - {self.label}
        return [self.label, *sorted(found)]

    def name(self, index: int) -> str:
        return str(self.names[index]) if index < len(self.names) else f"class {index}"

    def values(self) -> pd.DataFrame:
        """One row per ensemble and predicted class: its share of the plane, and the class at the image itself."""
        return pd.DataFrame(
            [
                {
                    "ensemble": title,
                    "class": int(value),
                    "name": self.name(int(value)),
                    "share": float((grid == value).mean()),
                    "at_image": bool(grid[grid.shape[0] // 2, grid.shape[1] // 2] == value),
                }
                for title, grid in self.classes.items()
                for value in np.unique(grid)
            ]
        )


def compute(
    ensembles: Mapping[str, Callable[[Tensor], Tensor]],
    image: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    label: int,
    extent: float = 0.1,
    resolution: int = 1000,
    batch_size: int = 1000,
    names: Sequence[str] = (),
) -> Regions:
    """What each ensemble predicts at image + a·first + b·second, a and b in ±extent, cut to the box [0, 1].

    Args:
        ensembles: title, and a function from images (B,C,H,W) in [0,1] to scores (B,K).
        image: (C,H,W) in [0,1], on the ensembles' device.
        first, second: directions, (C,H,W); of signs, so that a and b are ℓ∞ distances.
        resolution: points along each axis; odd puts one on the image itself.

    Raises:
        RobenchError: a resolution below 2.
    """
    if resolution < 2 or batch_size < 1:
        raise RobenchError(f"expected `resolution` >= 2 and `batch_size` >= 1, got {resolution} and {batch_size}")
    steps = torch.linspace(-extent, extent, resolution, device=image.device, dtype=image.dtype)
    found: dict[str, list[Tensor]] = {title: [] for title in ensembles}
    with torch.no_grad():
        for points in torch.split(torch.arange(resolution * resolution, device=image.device), batch_size):
            a = steps[points % resolution].view(-1, 1, 1, 1)
            b = steps[points.div(resolution, rounding_mode="floor")].view(-1, 1, 1, 1)
            plane = (image + a * first + b * second).clamp_(0, 1)
            for title, ensemble in ensembles.items():
                found[title].append(ensemble(plane).argmax(dim=1).cpu())
    classes = {title: torch.cat(parts).view(resolution, resolution).numpy() for title, parts in found.items()}
    return Regions(classes, extent, label, tuple(names))


def regions(plane: Regions, ax: Axes, *, title: str) -> Axes:
    """The plane of one ensemble: a colour per class, white for the true one, a cross at the image."""
    grid = plane.classes[title]
    index = {value: place for place, value in enumerate(plane.seen)}
    places = np.vectorize(index.__getitem__, otypes=[np.int64])(grid)
    across = np.linspace(-plane.extent, plane.extent, grid.shape[1])
    up = np.linspace(-plane.extent, plane.extent, grid.shape[0])
    # Points are the centres of pixels, so that the outer ones reach half a pixel further.
    right, top = (plane.extent * (1 + 1 / max(1, count - 1)) for count in (grid.shape[1], grid.shape[0]))
    ax.imshow(
        places, cmap=ListedColormap(_colors(plane)), vmin=-0.5, vmax=len(index) - 0.5, origin="lower",
        extent=(-right, right, -top, top), interpolation="nearest",
    )  # fmt: skip
    # The borders tell regions apart in grey print, too.
    for place in np.unique(places) if min(grid.shape) > 1 else []:
        if (places != place).any():
            ax.contour(across, up, places == place, levels=[0.5], colors="black", linewidths=0.3)
    ax.plot(0, 0, marker="+", color="black", markersize=5, markeredgewidth=0.8)
    ax.set_xticks([-plane.extent, 0, plane.extent])
    ax.set_yticks([-plane.extent, 0, plane.extent])
    ax.set_xlim(-plane.extent, plane.extent)
    ax.set_ylim(-plane.extent, plane.extent)
    ax.grid(False)
    ax.spines[:].set_visible(True)
    ax.set_xlabel("adversarial direction")
    ax.set_title(title)
    return ax


def legend(plane: Regions, figure: Figure) -> None:
    """The classes that were predicted, the true one first."""
    handles = [
        Patch(facecolor=color, edgecolor="black", linewidth=0.4, label=plane.name(value) + " (true)" * (not place))
        for place, (value, color) in enumerate(zip(plane.seen, _colors(plane), strict=True))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), handlelength=1.2)


def _colors(plane: Regions) -> list[str]:
    return ["#FFFFFF", *(_FILLS[place % len(_FILLS)] for place in range(len(plane.seen) - 1))]


@FIGURES.register("fig1_regions")
def sheet(inputs: Inputs) -> Iterator[Sheet | Skipped]:
    """Figure 1: what ensembles predict on a plane through one image."""
    plane = inputs.regions
    if plane is None:
        yield Skipped("fig1_regions", "no decision regions were computed")
        return
    across = min(4, len(plane.classes))
    down = -(-len(plane.classes) // across)
    side = min(2.2, style.TEXT / across)
    figure = style.figure(max(style.COLUMN, side * across), down * (side + 0.1) + 0.3)
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for place, (ax, title) in enumerate(zip(axes, plane.classes, strict=False)):
        regions(plane, ax, title=title)
        if place % across == 0:
            ax.set_ylabel("random direction")
    for ax in axes[len(plane.classes) :]:
        ax.set_axis_off()
    legend(plane, figure)
    yield Sheet(
        "fig1_regions", "Decision regions", figure, plane.values(),
        f"The predicted class around one image of class {plane.label}, for {', '.join(plane.classes)}.",
    )  # fmt: skip
