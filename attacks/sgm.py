"""Momentum ascent along the skip connections of residual networks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from robench.attacks.base import ATTACKS
from robench.attacks.iterative import Iterative
from robench.core.ensemble import Ensemble
from robench.core.errors import RobenchError
from robench.core.frozen import hooked
from robench.core.losses import LOSSES
from robench.core.rng import Draws

Blocks = Literal["all", "reference"]

#: What stochastic depth is called in timm and torchvision: by definition the end of a residual branch.
_DROPPED = re.compile(r"drop_path\d*|stochastic_depth")
_CONVOLUTION = re.compile(r"conv([2-9])")
#: An attribute of this name, a module or None, makes a class one of residual blocks.
_SHORTCUTS = ("downsample", "shortcut", "convShortcut")


@ATTACKS.register("sgm")
@dataclass(frozen=True, kw_only=True)
class SGM(Iterative):
    """Skip Gradient Method (Wu et al. 2020, https://arxiv.org/abs/2002.05990, eq. 5–6), with momentum.

    Every residual block passes γ times the gradient of its branch: y = skip + γ·f + (1−γ)·stop_gradient(f), so that
    the forward pass is as it was and a shortcut's convolution keeps its whole gradient. Not done is the reference
    code's division of the gradient by its standard deviation per block: for one model it changes no sign, and in an
    ensemble it breaks the weights of the members. No random start.

    Attributes:
        momentum: μ; the DVERGE study's choice is unknown.
        gamma: γ; 1 is momentum PGD, 0 follows the skip connections alone.
        blocks: ``all`` is the paper's formula; ``reference`` spares the first block of every stage, as the reference
            code does through the names of its hooks.
    """

    hooks: ClassVar[bool] = True

    steps: int = 100
    step_ratio: float = 0.2
    gamma: float = 0.2
    blocks: Blocks = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("gamma", 0 <= self.gamma <= 1, "in [0, 1]")
        self.require("blocks", self.blocks in get_args(Blocks), f"to be one of {', '.join(get_args(Blocks))}")

    @property
    def stochastic(self) -> bool:
        return False

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        loss = LOSSES.get(self.loss)
        with skip_gradient(model, self.gamma, self.blocks):
            return self.ascend(lambda z, _: loss(model(z), labels), images, eps)


@contextmanager
def skip_gradient(model: nn.Module, gamma: float, blocks: Blocks = "all") -> Iterator[None]:
    """Within, the gradient through every residual branch is scaled by γ; the forward pass is bit for bit the same.

    The hooks are gone afterwards. At least one forward pass is expected within.

    Raises:
        RobenchError: no residual blocks (in one member of an ensemble), none left by ``reference``, or hooks that
            the forward pass never reaches, as those of a compiled model.
    """
    ends = _ends(model, blocks)
    reached = False

    def scale(module: nn.Module, args: tuple[object, ...], output: Tensor) -> Tensor:
        nonlocal reached
        reached = True
        # f + γ·(f − f): exactly f, one kernel, and safe where the block then adds in place.
        return output.detach().lerp(output, gamma)

    with hooked(end.register_forward_hook(scale) for end in ends):
        yield
    if not reached:
        raise RobenchError(
            f"the forward pass of {type(model).__name__} does not reach its residual blocks, so SGM had no effect; "
            f"pass the model before torch.compile"
        )


def _ends(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """The modules that are hooked, each once."""
    ensemble = next((module for module in model.modules() if isinstance(module, Ensemble)), None)
    found: dict[nn.Module, None] = {}
    for number, part in enumerate([model] if ensemble is None else ensemble.members, 1):
        stages = _stages(part)
        owner = type(part).__name__ if ensemble is None else f"member {number} of the ensemble"
        if not stages:
            raise RobenchError(
                f"{owner} has no residual blocks that SGM recognises: a block has a child `drop_path`, or an "
                f"attribute `downsample` or `shortcut` and children `conv1`, `conv2`; pass your branch alone through "
                f"`self.drop_path = nn.Identity()`, or take another attack: mdi2"
            )
        spared = 1 if blocks == "reference" else 0
        ends = [end for stage in stages for block in stage[spared:] for end in block]
        if not ends:
            raise RobenchError(
                f"`blocks=reference` of attack 'sgm' spares the first block of every stage, and {owner} has no other; "
                f"use blocks=all"
            )
        found.update(dict.fromkeys(ends))
    return list(found)


def _stages(model: nn.Module) -> list[list[list[nn.Module]]]:
    """Per module that holds residual blocks, per block: the modules at the end of its branches.

    An end is any module through which all of a branch passes, and nothing of the skip: stochastic depth, else the
    convolution of the highest number. What follows it in the branch (BatchNorm, folded or not, squeeze-and-excite)
    need not be known: where along the branch its gradient is scaled makes no difference.
    """
    # By class: an identity shortcut need not have the attribute.
    residual = {type(module) for module in model.modules() if _has_shortcut(module)}
    stages = [[_branch_ends(child, type(child) in residual) for child in part.children()] for part in model.modules()]
    return [kept for stage in stages if (kept := [ends for ends in stage if ends])]


def _has_shortcut(module: nn.Module) -> bool:
    return any(isinstance(getattr(module, name, ""), nn.Module | None) for name in _SHORTCUTS)


def _branch_ends(block: nn.Module, residual: bool) -> list[nn.Module]:
    children = dict(block.named_children())
    dropped = [child for name, child in children.items() if _DROPPED.fullmatch(name)]
    if dropped or not residual:
        return dropped
    numbers = [int(match[1]) for name in children if (match := _CONVOLUTION.fullmatch(name))]
    return [children[f"conv{max(numbers)}"]] if numbers else []
