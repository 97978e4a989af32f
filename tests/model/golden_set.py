"""A folder of golden vectors of the published code (format: `tests/golden/svitt`), and the models of its cases.

Sizes come from the weights and the manifest, models from the public loaders.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model import VideoTextModel, load_official_svitt
from model.losses import matching_losses
from model.sparsity import EdgeLayout, local_blocks


@dataclass(frozen=True, slots=True)
class GoldenSet:
    """A folder with `manifest.json`, weights, position tables and vectors."""

    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        """Settings of all cases, and sizes that shapes do not tell."""
        return _manifest(self.folder)

    def case(self, name: str) -> dict[str, Any]:
        """Settings of one case."""
        return self.manifest["cases"][name]

    def vectors(self, case: dict[str, Any]) -> dict[str, Tensor]:
        """Tensors of one case, without its prefix; what all cases of a file share comes with them."""
        tensors = read_tensors(self.folder / case["file"])
        prefix = case.get("prefix", "")
        shared = {key: value for key, value in tensors.items() if "/" not in key or key.startswith("grad/")}
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        return {**shared, **own}

    def names(self, kind: str) -> list[str]:
        """Cases with vectors of one kind: encoder, pretrain, retrieval or inflate."""
        return [
            name for name, case in self.manifest["cases"].items() if name.startswith(kind) and "file" in case
        ]

    def model(self, case: dict[str, Any], num_frames: int, quirks: bool, **overrides: Any) -> VideoTextModel:
        """The model of one case, through the public loader."""
        tables = dict(read_tensors(self.folder / f"tables_T{num_frames}.safetensors"))
        state = {**read_tensors(self.folder / "weights.safetensors"), **tables}
        if "temp_initial" in case:
            state["temp"] = torch.tensor(case["temp_initial"])
        sizes = self.manifest["sizes"]
        ids = sizes["special_ids"]
        text = {
            "num_heads": sizes["text"]["heads"],
            "pad_id": ids["pad"],
            "cls_id": ids["cls"],
            "mask_id": ids["mask"],
        }
        model, report = load_official_svitt(
            state,
            image_size=sizes["vision"]["image"],
            settings=case,
            official_quirks=quirks,
            text=text,
            **overrides,
        )
        assert not report.inflated + report.new + report.unused, report
        return model


@cache
def _manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


@cache
def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one file, read once."""
    return load_file(path)


def close(ours: Tensor, theirs: Tensor, limit: float, what: str) -> None:
    """Equal within an absolute limit."""
    torch.testing.assert_close(ours, theirs, atol=limit, rtol=0, msg=lambda text: f"{what}: {text}")


def mean_matching_loss(logits_Q2: Tensor, has_negative_B: Tensor) -> Tensor:
    """Mean over B matching pairs, B with a wrong clip, B with a wrong caption; rows without a negative left out."""
    is_match = torch.arange(len(logits_Q2)) < len(has_negative_B)
    return matching_losses(logits_Q2, is_match)[has_negative_B.repeat(3)].mean()


def layouts_of(
    model: VideoTextModel, vectors: dict[str, Tensor], repeats: bool
) -> list[EdgeLayout | None] | None:
    """The stored random blocks and our local ones for every layer; without `repeats` a block counts once."""
    video = model.config.video
    if video.num_random_blocks is None:
        return None
    layouts: list[EdgeLayout | None] = []
    for layer, num_patches in enumerate(video.tokens_by_layer()[: video.depth]):
        num_blocks = -(-num_patches // video.block_size)
        local = local_blocks(num_blocks, video.num_local_blocks, circular=repeats)
        random = vectors.get(f"blocks_layer{layer:02d}", torch.empty(num_blocks, 0, dtype=torch.long))
        if not repeats:
            random = random.masked_fill((random[:, :, None] == local[:, None]).any(dim=2), -1)
        layouts.append(
            EdgeLayout.from_blocks(torch.cat([local, random], 1), video.block_size, num_patches, repeats)
        )
    return layouts
