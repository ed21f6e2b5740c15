"""f^l of any network: the input of its l-th activation in execution order, or, as the last layer, its logits."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from robench.core.errors import RobenchError
from robench.core.frozen import frozen, hooked
from robench.core.models import Normalized

#: Modules that count as activations; a functional call (`F.relu`) cannot be seen from outside.
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Softplus,
    nn.Tanh,
    nn.Sigmoid,
)


class _Reached(Exception):
    """Leaves the forward pass once the layer asked for is there: before an in-place activation overwrites it."""


def depth(model: nn.Module, image: Tensor) -> int:
    """The number of layers l that `features` accepts: activation calls of one forward pass, plus one for the logits.

    Args:
        image: a batch of at least one image (B,C,H,W) of the size that the model takes; run in eval mode, no state
            of the model changes. A model with its own ``features`` method states its ``depth`` as an attribute.

    Raises:
        RobenchError: a model without activation modules.
    """
    if isinstance(model, Normalized):
        return depth(model.model, model.normalize(image))
    own = _own(model)
    if own is not None:
        return int(own.depth)
    calls = 0

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal calls
        calls += 1

    with frozen(model), torch.no_grad(), _before_activations(model, count):
        model(image)
    if calls == 0:
        raise RobenchError(
            f"model {type(model).__name__} has no activation modules (such as nn.ReLU), so its feature layers cannot "
            f"be found; give its class `features(x, layer)` and an attribute `depth`"
        )
    return calls + 1


def features(model: nn.Module, images: Tensor, layer: int) -> Tensor:
    """f^l(x) before its activation, shape (B, ...); the forward pass ends there. Gradients flow.

    Args:
        layer: l in 1..depth(model); depth(model) itself gives the logits.

    Raises:
        RobenchError: a layer that the forward pass does not reach.
    """
    if isinstance(model, Normalized):
        return features(model.model, model.normalize(images), layer)
    own = _own(model)
    if own is not None:
        return own.features(images, layer)  # type: ignore[no-any-return]
    calls = 0
    reached: Tensor | None = None

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal calls, reached
        calls += 1
        if calls == layer:
            reached = args[0]
            raise _Reached

    try:
        with _before_activations(model, stop):
            logits: Tensor = model(images)
    except _Reached:
        assert reached is not None
        return reached
    if layer == calls + 1:
        return logits
    raise RobenchError(f"expected `layer` of {type(model).__name__} in 1..{calls + 1}, got {layer}")


def _own(model: nn.Module) -> Any | None:
    """The model, where it brings its own ``features`` (torchvision calls a part of its networks so: not callable
    with a layer, hence the check for ``depth``)."""
    return model if callable(getattr(model, "features", None)) and hasattr(model, "depth") else None


def _before_activations(model: nn.Module, hook: Any) -> AbstractContextManager[None]:
    activations = [module for module in model.modules() if isinstance(module, ACTIVATIONS)]
    return hooked(module.register_forward_pre_hook(hook) for module in activations)
