"""The recipe: one frozen tree that says everything about a run, and the numbers that follow from it.

A recipe file lists deviations from the defaults only. Paths may be relative to the workspace. Torch-free.
"""

from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from infra.config import CheckpointConfig, ClusterConfig, EngineConfig, Settings, TrackingConfig
from infra.config_io import ConfigError, apply_overrides, load_config, read_yaml
from model.config import ModelConfig
from pipeline.config import ClipRuleConfig, LoaderConfig, PrepareConfig, WorldConfig
from pipeline.storage import is_url


class DataConfig(Settings):
    """Where the data is. What `synth` and `clips` write is what `prepare` reads, so the defaults fit together."""

    videos: str = Field(default="world/videos", description="Folder of video files in `prepare.layout`.")
    egoclip: str = Field(
        default="annotations/egoclip.csv",
        description="Narrated clips in `egoclip_format`; EgoClip: TSV, 11 columns.",
    )
    egoclip_format: Literal["egoclip", "epic_kitchens", "lavila"] = Field(
        default="egoclip",
        description="epic_kitchens: EPIC-KITCHENS-100 CSV; lavila: LaViLa's pickles, which have no tags for EgoNCE.",
    )
    egomcq: str | None = Field(
        default="annotations/egomcq.json", description="EgoMCQ JSON; null = no scores."
    )
    taxonomy: str | None = Field(
        default=None, description="Verb and noun classes as JSON; adds names and the temporal probe."
    )
    vocabulary: str | None = Field(
        default=None, description="A BERT vocab.txt; null = the one prepare makes from the captions."
    )
    shards: str = Field(default="shards", description="Where shards go: <shards>/train and <shards>/egomcq.")


class StageConfig(Settings):
    """One stage of the curriculum: how long clips are, how sparse the model is, how it is trained."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    num_frames: int = Field(ge=1)
    keep_rate: float = Field(gt=0, le=1, description="q_v: share of patches kept at each pruning layer.")
    num_local_blocks: int | None = Field(default=None, description="K_l; null = the model's.")
    num_random_blocks: int | None = Field(default=None, description="K_r; null = the model's.")
    block_size: int | None = Field(default=None, description="G; null = the model's.")
    num_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps; either this or num_epochs."
    )
    num_epochs: float | None = Field(default=None, gt=0)
    global_batch_size: int = Field(ge=2, description="Anchor clips per optimizer step over all ranks.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Clips that a rank encodes at once, companions counted; null = all it has of a step. It decides "
        "memory and speed, never the losses.",
    )
    scene_companions: bool = Field(
        default=False, description="Adds one clip of the same video and minute per anchor (EgoNCE)."
    )
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    floor: float = Field(default=0.01, ge=0, le=1, description="Lowest share of the learning rate.")

    def clips_per_rank(self, num_workers: int) -> int:
        """Clips of one step on one rank, companions counted."""
        return self.global_batch_size // num_workers * (2 if self.scene_companions else 1)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("set exactly one of num_steps and num_epochs")
        if self.num_steps is not None and self.warmup_steps > self.num_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} do not fit into num_steps {self.num_steps}")
        return self


class EvaluationConfig(Settings):
    """How checkpoints are scored."""

    batch_size: int = Field(default=32, ge=1, description="Clips per forward pass on one rank.")
    max_unreadable_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="Share of questions without readable clips above which it fails.",
    )
    every_steps: int | None = Field(
        default=None,
        ge=1,
        description="Scores checkpoints on the way too, those whose step divides by it; null = only the last.",
    )


class GuardConfig(Settings):
    """What is done about losses that are not finite, and about those that stand out."""

    max_nonfinite_in_a_row: int = Field(
        default=3, ge=1, description="Steps without a finite loss, in a row, at which the stage rolls back."
    )
    max_rollbacks: int = Field(default=2, ge=0, description="Rollbacks of a stage; one more ends it.")
    spike_sigma: float = Field(
        default=6.0,
        gt=0,
        description="Standard deviations above the usual at which a loss is told as a spike.",
    )
    spike_window: int = Field(default=128, ge=2, description="Steps that make the usual.")


class Recipe(Settings):
    """The whole tree."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    seed: int = Field(default=0, ge=0)
    workspace: str = Field(default=".", description="Folder that relative paths start from.")
    world: WorldConfig = Field(default_factory=WorldConfig)
    clips: ClipRuleConfig = Field(default_factory=ClipRuleConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    loader: LoaderConfig = Field(default_factory=LoaderConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    stages: tuple[StageConfig, ...] = ()
    engine: EngineConfig = Field(default_factory=EngineConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    inflation: Literal["nearest", "interpolate"] = Field(
        default="interpolate", description="How position tables grow with the frames; nearest is SViTT's."
    )
    log_every_steps: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stage names are {names}; each must differ")
        if self.loader.image_size != self.model.video.image_size:
            raise ValueError(
                f"loader.image_size is {self.loader.image_size} and model.video.image_size "
                f"{self.model.video.image_size}; they must be equal"
            )
        if self.loader.text_length > self.model.text.max_length:
            raise ValueError(
                f"loader.text_length is {self.loader.text_length}, model.text.max_length has positions for "
                f"{self.model.text.max_length} tokens: raise it or shorten the captions"
            )
        self._check_cluster()
        for stage in self.stages:
            self._check_stage(stage)
        return self

    def _check_cluster(self) -> None:
        needed = self.cluster.num_workers * self.cluster.cpus_per_worker
        if self.cluster.num_cpus is not None and self.cluster.num_cpus < needed:
            raise ValueError(
                f"cluster.num_cpus is {self.cluster.num_cpus}, num_workers x cpus_per_worker is {needed}: "
                "the workers of a stage would wait for ever"
            )

    def _check_stage(self, stage: StageConfig) -> None:
        if stage.num_frames > self.prepare.num_frames:
            raise ValueError(
                f"stage {stage.name} wants {stage.num_frames} frames, prepare.num_frames stores "
                f"{self.prepare.num_frames}: raise it and run prepare again"
            )
        if stage.global_batch_size % self.cluster.num_workers:
            size = stage.global_batch_size
            numbers = [str(number) for number in range(1, size + 1) if size % number == 0]
            raise ValueError(
                f"stage {stage.name}: global_batch_size {size} does not divide by {self.cluster.num_workers} workers "
                f"(cluster.num_workers); {', '.join(numbers[:-1])} or {numbers[-1]} would do"
            )
        clips_per_rank = stage.clips_per_rank(self.cluster.num_workers)
        if stage.micro_batch_size is not None and stage.micro_batch_size > clips_per_rank:
            raise ValueError(
                f"stage {stage.name}: micro_batch_size {stage.micro_batch_size} exceeds the {clips_per_rank} clips "
                f"that each of {self.cluster.num_workers} ranks has of a step; lower it, or leave it out"
            )
        try:
            self.stage_model(stage)
        except ValidationError as error:
            faults = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
            raise ValueError(f"stage {stage.name}: {faults}") from None

    def stage_model(self, stage: StageConfig) -> ModelConfig:
        """The model of one stage: the recipe's, with the stage's frames and sparsity."""
        fields = ("num_frames", "keep_rate", "num_local_blocks", "num_random_blocks", "block_size")
        changes = {name: getattr(stage, name) for name in fields if getattr(stage, name) is not None}
        return self.model.replaced(video=changes)


SHIPPED = resources.files("jobs") / "recipes"


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> Recipe:
    """Reads a recipe file, or a shipped recipe by name. Raises ConfigError naming every fault."""
    return load_config(Recipe, _recipe_file(name_or_path), overrides)


def load_recipe_tree(name_or_path: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """The same as it is written, deviations from the defaults only, with overrides applied."""
    return apply_overrides(read_yaml(_recipe_file(name_or_path)), overrides)


def _recipe_file(name_or_path: str) -> Path:
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        return path
    shipped = Path(str(SHIPPED / f"{name_or_path}.yaml"))
    if not shipped.is_file():
        names = sorted(entry.name.removesuffix(".yaml") for entry in SHIPPED.iterdir())
        raise ConfigError(
            name_or_path, [f"neither a .yaml file nor a shipped recipe; shipped are: {', '.join(names)}"]
        )
    return shipped


def resolve_paths(recipe: Recipe, workspace: Path) -> Recipe:
    """The recipe with absolute paths, starting from `workspace`; URLs stay as they are."""
    root = workspace.resolve()
    data = recipe.data.model_dump(exclude={"egoclip_format"})
    paths = {
        name: value if is_url(value) else str(root / value)
        for name, value in data.items()
        if value is not None
    }
    return recipe.model_copy(update={"workspace": str(root), "data": recipe.data.model_copy(update=paths)})


def num_stage_steps(stage: StageConfig, num_clips: int) -> int:
    """Optimizer steps of a stage over `num_clips` training clips."""
    if stage.num_steps is not None:
        return stage.num_steps
    assert stage.num_epochs is not None, "validated: one of the two is set"
    return max(1, round(stage.num_epochs * (num_clips // stage.global_batch_size)))
