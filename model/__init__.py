"""Sparse video-text model. `from model import ModelConfig, VideoTextModel, load_official_svitt` is a start."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.config import ModelConfig as ModelConfig
    from model.config import TextConfig as TextConfig
    from model.config import VideoConfig as VideoConfig
    from model.errors import ModelInputError as ModelInputError
    from model.errors import WeightsError as WeightsError
    from model.pretrained import LoadedModel as LoadedModel
    from model.pretrained import build_from_parts as build_from_parts
    from model.pretrained import load_hf_beit as load_hf_beit
    from model.pretrained import load_hf_bert as load_hf_bert
    from model.pretrained import load_model as load_model
    from model.pretrained import load_official_svitt as load_official_svitt
    from model.pretrained import save_model as save_model
    from model.video_text_model import VideoTextModel as VideoTextModel

_HOMES = {
    "ModelConfig": "config",
    "TextConfig": "text_config",
    "VideoConfig": "config",
    "ModelInputError": "errors",
    "WeightsError": "errors",
    "LoadedModel": "pretrained",
    "build_from_parts": "pretrained",
    "load_hf_beit": "pretrained",
    "load_hf_bert": "pretrained",
    "load_model": "pretrained",
    "load_official_svitt": "pretrained",
    "save_model": "pretrained",
    "VideoTextModel": "video_text_model",
}


def __getattr__(name: str) -> Any:
    # Looked up when asked for, so that `model.config` alone (the command line) does not load torch.
    if name not in _HOMES:
        raise AttributeError(f"model has no {name}; it has {', '.join(_HOMES)}")
    return getattr(import_module(f"model.{_HOMES[name]}"), name)
