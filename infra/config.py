"""Settings of cluster, engine, checkpoints and tracking. Imports pydantic only, so reading stays cheap."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    max_failures: int = Field(default=3, ge=0, description="Worker crashes after which a stage gives up.")


class EngineConfig(Settings):
    """How a training step is computed. The learning rate belongs to the stage, batch sizes to the recipe."""

    backend: Literal["deepspeed", "plain"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = Field(default=2, description="What ZeRO shards over the ranks.")
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="bf16 keeps fp32 master weights in the optimizer."
    )
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(
        default=0.02, ge=0, description="Default for groups that set none of their own."
    )
    gradient_clipping: float = Field(
        default=0.0, ge=0, description="Largest global gradient norm; 0 = no clipping."
    )
    offload_optimizer: bool = Field(
        default=False, description="Optimizer state in host memory; needs a GPU and a C++ compiler."
    )
    bucket_bytes: int = Field(
        default=16 * 2**20, ge=2**16, description="Size of one reduction bucket; small keeps memory low."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, beta in zip(("betas[0]", "betas[1]"), self.betas, strict=True):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} is {beta}; it must lie in [0, 1)")
        if self.backend == "plain" and self.offload_optimizer:
            raise ValueError("offload_optimizer needs backend: deepspeed (backend is plain)")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3 (it is 0)")
        return self


class CheckpointConfig(Settings):
    """How often a stage saves and how many complete checkpoints it keeps."""

    every_steps: int = Field(default=100, ge=1)
    keep_last: int = Field(
        default=2, ge=1, description="Complete checkpoints kept; 2 survive damage to the newest."
    )


class TrackingConfig(Settings):
    """Which MLflow receives what the journal holds."""

    backend: Literal["mlflow", "none"] = "mlflow"
    uri: str | None = Field(default=None, description="None = an SQLite file in the workspace.")
    experiment: str = Field(default="svitt-ego", min_length=1)
