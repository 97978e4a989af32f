"""A folder in the format of the golden vectors, of another model size and written by our own model.

It proves nothing about parity: it shows that the checks, and the loaders under them, take all sizes from weights and
manifest, so that vectors of the published code at any size can be put in.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import ModelConfig, VideoTextModel
from model.attention import token_codes
from model.losses import info_nce, word_losses
from model.official_weights import to_official
from model.relative_bias import all_pair_rows
from model.retrieval import dual_scores, matching_scores, split_clips
from model.sparsity import EdgeLayout, draw_layouts
from tests.model.golden_set import mean_matching_loss

FRAMES, GRID, WIDTH, VOCABULARY, LENGTH = 3, 3, 40, 57, 9
VISION_ARGS = {
    "token_keep_rate": 0.7,
    "token_keep_strategy": "cls_attn",
    "token_drop_loc": [1, 3],
    "sparse_local_attn": 3,
    "sparse_random_attn": 2,
    "attn_block_size": 5,
}
TEXT_ARGS = {"token_keep_rate": 0.5, "token_drop_loc": [3], "token_keep_strategy": "avg_attn"}


def _model() -> VideoTextModel:
    video = {
        "num_frames": FRAMES,
        "image_size": 8 * GRID,
        "patch_size": 8,
        "width": WIDTH,
        "depth": 5,
        "num_heads": 5,
        "mlp_ratio": 1.55,
        "prune_layers": (1, 3),
        "num_local_blocks": 3,
        "num_random_blocks": 2,
        "block_size": 5,
        "init_std": 0.3,
        "position_init": "normal",
        "official_quirks": True,
    }
    text = {
        "vocab_size": VOCABULARY,
        "width": 24,
        "depth": 4,
        "fusion_layer": 2,
        "num_heads": 3,
        "mlp_ratio": 1.5,
        "max_length": LENGTH,
        "init_std": 0.3,
        "pad_id": 0,
        "cls_id": 5,
        "mask_id": 7,
    }
    fields = {"multimodal_keep_rate": 0.5, "multimodal_prune_layers": (3,), "multimodal_score": "avg_attn"}
    config = ModelConfig().replaced(video=video, text=text, joint_width=10, learn_temperature=True, **fields)
    torch.manual_seed(0)
    return VideoTextModel(config).eval()


def write_set(folder: Path) -> None:
    """Write one case of each kind."""
    model = _model()
    state = {key: value.clone() for key, value in to_official(model.state_dict()).items()}
    tables = {key: value for key, value in state.items() if key.endswith("relative_position_bias_table")}
    save_file(
        {key: value for key, value in state.items() if key not in tables}, folder / "weights.safetensors"
    )
    rows = next(iter(tables.values())).shape[0]
    index = all_pair_rows(token_codes(FRAMES, GRID, GRID), rows).int()
    save_file({**tables, "relative_position_index": index}, folder / f"tables_T{FRAMES}.safetensors")

    layouts = draw_layouts(model.config.video, 3)
    blocks = {
        f"blocks_layer{layer:02d}": layout.key_blocks_SK[:, 3:].contiguous()
        for layer, layout in enumerate(layouts)
        if layout is not None
    }
    args = {"vision_encoder_args": VISION_ARGS, "text_encoder_args": TEXT_ARGS}
    cases = {
        "encoder_T3/both": {**args, **_encoder(model, folder, layouts, blocks)},
        "pretrain_both_T3": {**args, **_pretraining(model, folder, layouts, blocks)},
        "retrieval/both": {**args, **_retrieval(model, folder, layouts, blocks)},
    }
    sizes = {
        "vision": {"image": 8 * GRID, "patch": 8},
        "text": {"heads": 3},
        "special_ids": {"pad": 0, "cls": 5, "mask": 7},
    }
    (folder / "manifest.json").write_text(json.dumps({"sizes": sizes, "cases": cases}))


def _clips(num_clips: int, num_frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (num_clips, num_frames, 3, 8 * GRID, 8 * GRID)
    return torch.randint(-64, 64, shape, generator=generator, dtype=torch.int8)


def _captions(num_captions: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(LENGTH) < torch.arange(3, 3 + num_captions)[:, None]
    ids = torch.randint(8, VOCABULARY, mask.shape, generator=generator).where(mask, 0)
    ids[:, 0] = 5
    return ids, mask.long()


def _encoder(
    model: VideoTextModel, folder: Path, layouts: list[EdgeLayout | None], blocks: dict[str, Tensor]
) -> dict[str, Any]:
    clips = _clips(2, FRAMES)
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
        for layer in model.video_encoder.layers
    ]
    with torch.no_grad():
        encoding = model.video_encoder(clips.float() / 32, layouts=layouts)
        for hook in hooks:
            hook.remove()
        output = model.encode_video(clips.float() / 32, layouts=layouts)
        exact = model.double().video_encoder(clips.double() / 32, layouts=layouts)
        model.float()
    states.append(encoding.tokens_BMD)
    kept = {f"kept_layer{layer:02d}": kept for layer, kept in zip((1, 3), encoding.keep_indices, strict=True)}
    vectors = {
        "last_hidden": encoding.tokens_BMD,
        "embeds_last": output.tokens_BMD[:, :2].contiguous(),
        "pooled": encoding.pooled_BD,
        "pooled_f64": exact.pooled_BD,
        "feat": output.features_BP,
        "cls_by_layer": torch.stack([state[:, 0] for state in states], 1),
        "mean_by_layer": torch.stack([state[:, 1:].mean(dim=1) for state in states], 1),
        **kept,
        **blocks,
    }
    save_file(
        {"video": clips, **{f"both/{key}": value.clone() for key, value in vectors.items()}},
        folder / f"encoder_T{FRAMES}.safetensors",
    )
    counts = [{"tokens": state.shape[1] - 1} for state in states[:-1]]
    file = f"encoder_T{FRAMES}.safetensors"
    return {"file": file, "prefix": "both/", "frames": FRAMES, "layers": counts}


def _pretraining(
    model: VideoTextModel, folder: Path, layouts: list[EdgeLayout | None], blocks: dict[str, Tensor]
) -> dict[str, Any]:
    clips, (ids, mask) = _clips(4, FRAMES), _captions(4)
    own, wrong = torch.arange(4), torch.tensor([1, 2, 3, 0])
    masked_ids = ids.clone()
    masked_ids[:, 1] = 7
    labels = torch.full_like(ids, -100)
    labels[:, 1] = ids[:, 1]
    model.zero_grad()
    encoding = model.video_encoder(clips.float() / 32, layouts=layouts)
    video = model.encode_video(clips.float() / 32, layouts=layouts)
    text, masked = model.encode_text(ids, mask.bool()), model.encode_text(masked_ids, mask.bool())
    rows, clip_rows = torch.cat([own, own, wrong]), torch.cat([own, wrong, own])
    pairs = model.fuse(text.states_BLD[rows], mask[rows].bool(), video.tokens_BMD, clip_rows)
    hidden = model.fuse(masked.states_BLD, mask.bool(), video.tokens_BMD).states_QLD
    logits = text.features_BP @ video.features_BP.T / model.temperature()
    same = torch.eye(4, dtype=torch.bool)
    vtm_logits, mlm_logits = model.matching_logits(pairs.states_QLD), model.text_encoder.mlm_head(hidden)
    losses = {
        "loss_ita": info_nce(logits, same),
        "loss_itm": mean_matching_loss(vtm_logits, ~same.all(dim=1)),
        "loss_mlm": word_losses(mlm_logits[labels != -100], labels[labels != -100]).mean(),
    }
    torch.stack(list(losses.values())).sum().backward()
    gradients = to_official({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    with torch.no_grad():
        every_layer = VideoTextModel(model.config.replaced(multimodal_keep_rate=1.0)).eval()
        every_layer.load_state_dict(model.state_dict())
        full = every_layer.fuse(text.states_BLD, mask.bool(), video.tokens_BMD).states_QLD
    vectors = {
        "video": clips,
        "input_ids": ids,
        "attention_mask": mask,
        "idx": own,
        "neg_video_for_text": wrong,
        "neg_text_for_video": wrong,
        "mlm_input_ids": masked_ids,
        "mlm_labels": labels,
        "temp_after": model.temperature().squeeze(),
        "vision_pooled": encoding.pooled_BD,
        "vision_embeds": video.tokens_BMD,
        "vision_feat": video.features_BP,
        "text_feat": text.features_BP,
        "text_embeds": text.states_BLD,
        "mlm_text_embeds": masked.states_BLD,
        "fusion_last_hidden": pairs.states_QLD[:4],
        "itm_cls": pairs.states_QLD[:, 0],
        "itm_logits": vtm_logits,
        "mlm_hidden": hidden,
        "mlm_logits": mlm_logits,
        "sim_i2t": logits.T,
        "neg_weights_t2i": logits.softmax(dim=1).masked_fill(same, 0),
        "neg_weights_i2t": logits.T.softmax(dim=1).masked_fill(same, 0),
        "xkept_layer03": pairs.keep_indices[0][:4],
        "full_stack_last_hidden": full,
        "grad/temp": gradients["temp"],
        "grad/vision_proj.weight": gradients["vision_proj.weight"],
        **{f"kept_layer{layer:02d}": kept for layer, kept in zip((1, 3), video.keep_indices, strict=True)},
        **losses,
        **blocks,
    }
    file = "pretrain_both_T3.safetensors"
    save_file({key: value.detach().clone().contiguous() for key, value in vectors.items()}, folder / file)
    return {
        "file": file,
        "frames": FRAMES,
        "batch": 4,
        "temp_initial": float(model.temperature().detach()),
        "loss_weight": {"itc": 1.0, "itm": 1.0, "mlm": 1.0},
        "grad_norm_by_parameter": {key: float(value.norm()) for key, value in gradients.items()},
        "parameters_without_gradient": [],
    }


def _retrieval(
    model: VideoTextModel, folder: Path, layouts: list[EdgeLayout | None], blocks: dict[str, Tensor]
) -> dict[str, Any]:
    videos, (ids, mask) = _clips(3, 2 * FRAMES), _captions(4)
    clips = split_clips(videos.float() / 32, FRAMES, "interleaved")
    with torch.no_grad():
        output = model.encode_video(clips.flatten(0, 1), layouts=layouts)
        text = model.encode_text(ids, mask.bool())
        dual = dual_scores(output.features_BP.unflatten(0, (3, 2)), text.features_BP)
        tokens = output.tokens_BMD.unflatten(0, (3, 2))
        scores = matching_scores(model, tokens, text, mask.bool(), dual, k_test=2, ensemble="max")
    vectors = {
        "i2t_dual": dual,
        "i2t_vtm": scores.video_to_text_VQ,
        "t2i_vtm": scores.text_to_video_QV,
        **blocks,
    }
    shared = {
        "video": videos,
        "input_ids": ids,
        "attention_mask": mask,
        "txt2img": torch.tensor([0, 1, 2, 0]),
    }
    own = {f"both/{key}": value.clone().contiguous() for key, value in vectors.items()}
    save_file({**shared, **own}, folder / "retrieval_eval.safetensors")
    return {
        "file": "retrieval_eval.safetensors",
        "prefix": "both/",
        "frames_per_clip": FRAMES,
        "clips_per_video": 2,
        "clip_layout": "interleaved (clip k = frames k, k+2, ...)",
        "ensemble": "max",
        "k_test": 2,
    }
