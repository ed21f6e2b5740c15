"""The context in which a model is attacked or trained, and the BatchNorm modes in which training crafts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

BatchNormMode = Literal["train", "batch", "eval"]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


_BACKENDS: Any = torch.backends  # torch does not declare all of their parts
#: What torch may compute float32 in something shorter for, each with its own switch.
_SHORTENED = (
    *(_BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn, _BACKENDS.cuda.matmul),
    *(_BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn, _BACKENDS.mkldnn.matmul),
)


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 is float32 within; torch's switches as before afterwards.

    By default torch convolves float32 in TF32 on a GPU, with ten bits of mantissa: a verdict would depend on the
    device, and a loss's slope would be rounded as in float16.
    """
    kept = [each.fp32_precision for each in _SHORTENED]
    # torch's older switches have to agree: reading one that does not raises, and networks may read them.
    older: list[tuple[Callable[[Any], object], Any]] = []
    with suppress(RuntimeError):  # they already disagree
        older.append((_set_allow_tf32, _BACKENDS.cudnn.allow_tf32))
    with suppress(RuntimeError):
        older.append((torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    try:
        for switch, before in older:
            switch(False if isinstance(before, bool) else "highest")
        for each in _SHORTENED:
            each.fp32_precision = "ieee"
        yield
    finally:
        for switch, before in older:
            switch(before)
        for each, before in zip(_SHORTENED, kept, strict=True):
            each.fp32_precision = before


def _set_allow_tf32(allowed: bool) -> None:
    _BACKENDS.cudnn.allow_tf32 = allowed


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode, no parameter gradients and full float32 within; every mode, hook, gradient flag and switch as before
    afterwards.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    hooks = [
        (module, name, dict(entries)) for module in modules for name in _HOOKS if (entries := getattr(module, name))
    ]
    parameters = list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        with full_float32():
            yield model
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
            for name in _HOOKS:
                if entries := getattr(module, name):
                    entries.clear()
        for module, name, kept in hooks:
            getattr(module, name).update(kept)
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Within, the hooks that torch gave these handles for; they are gone afterwards."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


@contextmanager
def batchnorm(model: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """How BatchNorm behaves while training crafts on ``model``.

    ``train``: batch statistics, running ones move (the DVERGE authors' code). ``batch``: batch statistics, running
    ones stay. ``eval``: running statistics. Modes are restored on leaving.
    """
    if mode == "train":
        yield
        return
    modules = list(model.modules())
    kept = [(module.training, getattr(module, "track_running_stats", None)) for module in modules]
    try:
        if mode == "eval":
            model.eval()
        else:
            for module in modules:
                if isinstance(module, _NormBase):
                    module.track_running_stats = False
        yield
    finally:
        for module, (training, tracked) in zip(modules, kept, strict=True):
            module.training = training
            if isinstance(module, _NormBase) and tracked is not None:
                module.track_running_stats = tracked
