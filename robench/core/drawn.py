"""What a model draws from torch's generators at inference, such as noise or dropout, keyed per image; and means over
several of its draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from robench.core.rng import Part, key


class ModelDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within, each of torch's random operations starts its generator from a key.

    Where the first dimension of what is drawn is the batch, every row is drawn by itself, from `row_key`: an image gets
    the same numbers whatever else is in the batch and in whatever order. Anything else, as one number for a layer that
    is dropped, is drawn from a key without an image: the same in every batch. So a model is another function of an
    image in another batch only where it draws from a generator of its own, from another library, or something of as
    many rows as the batch has images that is not of the images.

    Args:
        owner: what the draws are for.
        samples: index of each image in its data set, (B,).
        count: draws over which `over_draws` takes means.
    """

    def __init__(self, owner: Sequence[Part], samples: npt.NDArray[np.int64], count: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = tuple(owner)
        self.samples = samples
        self.count = count
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        number, self.number = self.number, self.number + 1
        device = next((each.device for each in args if isinstance(each, Tensor)), kwargs.get("device"))
        written = [argument.alias_info is not None for argument in func._schema.arguments]
        if _rows(args) != len(self.samples) or any(written[1:]):
            _seed(key("model", *self.owner, number), device)
            return func(*args, **kwargs)
        found = []
        for row, sample in enumerate(self.samples.tolist()):
            _seed(row_key(self.owner, sample, number), device)
            own = [_row(each, row, len(self.samples)) for each in args]
            found.append(func(*own, **kwargs))
            if written[0]:
                args[0][row : row + 1].copy_(own[0])
        if written[0]:
            return args[0]
        return _joined(found)


def row_key(owner: Sequence[Part], sample: int, number: int) -> int:
    """The seed of an image's row of a batch's draw ``number``, counted from 0."""
    return key("model", *owner, sample, number)


def _rows(args: Sequence[Any]) -> int | None:
    """The first dimension of what an operation draws: its first tensor's, or that of the size that it is given."""
    for each in args:
        if isinstance(each, Tensor) and each.ndim:
            return len(each)
        if isinstance(each, (list, tuple)) and each and all(isinstance(size, int) for size in each):
            return int(each[0])
    return None


def _row(value: Any, row: int, count: int) -> Any:
    """An argument for one row alone; a tensor's as a copy, for numbers are drawn in the order of memory."""
    if isinstance(value, Tensor) and value.ndim and len(value) == count:
        return value[row : row + 1].clone(memory_format=torch.contiguous_format)
    if isinstance(value, (list, tuple)) and value and value[0] == count:
        return [1, *value[1:]]
    return value


def _joined(found: list[Any]) -> Any:
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return tuple(torch.cat(each) for each in zip(*found, strict=True))


def _seed(seed: int, device: torch.device | None) -> None:
    """Sets torch's generator of ``device``, by default the CPU's."""
    if device is None or device.type != "cuda":
        torch.default_generator.manual_seed(seed)
    else:
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


_ACTIVE: ContextVar[ModelDraws | None] = ContextVar("model_draws", default=None)


@contextmanager
def model_draws(owner: Sequence[Part], samples: npt.NDArray[np.int64], count: int = 1) -> Iterator[None]:
    """`ModelDraws` within, and means over ``count`` draws by `over_draws`. torch's generators are not put back: that is
    for whoever calls."""
    mode = ModelDraws(owner, samples, count)
    token = _ACTIVE.set(mode)
    try:
        with mode:
            yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def part_of_draws(number: int, samples: npt.NDArray[np.int64]) -> Iterator[None]:
    """Within, the batch is ``samples``, a part of that of `model_draws`, and its draws do not depend on how many were
    made before: which parts of an attack an image sees may depend on other images. Nothing where nothing is keyed."""
    mode = _ACTIVE.get()
    if mode is None:
        yield
        return
    kept = mode.owner, mode.samples, mode.number
    mode.owner, mode.samples, mode.number = (*mode.owner, "part", number), samples, 0
    try:
        yield
    finally:
        mode.owner, mode.samples, mode.number = kept


def keyed() -> bool:
    """Whether draws of a model are keyed here, so that a batch must hold every image once."""
    return _ACTIVE.get() is not None


def over_draws(make: Callable[[], Tensor]) -> Tensor:
    """The mean of ``make()`` over the draws of `model_draws`; ``make()`` itself where there are none."""
    mode = _ACTIVE.get()
    total = make()
    if mode is None or mode.count == 1:
        return total
    for _ in range(mode.count - 1):
        total = total + make()
    return total / mode.count


def mixed_over_draws(make: Callable[[], Tensor]) -> Tensor:
    """log of the mean of softmax(``make()``) over the draws of `model_draws`, (B,K); ``make()`` itself, which may be
    logits, where there is no more than one."""
    mode = _ACTIVE.get()
    if mode is None or mode.count == 1:
        return make()
    return mixed([make() for _ in range(mode.count)])


def mixed(outputs: Sequence[Tensor]) -> Tensor:
    """log of the mean of softmax of these outputs, (B,K) each; of a single one, itself."""
    if len(outputs) == 1:
        return outputs[0]
    return torch.stack([each.log_softmax(dim=1) for each in outputs]).logsumexp(dim=0) - math.log(len(outputs))
