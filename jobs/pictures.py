"""What a sparse model looks at, as pictures: patches that survive each pruning, the blocks that see each other, and the
candidates of an EgoMCQ question. PNG and JPEG as data URIs, so that a page holds them itself.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Bool, UInt8

from jobs.batch_work import normalise
from jobs.evaluate import Encoder
from model.config import VideoConfig
from model.metrics import egomcq_scores
from model.sparsity import draw_layouts
from pipeline.loader import eval_batches
from pipeline.questions import McqQuestion
from pipeline.store import ClipStore

_SIDE = 112  # of a frame on the page, in pixels
_DIMMED = 0.18


@dataclass(frozen=True)
class PrunedClip:
    """A clip and one strip of its frames for every depth: all patches, then what is left after each pruning."""

    clip_id: str
    caption: str
    strips: tuple[tuple[str, str], ...]  # what it shows, data URI


@dataclass(frozen=True)
class Candidate:
    """One choice of a question: its frames, the model's score, whether it is right and whether it was chosen."""

    strip: str
    score: float
    is_answer: bool
    is_chosen: bool


@dataclass(frozen=True)
class AskedQuestion:
    """A question with its five candidates in their order."""

    kind: str
    caption: str
    candidates: tuple[Candidate, ...]


def kept_masks(
    config: VideoConfig, keep_indices: Sequence[torch.Tensor], clip: int
) -> list[Bool[np.ndarray, "T h w"]]:
    """Which patches of one clip are alive: at first all, then after each pruning layer."""
    shape = (config.num_frames, config.grid, config.grid)
    masks = [np.ones(shape, dtype=bool)]
    for positions_Bm in keep_indices:
        mask = np.zeros(shape, dtype=bool)
        mask.reshape(-1)[positions_Bm[clip].cpu().numpy()] = True
        masks.append(mask)
    return masks


def dim_patches(
    frames_THWC: UInt8[np.ndarray, "T H W 3"], mask_Thw: Bool[np.ndarray, "T h w"]
) -> UInt8[np.ndarray, "T H W 3"]:
    """The frames with patches outside of the mask nearly black."""
    patch = frames_THWC.shape[1] // mask_Thw.shape[1]
    share = np.where(mask_Thw, 1.0, _DIMMED).repeat(patch, axis=1).repeat(patch, axis=2)
    return (frames_THWC * share[..., None]).astype(np.uint8)


@torch.no_grad()
def pruned_clips(encoder: Encoder, store: ClipStore, rows: Sequence[int]) -> list[PrunedClip]:
    """Encodes the clips and shows what each pruning layer left of them."""
    config = encoder.model.config.video
    shown = []
    batches = eval_batches(store, rows, encoder.tokenizer, encoder.loader, config.num_frames, len(rows))
    for batch in batches:
        output = encoder.model.encode_video(normalise(batch.video_BTCHW, encoder.device, torch.float32))
        for clip, clip_id in enumerate(batch.clip_ids):
            frames = batch.video_BTCHW[clip].permute(0, 2, 3, 1).numpy()
            masks = kept_masks(config, output.keep_indices, clip)
            names = ["as given", *(f"after layer {layer + 1}" for layer in config.prune_layers)]
            strips = tuple(
                (f"{name}: {int(mask.sum())} patches", strip_uri(dim_patches(frames, mask)))
                for name, mask in zip(names, masks, strict=True)
            )
            shown.append(PrunedClip(clip_id, store.caption(int(batch.index_B[clip])), strips))
    return shown


@torch.no_grad()
def asked_questions(
    encoder: Encoder, store: ClipStore, questions: Sequence[McqQuestion], num_frames: int = 4
) -> list[AskedQuestion]:
    """Puts the questions to the model."""
    asked = []
    texts = encoder.captions([question.caption for question in questions])
    for question, text in zip(questions, texts, strict=True):
        rows = store.rows_of(question.choices).tolist()
        scores = egomcq_scores(text[None], encoder.clips(store, rows)[None])[0]
        (batch,) = eval_batches(store, rows, encoder.tokenizer, encoder.loader, num_frames, len(rows))
        frames = batch.video_BTCHW.permute(0, 1, 3, 4, 2).numpy()
        candidates = tuple(
            Candidate(
                strip_uri(frames[place]),
                float(scores[place]),
                place == question.answer,
                place == int(scores.argmax()),
            )
            for place in range(len(rows))
        )
        asked.append(AskedQuestion(question.kind, question.caption, candidates))
    return asked


def edge_layout_uri(config: VideoConfig, layer: int = 0) -> str | None:
    """Blocks of queries (rows) against blocks of keys: the window blue, random ones orange. None where dense."""
    layout = draw_layouts(config, config.eval_edge_seed)[layer]
    if layout is None:
        return None
    picture = np.full((layout.num_blocks, layout.num_blocks, 3), 235, dtype=np.uint8)
    reach = (config.num_local_blocks - 1) // 2
    for query, keys in enumerate(layout.key_blocks_SK.tolist()):
        for key in keys:
            if key >= 0:
                picture[query, key] = (0, 114, 178) if abs(key - query) <= reach else (213, 94, 0)
    scale = max(1, 240 // layout.num_blocks)
    return _uri(cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST), ".png")


def strip_uri(frames_THWC: UInt8[np.ndarray, "T H W 3"]) -> str:
    """Frames side by side, as a JPEG."""
    small = [cv2.resize(frame, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA) for frame in frames_THWC]
    return _uri(np.concatenate(small, axis=1), ".jpg")


def _uri(picture_HWC: UInt8[np.ndarray, "H W 3"], suffix: str) -> str:
    quality = [cv2.IMWRITE_JPEG_QUALITY, 82] if suffix == ".jpg" else []
    _, encoded = cv2.imencode(suffix, cv2.cvtColor(picture_HWC, cv2.COLOR_RGB2BGR), quality)
    kind = "png" if suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}"
