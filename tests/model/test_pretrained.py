"""Models from files: pickled checkpoints, Hugging Face folders, our own."""

import json
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BeitConfig, BeitModel, BertConfig, BertForPreTraining

import model as model_package
from model import (
    VideoTextModel,
    WeightsError,
    build_from_parts,
    load_hf_beit,
    load_hf_bert,
    load_model,
    load_official_svitt,
    save_model,
)
from tests.model.tiny import tiny_batch, tiny_config

GOLDEN = Path(__file__).parents[1] / "golden" / "svitt"
TEXT = {"num_heads": 4, "cls_id": 1, "mask_id": 3}


def _golden_state() -> dict[str, Tensor]:
    return {**load_file(GOLDEN / "weights.safetensors"), **load_file(GOLDEN / "tables_T2.safetensors")}


class _Touch:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture
def settings_object(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pickles like an OmegaConf config, of a package that is gone when the file is read."""
    package = types.ModuleType("omegaconf")
    for name in ("DictConfig", "ListConfig", "AnyNode"):
        made = type(name, (), {"__module__": "omegaconf"})
        setattr(package, name, made)
    monkeypatch.setitem(sys.modules, "omegaconf", package)

    def boxed(value: Any) -> Any:
        if isinstance(value, dict):
            made, content = package.DictConfig(), {key: boxed(entry) for key, entry in value.items()}
            made.__dict__.update(
                _content=content, _parent=None, _metadata={"object_type": dict, "key_type": Any}
            )
        elif isinstance(value, list):
            made = package.ListConfig()
            made.__dict__.update(_content=[boxed(entry) for entry in value])
        else:
            made = package.AnyNode()
            made.__dict__.update(_val=value)
        return made

    return boxed


def test_a_pickled_checkpoint_is_read_with_its_settings_and_without_its_packages(
    tmp_path: Path, settings_object: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "vision_encoder_args": {"token_keep_rate": 0.6, "token_drop_loc": [2, 5], "attn_block_size": 4},
        "text_encoder_args": {"token_keep_rate": 0.1},
        "optimizer": {"lr": 3e-5},
    }
    content = {"model": _golden_state(), "config": settings_object(settings), "epoch": 9}
    torch.save(content, tmp_path / "ckpt_09.pth")
    monkeypatch.delitem(sys.modules, "omegaconf")
    model, report = load_official_svitt(tmp_path / "ckpt_09.pth", text=TEXT)
    video = model.config.video
    assert (video.keep_rate, video.prune_layers, video.block_size) == (0.6, (2, 5), 4)
    assert model.config.multimodal_keep_rate == 0.1
    assert not report.new + report.unused
    assert "omegaconf" not in sys.modules


@pytest.mark.parametrize("where", ["config", "optimizer"])
def test_a_checkpoint_that_would_run_code_is_refused_and_nothing_runs(tmp_path: Path, where: str) -> None:
    mark = tmp_path / "ran"
    torch.save({"model": _golden_state(), where: _Touch(mark)}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"not read: it asks for .*getattr.*could run code"):
        load_official_svitt(tmp_path / "evil.pth", text=TEXT)
    with (tmp_path / "plain.pth").open("wb") as file:
        pickle.dump(_Touch(mark), file)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_official_svitt(tmp_path / "plain.pth", text=TEXT)
    assert not mark.exists()


def test_files_that_are_missing_cut_or_empty_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no file or folder .*gone\.pth"):
        load_official_svitt(tmp_path / "gone.pth")
    torch.save({"model": _golden_state()}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:5000])
    save_file({"a": torch.zeros(9)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:30])
    for name in ("cut.pth", "cut.safetensors"):
        with pytest.raises(WeightsError, match=f"{name} cannot be read"):
            load_official_svitt(tmp_path / name)
    with pytest.raises(WeightsError, match=r"holds none of model\.safetensors"):
        load_official_svitt(tmp_path)


def _beit(folder: Path, **settings: Any) -> BeitModel:
    torch.manual_seed(0)
    defaults = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 60,
        "image_size": 20,
        "patch_size": 4,
        "use_relative_position_bias": True,
        "initializer_range": 0.4,
        "use_mask_token": True,
    }
    beit = BeitModel(BeitConfig(**{**defaults, **settings})).eval()
    with torch.no_grad():
        for name, parameter in beit.named_parameters():
            if "relative_position_bias_table" in name or name.endswith("bias"):
                parameter.normal_()
    beit.save_pretrained(folder)
    return beit


def _bert(folder: Path, **settings: Any) -> BertForPreTraining:
    torch.manual_seed(1)
    defaults = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 36,
        "max_position_embeddings": 12,
        "initializer_range": 0.4,
    }
    bert = BertForPreTraining(BertConfig(**{**defaults, **settings})).eval()
    bert.save_pretrained(folder)
    words = [f"word{number}" for number in range(40)]
    words[7], words[9] = "[CLS]", "[MASK]"
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return bert


DENSE = {"num_random_blocks": None, "keep_rate": 1.0}


def test_one_frame_without_sparsity_equals_beit_of_the_same_weights(tmp_path: Path) -> None:
    beit = _beit(tmp_path)
    model, report = build_from_parts(load_hf_beit(tmp_path), video=DENSE, text={"width": 16, "num_heads": 2})
    images = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = beit(images)
        encoding = model.video_encoder(images[:, None])
    torch.testing.assert_close(encoding.tokens_BMD, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoding.pooled_BD, expected.pooler_output, atol=1e-5, rtol=0)
    assert not [key for key in report.new if key.startswith("video_encoder.")]
    assert not report.unused


def gradient(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    return module.get_parameter(name).grad


def test_text_layers_equal_bert_of_the_same_weights(tmp_path: Path) -> None:
    bert = _bert(tmp_path)
    part = load_hf_bert(tmp_path)
    assert part.text["fusion_layer"] == 3
    assert (part.text["cls_id"], part.text["mask_id"]) == (7, 9)
    model, report = build_from_parts(
        part, video={"image_size": 32, "block_size": 4}, multimodal_prune_layers=(3,)
    )
    ids = torch.randint(10, 40, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    states = bert.bert(ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    ours = model.encode_text(ids, mask).states_BLD
    head = model.text_encoder.mlm_head(ours)
    expected_head = bert.cls.predictions(states[3])
    torch.testing.assert_close(ours[mask], states[3][mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(head[mask], expected_head[mask], atol=1e-5, rtol=0)
    head[mask].sin().sum().backward()
    expected_head[mask].sin().sum().backward()
    for name, theirs in bert.bert.embeddings.named_parameters():
        torch.testing.assert_close(
            gradient(model.text_encoder.embeddings, name), theirs.grad, atol=1e-5, rtol=1e-4
        )
    for number in range(3):
        for name, theirs in bert.bert.encoder.layer[number].named_parameters():
            torch.testing.assert_close(
                gradient(model.text_encoder.layers[number], name), theirs.grad, atol=1e-5, rtol=1e-4
            )
    for name, theirs in bert.cls.predictions.transform.named_parameters():
        torch.testing.assert_close(
            gradient(model.text_encoder.mlm_head.transform, name), theirs.grad, atol=1e-5, rtol=1e-4
        )
    new = [key for key in report.new if key.startswith("text_encoder.")]
    assert new
    assert all(".layers.3.crossattention." in key for key in new)


def test_beit_and_bert_make_a_model_of_several_frames(tmp_path: Path) -> None:
    _beit(tmp_path / "beit")
    _bert(tmp_path / "bert")
    beit, bert = load_hf_beit(tmp_path / "beit"), load_hf_bert(tmp_path / "bert")
    model, report = build_from_parts(
        beit,
        bert,
        video={"num_frames": 3, "block_size": 5, "prune_layers": (1,)},
        multimodal_prune_layers=(3,),
    )
    assert len(report.inflated) == 3
    table = model.video_encoder.layers[1].attention.bias_table
    image = beit.state["video_encoder.layers.1.attention.bias_table"]
    assert torch.equal(table[:-3].unflatten(0, (5, 81)), image[:-3].expand(5, 81, 2))
    assert model.config.text.width == 16
    assert model.video_norm.weight.eq(1).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_absolute_position_embeddings": True}, "use_absolute_position_embeddings True"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    ],
)
def test_beit_that_is_built_otherwise_is_refused(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    _beit(tmp_path, **settings)
    with pytest.raises(WeightsError, match=words):
        load_hf_beit(tmp_path)


def test_folders_of_another_family_are_refused_with_the_loader_to_use(tmp_path: Path) -> None:
    _beit(tmp_path / "beit")
    _bert(tmp_path / "bert")
    with pytest.raises(
        WeightsError, match=r"not a checkpoint of BEiT; its keys are those of BERT: use load_hf_bert"
    ):
        load_hf_beit(tmp_path / "bert")
    with pytest.raises(WeightsError, match="use load_hf_beit"):
        load_hf_bert(tmp_path / "beit")
    with pytest.raises(WeightsError, match=r"not of this project.*use load_hf_bert"):
        load_model(tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").unlink()
    with pytest.raises(WeightsError, match="give cls_id, mask_id"):
        load_hf_bert(tmp_path / "bert")
    assert load_hf_bert(tmp_path / "bert", cls_id=1, mask_id=2).text["mask_id"] == 2


def test_a_saved_model_comes_back_exactly(tmp_path: Path) -> None:
    config = tiny_config(learn_temperature=True)
    torch.manual_seed(0)
    model = VideoTextModel(config).eval()
    save_model(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded, report = load_model(tmp_path)
    assert loaded.config == config
    assert not report.new + report.unused + report.inflated
    clips = tiny_batch(config).video
    with torch.inference_mode():
        assert torch.equal(loaded.encode_video(clips).features_BP, model.encode_video(clips).features_BP)
    longer = load_model(tmp_path, video={"num_frames": 6}).report
    assert len(longer.inflated) == 4


def test_a_folder_with_settings_that_do_not_fit_is_refused(tmp_path: Path) -> None:
    save_model(VideoTextModel(tiny_config()), tmp_path)
    with pytest.raises(WeightsError, match=r"attention_norm\.bias: shape \(16,\), the model has \(32,\)"):
        load_model(tmp_path, video={"width": 32})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["config"]["video"]["keep_rate"] = 1.2
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=r"keep_rate[\s\S]*less than or equal to 1"):
        load_model(tmp_path)
    settings["version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match="'version': 99"):
        load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"no .*config\.json"):
        load_model(tmp_path)


def test_the_package_offers_its_names_and_importing_it_loads_no_torch() -> None:
    for name in model_package._HOMES:
        assert getattr(model_package, name).__name__ == name
    with pytest.raises(AttributeError, match="model has no load_clip"):
        model_package.load_clip  # noqa: B018
    code = "import sys, model, model.config; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode
        == 0
    )
