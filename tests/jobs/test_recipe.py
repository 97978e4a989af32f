"""The recipe: shipped ones are valid, faults are named with their values, and it costs no heavy import."""

import subprocess
import sys
from pathlib import Path

import pytest

from infra.config_io import ConfigError, dump_yaml, load_config
from jobs.recipe import SHIPPED, Recipe, StageConfig, load_recipe, num_stage_steps, resolve_paths

SHIPPED_NAMES = sorted(
    entry.name.removesuffix(".yaml") for entry in SHIPPED.iterdir() if entry.name.endswith(".yaml")
)


def problem_of(*overrides: str) -> str:
    """The message about the demo recipe with these changes."""
    with pytest.raises(ConfigError) as caught:
        load_recipe("demo", overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_a_shipped_recipe_loads_and_has_stages(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.stages
    for stage in recipe.stages:
        assert recipe.stage_model(stage).video.num_frames == stage.num_frames


def test_a_resolved_recipe_written_and_read_again_is_the_same(tmp_path: Path) -> None:
    recipe = resolve_paths(load_recipe("demo"), tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    assert load_config(Recipe, tmp_path / "recipe.yaml") == recipe


def test_a_misspelt_key_is_named_with_its_value_and_the_nearest_valid_one() -> None:
    message = problem_of("stages.0.learnig_rate=3e-4")
    assert "stages.0.learnig_rate: unknown key (value found: 0.0003)" in message
    assert "did you mean 'learning_rate'?" in message


def test_a_misspelt_key_at_the_top_is_named() -> None:
    message = problem_of("prepair={num_frames: 8}")
    assert "prepair: unknown key (value found: {'num_frames': 8})" in message
    assert "did you mean 'prepare'?" in message


def test_every_fault_of_a_recipe_is_listed_at_once() -> None:
    message = problem_of("seed=-1", "log_every_steps=0", "loader.text_lenght=12")
    assert "3 problems" in message
    for key in ("seed", "log_every_steps", "loader.text_lenght"):
        assert f"- {key}: " in message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ("prepare.num_frames=8", "stages.1.name=longer", "stages.1.num_frames=16"),
            ("stage longer wants 16 frames", "prepare.num_frames stores 8"),
        ),
        (
            ("cluster.num_workers=2", "stages.0.name=first", "stages.0.global_batch_size=63"),
            (
                "stage first: global_batch_size 63",
                "does not divide by 2 workers",
                "1, 3, 7, 9, 21 or 63 would do",
            ),
        ),
        (
            ("loader.image_size=72", "model.video.image_size=96", "model.video.patch_size=24"),
            ("loader.image_size is 72", "model.video.image_size 96", "must be equal"),
        ),
        (
            # 4 frames (stage 1) of (96 / 24)^2 = 16 patches are 64 tokens
            (
                "loader.image_size=96",
                "model.video.image_size=96",
                "model.video.patch_size=24",
                "stages.0.name=first",
                "stages.0.num_frames=4",
                "stages.0.block_size=100",
            ),
            ("stage first: block_size 100 exceeds the 64 patches of 4 frames of 96 px",),
        ),
        (
            ("stages.0.num_steps=9", "stages.0.warmup_steps=10"),
            ("stages.0: warmup_steps 10 do not fit into num_steps 9",),
        ),
        (
            ("loader.text_length=40", "model.text.max_length=32"),
            ("loader.text_length is 40, model.text.max_length has positions for 32",),
        ),
        (
            ("cluster.num_cpus=3", "cluster.num_workers=2", "cluster.cpus_per_worker=2"),
            ("cluster.num_cpus is 3", "num_workers x cpus_per_worker is 4"),
        ),
        (
            ("stages.0.num_steps=9", "stages.0.num_epochs=2"),
            ("stages.0: set exactly one of num_steps and num_epochs",),
        ),
        (
            ("stages.0.num_steps=null",),
            ("stages.0: set exactly one of num_steps and num_epochs",),
        ),
        (
            ("stages.0.name=same", "stages.1.name=same"),
            ("stage names are ['same', 'same']; each must differ",),
        ),
        (
            ("stages.0.name=Four Frames",),
            ("stages.0.name: found 'Four Frames'",),
        ),
    ],
)
def test_a_contradiction_is_refused_with_the_values(
    overrides: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    message = problem_of(*overrides)
    for part in parts:
        assert part in message


def test_an_unknown_recipe_name_lists_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"shipped are: .*demo"):
        load_recipe("dmeo")


def test_paths_start_from_the_workspace_and_absolute_ones_stay(tmp_path: Path) -> None:
    recipe = load_recipe("demo", ("data.videos=/archive/videos", "data.egomcq=null"))
    resolved = resolve_paths(recipe, tmp_path)
    assert resolved.workspace == str(tmp_path)
    assert resolved.data.videos == "/archive/videos"
    assert resolved.data.egoclip == str(tmp_path / "annotations/egoclip.csv")
    assert resolved.data.shards == str(tmp_path / "shards")
    assert resolved.data.taxonomy == str(tmp_path / "world/taxonomy.json")
    assert resolved.data.egomcq is None
    assert resolved.data.vocabulary is None


def test_resolving_again_changes_nothing(tmp_path: Path) -> None:
    resolved = resolve_paths(load_recipe("demo"), tmp_path)
    assert resolve_paths(resolved, tmp_path) == resolved


def test_a_stage_changes_frames_and_sparsity_of_the_model_and_keeps_the_rest() -> None:
    recipe = load_recipe("demo", ("stages.1.num_random_blocks=2", "stages.1.block_size=32"))
    first, second = (recipe.stage_model(stage) for stage in recipe.stages)
    assert (first.video.num_frames, first.video.keep_rate) == (4, 0.7)
    assert (second.video.num_frames, second.video.keep_rate) == (8, 0.6)
    assert (second.video.num_random_blocks, second.video.block_size) == (2, 32)
    assert first.video.num_random_blocks == recipe.model.video.num_random_blocks
    assert first.video.block_size == recipe.model.video.block_size
    assert first.text == second.text == recipe.model.text


def test_steps_of_a_stage_follow_from_steps_or_from_epochs_of_whole_batches() -> None:
    stage = StageConfig(
        name="a", num_frames=1, keep_rate=1, global_batch_size=8, learning_rate=1, num_epochs=2.5
    )
    # 45 clips are 5 whole batches of 8; 2.5 epochs of 5 steps are 12.5, rounded half to even
    assert num_stage_steps(stage, 45) == 12
    assert num_stage_steps(stage.model_copy(update={"num_epochs": 0.01}), 45) == 1
    assert num_stage_steps(stage.model_copy(update={"num_epochs": None, "num_steps": 7}), 45) == 7


@pytest.mark.parametrize("module", ["jobs.recipe", "jobs.__main__"])
def test_reading_a_recipe_imports_no_heavy_framework(module: str) -> None:
    code = (
        f"import sys, {module}; from jobs.recipe import load_recipe; load_recipe('demo'); "
        "print(sorted({'torch', 'ray', 'mlflow', 'deepspeed', 'cv2', 'nvidia'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_paths_start_from_the_workspace_and_nothing_else_is_taken_for_a_path(tmp_path):
    recipe = resolve_paths(load_recipe("demo", ("data.egoclip_format=lavila", "data.egomcq=null")), tmp_path)
    assert recipe.data.videos == str(tmp_path / "world" / "videos")
    assert (recipe.data.egoclip_format, recipe.data.egomcq) == ("lavila", None)
