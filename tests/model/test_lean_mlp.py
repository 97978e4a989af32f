"""GELU and linear map in one function that keeps less."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.lean_mlp import gelu_linear


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_the_two_functions_one_after_the_other(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    results = []
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 5, 12), (7, 12), (7,))]
    slope = torch.randn(2, 5, 7, generator=generator).to(dtype)
    for function in (lambda h, w, b: functional.linear(functional.gelu(h), w, b), gelu_linear):
        inputs = [value.clone().requires_grad_() for value in values]
        out = function(*inputs)
        out.backward(slope)
        results.append([out, *(x.grad for x in inputs)])
    for plain, lean in zip(*results, strict=True):
        torch.testing.assert_close(plain, lean)


def test_only_the_hidden_tensor_and_the_weight_are_kept() -> None:
    hidden, layer = torch.randn(3, 12, requires_grad=True), nn.Linear(12, 7)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gelu_linear(hidden, layer.weight, layer.bias)
    assert [x.data_ptr() for x in kept] == [hidden.data_ptr(), layer.weight.data_ptr()]
