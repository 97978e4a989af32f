"""Checks of the model against one case of a folder of golden vectors.

Nothing here knows how large the model of a folder is: give them any folder in the format of `tests/golden/svitt`.
"""

from typing import Any

import torch
from torch import Tensor

from model import VideoTextModel
from model.attention import Backend, token_codes
from model.losses import info_nce, word_losses
from model.metrics import retrieval_score, target_ranks
from model.official_weights import to_official
from model.relative_bias import all_pair_rows
from model.retrieval import dual_scores, matching_scores, split_clips
from model.sparsity import EdgeLayout, choose_random_blocks, local_blocks
from model.token_order import token_order
from model.video_encoder import VideoEncoding
from model.weights import inflate_bias_table
from tests.model.golden_set import GoldenSet, close, layouts_of, mean_matching_loss, read_tensors

HIDDEN, POOLED, LOGITS, GRADIENT, DOUBLE = 5e-5, 1e-5, 2e-4, 1e-4, 1e-9


def _traced(
    model: VideoTextModel, clips: Tensor, layouts: list[EdgeLayout | None] | None
) -> tuple[list[Tensor], list[Tensor | None], VideoEncoding]:
    """What enters each layer and leaves the last, the scores of each layer, and the encoding."""
    states: list[Tensor] = []
    scores: list[Tensor | None] = []
    hooks = []
    for layer in model.video_encoder.layers:
        hooks.append(layer.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0])))
        hooks.append(layer.register_forward_hook(lambda module, inputs, output: scores.append(output[1])))
    encoding = model.video_encoder(clips, layouts=layouts)
    for hook in hooks:
        hook.remove()
    return [*states, encoding.tokens_BMD], scores, encoding


def check_encoder(golden: GoldenSet, name: str, quirks: bool, backend: Backend = "auto") -> None:
    """All outputs of the video encoder in float32 by one backend, and the pooled vector in float64 by any."""
    case = golden.case(name)
    vectors = golden.vectors(case)
    model = golden.model(case, case["frames"], quirks, video={"attention_backend": backend})
    double = golden.model(case, case["frames"], quirks).double()
    layouts = layouts_of(model, vectors, repeats=quirks)
    clips = vectors["video"].float() / 32
    with torch.inference_mode():
        states, scores, encoding = _traced(model, clips, layouts)
        output = model.encode_video(clips, layouts=layouts)
        exact = double.video_encoder(clips.double(), layouts=layouts)
    close(encoding.tokens_BMD, vectors["last_hidden"], HIDDEN, "last_hidden")
    close(output.tokens_BMD[:, :2], vectors["embeds_last"], HIDDEN, "embeds_last")
    close(encoding.pooled_BD, vectors["pooled"], POOLED, "pooled")
    close(output.features_BP, vectors["feat"], POOLED, "feat")
    close(exact.pooled_BD, vectors["pooled_f64"], DOUBLE, "pooled_f64")
    close(torch.stack([state[:, 0] for state in states], 1), vectors["cls_by_layer"], HIDDEN, "cls_by_layer")
    means = torch.stack([state[:, 1:].mean(dim=1) for state in states], 1)
    close(means, vectors["mean_by_layer"], HIDDEN, "mean_by_layer")
    for key, value in vectors.items():
        if key.startswith("hidden_"):
            close(states[int(key[-2:])], value, HIDDEN, key)
        if key.startswith("score_layer"):
            close(scores[int(key[-2:])], value, POOLED, key)
    _check_kept(model, encoding.keep_indices, vectors)
    counts = [layer["tokens"] for layer in case["layers"]]
    assert list(model.config.video.tokens_by_layer()[: len(counts)]) == counts


def _check_kept(model: VideoTextModel, keep_indices: tuple[Tensor, ...], vectors: dict[str, Tensor]) -> None:
    video = model.config.video
    layers = [layer for layer in range(video.depth) if video.prunes_after(layer)]
    assert len(layers) == len(keep_indices) == sum(key.startswith("kept_layer") for key in vectors)
    for layer, kept in zip(layers, keep_indices, strict=True):
        assert torch.equal(kept, vectors[f"kept_layer{layer:02d}"]), f"kept after layer {layer}"


def difference_without_quirks(golden: GoldenSet, name: str) -> float:
    """Largest difference of the pooled vector from that of the corrected model on the same blocks, each once."""
    case = golden.case(name)
    vectors = golden.vectors(case)
    model = golden.model(case, case["frames"], quirks=False)
    with torch.inference_mode():
        layouts = layouts_of(model, vectors, repeats=False)
        pooled = model.video_encoder(vectors["video"].float() / 32, layouts=layouts).pooled_BD
    return float((pooled - vectors["pooled"]).abs().max())


def check_choice_of_blocks(golden: GoldenSet, name: str) -> int:
    """Our rule gives the stored blocks from the stored uniform numbers; returns how many layers were compared."""
    case = golden.case(name)
    vectors, settings = golden.vectors(case), case["vision_encoder_args"]
    drawn = [key for key in vectors if key.startswith("uniform_layer")]
    for key in drawn:
        uniform = vectors[key]
        local = local_blocks(len(uniform), settings["sparse_local_attn"], circular=True)
        chosen = choose_random_blocks(uniform, local, settings["sparse_random_attn"], quirks=True)
        assert torch.equal(chosen, vectors[key.replace("uniform", "blocks")]), key
    return len(drawn)


def check_token_order(golden: GoldenSet, name: str) -> None:
    """The curve along which patches are cut into blocks."""
    case = golden.case(name)
    model = golden.model(case, case["frames"], quirks=True)
    assert torch.equal(token_order(model.config.video), golden.vectors(case)["token_order"])


def check_position_rows(golden: GoldenSet, num_frames: int) -> None:
    """The row of the position table of every pair of tokens."""
    tensors = read_tensors(golden.folder / f"tables_T{num_frames}.safetensors")
    index = tensors["relative_position_index"].long()
    side = golden.manifest["sizes"]["vision"]["image"] // golden.manifest["sizes"]["vision"]["patch"]
    rows = {value.shape[0] for key, value in tensors.items() if key.endswith("table")}
    assert torch.equal(all_pair_rows(token_codes(num_frames, side, side), *rows), index)


def check_inflation(golden: GoldenSet, name: str) -> None:
    """Position tables at another number of frames, bit for bit."""
    case = golden.case(name)
    vectors = golden.vectors(case)
    inflated = inflate_bias_table(vectors["in"], case["source_frames"], case["target_frames"], "nearest")
    assert torch.equal(inflated, vectors["out"])


def check_pretraining(golden: GoldenSet, name: str) -> None:
    """A whole training pass on given negatives and masked words: states, similarities, losses, gradients."""
    case = golden.case(name)
    vectors = golden.vectors(case)
    weight = case["loss_weight"]
    weights = {"vtc_weight": weight["itc"], "vtm_weight": weight["itm"], "mlm_weight": weight["mlm"]}
    model = golden.model(case, case["frames"], quirks=True, **weights)
    mask, own = vectors["attention_mask"].bool(), torch.arange(case["batch"])
    wrong_video, wrong_text = vectors["neg_video_for_text"], vectors["neg_text_for_video"]
    text_rows, clip_rows = torch.cat([own, own, wrong_text]), torch.cat([own, wrong_video, own])

    layouts = layouts_of(model, vectors, repeats=True)
    encoding = model.video_encoder(vectors["video"].float() / 32, layouts=layouts)
    video = model.encode_video(vectors["video"].float() / 32, layouts=layouts)
    text = model.encode_text(vectors["input_ids"], mask)
    masked = model.encode_text(vectors["mlm_input_ids"], mask)
    pairs = model.fuse(text.states_BLD[text_rows], mask[text_rows], video.tokens_BMD, clip_rows)
    vtm_logits = model.matching_logits(pairs.states_QLD)
    hidden = model.fuse(masked.states_BLD, mask, video.tokens_BMD).states_QLD
    mlm_logits = model.text_encoder.mlm_head(hidden)
    logits = text.features_BP @ video.features_BP.T / model.temperature()

    close(model.temperature().squeeze().detach(), vectors["temp_after"], 1e-7, "temp_after")
    close(encoding.pooled_BD, vectors["vision_pooled"], POOLED, "vision_pooled")
    close(video.tokens_BMD, vectors["vision_embeds"], HIDDEN, "vision_embeds")
    close(video.features_BP, vectors["vision_feat"], POOLED, "vision_feat")
    close(text.features_BP, vectors["text_feat"], POOLED, "text_feat")
    close(text.states_BLD, vectors["text_embeds"], HIDDEN, "text_embeds")
    close(masked.states_BLD, vectors["mlm_text_embeds"], HIDDEN, "mlm_text_embeds")
    close(pairs.states_QLD[: len(own)], vectors["fusion_last_hidden"], HIDDEN, "fusion_last_hidden")
    close(pairs.states_QLD[:, 0], vectors["itm_cls"], HIDDEN, "itm_cls")
    close(vtm_logits, vectors["itm_logits"], LOGITS, "itm_logits")
    close(hidden, vectors["mlm_hidden"], HIDDEN, "mlm_hidden")
    close(mlm_logits, vectors["mlm_logits"], LOGITS, "mlm_logits")
    close(logits.T, vectors["sim_i2t"], LOGITS, "sim_i2t")
    _check_kept(model, video.keep_indices, vectors)
    _check_pruned_in_fusion(model, pairs.keep_indices, vectors)

    same = vectors["idx"][:, None] == vectors["idx"]
    assert not same[own, wrong_video].any()
    assert not same[own, wrong_text].any()
    for key, scores in (("neg_weights_t2i", logits), ("neg_weights_i2t", logits.T)):
        close(scores.softmax(dim=1).masked_fill(same, 0), vectors[key], POOLED, key)
    selected = vectors["mlm_labels"] != -100
    vtc = weight["itc"] * info_nce(logits, same)
    vtm = weight["itm"] * mean_matching_loss(vtm_logits, ~same.all(dim=1))
    mlm = weight["mlm"] * word_losses(mlm_logits[selected], vectors["mlm_labels"][selected]).mean()
    for loss, key in ((vtc, "loss_ita"), (vtm, "loss_itm"), (mlm, "loss_mlm")):
        close(loss, vectors[key], POOLED, key)
    (vtc + vtm + mlm).backward()
    _check_gradients(model, case, vectors)


def _check_pruned_in_fusion(
    model: VideoTextModel, keep_indices: tuple[Tensor, ...], vectors: dict[str, Tensor]
) -> None:
    layers = model.config.multimodal_prune_layers if model.config.multimodal_keep_rate < 1 else ()
    assert len(layers) == len(keep_indices)
    stored = [key for key in vectors if key.startswith("xkept_layer")]
    for layer, kept in zip(layers, keep_indices, strict=True):
        key = f"xkept_layer{layer:02d}"
        if key in stored:
            assert torch.equal(kept[: len(vectors[key])], vectors[key]), key
            stored.remove(key)
    assert not stored


def _check_gradients(model: VideoTextModel, case: dict[str, Any], vectors: dict[str, Tensor]) -> None:
    norms = case["grad_norm_by_parameter"]
    if norms is None:
        return
    gradients = to_official({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for key, norm in norms.items():
        ours = float(gradients[key].norm())
        assert abs(ours - norm) <= GRADIENT * norm + 1e-6, f"norm of {key}: {ours}, expected {norm}"
    for key in case["parameters_without_gradient"]:
        assert key not in gradients
    stored = {key.removeprefix("grad/"): value for key, value in vectors.items() if key.startswith("grad/")}
    assert stored
    for key, expected in stored.items():
        error = float((gradients[key] - expected).norm() / expected.norm())
        assert error <= GRADIENT, f"gradient of {key}: relative error {error:.1e}"


def check_full_stack(golden: GoldenSet, name: str) -> None:
    """All text layers with the video and without multimodal pruning, as question answering uses them."""
    case = golden.case(name)
    vectors = golden.vectors(case)
    model = golden.model(case, case["frames"], quirks=True, multimodal_keep_rate=1.0)
    mask = vectors["attention_mask"].bool()
    with torch.inference_mode():
        states = model.encode_text(vectors["input_ids"], mask).states_BLD
        fused = model.fuse(states, mask, vectors["vision_embeds"])
    close(fused.states_QLD, vectors["full_stack_last_hidden"], HIDDEN, "full_stack_last_hidden")


def check_retrieval(golden: GoldenSet, name: str) -> None:
    """Test-time scores of videos of several clips, and the recalls that follow."""
    case = golden.case(name)
    vectors = golden.vectors(case)
    model = golden.model(case, case["frames_per_clip"], quirks=True)
    layout = "interleaved" if case["clip_layout"].startswith("interleaved") else "consecutive"
    clips = split_clips(vectors["video"].float() / 32, case["frames_per_clip"], layout)
    assert clips.shape[1] == case["clips_per_video"]
    mask = vectors["attention_mask"].bool()
    with torch.inference_mode():
        output = model.encode_video(clips.flatten(0, 1), layouts=layouts_of(model, vectors, repeats=True))
        text = model.encode_text(vectors["input_ids"], mask)
        tokens, features = (x.unflatten(0, clips.shape[:2]) for x in (output.tokens_BMD, output.features_BP))
        dual = dual_scores(features, text.features_BP)
        scores = matching_scores(
            model,
            tokens,
            text,
            mask,
            dual,
            k_test=case["k_test"],
            ensemble=case["ensemble"],
            pairs_per_pass=8,
        )
    close(dual, vectors["i2t_dual"], POOLED, "i2t_dual")
    close(scores.video_to_text_VQ, vectors["i2t_vtm"], LOGITS, "i2t_vtm")
    close(scores.text_to_video_QV, vectors["t2i_vtm"], LOGITS, "t2i_vtm")
    is_own = vectors["txt2img"] == torch.arange(len(dual))[:, None]
    ranked = [(dual, dual.T, case.get("metrics_dual"))]
    # Where k_test cut some off, they tie at -100 and the published order among them is that of its sort.
    if case["k_test"] >= max(dual.shape):
        ranked.append((scores.video_to_text_VQ, scores.text_to_video_QV, case.get("metrics_vtm")))
    for videos, texts, expected in ranked:
        if expected is None:
            continue
        for direction, similarity, targets in (("txt", videos, is_own), ("img", texts, is_own.T)):
            recalls = retrieval_score(target_ranks(similarity, targets)).recalls
            found = tuple(recall.recall for recall in recalls.values())
            wanted = tuple(expected[f"{direction}_r{k}"] for k in (1, 5, 10))
            assert all(abs(a - b) < 0.01 for a, b in zip(found, wanted, strict=True)), (
                direction,
                found,
                wanted,
            )
