import json

from jobs.clips import run_clips
from jobs.contact_sheet import sample_records, write_contact_sheet
from jobs.synth import run_synth
from pipeline.config import ClipRuleConfig, WorldConfig
from pipeline.egoclip import read_egoclip
from pipeline.egomcq import read_egomcq

CONFIG = WorldConfig(seed=1, num_train_videos=2, num_heldout_videos=5, video_s=(12.0, 14.0))


def states(folder):
    return {
        path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*") if path.is_file()
    }


def test_a_world_becomes_clips_and_questions_and_a_second_run_touches_nothing(tmp_path):
    said, done = [], []
    summary = run_synth(tmp_path / "world", CONFIG, 2, said.append, lambda *counts: done.append(counts))
    assert summary.num_written == 7
    assert done[-1] == (7, 7)
    assert "7 drawn, 0 already there" in said[-1]
    clips = run_clips(tmp_path / "world", tmp_path / "annotations", ClipRuleConfig(), progress=said.append)
    splits = json.loads((tmp_path / "world" / "splits.json").read_text())

    records, report = read_egoclip(clips.egoclip)
    assert report.kept == report.rows == clips.num_clips
    assert {record.video_uid for record in records} == set(splits["train"])
    assert all(len(record.verbs) == len(record.nouns) == 1 for record in records)
    assert all(0.7 < record.end_s - record.start_s < 1.4 for record in records)

    questions = read_egomcq(tmp_path / "annotations" / "egomcq.json")
    assert len(questions) == clips.num_inter + clips.num_intra
    assert clips.num_inter >= 20
    assert clips.num_intra >= 20
    assert clips.num_probe >= clips.num_intra // 4
    assert {choice.video_uid for item in questions for choice in item.choices} <= set(splits["heldout"])

    before = states(tmp_path)
    assert run_synth(tmp_path / "world", CONFIG, 2).num_written == 0
    assert not run_clips(tmp_path / "world", tmp_path / "annotations", ClipRuleConfig()).has_changed
    assert states(tmp_path) == before

    sheet = tmp_path / "sheet.png"
    write_contact_sheet(tmp_path / "world" / "videos", sample_records(records, 3), sheet, num_frames=4)
    assert sheet.read_bytes().startswith(b"\x89PNG")
