"""The second half of a feed-forward layer without keeping what is cheap to compute again."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def gelu_linear(
    hidden_BNF: Float[Tensor, "B N F"], weight_DF: Float[Tensor, "D F"], bias_D: Float[Tensor, " D"]
) -> Float[Tensor, "B N D"]:
    """linear(gelu(hidden)), exact (erf) GELU.

    Keeps `hidden` only, where the two functions one after the other also keep gelu(hidden): the widest tensor of a
    layer, a quarter of what its backward pass needs. The price is one more GELU.
    """
    return _GeluLinear.apply(hidden_BNF, weight_DF, bias_D)  # pyright: ignore[reportReturnType]


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(hidden, weight)
        return functional.linear(functional.gelu(hidden), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore
        hidden, weight = ctx.saved_tensors
        grad_rows = grad.flatten(0, -2)
        grad_weight = grad_rows.T @ functional.gelu(hidden).flatten(0, -2)
        grad_hidden = grad @ weight
        # In place: at its widest the layer then holds two such tensors, not three.
        torch.ops.aten.gelu_backward.grad_input(grad_hidden, hidden, grad_input=grad_hidden)
        return grad_hidden, grad_weight, grad_rows.sum(dim=0)
