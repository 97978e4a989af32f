"""What the ranks of the ZeRO test run; a module of its own so that started processes can import it."""

import torch

from infra.config import EngineConfig
from infra.engine import build_engine
from jobs.train_step import TrainStep
from model.config import ModelConfig
from model.optim import parameter_groups
from model.video_text_model import VideoTextModel
from pipeline.loader import Batch

CPU = torch.device("cpu")
NUM_CLIPS = 4


def batch_of(rank: int, step: int) -> Batch:
    """4 clips of 4 frames that differ between ranks and steps."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    pixels = torch.randint(0, 256, (NUM_CLIPS, 4, 3, 96, 96), generator=generator, dtype=torch.uint8)
    ids = torch.randint(5, 256, (NUM_CLIPS, 8), generator=generator)
    ids[:, 0] = 2
    tags = torch.eye(2 * NUM_CLIPS, dtype=torch.bool)[NUM_CLIPS * rank :][:NUM_CLIPS]
    names = tuple(f"clip-{rank}-{row}" for row in range(NUM_CLIPS))
    rows = torch.arange(NUM_CLIPS) + NUM_CLIPS * rank
    return Batch(pixels, ids, torch.ones_like(ids, dtype=torch.bool), tags, tags, names, rows)


def compare_stages(rank: int, _: str) -> None:
    """Losses, gradient norms and weights of three steps, against the plain engine."""
    expected = train(rank, EngineConfig(backend="plain"))
    for stage in (1, 2, 3):
        metrics, weights = train(rank, EngineConfig(zero_stage=stage))
        torch.testing.assert_close(metrics, expected[0], atol=1e-5, rtol=1e-5, msg=f"ZeRO {stage}")
        assert weights.keys() == expected[1].keys()
        for name, weight in weights.items():
            # A bias of keys shifts all scores of a query alike: its gradient is rounding, which AdamW blows up.
            if name.endswith("key.bias"):
                continue
            torch.testing.assert_close(weight, expected[1][name], atol=1e-5, rtol=1e-4, msg=name)


def train(rank: int, config: EngineConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Metrics of each step, (3, 5), and rank 0's weights afterwards. Random edges, pruning and dropout are on."""
    torch.manual_seed(0)
    model = VideoTextModel(ModelConfig.named("tiny").replaced(video={"num_frames": 4}))
    engine = build_engine(model, parameter_groups(model, config.weight_decay), config, NUM_CLIPS, CPU)
    engine.module.train()
    step = TrainStep(engine, 3, rank, learning_rate_at=lambda _: 1e-4)
    metrics = torch.stack([step(number, batch_of(rank, number)) for number in range(3)])
    return metrics, engine.consolidated_state_dict()
