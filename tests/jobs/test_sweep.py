"""Sparsity at test time: what is asked for, what is refused, and what stands in the file."""

import json
from pathlib import Path

import pytest
import torch
from stored_clips import write_set

from infra.config_io import ConfigError
from jobs.encoder import Encoder
from jobs.sweep import Sweep, parse_axes, run_sweep, sweep_points
from model.video_text_model import VideoTextModel
from pipeline.config import LoaderConfig
from pipeline.questions import McqQuestion, McqSet
from pipeline.store import ClipStore
from pipeline.text import CaptionTokenizer
from tests.model.tiny import tiny_config

# 3 frames of 4 x 4 patches, keep rate 0.65 after layers 1 and 2 of 4, 1 local and 2 random blocks of 4.
VIDEO = {"image_size": 16}


def test_settings_are_read_with_their_types_and_dense_is_no_number() -> None:
    axes = parse_axes(["keep_rate=0.5,1,0.5", "num_random_blocks=1, dense"])
    assert axes == {"keep_rate": (0.5, 1.0), "num_random_blocks": (1, None)}
    assert parse_axes([]) == {}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["keep_rate"], "expected SETTING=VALUE,VALUE"),
        (["width=8"], "with one of num_frames, keep_rate"),
        (["num_frames=two"], "'two' is not a whole number$"),
        (["num_frames=2.5"], "'2.5' is not a whole number$"),
        (["num_random_blocks=few"], "'few' is not a whole number or dense"),
        (["keep_rate=dense"], "'dense' is not a number$"),
        (["keep_rate=0.5,"], "'' is not a number"),
        (["keep_rate=0.5", "keep_rate=0.7"], "given twice"),
    ],
)
def test_what_is_no_sweep_is_refused(texts: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_axes(texts)


def test_every_combination_is_a_point_after_the_trained_one_which_comes_once() -> None:
    points = sweep_points(
        tiny_config(VIDEO),
        parse_axes(["keep_rate=0.5,0.65", "num_random_blocks=2,dense"]),
        num_stored_frames=8,
    )
    assert [point.settings for point in points] == [
        None,
        {"keep_rate": 0.5, "num_random_blocks": 2},
        {"keep_rate": 0.5, "num_random_blocks": None},
        {"keep_rate": 0.65, "num_random_blocks": None},
    ]
    assert points[1].model.video.keep_rate == 0.5
    assert points[1].model.text == points[0].model.text


def test_combinations_that_are_no_model_are_all_named_before_anything_is_scored() -> None:
    axes = parse_axes(["num_frames=2,9", "keep_rate=0.5,1.5"])
    with pytest.raises(ConfigError) as refused:
        sweep_points(tiny_config(VIDEO), axes, num_stored_frames=8)
    problems = "\n".join(refused.value.problems)
    assert "num_frames 2, keep_rate 1.5: Input should be less than or equal to 1" in problems
    assert "num_frames 9, keep_rate 0.5: the shards store 8 frames a clip" in problems
    assert "num_frames 2, keep_rate 0.5" not in problems


class FakeBudget:
    """Says what a device would, and when it was asked to begin anew."""

    def __init__(self) -> None:
        self.resets = 0

    def reset_peak(self) -> None:
        self.resets += 1

    def live_bytes(self) -> int:
        return 1000

    def peak_bytes(self) -> int:
        return 1000 + 2**20 * self.resets


def test_points_are_scored_priced_and_written_down(tmp_path: Path, report_lines) -> None:
    store = ClipStore(write_set(tmp_path / "shards"))
    tokenizer = CaptionTokenizer(tmp_path / "shards" / "vocab.txt", 8)
    config = tiny_config(VIDEO, text={"vocab_size": tokenizer.vocab_size})
    torch.manual_seed(0)
    model = VideoTextModel(config).eval()
    loader = LoaderConfig(image_size=16, num_threads=1, text_length=8)
    encoder = Encoder(model, tokenizer, loader, 4, torch.device("cpu"))
    ids = [store.clip_id(row) for row in range(10)]
    questions = tuple(
        McqQuestion(q, "inter", store.caption(5 * q), ids[5 * q], tuple(ids[5 * q : 5 * q + 5]), 0, True)
        for q in range(2)
    )
    budget = FakeBudget()
    sweep = Sweep(encoder, model.state_dict(), "interpolate", store, McqSet(questions, ()), 0.0, budget)  # type: ignore[arg-type]
    points = sweep_points(config, parse_axes(["num_frames=2,6", "keep_rate=1"]), store.num_frames)
    report, lines = report_lines
    path = tmp_path / "stage-1" / "sweep.json"
    trained, few, many = run_sweep(sweep, points, {"stage": 1}, path, report)

    # 48 patches, ceil(0.65 x 48) = 32, ceil(0.65 x 32) = 21; with keep rate 1 all of 2 x 16 and 6 x 16.
    assert [(r.tokens_in, r.tokens_out) for r in (trained, few, many)] == [(48, 21), (32, 32), (96, 96)]
    assert [r.gmacs_video for r in (trained, few, many)] == [
        point.model.video.macs() / 1e9 for point in points
    ]
    assert [r.peak_bytes for r in (trained, few, many)] == [2**20, 2 * 2**20, 3 * 2**20]
    assert [r.is_as_trained for r in (trained, few, many)] == [True, False, False]
    assert (many.settings["num_frames"], many.settings["keep_rate"], many.settings["block_size"]) == (6, 1, 4)
    assert {r.scores["eval/egomcq/inter_video_n"] for r in (trained, few, many)} == {2}
    assert not any("probe" in name for name in trained.scores)

    written = json.loads(path.read_text())
    assert (written["format"], written["stage"], written["batch_size"]) == (1, 1, 4)
    assert [point["gmacs_video"] for point in written["points"]] == [
        r.gmacs_video for r in (trained, few, many)
    ]
    assert written["points"][2]["scores"] == many.scores
    shown = [line.replace("│", " ").split() for line in lines()]
    assert [row[:6] for row in shown if row and row[0] == "trained"] == [
        ["trained", "3", "0.65", "48", "/", "21"]
    ]
    assert [row[6] for row in shown if row[:5] == ["6", "1", "96", "/", "96"]] == ["3"]
