"""Tensors and settings from files on the local disk. Nothing a file says is ever run.

`.safetensors` files hold tensors only. Pickled checkpoints go through torch's weights-only unpickler; the settings
objects of the published code (OmegaConf) are read as inert boxes, anything else that would need code is refused.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import WeightsError

# What settings of OmegaConf and saved schedules are pickled with. None is imported: each becomes an inert box.
_INERT_MODULES = ("omegaconf.", "numpy.", "pathlib.")
_INERT_NAMES = {"typing.Any", "collections.defaultdict"} | {
    f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "set", "str", "tuple")
}
_NAMES_IN_FOLDER = ("model.safetensors", "pytorch_model.bin")
_INDEX_SUFFIX = ".index.json"


class Checkpoint(NamedTuple):
    """Tensors by key, and the settings saved beside them as plain values (empty where there are none)."""

    state: dict[str, Tensor]
    settings: dict[str, Any]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Weights of a file, or of a Hugging Face style folder; tensors on the CPU.

    A pickled dict may hold the weights under `model` or `state_dict`, and its settings under `config`. Raises
    WeightsError when there is no such file, it cannot be read, or reading it would run code.
    """
    path = Path(path)
    if path.is_dir():
        return Checkpoint(_read_folder(path), _read_json(path / "config.json"))
    if not path.is_file():
        raise WeightsError(f"there is no file or folder {path}; give the path of a local checkpoint")
    if path.suffix == ".safetensors":
        return Checkpoint(_read_safetensors(path), {})
    content = _read_pickle(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    settings = plain(content.get("config"))
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    return Checkpoint(tensors_of(content, str(path)), settings if isinstance(settings, dict) else {})


def tensors_of(content: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The mapping itself when all its values are tensors; raises WeightsError that names the first others."""
    other = [
        f"{key} ({type(value).__name__})" for key, value in content.items() if not isinstance(value, Tensor)
    ]
    if other:
        raise WeightsError(
            f"{where} holds values that are not tensors: {', '.join(other[:5])}; "
            "give a state dict, or a dict with one under 'model'"
        )
    return dict(content)


def write_folder(folder: str | Path, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and `config.json`, each whole or not at all; the settings last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own_copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()}
    part = folder / "model.safetensors.part"
    save_file(own_copies, part, metadata={"format": "pt"})
    os.replace(part, folder / "model.safetensors")
    part = folder / "config.json.part"
    part.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / "config.json")


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in _NAMES_IN_FOLDER:
        if (folder / name).is_file():
            return read_checkpoint(folder / name).state
        if (folder / (name + _INDEX_SUFFIX)).is_file():
            shards = set(_read_json(folder / (name + _INDEX_SUFFIX))["weight_map"].values())
            parts = [read_checkpoint(folder / Path(shard).name).state for shard in sorted(shards)]
            return {key: value for part in parts for key, value in part.items()}
    raise WeightsError(
        f"the folder {folder} holds none of {', '.join(_NAMES_IN_FOLDER)}; give the one that does"
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(
            f"there is no {path}, which says how the model is built; copy it beside the weights"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}; copy the file again") from error


def _read_pickle(path: Path) -> Any:
    # Files of before torch 1.6 are no zip files: they cannot be asked what they need, and are read without boxes.
    is_zip = zipfile.is_zipfile(path)
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        refused = sorted(
            name for name in needed if name not in _INERT_NAMES and not name.startswith(_INERT_MODULES)
        )
        if refused:
            raise WeightsError(
                f"{path} was not read: it asks for {', '.join(refused)}, which could run code; "
                "ask its maker for the state dict alone, best as .safetensors"
            )
        boxes: list[Any] = [(_new_box(name), name) for name in needed]
        with torch.serialization.safe_globals(boxes):
            return torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle can fail with anything
        kind = (
            "damaged, or asks for something that could run code"
            if is_zip
            else "no checkpoint of torch 1.6 or newer"
        )
        raise WeightsError(
            f"{path} cannot be read: it is {kind} ({type(error).__name__}); "
            "copy the file again, or ask its maker for the state dict alone, best as .safetensors"
        ) from error


class _Box:
    """Stands in for an object of a class that is not imported: keeps its fields, does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments


def _new_box(name: str) -> type[_Box]:
    return type(name.rpartition(".")[2], (_Box,), {})


def plain(value: Any) -> Any:
    """Boxed OmegaConf containers and values as dicts, lists and values; any other box as None."""
    if isinstance(value, _Box):
        fields = value.__dict__
        return plain(fields["_content"]) if "_content" in fields else plain(fields.get("_val"))
    if isinstance(value, Mapping):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
