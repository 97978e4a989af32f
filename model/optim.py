"""Which parameters decay, and the learning-rate factor as a pure function of the step."""

from math import cos, pi
from typing import Any

from torch import nn

_NO_DECAY_PARTS = ("bias_table", "cls_token", "learned_temperature", "_embeddings.weight", "_embedding")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Only matrices of linear maps and the patch convolution decay.

    Not norms, biases, scales (one axis), nor CLS, temperature, embeddings and position tables.
    """
    return parameter.dim() > 1 and not any(part in name for part in _NO_DECAY_PARTS)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups, `decay` and `no_decay`, of the trainable parameters; shared ones appear once."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[decays(name, parameter)].append(parameter)
    return [
        {"name": "decay", "params": groups[True], "weight_decay": weight_decay},
        {"name": "no_decay", "params": groups[False], "weight_decay": 0.0},
    ]


def lr_factor(step: int, total_steps: int, warmup_steps: int, floor: float) -> float:
    """Factor of the peak learning rate for the update made at `step` (from 0).

    Linear warm-up, then a cosine to 0, both clipped at `floor` and not rescaled (SViTT's schedule). Steps
    past the end stay at the floor. Raises ValueError when warm-up does not fit into the run.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps {warmup_steps} must lie in 0..total_steps {total_steps}")
    if step < warmup_steps:
        return max(floor, step / warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return max(floor, (1 + cos(pi * progress)) / 2)
