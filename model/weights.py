"""Weights of another frame count: inflation of what depends on time, and strict loading with a report.

Tensors in, tensors out: reading and writing files is not done here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from model.errors import WeightsError
from model.relative_bias import CLS_ROWS
from model.video_text_model import VideoTextModel

InflationRule = Literal["nearest", "interpolate"]
_TABLE = "attention.bias_table"
_TIME = "time_embedding"
# Learned temperature of another stage: dropped by a model whose temperature is fixed.
_OPTIONAL = ("learned_temperature",)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What became of every key: taken as is, inflated in time, left at its start, not needed."""

    matched: tuple[str, ...]
    inflated: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]

    def summary(self) -> str:
        """One line for the log."""
        parts = (len(self.matched), len(self.inflated), len(self.new), len(self.unused))
        return "{} keys matched, {} inflated, {} new, {} unused".format(*parts)


def inflate_bias_table(
    table_RA: Float[Tensor, "R A"], old_frames: int, new_frames: int, rule: InflationRule = "nearest"
) -> Float[Tensor, "R2 A"]:
    """Position table for another number of frames; spatial offsets and the three CLS rows are kept.

    `nearest` is SViTT's map over the time slots: slot j of 2T'-1 takes slot floor(j (2T-1) / (2T'-1)). It is
    not symmetric in time, and when shrinking it moves offset 0. `interpolate` keeps offset 0 and is
    symmetric: a clip spans the same seconds at either count, so offset d of T' frames is offset d T / T' of T
    frames, linear between its neighbours and held at the ends. Both repeat an image table (T = 1) over all
    offsets. Raises WeightsError when the rows do not fit `old_frames`.
    """
    old_slots, new_slots = 2 * old_frames - 1, 2 * new_frames - 1
    spatial, rest = divmod(table_RA.shape[0] - CLS_ROWS, old_slots)
    if rest or spatial <= 0:
        raise WeightsError(
            f"a position table of {table_RA.shape[0]} rows is not one of {old_frames} frames: "
            f"without {CLS_ROWS} CLS rows it must be a multiple of {old_slots}; state its own frame count"
        )
    patches = table_RA[:-CLS_ROWS].view(old_slots, spatial, -1)
    slot = torch.arange(new_slots, device=table_RA.device)
    if rule == "nearest":
        inflated = patches[slot * old_slots // new_slots]
    elif rule == "interpolate":
        offset = (slot - (new_frames - 1)).double() * old_frames / new_frames
        position = (offset + old_frames - 1).clamp(0, old_slots - 1)
        low = position.floor().long().clamp_max(max(old_slots - 2, 0))
        share = (position - low).to(table_RA.dtype)[:, None, None]
        inflated = patches[low] * (1 - share) + patches[(low + 1).clamp_max(old_slots - 1)] * share
    else:
        raise WeightsError(f"no inflation rule is called {rule!r}; choose nearest or interpolate")
    return torch.cat([inflated.flatten(0, 1), table_RA[-CLS_ROWS:]])


def inflate_time_embedding(embedding_TD: Float[Tensor, "T D"], new_frames: int) -> Float[Tensor, "T2 D"]:
    """Time embedding for another number of frames, linear between the old ones and held at the ends.

    Frames are the middles of equal parts of the clip, so frame i of T' stands at (i + 1/2) T / T' - 1/2 of T.
    """
    old_frames = embedding_TD.shape[0]
    index = torch.arange(new_frames, device=embedding_TD.device, dtype=torch.float64)
    position = ((index + 0.5) * old_frames / new_frames - 0.5).clamp(0, old_frames - 1)
    low = position.floor().long()
    share = (position - low).to(embedding_TD.dtype)[:, None]
    return embedding_TD[low] * (1 - share) + embedding_TD[(low + 1).clamp_max(old_frames - 1)] * share


def load_for_num_frames(
    model: VideoTextModel,
    state: Mapping[str, Tensor],
    rule: InflationRule = "nearest",
    *,
    allow_new: bool | tuple[str, ...] = False,
    allow_unused: bool = False,
) -> LoadReport:
    """Load weights of a model that may differ in the number of frames; all else must fit.

    The old frame count follows from the rows of the tables. Raises WeightsError that names keys and shapes
    for anything missing, left over or misshaped, before a single weight is changed. `allow_new` accepts missing
    keys (they keep their start), all or those of the given prefixes; `allow_unused` left-over ones. A learned
    temperature is optional either way.
    """
    own = model.state_dict()
    loaded: dict[str, Tensor] = {}
    matched, inflated, problems = [], [], []
    for key in own.keys() & state.keys():
        value = state[key]
        if key.endswith(_TABLE) and value.shape != own[key].shape:
            try:
                value = _inflate_for(model, value, own[key], rule)
                inflated.append(key)
            except WeightsError as error:
                problems.append(f"{key}: {error}")
                continue
        elif key.endswith(_TIME) and value.shape[1:] == own[key].shape[1:] and value.shape != own[key].shape:
            value = inflate_time_embedding(value, model.config.video.num_frames)
            inflated.append(key)
        elif value.shape != own[key].shape:
            problems.append(f"{key}: shape {tuple(value.shape)}, the model has {tuple(own[key].shape)}")
            continue
        else:
            matched.append(key)
        loaded[key] = value
    new, unused = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if allow_new is not True:
        accepted = allow_new or ()
        problems += [
            f"{key}: missing" for key in new if key not in _OPTIONAL and not key.startswith(accepted)
        ]
    if not allow_unused:
        problems += [f"{key}: not part of this model" for key in unused if key not in _OPTIONAL]
    if problems:
        shown = "\n  ".join(sorted(problems)[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise WeightsError(
            f"the weights do not fit the model ({len(problems)} problems):\n  {shown}{more}\n"
            "Build the model with the settings of the checkpoint (only num_frames and sparsity may differ), "
            "or allow new or unused keys by name"
        )
    model.load_state_dict({**own, **loaded})
    return LoadReport(tuple(sorted(matched)), tuple(sorted(inflated)), tuple(new), tuple(unused))


def _inflate_for(model: VideoTextModel, table: Tensor, own: Tensor, rule: InflationRule) -> Tensor:
    config = model.config.video
    spatial = (2 * config.grid - 1) ** 2
    slots, rest = divmod(table.shape[0] - CLS_ROWS, spatial)
    if rest or slots % 2 == 0 or table.shape[1] != own.shape[1]:
        raise WeightsError(
            f"shape {tuple(table.shape)}, the model has {tuple(own.shape)}; the table must be that of "
            f"{config.grid} x {config.grid} patches and {own.shape[1]} heads"
        )
    return inflate_bias_table(table, (slots + 1) // 2, config.num_frames, rule).to(own.dtype)
