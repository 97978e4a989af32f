"""One optimizer step on the plain engine and a real model of a few thousand parameters."""

import torch

from infra.config import EngineConfig
from infra.engine import PlainEngine
from jobs.batch_work import normalise
from jobs.ranks import SingleRank
from jobs.train_step import TrainStep
from model.config import ModelConfig
from model.optim import parameter_groups
from model.video_text_model import VideoTextModel
from pipeline.loader import Batch

CPU = torch.device("cpu")
RATE = 1e-2


def tiny_model() -> VideoTextModel:
    """2 frames of 2 x 2 patches in blocks of 4, one fusion layer."""
    torch.manual_seed(0)
    config = ModelConfig().replaced(
        video={
            "num_frames": 2,
            "image_size": 8,
            "patch_size": 4,
            "width": 16,
            "depth": 2,
            "num_heads": 2,
            "drop_path": 0.0,
            "keep_rate": 0.75,
            "prune_layers": (0,),
            "num_random_blocks": 1,
            "block_size": 4,
            "init_std": 0.1,
            "layer_scale_init": 1.0,
        },
        text={
            "vocab_size": 20,
            "width": 16,
            "num_heads": 2,
            "depth": 2,
            "fusion_layer": 1,
            "max_length": 6,
            "dropout": 0.1,
            "init_std": 0.1,
        },
        joint_width=8,
    )
    return VideoTextModel(config)


def fixed_batch(num_clips: int = 4) -> Batch:
    """Clips of random pixels, captions of 3 words that differ, tags that differ."""
    generator = torch.Generator().manual_seed(1)
    words = torch.arange(5, 5 + 3 * num_clips).reshape(num_clips, 3)
    starts = torch.full((num_clips, 1), 2)
    ids = torch.cat([starts, words, torch.zeros(num_clips, 2, dtype=torch.long)], dim=1)
    tags = torch.eye(num_clips, dtype=torch.bool)
    pixels = torch.randint(0, 256, (num_clips, 2, 3, 8, 8), generator=generator, dtype=torch.uint8)
    names = tuple(f"clip-{row}" for row in range(num_clips))
    return Batch(pixels, ids, ids != 0, tags, tags, names, torch.arange(num_clips))


def new_step(seed: int = 3, micro_batch_size: int | None = None) -> TrainStep:
    model = tiny_model()
    engine = PlainEngine(model, parameter_groups(model, 0.0), EngineConfig(backend="plain"), CPU)
    engine.module.train()
    return TrainStep(engine, seed, SingleRank(), lambda step: RATE, micro_batch_size)


def weights(step: TrainStep) -> dict[str, torch.Tensor]:
    return step.engine.consolidated_state_dict()


def test_pixels_go_from_minus_one_to_one_and_keep_their_shape() -> None:
    video = torch.tensor([0, 255, 51, 204], dtype=torch.uint8).reshape(1, 1, 1, 2, 2)
    normalised = normalise(video, CPU, torch.float32)
    assert normalised.shape == (1, 1, 1, 2, 2)
    assert normalised.dtype == torch.float32
    assert normalised.flatten()[:2].tolist() == [-1.0, 1.0]
    # 51 is a fifth of 255: 0.2 of the way from -1 to 1
    torch.testing.assert_close(normalised.flatten()[2:], torch.tensor([-0.6, 0.6]))


def test_pixels_take_the_type_the_engine_asks_for_and_stay_bytes_themselves() -> None:
    video = torch.full((1, 1, 3, 2, 2), 255, dtype=torch.uint8)
    normalised = normalise(video, CPU, torch.bfloat16)
    assert normalised.dtype == torch.bfloat16
    assert normalised.unique().tolist() == [1.0]
    assert video.unique().tolist() == [255]


def test_a_step_returns_total_terms_and_gradient_norm_detached() -> None:
    metrics = new_step()(0, fixed_batch())
    assert metrics.shape == (5,)
    assert not metrics.requires_grad
    total, vtc, vtm, mlm, grad_norm = metrics.tolist()
    # All three weights are 1 by default.
    assert abs(total - (vtc + vtm + mlm)) < 1e-5
    assert min(vtc, vtm, mlm, grad_norm) > 0


def test_the_loss_of_one_fixed_batch_falls() -> None:
    train_step, batch = new_step(), fixed_batch()
    # The same step again and again: the same words hidden, the same random edges.
    losses = [train_step(0, batch)[0].item() for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0], losses


def test_the_same_seed_and_step_repeat_bitwise() -> None:
    first, second, batch = new_step(), new_step(), fixed_batch()
    for step in range(3):
        assert torch.equal(first(step, batch), second(step, batch))
    after_first, after_second = weights(first), weights(second)
    assert after_first.keys() == after_second.keys()
    for name, weight in after_first.items():
        assert torch.equal(weight, after_second[name]), name


def test_global_random_state_does_not_decide_a_step() -> None:
    """A resumed process has drawn other numbers before; its steps must be the same all the same."""
    first, second, batch = new_step(), new_step(), fixed_batch()
    expected = first(5, batch)
    torch.rand(1000)
    assert torch.equal(second(5, batch), expected)


def test_another_step_or_seed_draws_otherwise() -> None:
    batch = fixed_batch()
    base = new_step()(0, batch)
    assert not torch.equal(new_step()(1, batch), base)
    assert not torch.equal(new_step(seed=4)(0, batch), base)


def test_the_learning_rate_of_a_step_is_asked_for_that_step() -> None:
    train_step = new_step()
    asked: list[int] = []
    train_step.learning_rate_at = lambda step: float(asked.append(step) or 0.0)
    before = weights(train_step)
    train_step(7, fixed_batch())
    assert asked == [7]
    for name, weight in weights(train_step).items():  # at a rate of 0 nothing moves
        assert torch.equal(weight, before[name]), name
