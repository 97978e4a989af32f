"""The journal keeps every point, cuts torn tails and voids steps computed again."""

import math
from pathlib import Path

from infra.journal import Journal, flatten, metric_history, read_journal, valid_records


def test_points_params_and_tags_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j" / "a.jsonl", clock=lambda: 1.5)
    journal.params({"stage": {"num_frames": 4, "keep": [0.7, 0.1]}})
    journal.metrics(1, {"train/loss": 2.5, "train/grad_norm": math.inf})
    journal.tags({"commit": None})
    journal.close()
    params, metrics, tags = read_journal(journal.path)[0]
    assert params.values == {"stage.num_frames": "4", "stage.keep": "[0.7, 0.1]"}
    assert (metrics.step, metrics.time_ms) == (1, 1500)
    assert metrics.values == {"train/loss": 2.5, "train/grad_norm": math.inf}
    assert tags.values == {"commit": "None"}


def test_a_reader_follows_a_growing_file_and_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_journal(path) == ([], 0)
    line = '{"kind": "metrics", "step": 1, "time_ms": 0, "values": {"x": 1.0}}\n'
    path.write_text(line + line[:20])
    records, offset = read_journal(path)
    assert (len(records), offset) == (1, len(line))
    path.write_text(line + line)
    assert len(read_journal(path, offset)[0]) == 1


def test_resuming_cuts_the_torn_tail_and_voids_later_steps(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first = Journal(path)
    for step in (1, 2, 3, 4):
        first.metrics(step, {"loss": float(step)})
    first.close()
    path.write_text(path.read_text() + '{"kind": "met')
    second = Journal(path, resume_step=2)
    second.metrics(3, {"loss": 30.0})
    second.close()
    assert metric_history(path, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [record.step for record in valid_records(path)] == [1, 2, 3]


def test_nested_settings_become_flat_names() -> None:
    assert flatten({"a": {"b": [1, {"c": 2}]}, "d": None}) == {"a.b.0": "1", "a.b.1.c": "2", "d": "None"}


def test_lines_of_a_replaced_writer_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    old = Journal(path, resume_step=0, generation=3)
    old.metrics(1, {"loss": 1.0})
    old.flush()
    new = Journal(path, resume_step=0, generation=4)
    new.metrics(1, {"loss": 10.0})
    new.close()
    old.metrics(2, {"loss": 2.0})
    old.close()
    assert metric_history(path, "loss") == [(1, 10.0)]
