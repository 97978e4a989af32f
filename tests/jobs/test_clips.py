import json

import pytest

from jobs.clips import run_clips, summary_lines
from pipeline.config import ClipRuleConfig
from pipeline.egoclip import read_egoclip
from pipeline.errors import DataError


def write_world(folder, *, duration_s=20.0, splits=None):
    def one_pass(*times_s):
        return {
            "narrations": [
                {"timestamp_sec": time_s, "narration_text": f"#C C cuts bread {time_s}"} for time_s in times_s
            ]
        }

    entry = {
        "narration_pass_1": one_pass(2.0, 4.0, 6.0),
        "narration_pass_2": one_pass(5.0),
        "status": "complete",
    }
    if duration_s is not None:
        entry["duration_sec"] = duration_s
    documents = {
        "narration.json": {"videos": {"v": entry, "w": {"status": "redacted", "duration_sec": 5.0}}},
        "taxonomy.json": {"verbs": ["cut"], "nouns": ["bread"]},
    }
    if splits is not None:
        documents["splits.json"] = splits
    folder.mkdir(exist_ok=True)
    for name, value in documents.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def test_own_narrations_become_a_tsv_and_what_has_no_width_is_reported(tmp_path):
    summary = run_clips(write_world(tmp_path / "mine"), tmp_path / "out", ClipRuleConfig(mean_gap_s=4.0))
    records, _ = read_egoclip(summary.egoclip)
    # b = 2 and a = 4: clips of half a second
    assert [(record.start_s, record.end_s) for record in records] == [
        (1.75, 2.25),
        (3.75, 4.25),
        (5.75, 6.25),
    ]
    assert [(record.verbs, record.nouns) for record in records] == [((0,), (0,))] * 3
    assert summary.egomcq is None
    assert "skipped v narration_pass_2: one narration" in "\n".join(summary_lines(summary))


def test_a_video_without_a_length_is_refused(tmp_path):
    with pytest.raises(DataError, match="video v come without its length; add duration_sec"):
        run_clips(write_world(tmp_path / "mine", duration_s=None), tmp_path / "out", ClipRuleConfig())


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ["v"]}, "expected"),
        ({"train": ["v"], "heldout": ["v"]}, "in train and in heldout, first v"),
        ({"train": ["x"], "heldout": []}, "have no narrations, first x"),
    ],
)
def test_a_wrong_split_is_refused(tmp_path, splits, message):
    with pytest.raises(DataError, match=message):
        run_clips(write_world(tmp_path / "mine", splits=splits), tmp_path / "out", ClipRuleConfig())
