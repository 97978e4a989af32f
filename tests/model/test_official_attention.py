"""The published block attention: its quirks one by one, by hand, and none of them against the corrected one."""

import pytest
import torch
from torch import Tensor

from model.attention import AttentionOutput, sparse_attention, token_codes
from model.average_attention import average_attention
from model.official_attention import official_attention
from model.sparsity import EdgeLayout, draw_edge_layout

T, H, W, A, E, B = 3, 2, 3, 2, 5, 2
ROWS = (2 * T - 1) * (2 * H - 1) * (2 * W - 1) + 3
KEPT = torch.tensor([[0, 2, 3, 7, 9, 11, 16], [1, 2, 5, 8, 12, 13, 17]])


def _inputs(num_patches: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    qkv = [torch.randn(B, A, num_patches + 1, E, generator=generator, dtype=torch.float64) for _ in range(3)]
    table = torch.randn(ROWS, A, generator=generator, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in qkv)
    return q, k, v, table.requires_grad_()


def _corrected(
    q: Tensor, k: Tensor, v: Tensor, codes: Tensor, table: Tensor, layout: EdgeLayout | None
) -> AttentionOutput:
    return sparse_attention(_qkv(q, k, v), codes, table, layout, backend="reference", with_cls_scores=True)


def _qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, A, N, E) each to the one tensor that attention takes."""
    return torch.stack([q, k, v]).permute(1, 3, 0, 2, 4)


def _draw(num_patches: int, size: int, num_local: int, num_random: int) -> EdgeLayout:
    return draw_edge_layout(num_patches, size, num_local, num_random, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize(("num_local", "num_random"), [(1, 2), (3, 1), (0, 2)])
@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "pruned"])
def test_without_its_quirks_it_is_the_corrected_attention_in_values_and_gradients(
    kept: Tensor | None, size: int, num_local: int, num_random: int
) -> None:
    codes = token_codes(T, H, W)
    codes = codes if kept is None else codes[kept]
    num_patches = codes.shape[-1]
    layout = _draw(num_patches, size, num_local, num_random)
    results = []
    for corrected in (True, False):
        q, k, v, table = _inputs(num_patches)
        if corrected:
            out, scores = _corrected(q, k, v, codes, table, layout)
        else:
            out, scores = official_attention(
                _qkv(q, k, v),
                codes,
                table,
                layout,
                num_local,
                padded_keys_unmasked=False,
                value_and_bias_block_mirrored=False,
                with_cls_scores=True,
            )
        out.square().sum().backward()
        results.append([out, scores, q.grad, k.grad, v.grad, table.grad])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def _weights(layout: EdgeLayout, num_local: int, bias: Tensor, **flags: bool) -> Tensor:
    """Weight of every value (columns, CLS first) for every query, with zero queries: softmax of the bias alone."""
    n = layout.num_patches
    zero = torch.zeros(1, 1, n + 1, n + 1)
    values = torch.eye(n + 1)[None, None]
    codes = token_codes(1, 1, n)
    return official_attention(_qkv(zero, zero, values), codes, bias[:, None], layout, num_local, **flags)[0][
        0, :, 0
    ]


def test_padded_keys_take_weight_by_the_patch_to_cls_bias() -> None:
    # 3 patches in blocks of 2: the second block holds patch 2 and one padded key. All see both blocks.
    layout = EdgeLayout.from_blocks(torch.tensor([[0, 1], [0, 1]]), 2, 3)
    bias = torch.zeros(2 * 3 - 1 + 3)
    bias[-2] = torch.tensor(2.0).log()
    leaking = _weights(layout, 1, bias)
    # Keys: CLS (weight 2), three patches (1), one padded key (2, and nothing to give).
    assert leaking[1].tolist() == pytest.approx([2 / 7, 1 / 7, 1 / 7, 1 / 7])
    masked = _weights(layout, 1, bias, padded_keys_unmasked=False)
    assert masked[1].tolist() == pytest.approx([2 / 5, 1 / 5, 1 / 5, 1 / 5])
    # CLS sees no padding either way.
    assert leaking[0].tolist() == pytest.approx([1 / 4] * 4)


def test_a_block_listed_twice_counts_twice() -> None:
    layout = EdgeLayout.from_blocks(torch.tensor([[0, 0], [1, 0]]), 1, 2, allow_repeats=True)
    weights = _weights(layout, 1, torch.zeros(2 * 2 - 1 + 3))
    assert weights[1].tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert weights[2].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_a_local_window_of_three_mirrors_values_and_bias_but_not_keys() -> None:
    layout = draw_edge_layout(4, 1, 3, 0, torch.Generator(), quirks=True)
    assert layout.key_blocks_SK.tolist() == [[3, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 0]]
    # Only the key of patch 2 attracts: its score is log 9 for every query.
    zero = torch.zeros(1, 1, 5, 5)
    queries, keys = zero.clone(), zero.clone()
    queries[..., 0] = 5**0.5
    keys[0, 0, 3, 0] = torch.tensor(9.0).log()
    values = torch.eye(5)[None, None]
    codes, table = token_codes(1, 1, 4), torch.zeros(2 * 4 - 1 + 3, 1)
    mirrored = official_attention(_qkv(queries, keys, values), codes, table, layout, 3)[0][0, :, 0]
    straight = official_attention(
        _qkv(queries, keys, values), codes, table, layout, 3, value_and_bias_block_mirrored=False
    )[0][0, :, 0]
    # Query 1 sees CLS and patches 0, 1, 2. The weight of patch 2 (9 of 12) reaches the value of patch 0 instead.
    assert straight[2].tolist() == pytest.approx([1 / 12, 1 / 12, 1 / 12, 9 / 12, 0])
    assert mirrored[2].tolist() == pytest.approx([1 / 12, 9 / 12, 1 / 12, 1 / 12, 0])
    # A bias of log 9 on the offset "one before" acts where the key one after stands.
    table[3 + 1, 0] = torch.tensor(9.0).log()
    by_bias = official_attention(_qkv(zero, zero, values), codes, table, layout, 3)[0][0, :, 0]
    assert by_bias[2].tolist() == pytest.approx([1 / 12, 9 / 12, 1 / 12, 1 / 12, 0])


@pytest.mark.parametrize("is_sparse", [False, True])
def test_average_attention_is_the_mean_weight_of_a_patch(is_sparse: bool) -> None:
    codes = token_codes(T, H, W)[KEPT]
    layout = _draw(7, 2, 1, 1) if is_sparse else None
    q, k, v, table = _inputs(7)
    received = average_attention(_qkv(q, k, v), codes, table, layout)
    # The gradient of the summed output with respect to a value is the sum of the weights it gets.
    out, _ = _corrected(q, k, v, codes, table, layout)
    (summed,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(received, summed[:, :, 1:, 0].mean(dim=1) / 8)
    assert not received.requires_grad
