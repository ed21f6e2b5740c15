"""The same function, faster: what an attack differentiates instead of the original model.

What each choice is worth, and what was not worth taking (ReLU in place, members stacked by vmap),
`benchmarks/choices.py` measures. torch.compile gains 5 to 8 % on a CPU and takes a minute: off unless asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from robench.core.ensemble import Ensemble, logits_of
from robench.core.errors import in_a_line, out_of_memory
from robench.core.frozen import hooked
from robench.core.rules import USUAL, Rule

Precision = Literal["float32", "bfloat16", "float64"]

#: Two writings of one function agree where their outputs differ by at most this part of the outputs' scale, see
#: `disagreement`. Measured on three ResNet-20, at clean and at adversarial images: 1e-6, and 1e-2 in bfloat16.
ROUNDING: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 0.1, "float64": 1e-3}

#: Instructions for bfloat16, as `torch.cpu.get_capabilities` names them.
_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` computes bfloat16 itself. A CPU that does not imitates it, ten times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in _BFLOAT16)


def slow_precision(precision: str, device: torch.device) -> str:
    """What to tell a user whose device imitates the precision asked for; empty where it does not."""
    if precision != "bfloat16" or has_bfloat16(device):
        return ""
    return f"{device} has no instructions for bfloat16: imitating it is far slower than precision float32"


def disagreement(outputs: Tensor, reference: Tensor) -> float:
    """The largest difference of outputs (B,K) from ``reference`` (B,K), as a part of the reference's scale: how far, on
    the image where it is most, the highest output lies above the median one. Infinite where one is not finite alone.

    The scale is no fixed number, as logits may be of any size, and no range, as a class may be masked by −1e9.
    """
    mine, theirs = outputs.detach().double(), reference.detach().double()
    if bool((mine.isfinite() != theirs.isfinite()).any()):
        return float("inf")
    apart = float((mine - theirs).nan_to_num(0.0, 0.0, 0.0).abs().max())
    scale = float((theirs.amax(dim=1) - theirs.median(dim=1).values).nan_to_num(0.0, 0.0, 0.0).max())
    return apart / scale if scale else float("inf") if apart else 0.0


class _WideLinear(nn.Linear):
    """Computes in its weights' dtype under autocast too."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def widen_heads(model: nn.Module, classes: int) -> None:
    """Keeps every linear layer that returns ``classes`` values out of autocast, in place; names and weights stay.

    In bfloat16 logits have three digits: where a class is nearly certain, the loss's slope is their rounding, and an
    attack follows noise (`benchmarks/precision.py`).
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features == classes:
            module.__class__ = _WideLinear


class _Autocast(nn.Module):
    """Runs a model in a lower precision, but for its logits, which are float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.within(self.model, images)

    def within(self, part: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """What a part of the model returns in this precision, in float32."""
        with torch.autocast(images.device.type, self.dtype):
            return part(images).float()


def members(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """The members of ``model`` by themselves, images (B,C,H,W) -> logits (B,K), each in the precision of the whole.

    Args:
        model: an `Ensemble`, or what `attackable` made of one. A model without members is an ensemble of one.
    """
    if isinstance(model, Ensemble):
        # One member that refuses channels-last has the whole ensemble called on contiguous images.
        plain = _contiguous in model._forward_pre_hooks.values()
        return [partial(_called, member, plain) for member in model.members]
    if isinstance(model, _Autocast):
        return [partial(model.within, member) for member in members(model.model)]
    return [model]


def rule_of(model: nn.Module) -> Rule:
    """How ``model`` decides: an `Ensemble`, or what `attackable` made of one; any other by itself."""
    if isinstance(model, Ensemble):
        return model.rule
    return rule_of(model.model) if isinstance(model, _Autocast) else USUAL


def _called(member: nn.Module, plain: bool, images: Tensor) -> Tensor:
    return logits_of(member, images.contiguous() if plain else images)


def attackable(model: nn.Module, image: Tensor, precision: Precision, *, plain: bool = False) -> nn.Module:
    """A copy of ``model`` for crafting: eval mode, no parameter gradients, BatchNorm folded into convolutions,
    channels-last, in the precision asked for. The function is the same up to rounding on this image; whether it is on
    those that are crafted, the evaluator looks. ``model`` is untouched.

    Args:
        image: at least one image (B,C,H,W) on the model's device, to find out which BatchNorm follows which
            convolution.
        precision: ``float64`` copies the weights in double; ``bfloat16`` computes under autocast, all but the logits.
        plain: fold nothing and keep the layout.
    """

    def copied() -> nn.Module:
        made = copy.deepcopy(model).eval()
        for parameter in made.parameters():
            parameter.requires_grad_(False)
        return made.double() if precision == "float64" else made

    probe = image[:1].to(crafting_dtype(precision))
    fast = copied() if plain else _faster(copied, probe)
    if precision != "bfloat16":
        return fast
    with torch.no_grad():
        widen_heads(fast, fast(probe).shape[-1])
    return _Autocast(fast, torch.bfloat16)


def _faster(copied: Callable[[], nn.Module], image: Tensor) -> nn.Module:
    """What ``copied`` makes, folded and channels-last, or as it is where its code takes neither, such as
    TorchScript's."""
    faster = copied()
    try:
        with torch.no_grad():
            expected = faster(image)
            # Code that is no module may read a convolution's output beside its BatchNorm: seen in the result alone.
            if fold_batchnorm(faster, image) and disagreement(faster(image), expected) > ROUNDING["float32"]:
                faster = copied()
        channels_last(faster, image)
    except Exception as error:  # whatever a user's module may raise
        if out_of_memory(error):
            raise
        return copied()
    return faster


def channels_last(model: nn.Module, image: Tensor) -> None:
    """Puts ``model`` into channels-last, in place. One that refuses it, by a `view` in its forward pass, stays as it
    is, and is given contiguous images whatever it is called with.

    Args:
        image: at least one (B,C,H,W), to try.
    """
    model.to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            model(image.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        model.to(memory_format=torch.contiguous_format)
        model.register_forward_pre_hook(_contiguous)


def _contiguous(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.contiguous() if isinstance(each, Tensor) else each for each in arguments)


def compiled(model: nn.Module, image: Tensor) -> tuple[nn.Module, str]:
    """A copy of ``model`` whose members go through torch.compile, and nothing; or ``model``, and why it cannot be.

    Member by member: one compilation serves all networks of an architecture, whatever their weights. Hooks on modules
    inside are not called any more. The function is the same up to rounding.

    Args:
        model: from `attackable`; image: at least one (B,C,H,W), to compile for.
    """
    fast = copy.deepcopy(model)
    ensembles = [module for module in fast.modules() if isinstance(module, Ensemble)]
    try:
        for part in ensembles[0].members if ensembles else [fast]:
            part.compile()
        images = image.detach().clone().requires_grad_(True)
        torch.autograd.grad(fast(images).sum(), images)
    except Exception as error:  # whatever a compiler may raise
        return model, in_a_line(error)
    return fast, ""


def crafting_dtype(precision: Precision) -> torch.dtype:
    """The dtype of the images while they are crafted: float64 for float64, else float32."""
    return torch.float64 if precision == "float64" else torch.float32


def fold_batchnorm(model: nn.Module, image: Tensor) -> int:
    """Folds every BatchNorm2d that reads one convolution's output, and nothing else does, into that convolution.

    Which one that is shows in one forward pass, so it holds for any architecture. In place; the folded BatchNorm
    becomes an Identity, on which hooks (SGM's) still work.

    Returns:
        How many were folded.
    """
    producer: dict[int, nn.Conv2d] = {}
    alive: list[Any] = []  # so that no id is used twice
    readers: dict[int, list[nn.Module]] = {}
    calls: dict[nn.Module, int] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        alive.append((args, output))
        for value in args:
            if isinstance(value, Tensor):
                readers.setdefault(id(value), []).append(module)
        if isinstance(module, nn.Conv2d) and isinstance(output, Tensor):
            producer[id(output)] = module

    leaves = [module for module in model.modules() if not any(module.children())]
    with hooked(leaf.register_forward_hook(record) for leaf in leaves), torch.no_grad():
        model(image)
    pairs: dict[nn.Module, nn.Conv2d] = {}
    for identity, modules in readers.items():
        conv = producer.get(identity)
        if conv is not None and len(modules) == 1 and type(modules[0]) is nn.BatchNorm2d:
            norm = modules[0]
            # spectral_norm and weight_norm of old compute the weight in a hook.
            plain = not conv._forward_pre_hooks
            if plain and calls[norm] == 1 and calls[conv] == 1 and norm.track_running_stats:
                pairs[norm] = conv
    fused = {conv: fuse_conv_bn_eval(conv, norm) for norm, conv in pairs.items() if isinstance(norm, nn.BatchNorm2d)}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child in pairs:
                setattr(module, name, nn.Identity())
            elif child in fused:
                setattr(module, name, fused[child])
    return len(pairs)
