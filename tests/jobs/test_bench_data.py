"""The arithmetic of `svitt bench data`, and one whole tiny run. No figure of speed is tested."""

import json

import pytest
from video_files import write_video

from jobs.bench_data import DataPlan, bench_data, detail_lines
from jobs.bench_preparing import covered_s
from jobs.bench_record import BenchError, Ratio, Spread
from jobs.prepare import run_prepare
from jobs.prepare_work import serial_mapper
from jobs.recipe import load_recipe
from pipeline.clip import make_record
from pipeline.config import VideoLayout
from pipeline.egoclip import EgoClipRow, write_egoclip

PLAN = DataPlan(
    2, 32, batch_size=2, batches=1, loading_rounds=1, shards=1, clips_per_shard=2, preparing_rounds=1
)


def test_seconds_inside_several_clips_count_once():
    spans = [("a", 0.0, 2.0), ("a", 1.0, 3.0), ("a", 1.5, 2.5), ("a", 5.0, 6.0), ("b", 0.5, 1.0)]
    assert covered_s([make_record(uid, s, e, s, "x", (), ()) for uid, s, e in spans]) == 4.5


def test_a_ratio_is_that_of_the_medians_and_of_every_round():
    assert Ratio.of([8.0, 9.0, 4.0], [2.0, 3.0, 4.0]) == Ratio(8 / 3, Spread(3, 3.0, 1.0, 4.0))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_video(folder / "videos" / "of-a" / "a.mp4", num_frames=180)
    rows = [
        EgoClipRow(k, "a", 6.0, "narration_pass_1", k, k + 0.5, float(k), k + 1.0, "#C C waits", (0,), (0,))
        for k in range(5)
    ]
    write_egoclip(folder / "egoclip.csv", rows)
    file = folder / "bench.yaml"
    file.write_text(
        "name: bench\ndata:\n"
        f"  egoclip: {folder}/egoclip.csv\n  egomcq: null\n  videos: {folder}/videos\n  shards: {folder}/shards\n"
        "prepare:\n  num_frames: 4\n  short_side: 32\n  clips_per_shard: 3\n  layout: {pattern: 'of-{uid}/{uid}.mp4'}\n"
        "loader:\n  image_size: 32\nmodel:\n  video: {image_size: 32, patch_size: 16, num_random_blocks: null}\n"
    )
    return load_recipe(str(file))


@pytest.fixture
def prepared(recipe, report_lines):
    report, _ = report_lines
    data = recipe.data
    run_prepare(data.egoclip, None, data.videos, None, data.shards, recipe.prepare, serial_mapper, report)
    return recipe


def test_a_whole_run_prints_both_parts_and_records_them(prepared, report_lines, tmp_path):
    report, lines = report_lines
    assert bench_data(prepared, PLAN, 1, tmp_path / "record.json", report) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["data"]["layout"] == VideoLayout(pattern="of-{uid}/{uid}.mp4").model_dump()
    assert record["data"]["num_clips"] == 5
    assert record["loading"]["speedup"]["rounds"]["n"] == 1
    assert [row["name"] for row in record["preparing"]["rows"]] == ["build_shard", "decoding alone"]
    assert record["preparing"]["num_clips"] == 2
    text = "\n".join(lines())
    assert "times the clips/s of a DataLoader on the videos" in text
    assert "of the rate of decoding alone" in text


def test_settings_that_cannot_be_measured_are_refused(prepared, report_lines, tmp_path):
    with pytest.raises(BenchError, match=r"threads.*1 or more"):
        bench_data(prepared, PLAN, 0, tmp_path / "record.json", report_lines[0])


def test_frames_stored_smaller_than_the_videos_are_said():
    data = {
        "num_clips": 5,
        "clip_s": {"median": 1.0},
        "codecs": ["h264"],
        "video_short_side": {"least": 180.0, "most": 240.0},
        "video_fps": {"median": 30.0},
        "stored_frames_per_clip": 8,
        "stored_short_side": 64,
    }
    assert "not compared on equal pictures" in detail_lines(data)[1]
    assert len(detail_lines({**data, "stored_short_side": 180})) == 1
