"""The whole model: the training objective, its randomness, padding, fusion."""

import copy

import pytest
import torch

from model.config import ModelConfig
from model.errors import ModelInputError
from model.losses import ActionTags, ego_nce, info_nce
from model.objective import LossTerms
from model.step_key import StepKey
from model.video_text_model import VideoTextModel
from tests.model.tiny import tiny_batch, tiny_config


def _model(config: ModelConfig | None = None) -> VideoTextModel:
    torch.manual_seed(0)
    return VideoTextModel(config or tiny_config())


def _terms(model: VideoTextModel, key: StepKey, **change: object) -> LossTerms:
    return tiny_batch(model.config)._replace(**change).losses(model, key)  # pyright: ignore[reportArgumentType]


def test_losses_are_scalars_that_add_up_and_reach_every_parameter() -> None:
    model = _model(tiny_config(vtc_weight=0.5, vtm_weight=2.0, learn_temperature=True))
    terms = _terms(model, StepKey(0, 0))
    for term in terms:
        assert term.shape == ()
        assert term.dtype == torch.float32
    torch.testing.assert_close(terms.total, 0.5 * terms.vtc + 2 * terms.vtm + terms.mlm)
    terms.total.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


def test_contrastive_term_is_ego_nce_of_the_features() -> None:
    config = tiny_config(vtc_directions="mean")
    model, batch = _model(config).eval(), tiny_batch(config)
    with torch.no_grad():
        terms = batch.losses(model, StepKey(0, 0))
        video = model.encode_video(batch.video).features_BP
        text = model.encode_text(batch.text_ids, batch.text_mask).features_BP
        tags = ActionTags(batch.verbs, batch.nouns, batch.clip_index)
        expected = ego_nce(text @ video.T / 0.05, tags.positives(tags, "action"), "mean")
    torch.testing.assert_close(terms.vtc, expected)
    torch.testing.assert_close(video.norm(dim=1), torch.ones(6))


def test_contrastive_term_of_svitt_is_info_nce_of_the_features() -> None:
    config = tiny_config(vtc_loss="info_nce", vtc_positives="identity", vtc_directions="mean")
    model, batch = _model(config).eval(), tiny_batch(config)
    clips = torch.tensor([0, 0, 2, 3, 4, 5])
    with torch.no_grad():
        terms = batch._replace(clip_index=clips).losses(model, StepKey(0, 0))
        video = model.encode_video(batch.video).features_BP
        text = model.encode_text(batch.text_ids, batch.text_mask).features_BP
        expected = info_nce(text @ video.T / 0.05, clips[:, None] == clips)
    torch.testing.assert_close(terms.vtc, expected)


def test_random_multimodal_pruning_is_keyed_and_the_same_for_all_pairs() -> None:
    model = _model(tiny_config(multimodal_keep_rate=0.5, multimodal_score="random")).eval()
    batch = tiny_batch(model.config)
    video = model.encode_video(batch.video).tokens_BMD
    states = model.encode_text(batch.text_ids, batch.text_mask).states_BLD
    (kept,) = model.fuse(states, batch.text_mask, video).keep_indices
    assert kept.shape == (6, 6)
    assert (kept == kept[0]).all()
    assert torch.equal(kept, model.fuse(states, batch.text_mask, video).keep_indices[0])
    assert not torch.equal(kept, model.fuse(states, batch.text_mask, video, seed=5).keep_indices[0])
    assert _terms(model.train(), StepKey(0, 0)).total.isfinite()


def test_a_step_repeats_exactly_and_steps_and_seeds_differ() -> None:
    config = tiny_config({"drop_path": 0.3}, text={"dropout": 0.2})
    model = _model(config)
    plain = _terms(model, StepKey(0, 5))
    torch.manual_seed(999)
    state = torch.get_rng_state()
    again = _terms(model, StepKey(0, 5))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    for other in (StepKey(0, 6), StepKey(1, 5)):
        assert not torch.equal(_terms(model, other).total, plain.total)


def test_rows_in_another_order_have_the_same_losses() -> None:
    """Dropout, drop path, hidden words and negatives belong to a clip, not to its place in the batch."""
    config = tiny_config({"drop_path": 0.3}, text={"dropout": 0.2}, multimodal_keep_rate=0.5)
    model, batch = _model(config), tiny_batch(config)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = type(batch)(*(part[order] for part in batch))
    for plain, other in zip(
        batch.losses(model, StepKey(0, 5)), shuffled.losses(model, StepKey(0, 5)), strict=True
    ):
        torch.testing.assert_close(plain, other)


def test_dropout_reaches_every_layer_and_only_in_training() -> None:
    """With words dropped in one layer alone, the losses change."""
    model = _model(tiny_config({"drop_path": 0.4}))
    plain = _terms(model, StepKey(0, 5)).total
    for layer in (*model.text_encoder.layers, *model.video_encoder.layers[1:]):
        name = "rate" if hasattr(layer, "rate") else "drop_path"
        before = getattr(layer, name)
        setattr(layer, name, 0.8)
        assert not torch.equal(_terms(model, StepKey(0, 5)).total, plain), layer
        model.eval()
        here = _terms(model, StepKey(0, 5)).total
        setattr(layer, name, before)
        assert torch.equal(_terms(model, StepKey(0, 5)).total, here)
        model.train()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("backend", ["auto", "blocks"])
@pytest.mark.parametrize("video_mode", ["all_but_attention", "all"])
def test_recomputing_changes_neither_losses_nor_gradients(
    video_mode: str, backend: str, offload: bool
) -> None:
    results = []
    for recompute in (False, True):
        video = {"drop_path": 0.3, "attention_backend": backend}
        text = {"dropout": 0.2}
        if recompute:
            video |= {"recompute": video_mode, "offload_activations": offload}
            text |= {"recompute": "all", "offload_activations": offload}
        config = tiny_config(video, multimodal_keep_rate=0.7, text=text)
        model = _model(config)
        terms = _terms(model, StepKey(0, 5))
        terms.total.backward()
        results.append([terms.total.detach(), *(p.grad for p in model.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_random_edges_are_fixed_in_evaluation() -> None:
    model = _model(tiny_config(vtm_weight=0, mlm_weight=0))
    assert not torch.equal(_terms(model, StepKey(0, 1)).vtc, _terms(model, StepKey(0, 2)).vtc)
    model.eval()
    assert torch.equal(_terms(model, StepKey(0, 1)).vtc, _terms(model, StepKey(0, 2)).vtc)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    config = tiny_config()
    model, batch = _model(config), tiny_batch(config)
    other = batch.text_ids.where(batch.text_mask, 17)
    key = StepKey(0, 0)
    changed_batch = batch._replace(text_ids=other)
    for plain, changed in zip(batch.losses(model, key), changed_batch.losses(model, key), strict=True):
        torch.testing.assert_close(plain, changed)


@pytest.mark.parametrize("off", ["vtc_weight", "vtm_weight", "mlm_weight"])
def test_a_loss_of_weight_zero_is_not_computed(off: str) -> None:
    model = _model(tiny_config(**{off: 0}))
    terms = _terms(model, StepKey(0, 0))
    assert float(getattr(terms, off.removesuffix("_weight"))) == 0
    terms.total.backward()
    head = {
        "vtc_weight": "video_projection",
        "vtm_weight": "vtm_head",
        "mlm_weight": "text_encoder.mlm_head.transform",
    }
    part = model.get_submodule(head[off])
    assert all(parameter.grad is None for parameter in part.parameters()) or off == "vtc_weight"


def test_batches_without_negatives_stay_finite() -> None:
    config = tiny_config()
    model = _model(config)
    one = tiny_batch(config).rows(slice(0, 1))
    same = tiny_batch(config)
    same = same._replace(verbs=torch.ones_like(same.verbs), nouns=torch.ones_like(same.nouns))
    for batch in (one, same):
        terms = batch.losses(model, StepKey(0, 0))
        assert float(terms.vtm.detach()) == 0
        terms.total.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_rows_of_one_clip_are_positives_of_one_another() -> None:
    config = tiny_config(vtm_weight=0, mlm_weight=0)
    model, batch = _model(config).eval(), tiny_batch(config)
    empty = batch._replace(verbs=torch.zeros_like(batch.verbs))
    with torch.no_grad():
        plain = empty.losses(model, StepKey(0, 0))
        joined = empty._replace(clip_index=torch.tensor([0, 0, 2, 3, 4, 5])).losses(model, StepKey(0, 0))
    assert joined.vtc < plain.vtc


def test_companions_as_extra_rows_run_through_all_losses() -> None:
    config = tiny_config()
    batch = tiny_batch(config, num_clips=12)
    assert batch.losses(_model(config), StepKey(0, 0)).total.isfinite()


def test_temperature_is_clamped_in_value_but_keeps_its_gradient() -> None:
    model = _model(tiny_config(temperature=0.9, learn_temperature=True))
    assert float(model.temperature().detach()) == pytest.approx(0.5)
    _terms(model, StepKey(0, 0)).vtc.backward()
    assert model.learned_temperature is not None
    assert model.learned_temperature.shape == (1,)
    assert model.learned_temperature.grad is not None
    assert float(model.learned_temperature.grad) != 0


@pytest.mark.parametrize("num_clips", [1, 2, 6])
@pytest.mark.parametrize("same_tags", [True, False])
def test_the_smallest_temperature_stays_finite(num_clips: int, same_tags: bool) -> None:
    model = _model(tiny_config(temperature=0.001, learn_temperature=True))
    batch = tiny_batch(model.config).rows(slice(0, num_clips))
    if same_tags:
        batch = batch._replace(verbs=torch.ones_like(batch.verbs), nouns=torch.ones_like(batch.nouns))
    terms = batch.losses(model, StepKey(0, 0))
    terms.total.backward()
    assert all(term.isfinite() for term in terms)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    has_negatives = num_clips > 2 and not same_tags
    assert (float(terms.vtm.detach()) > 0) == has_negatives


def test_multimodal_pruning_of_rate_one_changes_nothing_and_cls_stays() -> None:
    plain, pruned = _model(), _model(tiny_config(multimodal_keep_rate=0.25))
    batch = tiny_batch(plain.config)
    video = plain.encode_video(batch.video).tokens_BMD
    states = plain.encode_text(batch.text_ids, batch.text_mask).states_BLD
    assert plain.fuse(states, batch.text_mask, video).keep_indices == ()
    fused = pruned.fuse(states, batch.text_mask, video)
    assert fused.keep_indices[0].shape == (6, 3)
    # Layer 2 sees only CLS and the kept patches: the others may hold anything once layer 1 has run.
    hit = torch.zeros(6, 13, dtype=torch.bool)
    hit[:, 0] = True
    hit.scatter_(1, fused.keep_indices[0] + 1, True)
    layer = pruned.text_encoder.layers[2]
    mask = batch.text_mask[:, None, None]
    seen, _ = layer(states, mask, video, None, fused.keep_indices[0], None)
    changed, _ = layer(states, mask, video.where(hit[..., None], 7.0), None, fused.keep_indices[0], None)
    assert torch.equal(seen, changed)


def test_pairs_name_their_clip() -> None:
    model = _model(tiny_config(multimodal_keep_rate=0.5)).double().eval()
    batch = tiny_batch(model.config)
    video = model.encode_video(batch.video.double()).tokens_BMD
    states = model.encode_text(batch.text_ids, batch.text_mask).states_BLD
    clip = torch.tensor([3, 0, 0, 5, 2, 1])
    by_index = model.fuse(states, batch.text_mask, video, clip)
    by_rows = model.fuse(states, batch.text_mask, video[clip])
    torch.testing.assert_close(by_index.states_QLD, by_rows.states_QLD)
    assert torch.equal(by_index.keep_indices[0], by_rows.keep_indices[0])


def test_captions_that_do_not_fit_are_refused_with_their_rows() -> None:
    model = _model()
    batch = tiny_batch(model.config)
    mask = batch.text_mask.clone()
    mask[[2, 4]] = False
    with pytest.raises(ModelInputError, match=r"rows \[2, 4\] have no tokens"):
        model.encode_text(batch.text_ids, mask)
    with pytest.raises(ModelInputError, match="must be bool"):
        model.encode_text(batch.text_ids, mask.long())
    with pytest.raises(ModelInputError, match="9 tokens, the model has 8 positions"):
        model.encode_text(torch.ones(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.bool))


def test_the_state_dict_holds_no_tensor_twice_and_restores_the_tie() -> None:
    model = _model()
    state = model.state_dict()
    pointers = [value.data_ptr() for value in state.values()]
    assert len(set(pointers)) == len(pointers)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(state)
    head = twin.text_encoder.mlm_head.decoder
    assert head.weight is twin.text_encoder.embeddings.word_embeddings.weight
    assert torch.equal(head.weight, model.text_encoder.embeddings.word_embeddings.weight)


def test_a_few_updates_lower_the_loss() -> None:
    config = tiny_config()
    model, batch = _model(config), tiny_batch(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        total = batch.losses(model, StepKey(0, step)).total
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_models_return_float32_losses(dtype: torch.dtype) -> None:
    model = _model().to(dtype)
    terms = _terms(model, StepKey(0, 0))
    assert terms.total.dtype == torch.float32
    terms.total.backward()
    assert terms.total.isfinite()
