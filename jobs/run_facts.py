"""What a run did, for people: gathered from its folder for `compare` and `report`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.journal import flatten, read_journal, valid_records
from infra.ledger import Ledger
from jobs.goodput import Goodput, goodput
from jobs.recipe import Recipe, StageConfig
from jobs.run_dir import RunDir
from jobs.status import StageStatus, run_status

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class StageFacts:
    """One stage. `curves` are (step, value) by metric name; `tokens` those of a clip before and after pruning; memory
    is the most that a rank took and was predicted to take, in GiB.
    """

    number: int
    config: StageConfig
    status: StageStatus
    tokens: tuple[int, int]
    curves: Mapping[str, Curve]
    scores: Mapping[str, float]
    peak_gib: float | None
    predicted_gib: float | None
    clips_per_s: float | None

    @property
    def title(self) -> str:
        return f"{self.number} {self.config.name}"


@dataclass(frozen=True)
class RunFacts:
    """One run. `tags` say whose data and which code: data_fingerprint, commit, is_dirty, versions."""

    name: str
    run: RunDir
    recipe: Recipe
    stages: tuple[StageFacts, ...]
    tags: Mapping[str, str]
    goodput: Goodput
    drift: Sequence[Mapping[str, Any]]

    @property
    def last(self) -> StageFacts:
        """The last stage that has a score; the first one when none has."""
        return next((stage for stage in reversed(self.stages) if stage.scores), self.stages[0])

    @property
    def device_hours(self) -> float:
        """Wall time of its ranks, down time left out."""
        driven_s = self.goodput.wall_s - self.goodput.down_s
        return driven_s * self.recipe.cluster.num_workers / 3600


def run_facts(run: RunDir) -> RunFacts:
    """Reads a run directory. Raises ConfigError when it is none."""
    recipe, state, status = run.recipe(), Ledger(run.ledger_file).read(), run_status(run)
    tags: dict[str, str] = {}
    for record in read_journal(run.journal(0))[0]:
        if record.kind == "tags":
            tags |= record.values
    stages = tuple(
        _stage_facts(run, recipe, number, status.stages[number - 1])
        for number in range(1, len(recipe.stages) + 1)
    )
    return RunFacts(
        run.path.name, run, recipe, stages, tags, goodput(run), tuple(state.facts.get("drift", ()))
    )


def flat_recipe(recipe: Recipe) -> dict[str, str]:
    """Dotted keys to texts; the folder of the run's workspace is no setting."""
    return flatten(recipe.model_dump(mode="json", exclude={"workspace"}))


def _stage_facts(run: RunDir, recipe: Recipe, number: int, status: StageStatus) -> StageFacts:
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in valid_records(run.journal(number)):
        if record.kind == "metrics":
            for name, value in record.values.items():
                curves.setdefault(name, []).append((record.step, value))
    stage = recipe.stages[number - 1]
    tokens = recipe.stage_model(stage).video.tokens_by_layer()
    rates = sorted(value for _, value in curves.get("perf/clips_per_s", ()))
    return StageFacts(
        number=number,
        config=stage,
        status=status,
        tokens=(tokens[0], tokens[-1]),
        curves=curves,
        scores=status.scores,
        peak_gib=_largest(curves, "mem/peak_device_gib"),
        predicted_gib=_largest(curves, "mem/predicted_device_gib"),
        clips_per_s=rates[len(rates) // 2] if rates else None,
    )


def _largest(curves: Mapping[str, Curve], name: str) -> float | None:
    return max((value for _, value in curves.get(name, ())), default=None)
