"""A run in words and as a table, from its ledger and journals."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from infra.journal import valid_records
from infra.ledger import Ledger, RunState, StageState
from jobs.recipe import Recipe, StageConfig, num_stage_steps
from jobs.run_dir import RunDir
from pipeline.errors import ShardError
from pipeline.manifest import read_manifest
from pipeline.storage import storage_path

INTER, INTRA = "eval/egomcq/inter_video", "eval/egomcq/intra_video"
PROBE_ORDERED, PROBE_SHUFFLED = "eval/temporal_probe/ordered", "eval/temporal_probe/shuffled"

# Facts of a stage in the ledger: of steps without an update, and of scored checkpoints before the last.
DAMAGED_STEPS = "damaged_steps"
NON_FINITE_STEPS = "non_finite_steps"
SKIPPED_WINDOWS = "skipped_windows"
SCORED_CHECKPOINTS = "scored_checkpoints"


def describe_stage(recipe: Recipe, stage: StageConfig) -> str:
    """Frames, sparsity and batch of a stage in one line."""
    video = recipe.stage_model(stage).video
    tokens = video.tokens_by_layer()
    edges = (
        "dense attention"
        if video.is_dense
        else f"blocks of {video.block_size} see {video.num_local_blocks} local + {video.num_random_blocks} random"
    )
    companions = " with a companion of the same scene each" if stage.scene_companions else ""
    return (
        f"{stage.num_frames} frames, keep rate {stage.keep_rate}: {tokens[0]} tokens a clip in, {tokens[-1]} out; "
        f"{edges}; {stage.global_batch_size} clips a step{companions}"
    )


def damaged_steps(state: StageState) -> Mapping[str, Sequence[str]]:
    """Steps of a stage that were left out for a damaged clip -> what was found, as the ledger has it."""
    return state.facts.get(DAMAGED_STEPS, {})


def describe_scores(scores: Mapping[str, float]) -> str:
    """EgoMCQ and the probe in one line."""
    parts = []
    for label, name in (("EgoMCQ inter", INTER), ("intra", INTRA)):
        if f"{name}_acc" in scores:
            parts.append(f"{label} {interval(scores, name)} (n {scores[f'{name}_n']:.0f})")
    if f"{PROBE_ORDERED}_acc" in scores:
        parts.append(
            f"temporal probe {scores[f'{PROBE_ORDERED}_acc']:.1f} in order, "
            f"{scores[f'{PROBE_SHUFFLED}_acc']:.1f} shuffled (n {scores[f'{PROBE_ORDERED}_n']:.0f})"
        )
    if scores.get("eval/egomcq/num_unreadable"):
        parts.append(f"{scores['eval/egomcq/num_unreadable']:.0f} unreadable questions not scored")
    return "; ".join(parts) or "Not scored: the recipe has no questions (data.egomcq)"


def interval(scores: Mapping[str, float], name: str) -> str:
    """`71.2 [66.4, 75.6]`: percent and its 95 % interval."""
    return f"{scores[f'{name}_acc']:.1f} [{scores[f'{name}_low']:.1f}, {scores[f'{name}_high']:.1f}]"


def stage_table(run: RunDir) -> Table:
    """What a person wants to know of each stage, one column a stage."""
    recipe, state = run.recipe(), Ledger(run.ledger_file).read()
    table = Table(title=f"{recipe.name} ({run.path})", title_justify="left")
    table.add_column("")
    rows: dict[str, list[str]] = {}
    for number, stage in enumerate(recipe.stages, start=1):
        table.add_column(f"{number} {stage.name}", justify="right")
        for label, value in _stage_cells(run, recipe, stage, number).items():
            rows.setdefault(label, []).append(value)
    for label, values in rows.items():
        table.add_row(label, *values)
    if (attempts := sum(stage.attempts for stage in state.stages.values())) > len(state.stages):
        table.caption = f"{attempts} stage jobs in all: some stages were interrupted and continued"
    return table


def planned_steps(recipe: Recipe, stage: StageConfig, facts: Mapping[str, Any]) -> int | None:
    """Steps of a stage: as its ledger facts say, else as the prepared clips make them; None before there are any."""
    if "num_steps" in facts or stage.num_steps is not None:
        return facts.get("num_steps", stage.num_steps)
    try:
        manifest = read_manifest(storage_path(recipe.data.shards) / "train")
    except ShardError:
        return None
    return num_stage_steps(stage, manifest.num_clips)


def _stage_cells(run: RunDir, recipe: Recipe, stage: StageConfig, number: int) -> dict[str, str]:
    state = Ledger(run.ledger_file).read().stage(number)
    tokens = recipe.stage_model(stage).video.tokens_by_layer()
    scores = state.facts.get("scores", {})
    last, peak_gib, rates = _journal_facts(run, number)
    done, total = state.facts.get("step", 0), planned_steps(recipe, stage, state.facts)
    return {
        "status": state.status,
        "frames": str(stage.num_frames),
        "keep rate": str(stage.keep_rate),
        "tokens a clip before / after": f"{tokens[0]} / {tokens[-1]}",
        "steps": f"{done} / {total if total is not None else '?'}",
        "loss": f"{last['train/loss']:.3f}" if last else "-",
        "EgoMCQ inter %": _score(scores, INTER),
        "EgoMCQ intra %": _score(scores, INTRA),
        "temporal probe % in order": _score(scores, PROBE_ORDERED),
        "temporal probe % shuffled": _score(scores, PROBE_SHUFFLED),
        "clips/s": f"{rates:.0f}" if rates else "-",
        "peak memory a rank": f"{peak_gib:.2f} GiB" if peak_gib else "-",
        "attempts": str(state.attempts),
        **({"steps left out": str(len(damaged))} if (damaged := damaged_steps(state)) else {}),
    }


def _score(scores: Mapping[str, float], name: str) -> str:
    """A kind that has no questions (inter needs five held-out videos) is absent from the scores."""
    return f"{interval(scores, name)}  n {scores[f'{name}_n']:.0f}" if f"{name}_acc" in scores else "-"


def _journal_facts(run: RunDir, number: int) -> tuple[Mapping[str, float], float, float]:
    """Newest training metrics, largest memory of a rank in GiB, median clips/s."""
    intervals = [
        r.values
        for r in valid_records(run.journal(number))
        if r.kind == "metrics" and "train/loss" in r.values
    ]
    if not intervals:
        return {}, 0.0, 0.0
    peaks = [max(v["mem/peak_rss_gib"], v.get("mem/peak_device_gib", 0.0)) for v in intervals]
    rates = sorted(v["perf/clips_per_s"] for v in intervals)
    return intervals[-1], max(peaks), rates[len(rates) // 2]


def unsent_name(number: int) -> str:
    """Under which name the ledger keeps how many journal lines MLflow did not get by the end of a run."""
    return f"unsent_{number}"


def num_unsent(state: RunState) -> int:
    """Lines of all journals that the last controller could not send."""
    return sum(state.facts.get(unsent_name(number), 0) for number in (0, *state.stages))
