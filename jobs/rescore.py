"""The `evaluate` verb: scores a stage's newest checkpoint again, in this process, without a cluster."""

import json
from pathlib import Path

import torch

from infra.checkpoint import CheckpointStore
from infra.config_io import ConfigError
from infra.ledger import Ledger
from jobs.pretrain import StageContext, evaluate_weights, open_tokenizer
from jobs.progress import ProgressReport
from jobs.ranks import SingleRank
from jobs.run_dir import RunDir
from jobs.summary import describe_scores


def rescore(run: RunDir, stage: int | None, report: ProgressReport) -> int:
    """Prints the scores of stage `stage` (default: the newest with a checkpoint), in words and as one JSON line.

    Raises ConfigError when there is no such stage, no checkpoint to score, or the recipe names no EgoMCQ file.
    """
    recipe = run.recipe()
    if stage is not None:
        run.stage(stage)
    numbers = [stage] if stage is not None else list(range(len(recipe.stages), 0, -1))
    found = {number: CheckpointStore(run.checkpoints(number), rank=1).newest_good() for number in numbers}
    number, checkpoint = next(((n, c) for n, c in found.items() if c is not None), (0, None))
    if checkpoint is None:
        raise ConfigError(
            str(run.path), [f"no checkpoint of stage {stage or 'any'} yet; train it first: svitt resume"]
        )
    if recipe.data.egomcq is None:
        raise ConfigError(str(run.recipe_file), ["data.egomcq is null: there are no questions to score"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = StageContext(
        run, recipe, number, device, SingleRank(), open_tokenizer(recipe), Ledger(run.ledger_file)
    )
    metrics = evaluate_weights(context, checkpoint).metrics()
    name = Path(checkpoint.path).name
    report.say(f"stage {number} ({recipe.stages[number - 1].name}), {name}: {describe_scores(metrics)}")
    report.say(json.dumps({"stage": number, "checkpoint": str(checkpoint.path), **metrics}))
    return 0
