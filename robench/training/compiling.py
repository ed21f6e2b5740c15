"""Training through torch.compile: fewer and larger operations, where a device takes longer to start them than to
compute them, as a GPU does with small networks.

The step is the same up to rounding, which the first steps prove on the device at hand; else training goes on without.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robench.core.ensemble import Ensemble
from robench.core.errors import in_a_line, out_of_memory
from robench.core.fast import Precision
from robench.core.features import parted

log = logging.getLogger(__name__)

#: A step through torch.compile is the plain one where the loss differs by at most this part, and the updates of weights
#: and of statistics have at least this cosine. The sign of a gradient in a crafted image may be that of rounding.
SAME_LOSS: dict[Precision, float] = {"float32": 0.01, "bfloat16": 0.05}
SAME_UPDATE: dict[Precision, float] = {"float32": 0.99, "bfloat16": 0.9}

#: One step of an ensemble with an optimiser, on the batch of that number; the loss's terms.
Step = Callable[[Ensemble, torch.optim.Optimizer, int], Mapping[str, Tensor]]
#: Steps that are compared: from the second on, weights and statistics that did not follow show.
COMPARED = 3


@contextmanager
def compiled(ensemble: Ensemble) -> Iterator[None]:
    """Within, every member and every part of it that ends at a feature layer goes through torch.compile, on a GPU with
    CUDA graphs; afterwards they are as before. Weights stay where they are.

    One compilation serves all members of an architecture. Modules inside are not called any more, so that hooks on
    these do nothing.
    """
    device = next(ensemble.parameters()).device
    options: dict[str, Any] = {"fallback_random": True}  # dropout draws what it draws without
    if device.type == "cuda":
        options["triton.cudagraphs"] = True

    def through(module: nn.Module) -> nn.Module:
        module.compile(options=options, dynamic=False)
        return module

    members = list(ensemble.members)
    try:
        with parted(members, through):
            for member in members:
                through(member)
            yield
    finally:
        for member in members:
            member._compiled_call_impl = None


@contextmanager
def compiled_if_same(
    ensemble: Ensemble,
    make: Callable[[Ensemble], torch.optim.Optimizer],
    step: Step,
    precision: Precision,
) -> Iterator[bool]:
    """`compiled`, where that gives the steps of `differs`; else as usual, and a warning says so. Whether it is."""
    with ExitStack() as stack:
        stack.enter_context(compiled(ensemble))
        why = differs(ensemble, make, step, precision)
        if why:
            stack.close()
            log.warning(f"training goes on without torch.compile: {why}")
        yield not why


def begin_step(device: torch.device) -> None:
    """To be called before every step: tells CUDA graphs that nothing of the last one is read any more."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def differs(
    ensemble: Ensemble, make: Callable[[Ensemble], torch.optim.Optimizer], step: Step, precision: Precision
) -> str:
    """How the first steps of ``ensemble`` differ from plain ones, or why there are none; empty where they do not.

    Call it where ``ensemble`` takes the other steps, through torch.compile or recorded. Weights move, and are
    afterwards what they were.

    Args:
        make: a new optimiser of an ensemble.
    """
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    plain = copy.deepcopy(ensemble)  # the copy of a compiled module is not compiled
    try:
        mine, theirs = make(ensemble), make(plain)
        for number in range(COMPARED):
            found, wanted = step(ensemble, mine, number), step(plain, theirs, number)
            for name, value in wanted.items():
                apart = abs(float(found[name]) - float(value)) / max(abs(float(value)), 1e-3)
                if not apart <= SAME_LOSS[precision] * (number + 1):
                    return f"in step {number + 1} {name!r} is {float(found[name]):.5g} instead of {float(value):.5g}"
            alike = min(_cosines(before, ensemble.state_dict(), plain.state_dict()), default=1.0)
            if not alike >= SAME_UPDATE[precision]:
                return f"after step {number + 1} the updates have a cosine of {alike:.3f} with plain ones"
    except Exception as error:  # whatever a compiler may raise
        if out_of_memory(error):
            raise
        return in_a_line(error)
    finally:
        ensemble.load_state_dict(before)
        ensemble.zero_grad(set_to_none=True)
    return ""


def _cosines(before: Mapping[str, Tensor], mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[float]:
    """Of two updates: of the weights, and of BatchNorm's statistics."""
    names = [name for name, value in before.items() if value.is_floating_point()]
    for statistics in (False, True):
        chosen = [name for name in names if (".running_" in name) == statistics]
        if not chosen:
            continue
        one, other = (
            torch.cat([(after[name] - before[name]).flatten().double() for name in chosen]) for after in (mine, theirs)
        )
        if bool(one.any()) or bool(other.any()):
            yield float(torch.cosine_similarity(one, other, dim=0))
