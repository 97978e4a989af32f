"""Both attention backends against each other and against a loop over pairs."""

import pytest
import torch
from torch import Tensor

from model.attention import Backend, sparse_attention, token_codes
from model.sparsity import EdgeLayout, draw_edge_layout

T, H, W, A, E, B = 3, 2, 3, 2, 5, 2
ROWS = (2 * T - 1) * (2 * H - 1) * (2 * W - 1) + 3


def _inputs(num_patches: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    qkv = [torch.randn(B, A, num_patches + 1, E, generator=generator, dtype=torch.float64) for _ in range(3)]
    table = torch.randn(ROWS, A, generator=generator, dtype=torch.float64)
    return [x.requires_grad_() for x in qkv], table.requires_grad_()


def _codes(kept: list[list[int]] | None) -> Tensor:
    codes = token_codes(T, H, W)
    return codes if kept is None else codes[torch.tensor(kept)]


KEPT = [[0, 2, 3, 7, 9, 11, 16], [1, 2, 5, 8, 12, 13, 17]]


def _layout(num_patches: int, size: int, num_local: int = 1, num_random: int = 2) -> EdgeLayout:
    generator = torch.Generator().manual_seed(1)
    return draw_edge_layout(num_patches, size, num_local, num_random, generator)


def _slow(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, kept: list[list[int]], layout: EdgeLayout
) -> Tensor:
    """One query at a time, the table row from the coordinates as the paper numbers them."""

    def row(query: int, key: int) -> int:
        if query < 0 or key < 0:
            return ROWS - 1 if query == key else (ROWS - 3 if query < 0 else ROWS - 2)
        (t1, r1), (t2, r2) = divmod(query, H * W), divmod(key, H * W)
        (h1, w1), (h2, w2) = divmod(r1, W), divmod(r2, W)
        return ((t1 - t2 + T - 1) * (2 * H - 1) + h1 - h2 + H - 1) * (2 * W - 1) + w1 - w2 + W - 1

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
                weights = (k[b, a, seen] @ q[b, a, i] / E**0.5 + bias).softmax(0)
                out[b, a, i] = weights @ v[b, a, seen]
    return out


@pytest.mark.parametrize("num_local", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_both_backends_equal_a_loop_over_pairs(backend: Backend, num_local: int) -> None:
    (q, k, v), table = _inputs(7)
    layout = _layout(7, 2, num_local, num_random=1)
    out = sparse_attention(q, k, v, _codes(KEPT), table, layout, backend=backend).values_BANE
    torch.testing.assert_close(out, _slow(q, k, v, table, KEPT, layout))


@pytest.mark.parametrize(("num_local", "num_random"), [(1, 2), (3, 1), (0, 2), (1, 0)])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 18])
@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "pruned"])
def test_backends_agree_in_values_scores_and_gradients(
    kept: list[list[int]] | None, size: int, num_local: int, num_random: int
) -> None:
    codes = _codes(kept)
    num_patches = codes.shape[-1]
    layout = _layout(num_patches, size, num_local, num_random)
    results = []
    for backend in ("reference", "gather"):
        (q, k, v), table = _inputs(num_patches)
        out, scores = sparse_attention(q, k, v, codes, table, layout, backend=backend, with_cls_scores=True)
        out.square().sum().backward()
        results.append([out, scores, q.grad, k.grad, v.grad, table.grad])
    for reference, gather in zip(*results, strict=True):
        torch.testing.assert_close(reference, gather)


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "pruned"])
def test_own_block_and_all_others_equal_dense_in_values_and_gradients(
    kept: list[list[int]] | None, backend: Backend
) -> None:
    codes = _codes(kept)
    num_patches = codes.shape[-1]
    results = []
    for layout in (None, _layout(num_patches, 4, 1, -(-num_patches // 4) - 1)):
        (q, k, v), table = _inputs(num_patches)
        out, _ = sparse_attention(q, k, v, codes, table, layout, backend=backend)
        out.square().sum().backward()
        results.append([out, q.grad, k.grad, v.grad, table.grad])
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(dense, sparse)


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_masked_keys_have_no_weight_whatever_they_hold(backend: Backend) -> None:
    (q, k, v), table = _inputs(18)
    mask = torch.ones(B, 19, dtype=torch.bool)
    mask[0, 5:9] = False
    layout = _layout(18, 4)
    plain = sparse_attention(
        q, k, v, _codes(None), table, layout, mask, backend=backend, with_cls_scores=True
    )
    assert plain.cls_scores_BN is not None
    assert plain.cls_scores_BN[0, 4:8].tolist() == [0, 0, 0, 0]
    with torch.no_grad():
        k[0, :, 5:9], v[0, :, 5:9] = 50.0, -7.0
    changed = sparse_attention(q, k, v, _codes(None), table, layout, mask, backend=backend)
    others = [i for i in range(19) if i not in range(5, 9)]
    torch.testing.assert_close(plain.values_BANE[:, :, others], changed.values_BANE[:, :, others])


@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_weights_of_a_partly_filled_last_block_sum_to_one(backend: Backend) -> None:
    (q, k, v), table = _inputs(7)
    ones = torch.ones_like(v)
    out = sparse_attention(q, k, ones, _codes(KEPT), table, _layout(7, 4, 1, 1), backend=backend).values_BANE
    torch.testing.assert_close(out, ones)


def test_cls_scores_are_its_attention_to_patches_averaged_over_heads() -> None:
    (q, k, v), table = _inputs(18)
    _, scores = sparse_attention(q, k, v, _codes(None), table, _layout(18, 4), with_cls_scores=True)
    logits = q[:, :, :1] @ k.transpose(2, 3) / E**0.5
    logits = logits + torch.stack([table[-1], *[table[-3]] * 18]).T[:, None]
    assert scores is not None
    assert not scores.requires_grad
    torch.testing.assert_close(scores, logits.softmax(-1)[:, :, 0, 1:].mean(1).detach())


def test_a_layout_for_another_length_is_refused() -> None:
    (q, k, v), table = _inputs(7)
    with pytest.raises(ValueError, match="layout is for 8 patches, got 7"):
        sparse_attention(q, k, v, _codes(KEPT), table, _layout(8, 4))


def test_automatic_choice_gathers_only_when_most_keys_are_left_out() -> None:
    (q, k, v), table = _inputs(18)
    sparse, wide = _layout(18, 2, 1, 1), _layout(18, 4, 1, 3)
    for layout, expected in ((sparse, "gather"), (wide, "reference")):
        auto = sparse_attention(q, k, v, _codes(None), table, layout).values_BANE
        named = sparse_attention(q, k, v, _codes(None), table, layout, backend=expected).values_BANE
        assert torch.equal(auto, named)
