"""Predicted against measured device memory of a step, over settings that differ in everything that takes memory.

`python -m tests.soak.predicted_memory` rehearses them all, minutes to an hour; `--only small` those with this in
their line.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from infra.config import EngineConfig
from infra.engine import torch_dtype
from jobs.memory_plan import engine_memory, predict
from jobs.memory_probe import ProbeRequest, probe
from jobs.step_memory import trace_step
from model.config import ModelConfig

MIB = 2**20
TEXT_LENGTH, NUM_TAGS = 32, (118, 582)
DENSE = {"num_random_blocks": None}
ALL = {"recompute": "all"}
OFTEN = {"gradient_reduction": "backward"}
ON_HOST = {"offload_optimizer": "cpu"}


@dataclass(frozen=True)
class Setting:
    """A step of `clips` clips on each rank, `micro` at once."""

    size: str
    frames: int
    micro: int
    clips: int
    ranks: int = 1
    engine: dict[str, Any] = field(default_factory=lambda: {"backend": "plain"})
    video: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{k}={v}" for some in (self.engine, self.video) for k, v in some.items()]
        text = [f"text.{k}={v}" for k, v in self.text.items()]
        return f"{self.size} T {self.frames}, {self.micro} of {self.clips} x {self.ranks}: {', '.join(parts + text)}"

    def request(self) -> ProbeRequest:
        model = ModelConfig.named(self.size).replaced(
            video={"num_frames": self.frames, **self.video}, text=self.text
        )
        return ProbeRequest(
            model=model,
            engine=EngineConfig.model_validate({"bucket_bytes": 4 * MIB, **self.engine}),
            world_size=self.ranks,
            clips_per_rank=self.clips,
            micro_batch_size=self.micro,
            text_length=TEXT_LENGTH,
            num_tags=NUM_TAGS,
            num_threads=2 // self.ranks,
        )


SETTINGS = (
    Setting("tiny", 4, 8, 24),
    Setting("tiny", 8, 8, 24, video=DENSE),
    Setting("tiny", 16, 4, 4, video=ALL, text=ALL),
    Setting("tiny", 4, 8, 24, 2, {"zero_stage": 1}),
    Setting("tiny", 8, 8, 24, 2, {"zero_stage": 2, **OFTEN}),
    Setting("tiny", 8, 8, 8, 2, {"zero_stage": 3}, video=DENSE),
    Setting("tiny", 4, 8, 24, 2, {"zero_stage": 2, "precision": "bf16"}),
    Setting("tiny", 16, 4, 12, 2, {"zero_stage": 2, **ON_HOST}),
    Setting("small", 4, 2, 6),
    Setting("small", 8, 2, 2, video=DENSE),
    Setting("small", 16, 1, 3, video=ALL, text=ALL),
    Setting("small", 8, 2, 6, video={"recompute": "all_but_attention"}),
    Setting("small", 4, 2, 4, 2, {"zero_stage": 0}),
    Setting("small", 4, 2, 4, 2, {"zero_stage": 1}),
    Setting("small", 4, 2, 4, 2, {"zero_stage": 2, **OFTEN}),
    Setting("small", 4, 2, 4, 2, {"zero_stage": 3}),
    Setting("small", 8, 2, 4, 2, {"zero_stage": 3, **OFTEN}, video=ALL),
    Setting("small", 4, 2, 4, 1, {"zero_stage": 2, **ON_HOST}),
    Setting("small", 4, 2, 4, 1, {"zero_stage": 2, **ON_HOST, **OFTEN}),
    Setting("small", 4, 2, 4, 2, {"zero_stage": 3, **ON_HOST, "offload_parameters": "cpu", **OFTEN}),
    Setting("small", 16, 1, 2, video={**DENSE, **ALL, "offload_activations": True}, text=ALL),
    Setting("small", 8, 6, 12, 1, {"zero_stage": 2, **ON_HOST, **OFTEN}, video=ALL, text=ALL),
    Setting("base", 4, 1, 2),
    Setting("base", 8, 1, 2, 1, {"zero_stage": 1}, video=ALL, text=ALL),
    Setting("base", 16, 1, 2, 1, {"zero_stage": 2, **ON_HOST}, video=ALL, text=ALL),
    Setting("base", 16, 1, 2, video={**DENSE, **ALL}, text=ALL),
    Setting("base", 4, 1, 2, 2, {"zero_stage": 3}, video=ALL),
    Setting(
        "base",
        16,
        1,
        2,
        1,
        {"zero_stage": 3, **ON_HOST, "offload_parameters": "cpu", **OFTEN},
        video={**ALL, "offload_activations": True},
        text={**ALL, "offload_activations": True},
    ),
)


def compare(setting: Setting) -> float:
    """Prints both figures; returns the relative error of the peak."""
    request = setting.request()
    began_s = time.monotonic()
    trace = trace_step(
        request.model,
        torch_dtype(request.engine),
        request.clips_per_rank,
        request.micro_batch_size,
        TEXT_LENGTH,
        NUM_TAGS,
        request.world_size,
    )
    predicted = predict(trace, engine_memory(request.model, request.engine, request.world_size))
    traced_s = time.monotonic() - began_s
    found = probe(request)
    error = predicted.total / found.peak_bytes - 1
    print(
        f"{setting}\n    predicted {predicted.total / MIB:.1f} MiB ({predicted.moment}), measured "
        f"{found.peak_bytes / MIB:.1f} (backward {found.backward_bytes / MIB:.1f}, update "
        f"{found.update_bytes / MIB:.1f}, between steps {found.resident_bytes / MIB:.1f}): {error:+.2%}; host "
        f"{predicted.host / MIB:.1f}, measured {found.host_bytes / MIB:.1f}; traced in {traced_s:.1f} s, "
        f"step {found.step_s:.1f} s",
        flush=True,
    )
    return error


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Predicted against measured device memory of training steps."
    )
    parser.add_argument("--only", nargs="+", default=[""], help="settings with one of these in their line")
    only = parser.parse_args().only
    errors = [abs(compare(setting)) for setting in SETTINGS if any(part in str(setting) for part in only)]
    print(f"{len(errors)} settings: median error {statistics.median(errors):.2%}, worst {max(errors):.2%}")
    return int(max(errors) > 0.08 or statistics.median(errors) > 0.03)


if __name__ == "__main__":
    sys.exit(main())
