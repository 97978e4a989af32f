"""A run with prepared clips and a committed checkpoint of weights nobody trained."""

from pathlib import Path

import torch
from small_runs import small_run
from stored_clips import write_set

from infra.checkpoint import CheckpointStore
from infra.ledger import Ledger
from jobs.pretrain import StageContext, open_tokenizer
from jobs.ranks import SingleRank
from jobs.run_dir import RunDir
from model.video_text_model import VideoTextModel
from pipeline.manifest import read_manifest


def trained_run(folder: Path) -> tuple[RunDir, VideoTextModel]:
    """The run, with stage 1 (2 frames) at step 40, and the model whose weights its checkpoint holds."""
    run = small_run(folder, "loader.text_length=8")
    recipe = run.recipe()
    shards = Path(recipe.data.shards) / "train"
    shards.mkdir(parents=True)
    fingerprint = read_manifest(write_set(shards)).fingerprint
    context = StageContext(
        run, recipe, 1, torch.device("cpu"), SingleRank(), open_tokenizer(recipe), Ledger(run.ledger_file)
    )
    torch.manual_seed(5)
    model = VideoTextModel(context.model_config()).eval()
    store, ranks = CheckpointStore(run.checkpoints(1)), SingleRank()
    facts = {"data_fingerprint": fingerprint}
    store.save(40, lambda _: None, facts, model.state_dict(), any_rank=ranks.any)
    store.wait(ranks.any)
    return run, model
