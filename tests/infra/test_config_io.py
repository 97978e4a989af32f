"""Strict YAML, overrides and the wording of configuration errors."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from infra.config import ClusterConfig, EngineConfig
from infra.config_io import (
    ConfigError,
    apply_overrides,
    config_hash,
    dump_yaml,
    load_config,
    parse_mapping,
    read_yaml,
    validate,
)


class Stage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    learning_rate: float = Field(default=1e-4, gt=0)
    keep_rate: float = Field(default=1.0, gt=0, le=1)


class Recipe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    seed: int = 0
    engine: EngineConfig = EngineConfig()
    stages: tuple[Stage, ...] = ()
    note: str | None = None


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_numbers_and_words_follow_yaml_1_2() -> None:
    tree = parse_mapping("a: 3e-5\nb: on\nc: 1:30\nd: 010\ne: 'x'\n", "text")
    assert tree == {"a": 3e-5, "b": "on", "c": "1:30", "d": 10, "e": "x"}


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, "# only a comment\n")) == {}


def test_a_key_written_twice_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 3, column 1: key 'seed' stands twice"):
        read_yaml(write(tmp_path, "seed: 1\nnote: a\nseed: 2\n"))


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml: 1 problem\n.*line 3, column 1"):
        read_yaml(write(tmp_path, "seed: 1\nnote: [a\n"))


def test_a_list_at_the_top_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the top level is a list"):
        read_yaml(write(tmp_path, "- 1\n"))


def test_python_tags_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="python/object"):
        read_yaml(write(tmp_path, "seed: !!python/object/apply:os.getcwd []\n"))


def test_a_missing_file_suggests_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\n")
    with pytest.raises(ConfigError, match=r"did you mean '.*recipe\.yaml'"):
        read_yaml(tmp_path / "recipes.yaml")


def test_every_problem_is_listed_with_key_value_rule_and_nearest_key(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "seeds: 3\nengine: {zero_stage: 7, backend: deepsped}\nstages:\n"
        "  - {name: a, learning_rat: 1e-3}\n  - {keep_rate: 1.5}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, path)
    assert caught.value.problems == [
        "engine.backend: found 'deepsped'; input should be 'deepspeed' or 'plain'; did you mean 'deepspeed'?",
        "engine.zero_stage: found 7; input should be 0, 1, 2 or 3",
        "stages.0.learning_rat: unknown key (value found: 0.001); did you mean 'learning_rate'?",
        "stages.1.name: missing; it has no default and must be set",
        "stages.1.keep_rate: found 1.5; input should be less than or equal to 1",
        "seeds: unknown key (value found: 3); did you mean 'seed'?",
    ]


def test_a_key_like_nothing_lists_the_valid_keys() -> None:
    with pytest.raises(ConfigError, match="valid keys: engine, note, seed, stages"):
        validate(Recipe, {"zzz": 1}, "text")


def test_values_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match="engine: offload_optimizer needs zero_stage 1, 2 or 3"):
        validate(Recipe, {"engine": {"zero_stage": 0, "offload_optimizer": "cpu"}}, "text")


def test_overrides_reach_into_lists_and_leave_the_original_alone() -> None:
    tree = {"stages": [{"name": "a"}], "seed": 0}
    changed = apply_overrides(
        tree,
        ["stages.0.learning_rate=1e-3", "seed=7", "note=on", "engine.betas=[0.9, 0.98]", "stages.1.name=b"],
    )
    assert changed["stages"] == [{"name": "a", "learning_rate": 1e-3}, {"name": "b"}]
    assert (changed["seed"], changed["note"], changed["engine"]) == (7, "on", {"betas": [0.9, 0.98]})
    assert tree == {"stages": [{"name": "a"}], "seed": 0}


def test_every_bad_override_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"stages": [1], "seed": 0}, ["seed", "stages.5=1", "seed.x=1", "note=[1"])
    assert [problem.split(":")[0].split(" is")[0] for problem in caught.value.problems] == [
        "'seed'",
        "'stages.5=1'",
        "'seed.x=1'",
        "'note=[1'",
    ]


def test_the_dump_reads_back_to_an_equal_tree_and_hash(tmp_path: Path) -> None:
    recipe = validate(Recipe, {"note": "on", "stages": [{"name": "1e3", "learning_rate": 3e-5}]}, "text")
    again = load_config(Recipe, write(tmp_path, dump_yaml(recipe)))
    assert again == recipe
    assert config_hash(again) == config_hash(recipe)
    assert config_hash(again) != config_hash(recipe.model_copy(update={"seed": 1}))
    assert dump_yaml(recipe).startswith("seed: 0\nengine:\n")


def test_the_hash_is_that_of_canonical_json() -> None:
    # sha256 of {"a":1,"b":[2]}
    assert config_hash({"b": [2], "a": 1}) == config_hash({"a": 1, "b": [2]})
    assert config_hash({"b": [2], "a": 1}).startswith("0855bfc20eb6")


def test_cluster_settings_refuse_zero_workers() -> None:
    with pytest.raises(ConfigError, match="num_workers: found 0"):
        validate(ClusterConfig, {"num_workers": 0}, "text")


def test_reading_a_recipe_imports_no_heavy_library() -> None:
    code = (
        "import sys, infra.config, infra.config_io; "
        "bad = {'torch', 'ray', 'mlflow', 'numpy'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
