"""An exported folder as a model of this project, with what turns videos and sentences into its inputs."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from infra.checkpoint_files import sha256_of
from jobs.batch_work import normalise
from jobs.export_code import ExportError
from model.pretrained import load_model
from model.video_text_model import VideoTextModel
from pipeline.text import CaptionTokenizer

PREPROCESSOR = "preprocessor_config.json"
VOCABULARY = "vocab.txt"


@dataclass(frozen=True)
class ExportedModel:
    """Evaluation mode, on `device`. `short_side` is what frames are shrunk to before they become squares."""

    model: VideoTextModel
    tokenizer: CaptionTokenizer
    short_side: int
    device: torch.device
    digest: str

    @torch.no_grad()
    def encode_clips(self, video_BTCHW: UInt8[Tensor, "B T C H W"]) -> Float[Tensor, "B P"]:
        """Unit features of clips, float32 on the CPU."""
        pixels = normalise(video_BTCHW, self.device, torch.float32)
        return self.model.encode_video(pixels).features_BP.float().cpu()

    @torch.no_grad()
    def encode_sentences(self, sentences: list[str]) -> Float[Tensor, "B P"]:
        """Unit features of sentences, float32 on the CPU."""
        ids_BL, mask_BL = self.tokenizer(sentences)
        return (
            self.model.encode_text(ids_BL.to(self.device), mask_BL.to(self.device)).features_BP.float().cpu()
        )


def load_exported(folder: Path, device: torch.device | None = None) -> ExportedModel:
    """Reads a folder that `svitt export` wrote; attention takes the fastest backend there is.

    `digest` is the SHA-256 of the weights. Raises ExportError when a file of the folder is missing or cannot be read,
    WeightsError for weights that do not fit.
    """
    file = folder / PREPROCESSOR
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        short_side, text_length = int(settings["short_side"]), int(settings["text_length"])
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(
            f"reading {file} failed ({type(error).__name__}: {error}); give a folder that svitt export wrote"
        ) from error
    device = device or torch.device("cpu")
    model = load_model(folder, video={"attention_backend": "auto"}).model.to(device)
    tokenizer = CaptionTokenizer(folder / VOCABULARY, text_length)
    return ExportedModel(model, tokenizer, short_side, device, sha256_of(folder / "model.safetensors"))
