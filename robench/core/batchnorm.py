"""BatchNorm whose gradient is differentiated again in a few passes over the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


class TwiceDifferentiable(TorchFunctionMode):
    """A context in which every BatchNorm that trains is differentiated twice by the formula, instead of by torch's
    some thirty operations, which more than double what GAL and TRS cost on a CPU (`benchmarks/defense_cost.py`).

    Outputs, running statistics and first gradients come from torch's kernels; second gradients are the same up to
    rounding, in float32 for bfloat16. There are no third ones.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`; its parameters have torch's names."""
    if not training or input.numel() <= input.shape[1]:  # torch refuses one value per channel
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y: Tensor = _Normalised.apply(input, weight, bias, running_mean, running_var, momentum, eps)
    return y


class _Normalised(torch.autograd.Function):
    """y = w·x̂ + b, x̂ = (x − μ)·r, r = 1/√(σ² + ε), each of a channel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, scale = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, mean, scale, weight)
        ctx.eps, ctx.has_bias = eps, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, mean, scale, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = _Slope.apply(slope, x, weight, mean, scale, ctx.eps)
        return by_x, by_weight if weight is not None else None, by_bias if ctx.has_bias else None, *[None] * 4


def _first(
    slope: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """w·r·(g − mean g − x̂·mean(g·x̂)), Σ g·x̂ and Σ g of a gradient g by y: what torch makes of it."""
    by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
        slope, x, weight, None, None, mean, scale, True, eps, [True, True, True]
    )
    return by_x, by_weight, by_bias


class _Slope(torch.autograd.Function):
    """The gradient of `_Normalised`, by x, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, slope: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_x, by_weight, by_bias = _first(slope, x, weight, mean, scale, eps)
        ctx.save_for_backward(slope, x, weight, mean, scale, by_weight, by_bias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return by_x, by_weight, by_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor | None, by_weight: Tensor | None, by_bias: Tensor | None) -> Any:
        """Gradients by g, x and w of ⟨v, ∂x⟩ + ⟨by_weight, ∂w⟩ + ⟨by_bias, ∂b⟩.

        With p = mean(v·x̂), q = mean(g·x̂), c = mean(v·g) − mean(v)·mean(g), the first is Φ = n·w·r·(c − p·q); its
        gradient by x is −w·r²·(q·(v − mean v) + p·(g − mean g) + (c − 3·p·q)·x̂).
        """
        slope, x, weight, mean, scale, total_weight, total_bias = ctx.saved_tensors
        count, others = x.numel() // x.shape[1], [at for at in range(x.dim()) if at != 1]
        wide = torch.promote_types(x.dtype, torch.float32)

        def each(value: Tensor) -> Tensor:
            return value.to(wide).view(1, -1, *[1] * (x.dim() - 2))

        r, q, g_mean = each(scale), each(total_weight) / count, each(total_bias) / count
        w = torch.ones_like(r) if weight is None else each(weight)
        v = torch.zeros_like(slope) if v is None else v
        of_g, v_weight, v_bias = _first(v, x, weight, mean, scale, ctx.eps)
        p, v_mean = each(v_weight) / count, each(v_bias) / count
        v, g, normal = v.to(wide), slope.to(wide), (x.to(wide) - each(mean)) * r
        c = (v * g).mean(others, keepdim=True) - v_mean * g_mean
        of_w = (count * r * (c - p * q)).flatten().to(mean.dtype)
        factor = -w * r * r
        on_g, on_x, constant = factor * p, factor * (c - 3 * p * q), -factor * (q * v_mean + p * g_mean)
        if by_weight is not None:
            up = each(by_weight) * r
            of_g = of_g + (each(by_weight) * normal).to(of_g.dtype)
            on_g, on_x, constant = on_g + up, on_x - up * q, constant - up * g_mean
        if by_bias is not None:
            of_g = of_g + each(by_bias).to(of_g.dtype)
        of_x = torch.addcmul(constant, v, factor * q).addcmul_(g, on_g).addcmul_(normal, on_x)
        return of_g, of_x.to(x.dtype), of_w if weight is not None else None, None, None, None
