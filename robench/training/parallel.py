"""One training on several processes, as torchrun starts them: the loss of one process and, up to rounding, its weights.

Each process takes its part of every batch; draws, gradients and BatchNorm's statistics are those of the whole batch.
Dropout and stochastic depth alone draw per process. Only the first process writes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce  # whose gradient can be derived again
from torch.nn.modules.batchnorm import _BatchNorm

from robench.core.errors import RobenchError
from robench.core.rng import Part, Stream
from robench.defenses import Batch


def join(device: torch.device) -> None:
    """Connects the processes that torchrun started, for as long as they live; alone, does nothing.

    Args:
        device: to train on; on GPUs each process has its own.
    """
    # Never twice: a second connection may find the addresses of the first, and wait for ever.
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    atexit.register(dist.destroy_process_group)


def place() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait() -> None:
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@dataclass(frozen=True)
class _PartOfStream(Stream):
    """A step's draws; of one that is made per image, those of this process's images."""

    images: int

    def uniform(self, shape: Sequence[int], *purpose: Part) -> Tensor:
        rank, size = place()
        if shape[0] != self.images:
            return super().uniform(shape, *purpose)
        return super().uniform((size * self.images, *shape[1:]), *purpose).chunk(size)[rank]

    def within(self, *purpose: Part) -> Stream:
        return replace(self, owner=(*self.owner, *purpose))


def part_of(batch: Batch) -> Batch:
    """The images of ``batch`` that this process works on, as many as every other; RobenchError where that fails."""
    rank, size = place()
    if size == 1:
        return batch
    images, rest = divmod(len(batch.images), size)
    if rest:
        raise RobenchError(f"expected `batch_size` to be a multiple of {size} processes, got {len(batch.images)}")
    return replace(
        batch,
        images=batch.images.chunk(size)[rank],
        labels=batch.labels.chunk(size)[rank],
        paired=None if batch.paired is None else batch.paired.chunk(size)[rank],
        draws=_PartOfStream(batch.draws.owner, images),
        parts=size,
        samples=None if batch.samples is None else batch.samples.chunk(size)[rank],
    )


def share_rows(batch: Batch) -> None:
    """Gives every process the rows that each one wrote of what the defense keeps per image; ``batch``: this part."""
    size = place()[1]
    if size == 1 or batch.samples is None or not batch.state:
        return
    samples = _from_all(batch.samples)
    for tensor in batch.state.values():
        if tensor.ndim and len(tensor) == batch.train_size:
            tensor[samples] = _from_all(tensor[batch.samples])


def _from_all(part: Tensor) -> Tensor:
    """The parts of all processes, along the first dimension."""
    parts = [torch.empty_like(part) for _ in range(place()[1])]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def average(tensors: Iterable[Tensor | None]) -> None:
    """Replaces each tensor by its mean over the processes, in one message."""
    found, (_, size) = [tensor for tensor in tensors if tensor is not None], place()
    if size > 1:
        flat = torch.cat([tensor.flatten() for tensor in found])
        dist.all_reduce(flat)
        means = torch.split(flat.div_(size), [each.numel() for each in found])
        for tensor, mean in zip(found, means, strict=True):
            tensor.copy_(mean.view_as(tensor))


class _SharedBatchNorm(_BatchNorm):
    """BatchNorm over the batch of all processes. torch's SyncBatchNorm has no CPU kernel, and no second derivative."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        wide = input if input.dtype == torch.float64 else input.float()
        dims, shape, size = [0, *range(2, input.ndim)], [1, -1, *[1] * (input.ndim - 2)], place()[1]
        mean = all_reduce(wide.mean(dims)) / size  # type: ignore[no-untyped-call]
        centred = wide - mean.view(shape)
        variance = all_reduce(centred.square().mean(dims)) / size  # type: ignore[no-untyped-call]
        if self.track_running_stats:
            count = size * input.numel() / input.shape[1]
            for running, now in ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1)))):
                assert running is not None
                running.lerp_(now.detach(), self.momentum or 0.0)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        scale = (variance + self.eps).rsqrt() * self.weight
        normal: Tensor = centred * scale.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)


def share_batchnorm(model: nn.Module) -> None:
    """Lets every BatchNorm of ``model`` see the batches of all processes; RobenchError for one that is not as usual."""
    for module in model.modules() if place()[1] > 1 else ():
        if not isinstance(module, _BatchNorm):
            continue
        usual = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        if not (usual and module.affine and module.momentum):
            raise RobenchError(f"several processes cannot share the statistics of {module}; train without torchrun")
        module.__class__ = _SharedBatchNorm
