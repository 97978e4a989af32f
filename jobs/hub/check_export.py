"""Encodes one clip and one caption with an exported folder, as somebody would who has nothing else of this project.

    python -I check_export.py FOLDER INPUTS OUTPUTS CAPTION [PACKAGE ...]

INPUTS is a safetensors file with `pixel_values`; OUTPUTS gets `video_features` and `text_features`. Packages that are
named cannot be imported, as if they were not installed.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType


class _Hidden(MetaPathFinder):
    """Finds nothing, and says so before others look, for the packages it is given."""

    def __init__(self, packages: frozenset[str]) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def main(folder: str, inputs: str, outputs: str, caption: str, *hidden: str) -> None:
    """What the command line says."""
    sys.meta_path.insert(0, _Hidden(frozenset(hidden)))
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    text = tokenizer([caption], return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        output = model(load_file(inputs)["pixel_values"], text["input_ids"], text["attention_mask"])
    save_file({"video_features": output.video_features, "text_features": output.text_features}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
