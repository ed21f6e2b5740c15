"""Small models whose clean predictions are right by construction: nothing has to be trained."""

from __future__ import annotations

import numpy as np
import torch

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
    """40 noise images of 8x8, labelled as model 0 sees them."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    with torch.no_grad():
        labels = ensemble(0)(torch.from_numpy(pixels).float() / 255).argmax(dim=1).numpy()
    return make(
        "npz:noise", (pixels, labels), (pixels, labels), classes=["a", "b", "c", "d"], statistics=((0.5,), (0.25,))
    )
