"""What lies where in a run directory. A run explains itself from here: recipe, ledger, journals, checkpoints."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from infra.config_io import ConfigError, load_config
from jobs.recipe import Recipe, StageConfig


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. Stages count from 1."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def stop_file(self) -> Path:
        """Exists while a stop is asked for."""
        return self.path / "stop-requested"

    @property
    def driver_lease(self) -> Path:
        """Held by the command that drives the run on a cluster of its own."""
        return self.path / "driver.lease"

    @property
    def controller_lease(self) -> Path:
        """Held by the controller job."""
        return self.path / "controller.lease"

    @property
    def run_id(self) -> str:
        """Names the run in job ids: the same folder always gives the same id."""
        return f"{self.path.name}-{hashlib.sha256(str(self.path).encode()).hexdigest()[:8]}"

    def stage_dir(self, number: int) -> Path:
        return self.path / f"stage-{number}"

    def checkpoints(self, number: int) -> Path:
        return self.stage_dir(number) / "checkpoints"

    def journal(self, number: int) -> Path:
        """Of a stage; number 0 is the journal of the whole run."""
        return (self.stage_dir(number) if number else self.path) / "journal.jsonl"

    def heartbeats(self, number: int) -> Path:
        """Folder of the last signs of life of a stage's ranks."""
        return self.stage_dir(number) / "heartbeat"

    def log_file(self, number: int, attempt: int, rank: int) -> Path:
        return self.stage_dir(number) / "logs" / f"attempt-{attempt}-rank-{rank}.log"

    def recipe(self) -> Recipe:
        """The resolved recipe the run was started with. Raises ConfigError when this is no run directory."""
        if not self.recipe_file.is_file():
            raise ConfigError(
                str(self.path),
                ["this is no run directory: recipe.yaml is missing. Start one with svitt submit"],
            )
        return load_config(Recipe, self.recipe_file)

    def stage(self, number: int) -> StageConfig:
        """A stage by its number. Raises ConfigError when the recipe has no such stage."""
        stages = self.recipe().stages
        if not 1 <= number <= len(stages):
            raise ConfigError(
                str(self.recipe_file), [f"there is no stage {number}; there are 1 to {len(stages)}"]
            )
        return stages[number - 1]
