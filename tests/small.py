"""Small models whose clean predictions are right by construction: nothing has to be trained."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from robench.core.data import Data, make
from robench.core.ensemble import Ensemble
from robench.core.models import ModelSpec, build

SPEC = ModelSpec(name="resnet8", num_classes=4, in_channels=1, mean=(0.5,), std=(0.25,))


def ensemble(seed: int, members: int = 2) -> Ensemble:
    """Random networks whose last layer is scaled up, so that they have an opinion."""
    made = Ensemble(build(SPEC, 100 * seed + i) for i in range(members)).eval()
    with torch.no_grad():
        for member in made.members:
            member.model.fc.weight.mul_(8)
    return made


def noise() -> Data:
    """40 noise images of 8x8 to test and as many to train, labelled as model 0 sees them."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 1, 8, 8), dtype=np.uint8)
    with torch.no_grad():
        labels = ensemble(0)(torch.from_numpy(pixels).float() / 255).argmax(dim=1).numpy()
    return make(
        "npz:noise",
        (pixels[40:], labels[40:]),
        (pixels[:40], labels[:40]),
        classes=["a", "b", "c", "d"],
        statistics=((0.5,), (0.25,)),
    )


class Rounds(nn.Module):
    """A defense whose gradient is zero: it rounds its input to so many levels."""

    def __init__(self, model: nn.Module, levels: int) -> None:
        super().__init__()
        self.model = model
        self.steps = levels - 1

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images * self.steps).round() / self.steps)  # type: ignore[no-any-return]


def assert_same_rows(first: pd.DataFrame, second: pd.DataFrame, tolerance: float) -> None:
    """The same outcomes, in whatever order; margins and distances within ``tolerance``."""
    keys = ["cell", "member", "sample"]
    first, second = (frame.sort_values(keys, ignore_index=True) for frame in (first, second))
    exact = [name for name in first if name not in ("margin", "linf")]
    pd.testing.assert_frame_equal(first[exact], second[exact])
    for name in ("margin", "linf"):
        np.testing.assert_allclose(first[name], second[name], atol=tolerance)
