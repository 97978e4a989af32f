"""The whole video encoder: pruning, repeatability, frame order, errors."""

import pytest
import torch
from torch import Tensor

from model.blocks import VideoBlock
from model.config import VideoConfig
from model.errors import ModelInputError
from model.row_draws import RowDraws
from model.sparsity import EdgeLayout, draw_layouts
from model.video_encoder import VideoEncoder, check_finite
from model.weights import inflate_bias_table
from tests.model.tiny import tiny_batch, tiny_config


def _encoder(**video: object) -> VideoEncoder:
    torch.manual_seed(0)
    return VideoEncoder(tiny_config(video).video).eval()


def _clips(**video: object) -> Tensor:
    return tiny_batch(tiny_config(video)).video


def test_survivors_are_nested_ascending_and_counted() -> None:
    encoding = _encoder()(_clips())
    first, second = encoding.keep_indices
    assert first.shape == (6, 18)
    assert second.shape == (6, 12)
    assert encoding.tokens_BMD.shape == (6, 13, 16)
    for earlier, later in zip(first.tolist(), second.tolist(), strict=True):
        assert earlier == sorted(set(earlier))
        assert later == sorted(set(later))
        assert set(later) <= set(earlier) <= set(range(27))


@pytest.mark.parametrize("size", [1, 4, 5, 27])
def test_both_backends_give_the_same_encoding_and_gradients(size: int) -> None:
    results = []
    for backend in ("reference", "blocks"):
        encoder = _encoder(attention_backend=backend, block_size=size).double()
        encoding = encoder(_clips().double(), edge_seed=5)
        encoding.pooled_BD.square().sum().backward()
        results.append([encoding.tokens_BMD, *encoding.keep_indices, *(p.grad for p in encoder.parameters())])
    for reference, gather in zip(*results, strict=True):
        torch.testing.assert_close(reference, gather)


def test_evaluation_repeats_and_another_seed_changes_only_sparse_encoders() -> None:
    clips = _clips()
    sparse, dense = _encoder(), _encoder(num_random_blocks=None)
    for encoder, changes in ((sparse, True), (dense, False)):
        plain = encoder(clips).pooled_BD
        assert torch.equal(plain, encoder(clips).pooled_BD)
        assert torch.equal(plain, encoder(clips, edge_seed=encoder.config.eval_edge_seed).pooled_BD)
        assert torch.equal(plain, encoder(clips, edge_seed=99).pooled_BD) != changes


def test_given_layouts_replace_the_drawn_ones() -> None:
    encoder = _encoder()
    given: list[EdgeLayout | None] = draw_layouts(encoder.config, 99)
    assert torch.equal(encoder(_clips(), layouts=given).pooled_BD, encoder(_clips(), edge_seed=99).pooled_BD)


def test_one_frame_with_pruning_and_more_random_blocks_than_are_left_runs() -> None:
    encoder = _encoder(num_frames=1, num_random_blocks=9, keep_rate=0.5, num_local_blocks=3)
    assert encoder(_clips(num_frames=1)).tokens_BMD.shape == (6, 1 + 3, 16)


@pytest.mark.parametrize("num_local", [1, 3])
def test_all_blocks_equal_the_dense_encoder(num_local: int) -> None:
    clips = _clips().double()
    sparse = _encoder(num_random_blocks=6, num_local_blocks=num_local, attention_backend="blocks").double()
    dense = _encoder(num_random_blocks=None).double()
    torch.testing.assert_close(sparse(clips).tokens_BMD, dense(clips).tokens_BMD, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("num_frames", "keep_rate", "tokens"),
    [
        (1, 0.7, (196, 138, 97, 68)),
        (2, 0.7, (392, 275, 193, 136)),
        (4, 0.7, (784, 549, 385, 270)),
        (4, 0.6, (784, 471, 283, 170)),
        (8, 0.7, (1568, 1098, 769, 539)),
        (8, 0.6, (1568, 941, 565, 339)),
        (16, 0.7, (3136, 2196, 1538, 1077)),
        (16, 0.6, (3136, 1882, 1130, 678)),
    ],
)
def test_the_published_numbers_of_tokens_survive(
    num_frames: int, keep_rate: float, tokens: tuple[int, ...]
) -> None:
    config = VideoConfig(num_frames=num_frames, keep_rate=keep_rate, width=4, num_heads=1)
    entering = []
    encoder = VideoEncoder(config).eval()
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0].shape[1] - 1))
    with torch.inference_mode():
        encoding = encoder(torch.randn(1, num_frames, 3, 224, 224))
    expected = [*[tokens[0]] * 4, *[tokens[1]] * 3, *[tokens[2]] * 3, *[tokens[3]] * 2]
    assert entering == expected
    assert encoding.tokens_BMD.shape[1] == 1 + tokens[3]
    assert tuple(kept.shape[1] for kept in encoding.keep_indices) == tokens[1:]


def test_a_clip_is_encoded_the_same_alone_and_in_a_batch() -> None:
    # Padded keys would let what stands beside a clip in memory leak into it.
    encoder, clips = _encoder(), _clips()
    torch.testing.assert_close(encoder(clips).pooled_BD[2:3], encoder(clips[2:3]).pooled_BD)


def test_quirks_change_the_encoding_only_where_blocks_are_partly_filled_or_repeated() -> None:
    clips = _clips()
    whole = {"block_size": 9, "num_random_blocks": 1, "keep_rate": 1.0}
    for video, changes in ((whole, False), ({**whole, "block_size": 8}, True), ({}, True)):
        plain, quirky = (_encoder(**video, official_quirks=on)(clips).pooled_BD for on in (False, True))
        assert torch.allclose(plain, quirky, atol=1e-5) != changes


def test_a_window_of_three_wraps_only_when_asked() -> None:
    clips = _clips()
    video = {"num_local_blocks": 3, "num_random_blocks": 0, "keep_rate": 1.0, "block_size": 3}
    # Mirroring aside, the published window is the circular one.
    plain, circular = (_encoder(**video, circular_window=on)(clips).pooled_BD for on in (False, True))
    assert not torch.allclose(plain, circular, atol=1e-4)


@pytest.mark.parametrize("score", ["cls_attn", "avg_attn", "random"])
def test_every_score_keeps_the_same_number_and_repeats(score: str) -> None:
    clips = _clips()
    encoder = _encoder(prune_score=score)
    first, again = encoder(clips), encoder(clips)
    assert [kept.shape[1] for kept in first.keep_indices] == [18, 12]
    assert torch.equal(first.pooled_BD, again.pooled_BD)
    other = [kept.tolist() for kept in _encoder(prune_score="cls_attn")(clips).keep_indices]
    assert ([kept.tolist() for kept in first.keep_indices] == other) == (score == "cls_attn")


def test_random_pruning_is_keyed_and_the_same_for_all_clips() -> None:
    clips = _clips()
    encoder = _encoder(prune_score="random", num_random_blocks=None)
    kept, _ = encoder(clips, edge_seed=1).keep_indices
    assert (kept == kept[0]).all()
    assert torch.equal(kept[:2], encoder(clips[:2], edge_seed=1).keep_indices[0])
    assert not torch.equal(kept, encoder(clips, edge_seed=2).keep_indices[0])


def test_average_pruning_keeps_the_patches_that_all_tokens_look_at() -> None:
    encoder = _encoder(num_random_blocks=None, prune_layers=(0,), keep_rate=0.3, prune_score="avg_attn")
    clips = _clips()
    tokens = torch.cat([encoder.cls_token.expand(6, -1, -1), encoder.patch_embed(clips)], dim=1)
    _, scores = encoder.layers[0](tokens, encoder.codes, None, True)
    best = scores.argsort(dim=1, descending=True)[:, :9].sort(dim=1).values
    assert torch.equal(encoder(clips).keep_indices[0], best)
    assert (scores.sum(dim=1) < 1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("is_training", [True, False])
def test_clips_that_are_not_finite_are_refused_by_row(value: float, is_training: bool) -> None:
    encoder, clips = _encoder().train(is_training), _clips()
    clips[[1, 4], 2, 0, 3, 3] = value
    with pytest.raises(ModelInputError, match=r"rows \[1, 4\] hold NaN or infinite values"):
        encoder(clips)


def test_in_training_clips_on_an_accelerator_are_not_looked_at() -> None:
    class OnAccelerator:
        device = torch.device("cuda")

        def flatten(self, axis: int) -> Tensor:
            raise AssertionError("the answer would have to be waited for")

    check_finite(OnAccelerator(), is_training=True)  # pyright: ignore[reportArgumentType]
    with pytest.raises(AssertionError, match="waited for"):
        check_finite(OnAccelerator(), is_training=False)  # pyright: ignore[reportArgumentType]


def _inflated_from_image(num_frames: int) -> VideoEncoder:
    image = _encoder(num_frames=1, num_random_blocks=None, keep_rate=1.0)
    clip = _encoder(num_frames=num_frames, num_random_blocks=None, keep_rate=1.0)
    state = {
        key: inflate_bias_table(value, 1, num_frames) if key.endswith("bias_table") else value
        for key, value in image.state_dict().items()
    }
    clip.load_state_dict(state)
    return clip.double()


def test_an_inflated_image_encoder_is_blind_to_frame_order() -> None:
    encoder = _inflated_from_image(3)
    clips = _clips().double()
    order = torch.tensor([2, 0, 1])
    plain, shuffled = encoder(clips), encoder(clips[:, order])
    torch.testing.assert_close(plain.pooled_BD, shuffled.pooled_BD)
    patches = plain.tokens_BMD[:, 1:].unflatten(1, (3, 9))
    torch.testing.assert_close(patches[:, order].flatten(1, 2), shuffled.tokens_BMD[:, 1:])


@pytest.mark.parametrize("init", ["normal", "motion"])
def test_position_tables_make_the_encoder_see_frame_order(init: str) -> None:
    encoder = _encoder(position_init=init).double()
    clips = _clips().double()
    difference = (encoder(clips).pooled_BD - encoder(clips.flip(1)).pooled_BD).abs().max()
    assert float(difference.detach()) > 1e-2


def test_the_kept_patches_are_those_that_cls_scored_highest_in_the_layer() -> None:
    encoder = _encoder(num_random_blocks=None, prune_layers=(0,), keep_rate=0.3)
    clips = _clips()
    tokens = torch.cat([encoder.cls_token.expand(6, -1, -1), encoder.patch_embed(clips)], dim=1)
    block = encoder.layers[0]
    assert isinstance(block, VideoBlock)
    after, scores = block(tokens, encoder.codes, None, True)
    best = scores.argsort(dim=1, descending=True)[:, :9].sort(dim=1).values
    kept = encoder(clips).keep_indices[0]
    assert torch.equal(kept, best)
    assert after.shape == tokens.shape


def test_recomputation_changes_neither_values_nor_gradients() -> None:
    results = []
    for recompute in ("none", "all_but_attention", "all"):
        encoder = _encoder(recompute=recompute, drop_path=0.5).train()
        draws = RowDraws.of(1, torch.arange(len(_clips())))
        pooled = encoder(_clips(), edge_seed=3, draws=draws).pooled_BD
        pooled.square().sum().backward()
        results.append([pooled, *(p.grad for p in encoder.parameters())])
    for plain, *recomputed in zip(*results, strict=True):
        for other in recomputed:
            torch.testing.assert_close(plain, other)


def test_token_order_does_not_change_a_dense_encoder() -> None:
    clips = _clips()
    raster, curve = (
        _encoder(num_random_blocks=None, token_order=order)(clips) for order in ("raster", "zcurve")
    )
    torch.testing.assert_close(raster.pooled_BD, curve.pooled_BD)
    torch.testing.assert_close(raster.keep_indices[1], curve.keep_indices[1].sort(dim=1).values)


def test_drop_path_acts_with_draws_only_and_keeps_the_mean() -> None:
    config = tiny_config({"drop_path": 0.5}).video
    block = VideoBlock(config, 0.5)
    draws = RowDraws.of(1, torch.arange(4000))
    with torch.no_grad():
        scale = block._branch_scale(block.mlp_scale, draws)
        assert set(scale[:, 0, 0].tolist()) == {0.0, 2.0}
        assert float(scale.mean()) == pytest.approx(1.0, abs=0.1)
        assert torch.equal(block._branch_scale(block.mlp_scale, None), block.mlp_scale)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 4, 3, 12, 12), "clips have 4 frames.*num_frames=4.*load_for_num_frames"),
        ((1, 3, 3, 12, 16), r"\(3, 12, 16\), the model takes \(3, 12, 12\)"),
        ((3, 3, 12, 12), r"axes \(B, T, 3, H, W\)"),
    ],
)
def test_clips_of_another_shape_are_refused_with_the_remedy(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ModelInputError, match=words):
        _encoder()(torch.zeros(shape))
