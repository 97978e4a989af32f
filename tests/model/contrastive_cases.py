"""Features, tags and settings for tests of the tiled contrastive loss; started processes import them too."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from model.losses import ActionTags

CASES: list[dict[str, Any]] = [
    {"loss": loss, "positives": positives, "directions": directions}
    for loss in ("ego_nce", "info_nce")
    for positives in ("action", "identity")
    for directions in ("sum", "mean")
]


def features_and_tags(num_rows: int, temperature: float = 0.05) -> tuple[Tensor, Tensor, Tensor, ActionTags]:
    """Random unit features, few tags so that some rows are positives of one another, a third of the clips twice."""
    generator = torch.Generator().manual_seed(num_rows)
    text, video = (
        functional.normalize(torch.randn(num_rows, 8, generator=generator), dim=1) for _ in range(2)
    )
    verbs, nouns = (torch.rand(num_rows, 4, generator=generator) < 0.3 for _ in range(2))
    clips = torch.arange(num_rows) % (2 * num_rows // 3 + 1)
    return text, video, torch.tensor([temperature]), ActionTags(verbs, nouns, clips)
