"""Settings of cluster, engine, checkpoints and tracking. Without torch, so reading stays cheap."""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from infra.memory_budget import parse_memory


class Settings(BaseModel):
    """A frozen part of the configuration tree; a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ClusterConfig(Settings):
    """Where jobs run and how much of it one training run takes."""

    address: str | None = Field(
        default=None,
        description="None starts a local Ray for this command; 'auto' or http://host:8265 uses another.",
    )
    num_cpus: int | None = Field(
        default=None, ge=1, description="CPUs offered by a local Ray; None = this machine's."
    )
    num_workers: int = Field(default=2, ge=1, description="Training processes (ranks).")
    cpus_per_worker: int = Field(default=1, ge=1, description="CPUs and compute threads of one rank.")
    use_gpu: bool = Field(default=False, description="One GPU and NCCL per rank instead of gloo on the CPU.")
    max_failures: int = Field(default=3, ge=0, description="Crashes of a stage; one more ends it.")
    max_crashes_at_one_step: int = Field(
        default=2,
        ge=0,
        description="Crashes in a row at the same step that end a stage: they would go on. 0 = no limit.",
    )
    max_preemptions: int = Field(
        default=1000, ge=0, description="Times that a stage's machines may be taken away; one more ends it."
    )
    collective_timeout_s: int = Field(
        default=600,
        ge=1,
        description="How long a rank waits for the others before that is an error; stacks are written at half of it.",
    )
    device_memory: str | None = Field(
        default=None,
        description="Most memory that a rank may take of its device, such as 8GiB; enforced. None = all there is.",
    )

    @field_validator("device_memory")
    @classmethod
    def _amount(cls, text: str | None) -> str | None:
        if text is not None:
            parse_memory(text)
        return text


class EngineConfig(Settings):
    """How a training step is computed. The learning rate belongs to the stage, batch sizes to the recipe."""

    backend: Literal["deepspeed", "plain"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = Field(default=2, description="What ZeRO shards over the ranks.")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="bf16 keeps fp32 master weights in the optimizer, unless bf16_states."
    )
    bf16_states: bool = Field(
        default=False,
        description="Master weights and both AdamW moments in bf16: half the optimizer's memory.",
    )
    optimizer: Literal["adamw", "fused_adamw", "adamw_8bit"] = Field(
        default="fused_adamw",
        description="adamw: torch, one parameter after another; fused_adamw: torch's fused kernel; adamw_8bit: "
        "moments in 8 bits by bitsandbytes, on a GPU. Where the optimizer is offloaded, DeepSpeedCPUAdam computes.",
    )
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(
        default=0.02, ge=0, description="Default for groups that set none of their own."
    )
    gradient_clipping: float = Field(
        default=0.0, ge=0, description="Largest global gradient norm; 0 = no clipping."
    )
    gradient_reduction: Literal["step", "backward"] = Field(
        default="step",
        description="When ranks average gradients: step = once, holding whole gradients until then; backward = "
        "at every backward call, so ZeRO 2 and 3 hold only their part (less memory, more traffic).",
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description="Where ZeRO keeps master weights and moments: GPU, host or NVMe (stage 3).",
    )
    offload_parameters: Literal["none", "cpu", "nvme"] = Field(
        default="none", description="Where ZeRO 3 keeps parameters that no layer is computing with."
    )
    nvme_path: str | None = Field(
        default=None, description="Writable folder on a fast local disk, for nvme offload."
    )
    bucket_bytes: int = Field(
        default=16 * 2**20, ge=2**16, description="Size of one reduction bucket; small keeps memory low."
    )

    @property
    def offloads(self) -> bool:
        return self.offload_optimizer != "none" or self.offload_parameters != "none"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, beta in zip(("betas[0]", "betas[1]"), self.betas, strict=True):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} is {beta}; it must lie in [0, 1)")
        for problem in (*self._offload_problems(), *self._precision_problems()):
            raise ValueError(problem)
        return self

    def _offload_problems(self) -> Iterator[str]:
        places = {"offload_optimizer": self.offload_optimizer, "offload_parameters": self.offload_parameters}
        for name, place in places.items():
            if place != "none" and self.backend == "plain":
                yield f"{name} needs backend: deepspeed (backend is plain)"
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            yield "offload_optimizer needs zero_stage 1, 2 or 3 (it is 0)"
        if self.offload_parameters != "none" and self.zero_stage != 3:
            yield f"offload_parameters needs zero_stage 3 (it is {self.zero_stage})"
        # DeepSpeed would keep the states in host memory without a word.
        if self.offload_optimizer == "nvme" and self.zero_stage != 3:
            yield f"offload_optimizer: nvme needs zero_stage 3 (it is {self.zero_stage}); cpu works with 1, 2 and 3"
        uses_nvme = [name for name, place in places.items() if place == "nvme"]
        if uses_nvme and self.nvme_path is None:
            yield f"{uses_nvme[0]}: nvme needs nvme_path, a writable folder on a local disk"
        if self.nvme_path is not None and not uses_nvme:
            yield "nvme_path is set but nothing is offloaded to nvme; set offload_optimizer: nvme or remove nvme_path"
        if self.offload_optimizer != "none" and self.optimizer == "adamw_8bit":
            yield "optimizer: adamw_8bit works on the GPU; with offload_optimizer set adamw"

    def _precision_problems(self) -> Iterator[str]:
        if not self.bf16_states:
            return
        if self.precision != "bf16":
            yield f"bf16_states needs precision: bf16 (it is {self.precision})"
        if self.backend == "plain":
            yield "bf16_states needs backend: deepspeed (backend is plain)"
        if self.zero_stage == 0:
            yield "bf16_states needs zero_stage 1, 2 or 3 (it is 0)"


class CheckpointConfig(Settings):
    """How often a stage saves and how many complete checkpoints it keeps."""

    every_steps: int = Field(default=100, ge=1)
    keep_last: int = Field(
        default=2, ge=1, description="Complete checkpoints kept; 2 survive damage to the newest."
    )
    keep_best: int = Field(
        default=0, ge=0, description="Besides those, scored checkpoints kept for their EgoMCQ intra."
    )
    mirror: str | None = Field(
        default=None, description="A folder or URL such as s3://bucket/runs that checkpoints are copied to."
    )


class TrackingConfig(Settings):
    """Which MLflow receives what the journal holds."""

    backend: Literal["mlflow", "none"] = "mlflow"
    uri: str | None = Field(default=None, description="None = an SQLite file in the workspace.")
    experiment: str = Field(default="svitt-ego", min_length=1)
    upload_weights: bool = Field(
        default=False,
        description="Also copies the weights of registered checkpoints into MLflow's artifact store.",
    )
