"""Which blocks and patches are chosen."""

import pytest
import torch

from model.config import VideoConfig
from model.sparsity import (
    EdgeLayout,
    choose_random_blocks,
    draw_edge_layout,
    draw_layouts,
    draw_node_scores,
    keep_patches,
    local_blocks,
    select_patches,
)
from model.token_order import token_order


def _draw(num_patches: int, size: int, num_local: int, num_random: int, seed: int = 0) -> EdgeLayout:
    return draw_edge_layout(num_patches, size, num_local, num_random, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_patches", [5, 12, 17, 64])
@pytest.mark.parametrize(("num_local", "num_random"), [(1, 0), (1, 3), (3, 2), (0, 2), (5, 9)])
def test_every_block_is_listed_once_and_random_ones_are_not_local(
    num_patches: int, num_local: int, num_random: int
) -> None:
    layout = _draw(num_patches, 4, num_local, num_random)
    half = (num_local - 1) // 2 if num_local else -1
    for own, row in enumerate(layout.key_blocks_SK.tolist()):
        used = [block for block in row if block >= 0]
        local = [b for b in range(layout.num_blocks) if abs(b - own) <= half]
        assert len(set(used)) == len(used)
        assert used[: len(local)] == local
        random_part = used[len(local) :]
        assert random_part == sorted(random_part)
        assert len(random_part) == min(num_random, layout.num_blocks - len(local))


def test_local_blocks_do_not_wrap_round_the_ends() -> None:
    assert _draw(16, 4, 3, 0).key_blocks_SK.tolist() == [[-1, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, -1]]


def test_a_circular_window_wraps_and_lists_a_block_once() -> None:
    generator = torch.Generator()
    assert draw_edge_layout(16, 4, 3, 0, generator, circular=True).key_blocks_SK.tolist() == [
        [3, 0, 1],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 0],
    ]
    # Two blocks, a window of three: the neighbour on both sides is the same one.
    assert draw_edge_layout(8, 4, 3, 0, generator, circular=True).key_blocks_SK.tolist() == [
        [1, 0, -1],
        [0, 1, -1],
    ]
    both = draw_edge_layout(24, 4, 3, 9, generator, circular=True).key_blocks_SK
    assert both.sort(dim=1).values.tolist() == [list(range(6))] * 6


def test_the_published_draw_repeats_local_blocks_when_others_run_out() -> None:
    layout = draw_edge_layout(8, 4, 1, 2, torch.Generator(), quirks=True)
    assert layout.key_blocks_SK.tolist() == [[0, 0, 1], [1, 0, 1]]
    wrapped = draw_edge_layout(8, 4, 3, 0, torch.Generator(), quirks=True)
    assert wrapped.key_blocks_SK.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_random_blocks_are_those_of_the_highest_numbers_that_are_not_local() -> None:
    uniform = torch.tensor(
        [[0.9, 0.1, 0.2, 0.3], [0.4, 0.9, 0.1, 0.3], [0.5, 0.6, 0.9, 0.1], [0.2, 0.1, 0.3, 0.9]]
    )
    own = local_blocks(4, 1)
    assert choose_random_blocks(uniform, own, 2).tolist() == [[2, 3], [0, 3], [0, 1], [0, 2]]
    assert choose_random_blocks(uniform, own, 9).tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    near = local_blocks(4, 3)
    assert choose_random_blocks(uniform, near, 2).tolist() == [[2, 3], [3, -1], [0, -1], [0, 1]]


def test_random_node_scores_are_a_function_of_seed_and_layer() -> None:
    scores = draw_node_scores(20, 3, 1)
    assert torch.equal(scores, draw_node_scores(20, 3, 1))
    assert not torch.equal(scores, draw_node_scores(20, 4, 1))
    assert not torch.equal(scores, draw_node_scores(20, 3, 2))


def test_dense_mask_by_hand() -> None:
    layout = EdgeLayout.from_blocks(torch.tensor([[0], [2], [0]]), block_size=2, num_patches=5)
    expected = [
        # CLS, then patches 0..4; blocks {0, 1}, {2, 3}, {4}
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0, 1],
        [1, 1, 1, 0, 0, 0],
    ]
    assert layout.dense_mask().int().tolist() == expected


def test_all_other_blocks_give_the_dense_mask() -> None:
    assert _draw(18, 4, 1, 4).dense_mask().all()
    assert _draw(18, 4, 1, 99).dense_mask().all()


@pytest.mark.parametrize(
    ("blocks", "words"),
    [([[0, 0], [1, 0]], "lists a key block twice"), ([[0, 1]], "1 rows"), ([[0, 2], [1, 0]], "outside 0..1")],
)
def test_given_layouts_are_checked(blocks: list[list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EdgeLayout.from_blocks(torch.tensor(blocks), block_size=4, num_patches=8)


def test_layouts_are_a_function_of_seed_and_layer() -> None:
    config = VideoConfig(num_frames=4)
    first, again, other = (draw_layouts(config, seed) for seed in (1, 1, 2))
    for layer in range(12):
        a, b, c = first[layer], again[layer], other[layer]
        assert a is not None
        assert b is not None
        assert c is not None
        assert torch.equal(a.key_blocks_SK, b.key_blocks_SK)
        assert not torch.equal(a.key_blocks_SK, c.key_blocks_SK)
    assert first[0] is not None
    assert first[1] is not None
    assert not torch.equal(first[0].key_blocks_SK, first[1].key_blocks_SK)


def test_random_blocks_are_drawn_evenly() -> None:
    counts = torch.zeros(8)
    for seed in range(400):
        counts += torch.bincount(_draw(32, 4, 1, 2, seed).key_blocks_SK[0, 1:], minlength=8)
    assert counts[0] == 0
    # 800 draws over 7 blocks: 114 each, standard deviation 9
    assert counts[1:].min() > 75
    assert counts[1:].max() < 155


def test_selected_patches_are_the_best_in_ascending_order() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.2, 0.4], [0.9, 0.1, 0.3, 0.2]])
    kept = select_patches(scores, 2)
    assert kept.tolist() == [[1, 3], [0, 2]]
    tokens = torch.arange(10.0).view(2, 5, 1)
    assert keep_patches(tokens, kept)[..., 0].tolist() == [[0, 2, 4], [5, 6, 8]]


def test_the_curve_runs_through_time_first() -> None:
    config = VideoConfig(num_frames=2, image_size=32, num_random_blocks=None, token_order="zcurve")
    # 2 x 2 patches: positions 0..3 of frame 0, 4..7 of frame 1
    assert token_order(config).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


@pytest.mark.parametrize("curve", ["zcurve", "hilbert"])
def test_curves_visit_every_patch_of_an_uneven_grid_once(curve: str) -> None:
    config = VideoConfig(num_frames=3, image_size=80, num_random_blocks=None, token_order=curve)
    assert token_order(config).sort().values.tolist() == list(range(75))


def test_successive_patches_on_the_hilbert_curve_are_neighbours() -> None:
    config = VideoConfig(num_frames=8, image_size=128, num_random_blocks=None, token_order="hilbert")
    order = token_order(config)
    places = torch.stack([order // 64, order // 8 % 8, order % 8], dim=1)
    assert ((places[1:] - places[:-1]).abs().sum(dim=1) == 1).all()
