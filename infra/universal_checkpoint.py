"""DeepSpeed checkpoints for another number of ranks, by way of DeepSpeed's universal format.

`convert` rewrites a checkpoint as one file per parameter and state; DeepSpeed loads those at any number of ranks,
and `restore_the_rest` puts right what it leaves out or gets wrong there. Left out: moments in 8 bits and states
on NVMe, which the format does not know.
"""

import argparse
import contextlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn

from infra.engine import EngineError

# What DeepSpeed's own checkpoints hold besides tensors and plain values.
_SAFE_TYPES = [ZeroStageEnum, fragment_address, LossScaler]


def num_writers(folder: Path) -> int:
    """Ranks that wrote a DeepSpeed checkpoint; 0 where no state is sharded (ZeRO 0), which any number can load."""
    return len(list(folder.glob("*zero_pp_rank_*_optim_states.pt")))


def convert(folder: Path, universal: Path, names: Iterable[str]) -> None:
    """Rewrite `folder` as the new folder `universal`, on one rank; a few files of `folder`'s size are written.

    Raises EngineError when a parameter in `names` came out without its weights or moments, and whatever DeepSpeed
    and torch raise on files they cannot read.
    """
    settings = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(universal),
        # Other processes would load the files without the guard of `data_only`.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    universal.mkdir(parents=True)
    with data_only(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(settings)
    states = ("fp32", "exp_avg", "exp_avg_sq")
    missing = [
        f"{state} of {name}"
        for name in names
        for state in states
        if not (universal / "zero" / name / f"{state}.pt").is_file()
    ]
    if missing:
        raise EngineError(
            f"DeepSpeed's universal format of {folder} lacks {missing[0]} and {len(missing) - 1} more: the checkpoint "
            "was written before the first step, or by another optimizer"
        )


def restore_the_rest(
    folder: Path, module: nn.Module, optimizer: Any, hyperparameters: list[dict[str, Any]]
) -> None:
    """Complete DeepSpeed's load of the universal form of `folder`.

    It skips buffers and frozen parameters; at ZeRO 3 it gives all parameter groups the settings of the first, and all
    parts of the optimizer one tensor that counts their steps, which each of them would then advance.
    `hyperparameters` are those of the groups of `optimizer` (torch's own) before the load.
    """
    for group, values in zip(optimizer.param_groups, hyperparameters, strict=True):
        group.update(values)
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    for part, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(part.device if is_fused else "cpu", copy=True)
    _restore_untrained(folder, module)


@torch.no_grad()
def _restore_untrained(folder: Path, module: nn.Module) -> None:
    """Copy buffers and frozen parameters from the model files of the ranks that wrote `folder`."""
    files = sorted(folder.glob("*mp_rank_00_model_states.pt"), key=_rank_of)
    saved = _read(files[0])
    for name, buffer in module.named_buffers():
        if name in saved["module"]:
            buffer.copy_(saved["module"][name])
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    sharded: dict[str, Any] = {name: p for name, p in frozen.items() if hasattr(p, "ds_tensor")}
    for name in frozen.keys() - sharded.keys():
        frozen[name].copy_(saved["module"][name])
    if not sharded:
        return
    fragments = [
        saved["frozen_param_fragments"],
        *(_read(path)["frozen_param_fragments"] for path in files[1:]),
    ]
    for name, parameter in sharded.items():
        whole = torch.cat([part[name].flatten() for part in fragments])[: parameter.ds_numel]
        own = parameter.ds_tensor
        start = min(own.numel() * dist.get_rank(), len(whole))
        piece = whole[start : start + own.numel()]
        own.flatten()[: len(piece)].copy_(piece)


def _rank_of(path: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found.group(1)) if found else 0


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def data_only() -> Iterator[None]:
    """Inside, no `torch.load` runs code from a file: tensors, plain values and the three allow-listed types only.

    DeepSpeed asks for the opposite at each of its calls, so the function is replaced.
    """
    load = torch.load

    def load_data(*args: Any, **kwargs: Any) -> Any:
        with torch.serialization.safe_globals(
            _SAFE_TYPES
        ):  # here: leaving it forgets the types, also when nested
            return load(*args, **{**kwargs, "weights_only": True})

    torch.load = load_data
    try:
        yield
    finally:
        torch.load = load
