"""How an evaluation is computed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from robench.core.errors import RobenchError
from robench.core.fast import Precision
from robench.core.threads import fitting_batch


@dataclass(frozen=True)
class Settings:
    """How to compute; nothing here changes a row beyond rounding, but ``precision`` and ``seed``, which keys hold.

    Attributes:
        precision: in which images are crafted. Verdicts are taken in float32 on the original weights (in float64
            where that is the precision).
        batch_size: images per forward pass at most, by default what suits the device; on a CPU fewer where they are
            large, which is faster; halved by itself when memory runs out.
        seed: of the attacks' draws.
        compile: crafts on a model that went through torch.compile, where no attack hooks its modules; without a
            compiler, as usual, and a warning says so.
        workers: processes with these settings that share the work, which is cut so that there is enough for all.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "float32"
    batch_size: int | None = None
    seed: int = 0
    compile: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise RobenchError(f"expected `batch_size` to be at least 1, got {self.batch_size}")

    def images_per_pass(self, numel: int) -> int:
        """Images of ``numel`` elements, before memory ran out: the same in every process with the same settings."""
        return fitting_batch(self.device, numel, self.batch_size)
