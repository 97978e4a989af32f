"""The Triton kernels against the reference: on a GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from torch import Tensor

from model import attention
from model.attention import Backend, choose_backend, sparse_attention, token_codes
from model.sparsity import EdgeLayout, draw_edge_layout

pytest.importorskip(
    "triton", reason="Triton comes with torch on GPU machines and with the development packages"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T, H, W, A, E, B = 3, 2, 3, 2, 20, 2
KEPT = [[0, 2, 3, 7, 9, 11, 16], [1, 2, 5, 8, 12, 13, 17]]


def _layout(num_patches: int, size: int, num_local: int = 1, num_random: int = 2) -> EdgeLayout:
    layout = draw_edge_layout(num_patches, size, num_local, num_random, torch.Generator().manual_seed(1))
    return layout.to(DEVICE)


def _codes(kept: list[list[int]] | None) -> Tensor:
    codes = token_codes(T, H, W)
    return (codes if kept is None else codes[torch.tensor(kept)]).to(DEVICE)


def _results(
    backend: Backend, codes: Tensor, layout: EdgeLayout | None, mask: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(B, codes.shape[-1] + 1, 3, A, E, generator=generator)
    table = torch.randn((2 * T - 1) * (2 * H - 1) * (2 * W - 1) + 3, A, generator=generator)
    qkv, table = (x.to(dtype).to(DEVICE).requires_grad_() for x in (qkv, table))
    out, scores = sparse_attention(qkv, codes, table, layout, mask, backend=backend, with_cls_scores=True)
    slope = torch.linspace(0.5, 1.5, out.numel(), device=DEVICE, dtype=dtype)
    (out * slope.view(out.shape)).sum().backward()
    assert scores is not None
    assert qkv.grad is not None
    assert table.grad is not None
    return [out.detach(), scores, qkv.grad, table.grad]


def _assert_equals_reference(
    codes: Tensor, layout: EdgeLayout | None, mask: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    found = _results("triton", codes, layout, mask, dtype)
    for one, other in zip(found, _results("reference", codes, layout, mask, torch.float32), strict=True):
        # Against the largest value: half precision rounds each term, not their sum.
        worst = float((one.float() - other).abs().max() / other.abs().max())
        assert worst < tolerance


@pytest.mark.parametrize(("num_local", "num_random"), [(1, 2), (3, 1), (0, 2), (1, 0)])
@pytest.mark.parametrize("size", [2, 5, 18])
def test_it_equals_the_reference_in_values_scores_and_gradients(
    size: int, num_local: int, num_random: int
) -> None:
    _assert_equals_reference(_codes(None), _layout(18, size, num_local, num_random))


@pytest.mark.parametrize("dense", [False, True])
def test_patches_may_differ_between_samples(dense: bool) -> None:
    _assert_equals_reference(_codes(KEPT), None if dense else _layout(7, 2))


@pytest.mark.parametrize("dense", [False, True])
def test_masked_keys_have_no_weight(dense: bool) -> None:
    mask = torch.ones(B, 19, dtype=torch.bool, device=DEVICE)
    mask[0, 5:9], mask[1, 18] = False, False
    _assert_equals_reference(_codes(None), None if dense else _layout(18, 4), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_sums_in_float32(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 tiles, not their values")
    _assert_equals_reference(_codes(KEPT), _layout(7, 2), dtype=dtype)


def test_queries_may_be_views_of_a_larger_projection() -> None:
    wide = torch.randn(B, 20, 4, A + 1, E + 4, device=DEVICE)
    table = torch.randn((2 * T - 1) * (2 * H - 1) * (2 * W - 1) + 3, A, device=DEVICE)
    view = wide[:, 1:, :3, 1:, :E]
    pair = [
        sparse_attention(qkv, _codes(None), table, _layout(18, 4), backend="triton").values_BNAE
        for qkv in (view, view.contiguous())
    ]
    assert torch.equal(pair[0], pair[1])


def test_it_is_refused_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=r"triton takes float32, float16 or bfloat16 on a GPU, got .* on cpu"
    ):
        choose_backend(torch.device("cpu"), torch.float32, 1, "triton")


def test_it_is_refused_for_a_type_that_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        choose_backend(DEVICE, torch.float64, 1, "triton")


def test_auto_takes_the_kernels_on_a_gpu() -> None:
    assert choose_backend(torch.device("cuda"), torch.bfloat16, 1, "auto") == "triton"
    # A type that they do not know goes the plain way.
    assert choose_backend(torch.device("cuda"), torch.float64, 1, "auto") == "reference"


def test_a_gpu_without_triton_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    attention._has_triton.cache_clear()
    try:
        assert choose_backend(torch.device("cuda"), torch.bfloat16, 1 << 30, "auto") == "blocks"
        assert "no package triton here" in caplog.text
    finally:
        attention._has_triton.cache_clear()
