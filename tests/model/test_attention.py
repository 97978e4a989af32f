"""Attention backends against each other and against a loop over pairs."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model import attention_blocks
from model.attention import Backend, choose_backend, sparse_attention, token_codes
from model.sparsity import EdgeLayout, draw_edge_layout

T, H, W, A, E, B = 3, 2, 3, 2, 5, 2
ROWS = (2 * T - 1) * (2 * H - 1) * (2 * W - 1) + 3


BACKENDS: tuple[Backend, ...] = ("reference", "blocks", "fused")
# The fused kernel computes in float32, the others are tested in float64.
DTYPE: dict[Backend, torch.dtype] = {
    "reference": torch.float64,
    "blocks": torch.float64,
    "fused": torch.float32,
}


def _inputs(num_patches: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(B, num_patches + 1, 3, A, E, generator=generator, dtype=torch.float64)
    table = torch.randn(ROWS, A, generator=generator, dtype=torch.float64)
    return qkv.to(dtype).requires_grad_(), table.to(dtype).requires_grad_()


def _codes(kept: list[list[int]] | None) -> Tensor:
    codes = token_codes(T, H, W)
    return codes if kept is None else codes[torch.tensor(kept)]


KEPT = [[0, 2, 3, 7, 9, 11, 16], [1, 2, 5, 8, 12, 13, 17]]


def _layout(num_patches: int, size: int, num_local: int = 1, num_random: int = 2) -> EdgeLayout:
    generator = torch.Generator().manual_seed(1)
    return draw_edge_layout(num_patches, size, num_local, num_random, generator)


def _slow(qkv: Tensor, table: Tensor, kept: list[list[int]], layout: EdgeLayout) -> Tensor:
    """One query at a time, the table row from the coordinates as the paper numbers them."""

    def row(query: int, key: int) -> int:
        if query < 0 or key < 0:
            return ROWS - 1 if query == key else (ROWS - 3 if query < 0 else ROWS - 2)
        (t1, r1), (t2, r2) = divmod(query, H * W), divmod(key, H * W)
        (h1, w1), (h2, w2) = divmod(r1, W), divmod(r2, W)
        return ((t1 - t2 + T - 1) * (2 * H - 1) + h1 - h2 + H - 1) * (2 * W - 1) + w1 - w2 + W - 1

    q, k, v = qkv.unbind(2)
    out = torch.zeros_like(v)
    for b, positions in enumerate(kept):
        places = [-1, *positions]
        for i, query in enumerate(places):
            block = (i - 1) // layout.block_size
            seen = [
                j
                for j in range(len(places))
                if i == 0 or j == 0 or (j - 1) // layout.block_size in layout.key_blocks_SK[block].tolist()
            ]
            for a in range(A):
                bias = torch.stack([table[row(query, places[j]), a] for j in seen])
                weights = (k[b, seen, a] @ q[b, i, a] / E**0.5 + bias).softmax(0)
                out[b, i, a] = weights @ v[b, seen, a]
    return out


@pytest.mark.parametrize("num_local", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_a_loop_over_pairs(backend: Backend, num_local: int) -> None:
    qkv, table = _inputs(7, DTYPE[backend])
    layout = _layout(7, 2, num_local, num_random=1)
    out = sparse_attention(qkv, _codes(KEPT), table, layout, backend=backend).values_BNAE
    torch.testing.assert_close(out, _slow(qkv, table, KEPT, layout))


def _values_scores_and_gradients(
    backend: Backend,
    codes: Tensor,
    layout: EdgeLayout | None,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    qkv, table = _inputs(codes.shape[-1], dtype or DTYPE[backend])
    out, scores = sparse_attention(qkv, codes, table, layout, mask, backend=backend, with_cls_scores=True)
    # Different weights everywhere, so that no gradient cancels.
    (out * torch.linspace(0.5, 1.5, out.numel()).view(out.shape)).sum().backward()
    assert scores is not None
    assert qkv.grad is not None
    assert table.grad is not None
    return [out, scores, qkv.grad, table.grad]


def _assert_backends_agree(codes: Tensor, layout: EdgeLayout | None, mask: Tensor | None = None) -> None:
    expected = _values_scores_and_gradients("reference", codes, layout, mask)
    for backend in ("blocks", "fused"):
        for found, wanted in zip(
            _values_scores_and_gradients(backend, codes, layout, mask), expected, strict=True
        ):
            torch.testing.assert_close(found, wanted.to(found.dtype), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(("num_local", "num_random"), [(1, 2), (3, 1), (0, 2), (1, 0)])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 18])
@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "pruned"])
def test_backends_agree_in_values_scores_and_gradients(
    kept: list[list[int]] | None, size: int, num_local: int, num_random: int
) -> None:
    codes = _codes(kept)
    _assert_backends_agree(codes, _layout(codes.shape[-1], size, num_local, num_random))


@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "pruned"])
def test_backends_agree_where_attention_is_dense(kept: list[list[int]] | None) -> None:
    _assert_backends_agree(_codes(kept), None)


@pytest.mark.parametrize(
    ("part_scores", "num_parts"),
    # 18 patches in 5 blocks of 4, 2 heads, 2 clips; a query block has 4 x 13 scores: CLS and 3 blocks of keys.
    # Everything at once; clips apart; heads apart, too; then blocks two by two, one by one.
    [(1 << 19, 1), (2 * 5 * 52, 2), (5 * 52, 4), (2 * 52, 12), (1, 20)],
)
def test_blocks_in_parts_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, part_scores: int, num_parts: int
) -> None:
    seen: list[int] = []
    parts = attention_blocks._Plan.parts

    def counted(plan: attention_blocks._Plan) -> Iterator[attention_blocks._Part]:
        found = list(parts(plan))
        seen.append(len(found))
        return iter(found)

    monkeypatch.setattr(attention_blocks, "_PART_SCORES", part_scores)
    monkeypatch.setattr(attention_blocks._Plan, "parts", counted)
    _assert_backends_agree(_codes(None), _layout(18, 4))
    assert set(seen) == {num_parts}


@pytest.mark.parametrize("dense", [False, True])
def test_backends_agree_where_keys_are_masked(dense: bool) -> None:
    mask = torch.ones(B, 19, dtype=torch.bool)
    mask[0, 5:9], mask[1, 18] = False, False
    _assert_backends_agree(_codes(None), None if dense else _layout(18, 4), mask)


def _large(kept: int | None) -> tuple[Tensor, Tensor, Tensor, EdgeLayout]:
    """4 frames of 10 x 10 patches, 2 heads of 40: several vectors a row, tiles that split a block, partly filled
    vectors, blocks and pieces; more keys than the kernel scores at once.
    """
    generator = torch.Generator().manual_seed(5)
    codes = token_codes(4, 10, 10)
    if kept:
        chosen = [torch.randperm(400, generator=generator)[:kept].sort().values for _ in range(2)]
        codes = codes[torch.stack(chosen)]
    qkv = torch.randn(2, codes.shape[-1] + 1, 3, 2, 40, generator=generator)
    table = torch.randn(7 * 19 * 19 + 3, 2, generator=generator)
    return qkv, table, codes, draw_edge_layout(codes.shape[-1], 90, 1, 3, generator)


@pytest.mark.parametrize("kept", [None, 347])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["float32", "bfloat16"]
)
def test_fused_and_blocks_equal_the_reference_on_many_blocks(
    dtype: torch.dtype, tolerance: float, dense: bool, kept: int | None
) -> None:
    *inputs, codes, layout = _large(kept)
    qkv, table = (x.to(dtype) for x in inputs)
    results = {}
    for backend, precision in (("reference", torch.float64), ("fused", dtype), ("blocks", dtype)):
        q, t = (x.to(precision, copy=True).requires_grad_() for x in (qkv, table))
        out = sparse_attention(q, codes, t, None if dense else layout, backend=backend).values_BNAE
        slope = torch.linspace(-1, 1, out.numel()).to(dtype).to(precision)
        out.backward(slope.view(out.shape))
        results[backend] = [x.detach().double() for x in (out, q.grad, t.grad) if x is not None]
    for backend in ("fused", "blocks"):
        for found, expected in zip(results[backend], results["reference"], strict=True):
            # Against the largest value: bfloat16 rounds each term, not their sum.
            worst = float((found - expected).abs().max() / expected.abs().max())
            assert worst < tolerance, (backend, worst)


@pytest.mark.parametrize("kept", [None, 347])
def test_the_fused_kernel_repeats_bit_by_bit_on_any_number_of_threads(kept: int | None) -> None:
    qkv, table, codes, layout = _large(kept)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            q, t = qkv.clone().requires_grad_(), table.clone().requires_grad_()
            out, scores = sparse_attention(q, codes, t, layout, backend="fused", with_cls_scores=True)
            out.sin().sum().backward()
            results.append([out, scores, q.grad, t.grad])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for found, first in zip(other, results[0], strict=True):
            assert torch.equal(found, first)


def test_queries_may_be_views_of_a_larger_projection() -> None:
    qkv, table, codes, layout = _large(None)
    wide = torch.zeros(2, 402, 4, 3, 48)
    wide[:, 1:, :3, 1:, :40] = qkv
    view = wide[:, 1:, :3, 1:, :40]
    plain = sparse_attention(qkv, codes, table, layout, backend="fused").values_BNAE
    assert torch.equal(sparse_attention(view, codes, table, layout, backend="fused").values_BNAE, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "pruned"])
def test_own_block_and_all_others_equal_dense_in_values_and_gradients(
    kept: list[list[int]] | None, backend: Backend
) -> None:
    codes = _codes(kept)
    num_patches = codes.shape[-1]
    everything = _layout(num_patches, 4, 1, -(-num_patches // 4) - 1)
    dense = _values_scores_and_gradients(backend, codes, None)
    for one, other in zip(_values_scores_and_gradients(backend, codes, everything), dense, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_have_no_weight_whatever_they_hold(backend: Backend) -> None:
    qkv, table = _inputs(18, DTYPE[backend])
    mask = torch.ones(B, 19, dtype=torch.bool)
    mask[0, 5:9] = False
    layout = _layout(18, 4)
    plain = sparse_attention(qkv, _codes(None), table, layout, mask, backend=backend, with_cls_scores=True)
    assert plain.cls_scores_BN is not None
    assert plain.cls_scores_BN[0, 4:8].tolist() == [0, 0, 0, 0]
    with torch.no_grad():
        qkv[0, 5:9, 1], qkv[0, 5:9, 2] = 50.0, -7.0
    changed = sparse_attention(qkv, _codes(None), table, layout, mask, backend=backend)
    others = [i for i in range(19) if i not in range(5, 9)]
    torch.testing.assert_close(plain.values_BNAE[:, others], changed.values_BNAE[:, others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_a_partly_filled_last_block_sum_to_one(backend: Backend) -> None:
    qkv, table = _inputs(7, DTYPE[backend])
    with torch.no_grad():
        qkv[:, :, 2] = 1.0
    out = sparse_attention(qkv, _codes(KEPT), table, _layout(7, 4, 1, 1), backend=backend).values_BNAE
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cls_scores_are_its_attention_to_patches_averaged_over_heads(backend: Backend) -> None:
    qkv, table = _inputs(18, DTYPE[backend])
    _, scores = sparse_attention(
        qkv, _codes(None), table, _layout(18, 4), backend=backend, with_cls_scores=True
    )
    logits = torch.einsum("bae,bnae->ban", qkv[:, 0, 0], qkv[:, :, 1]) / E**0.5
    logits = logits + torch.stack([table[-1], *[table[-3]] * 18]).T
    assert scores is not None
    assert not scores.requires_grad
    torch.testing.assert_close(scores, logits.softmax(-1)[:, :, 1:].mean(1).detach())


def test_a_layout_for_another_length_is_refused() -> None:
    qkv, table = _inputs(7, torch.float64)
    with pytest.raises(ValueError, match="layout is for 8 patches, got 7"):
        sparse_attention(qkv, _codes(KEPT), table, _layout(8, 4))


def test_the_fused_kernel_refuses_what_it_would_read_out_of_bounds() -> None:
    qkv, table = _inputs(18, torch.float32)
    unknown = EdgeLayout(torch.full((5, 1), 5), 4, 18)
    with pytest.raises(ValueError, match="18 patches in blocks of 4: key_blocks lists a block"):
        sparse_attention(qkv, _codes(None), table, unknown, backend="fused")
    with pytest.raises(ValueError, match="farther apart than the position table reaches"):
        sparse_attention(qkv, _codes(None) * 9, table, _layout(18, 4), backend="fused")


def test_fused_is_refused_for_a_type_that_it_does_not_know() -> None:
    qkv, table = _inputs(18, torch.float64)
    with pytest.raises(ValueError, match=r"takes float32 or bfloat16 on the CPU, got torch\.float64"):
        sparse_attention(qkv, _codes(None), table, backend="fused")


@pytest.mark.parametrize(
    ("dtype", "num_scores", "expected"),
    [
        (torch.float32, 1, "fused"),
        (torch.bfloat16, 10**9, "fused"),
        (torch.float64, 10**6, "reference"),
        (torch.float64, 10**7, "blocks"),
    ],
)
def test_the_automatic_choice_is_fused_where_it_fits_else_by_size(
    dtype: torch.dtype, num_scores: int, expected: str
) -> None:
    assert choose_backend(torch.device("cpu"), dtype, num_scores, "auto") == expected
