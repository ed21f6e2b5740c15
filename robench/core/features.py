"""f^l of any network: the input of its l-th activation in execution order, or, as the last layer, its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

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
    part = _PARTS[model](layer, model.training) if model in _PARTS else None
    if part is not None:
        # CUDA graphs write the next output over this one.
        return part(images).clone()  # type: ignore[no-any-return]
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


_Part = Callable[[int, bool], nn.Module | None]

#: Networks of which the part up to a layer is a module of its own, see `parted`.
_PARTS: WeakKeyDictionary[nn.Module, _Part] = WeakKeyDictionary()


@contextmanager
def parted(models: Iterable[nn.Module], prepare: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
    """Within, `features` of these networks runs modules that end at the layer asked for, each once through ``prepare``,
    instead of leaving the forward pass: as torch.compile wants it. Networks that torch.fx cannot trace, and those with
    their own ``features``, go on as usual.
    """
    parts = {model: _parts(model, prepare) for model in models if _traceable(model)}
    _PARTS.update(parts)
    try:
        yield
    finally:
        for model in parts:
            del _PARTS[model]


def _traceable(model: nn.Module) -> bool:
    if _own(model.model if isinstance(model, Normalized) else model) is not None:
        return False
    try:
        fx.symbolic_trace(model)
    except Exception:  # whatever tracing a user's forward may raise
        return False
    return True


def _parts(model: nn.Module, prepare: Callable[[nn.Module], nn.Module]) -> _Part:
    @cache
    def part(layer: int, training: bool) -> nn.Module | None:
        """The operations before the ``layer``-th activation, in execution order: also those that it does not depend on,
        as their BatchNorm counts in train mode. None where there are fewer layers."""
        graph, calls = fx.Graph(), 0
        copies: dict[fx.Node, fx.Node] = {}
        for node in fx.symbolic_trace(model).graph.nodes:
            if node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), ACTIVATIONS):
                calls += 1
                if calls == layer:
                    graph.output(copies[node.args[0]])
                    return prepare(fx.GraphModule(model, graph))
            copies[node] = graph.node_copy(node, copies.__getitem__)
        return prepare(fx.GraphModule(model, graph)) if layer == calls + 1 else None

    return part


def _own(model: nn.Module) -> Any | None:
    """The model, where it brings its own ``features`` (torchvision calls a part of its networks so: not callable
    with a layer, hence the check for ``depth``)."""
    return model if callable(getattr(model, "features", None)) and hasattr(model, "depth") else None


def _before_activations(model: nn.Module, hook: Any) -> AbstractContextManager[None]:
    activations = [module for module in model.modules() if isinstance(module, ACTIVATIONS)]
    return hooked(module.register_forward_pre_hook(hook) for module in activations)
