"""Work of several networks at the same time, where a CUDA graph is being recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: What branches of the graph that is being recorded returned: their memory is a branch's, which must not use it again
#: while another one reads it.
_held: list[Tensor] = []


def recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded (`robench.training.recording`)."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def side_by_side(calls: Sequence[Callable[[], Tensor]], device: torch.device) -> list[Tensor]:
    """What each call returns. While a CUDA graph is recorded each call is a branch of it, so that they run at the same
    time; otherwise one after another.

    One batch through one small network leaves most of a GPU idle. No call may need what another one writes.
    """
    if len(calls) < 2 or not recording(device):
        return [call() for call in calls]
    here, results = torch.cuda.current_stream(device), []
    branches = [torch.cuda.Stream(device) for _ in calls]  # type: ignore[no-untyped-call]
    for call, branch in zip(calls, branches, strict=True):
        branch.wait_stream(here)
        with torch.cuda.stream(branch):
            results.append(call())
    for branch in branches:
        here.wait_stream(branch)
    _held.extend(results)
    return results


def release() -> None:
    """To be called when a graph is recorded, or has failed to be."""
    _held.clear()
