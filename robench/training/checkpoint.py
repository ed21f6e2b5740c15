"""The state of a training that was cut off, as one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.files import Absent, content_key, read_hashed, tensors_hash, write_hashed
from robench.core.parts import read_intact


@dataclass
class State:
    """Where training stands, and what its epochs gave.

    Attributes:
        epoch: the current one, from 0; step: steps done in it.
        sums: the loss's terms, summed over these steps, on the device.
        history: per finished epoch the learning rate and the mean of each term.
        kept: what the defense keeps between steps, `Batch.state`.
        snapshots: the ensemble's state, on the CPU, where `Recipe.snapshots` asks for it; the earliest first.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)
    snapshots: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.step += 1

    def close(self, rate: float) -> None:
        """Ends the epoch."""
        means = {name: float(value) / self.step for name, value in self.sums.items()}
        self.history.append({"epoch": self.epoch + 1, "lr": rate, "terms": means})
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}


class Checkpoint:
    """Weights, optimiser and `State` of one task; nothing else is needed, as every draw is keyed."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key

    def save(self, ensemble: Ensemble, optimizer: torch.optim.Optimizer, state: State) -> None:
        tensors = {f"model.{name}": value for name, value in ensemble.state_dict().items()}
        for index, values in optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{name}": value for name, value in values.items()})
        tensors.update({f"sums.{name}": value for name, value in state.sums.items()})
        tensors.update({f"kept.{name}": value for name, value in state.kept.items()})
        for number, snapshot in enumerate(state.snapshots):
            tensors.update({f"snapshot.{number}.{name}": value for name, value in snapshot.items()})
        progress = json.dumps({"epoch": state.epoch, "step": state.step, "history": state.history})
        write_hashed(self.path, tensors, {"key": self.key, "progress": progress}, _hashed)

    def load(self, ensemble: Ensemble, optimizer: torch.optim.Optimizer) -> State:
        """Restores weights and optimiser in place; the state from the start where there is no usable file.

        Raises:
            RobenchError: the file belongs to other settings, or cannot be read.
        """
        try:
            found = read_intact(self.path, partial(read_hashed, hashed=_hashed), "the training", "starts over")
        except Absent:
            return State()
        if found is None:
            return State()
        tensors, metadata = found
        if metadata["key"] != self.key:
            raise RobenchError(
                f"{self.path} is of a training with other settings; give this one --name, or remove {self.path.parent}"
            )
        ensemble.load_state_dict(_under(tensors, "model"))
        device = next(ensemble.parameters()).device
        sums, kept = ({name: v.to(device) for name, v in _under(tensors, kind).items()} for kind in ("sums", "kept"))
        optimizer.load_state_dict({**optimizer.state_dict(), "state": _numbered(_under(tensors, "optimizer"))})
        # In the layout of its parameter, as training made it: torch updates many at once only where layouts agree.
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        progress = json.loads(metadata["progress"])
        snapshots = [snapshot for _, snapshot in sorted(_numbered(_under(tensors, "snapshot")).items())]
        return State(progress["epoch"], progress["step"], sums, progress["history"], kept, snapshots)


def _under(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Those whose names begin with ``kind.``, without it."""
    return {name.removeprefix(f"{kind}."): v for name, v in tensors.items() if name.startswith(f"{kind}.")}


def _numbered(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Tensors ``0.a``, ``0.b``, ``1.a`` by their number."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, rest = name.partition(".")
        found.setdefault(int(number), {})[rest] = value
    return found


def _hashed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Over all that the file holds: a flipped digit of the step number is damage, too."""
    return content_key([tensors_hash(tensors), metadata.get("key"), metadata.get("progress")])
