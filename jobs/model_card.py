"""README.md of an exported model, filled from the run that trained it."""

from pathlib import Path
from statistics import median

from infra.config_io import config_hash, dump_yaml
from infra.journal import valid_records
from infra.ledger import Ledger, RunState
from jobs.recipe import Recipe
from jobs.run_dir import RunDir
from jobs.summary import INTER, INTRA, PROBE_ORDERED, PROBE_SHUFFLED, describe_stage, interval
from pipeline.manifest import Manifest

_SCORES = {
    "EgoMCQ inter": INTER,
    "EgoMCQ intra": INTRA,
    "temporal probe, frames in order": PROBE_ORDERED,
    "temporal probe, frames shuffled": PROBE_SHUFFLED,
}


def model_card(run: RunDir, number: int, step: int, manifest: Manifest, exporter: str | None) -> str:
    """Markdown with the front matter of model hubs. Says of every number that the run does not hold that it does not.

    `number` and `step` are the stage and step of the exported checkpoint, `manifest` that of the training clips,
    `exporter` the commit that exports.
    """
    recipe, state = run.recipe(), Ledger(run.ledger_file).read()
    stage = recipe.stages[number - 1]
    tags = _tags(run)
    dirty = " with uncommitted changes" if tags.get("is_dirty") == "True" else ""
    trained = f"{tags['commit']}{dirty}" if tags.get("commit") not in (None, "None") else "not recorded"
    sections = [
        _FRONT_MATTER,
        f"# {recipe.name}: SViTT-Ego, stage {number} ({stage.name}), step {step}",
        "A sparse video-text transformer for egocentric video ([SViTT-Ego](https://arxiv.org/abs/2406.09462)): clips "
        "and narrations become unit vectors of one space, whose dot product says what fits what.",
        _usage(recipe, number),
        "## Data",
        f"{manifest.num_clips} narrated clips for training, {manifest.num_rejected} of {manifest.num_planned} planned "
        f"ones rejected as unreadable; fingerprint `{manifest.fingerprint}`.",
        "## Stages",
        _stages(recipe, state, number),
        "## Scores",
        _scores(state, number),
        "## Cost",
        _cost(run, recipe, number),
        "## Where it comes from",
        f"* trained by commit {trained}, exported by commit {exporter or 'not recorded'}\n"
        f"* recipe `{config_hash(recipe)}`, below; `svitt prepare recipe.yaml`, then `svitt submit recipe.yaml`\n"
        f"* `svitt export {run.path.name} --stage {number} --output FOLDER` wrote this folder",
        "## Licence",
        "The code in this folder is Apache-2.0. What the weights may be used for also depends on the terms of the "
        "data they were trained on.",
        "## Recipe",
        f"```yaml\n{dump_yaml(_portable(recipe))}```",
    ]
    return "\n\n".join(section.rstrip("\n") for section in sections) + "\n"


_FRONT_MATTER = """---
license: apache-2.0
library_name: transformers
pipeline_tag: feature-extraction
tags: [video-text, egocentric, svitt-ego, custom_code]
---"""


def _usage(recipe: Recipe, number: int) -> str:
    video = recipe.stage_model(recipe.stages[number - 1]).video
    side = video.image_size
    return f"""## Use

```python
import torch
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("FOLDER", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
text = tokenizer(["picks up the cup"], return_tensors="pt", padding=True, truncation=True)
clips = torch.zeros(1, {video.num_frames}, 3, {side}, {side}, dtype=torch.uint8)
with torch.no_grad():
    video_features = model.encode_video(clips)
    text_features = model.encode_text(text["input_ids"], text["attention_mask"])
print(text_features @ video_features.T)
```

Needs torch, transformers and safetensors. A clip is {video.num_frames} RGB frames, taken at the middles of \
{video.num_frames} equal parts of it, shrunk to a short side of {recipe.prepare.short_side} and then squeezed whole to \
{side} x {side}, without a crop; `encode_video` takes uint8, or floating point scaled to [-1, 1]. The tokenizer cleans \
narrations as in training (`#C C picks up the cup.` is `picks up the cup`). Attention \
runs in plain torch, on CPU and GPU."""


def _stages(recipe: Recipe, state: RunState, number: int) -> str:
    lines = []
    for place, stage in enumerate(recipe.stages[:number], start=1):
        facts = state.stage(place).facts
        steps = f"{facts.get('step', '?')} of {facts.get('num_steps', '?')} steps"
        lines.append(f"{place}. **{stage.name}**, {steps}: {describe_stage(recipe, stage)}")
    return "\n".join(lines)


def _scores(state: RunState, number: int) -> str:
    scores = state.stage(number).facts.get("scores", {})
    rows = [
        f"| {label} | {interval(scores, name)} | {scores[f'{name}_n']:.0f} |"
        for label, name in _SCORES.items()
        if f"{name}_acc" in scores
    ]
    if not rows:
        return "This stage has not been scored."
    table = ["| questions | % right, 95 % interval | n |", "|---|---|--:|", *rows]
    return "\n".join([*table, "", "Five choices, chance is 20 %; a tie counts as wrong."])


def _cost(run: RunDir, recipe: Recipe, number: int) -> str:
    rows = ["| stage | clips/s | training time, min | peak memory of a rank, GiB |", "|---|--:|--:|--:|"]
    for place, stage in enumerate(recipe.stages[:number], start=1):
        records = valid_records(run.journal(place))
        intervals = [
            (r.step, r.values) for r in records if r.kind == "metrics" and "perf/clips_per_s" in r.values
        ]
        if not intervals:
            rows.append(f"| {stage.name} | not recorded | not recorded | not recorded |")
            continue
        starts = [0, *(step for step, _ in intervals)]
        time_s = sum(
            (step - start) * stage.global_batch_size / values["perf/clips_per_s"]
            for start, (step, values) in zip(starts, intervals, strict=False)
        )
        rate = median(values["perf/clips_per_s"] for _, values in intervals)
        peaks = [
            max(values.get("mem/peak_rss_gib", 0.0), values.get("mem/peak_device_gib", 0.0))
            for _, values in intervals
        ]
        rows.append(f"| {stage.name} | {rate:.1f} | {time_s / 60:.1f} | {max(peaks):.2f} |")
    world = f"{recipe.cluster.num_workers} ranks; median clips/s over all of them, without checkpoints and scoring."
    return "\n".join([*rows, "", world])


def _tags(run: RunDir) -> dict[str, str]:
    tags: dict[str, str] = {}
    for record in valid_records(run.journal(0)):
        if record.kind == "tags":
            tags |= record.values
    return tags


def _portable(recipe: Recipe) -> Recipe:
    """The recipe without the folders of the machine it ran on, where they lie in its workspace."""
    root = Path(recipe.workspace)
    paths = {
        name: str(Path(value).relative_to(root))
        for name, value in recipe.data.model_dump(exclude={"egoclip_format"}).items()
        if value is not None and Path(value).is_relative_to(root)
    }
    return recipe.model_copy(update={"workspace": ".", "data": recipe.data.model_copy(update=paths)})
