"""`svitt embed` and `svitt search`: which frames are shown, what is listed, what is found."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from trained_runs import trained_run
from video_files import read_barcode, write_video

from jobs.embed import (
    EmbedError,
    Span,
    Unreadable,
    cut,
    decode_spans,
    embed,
    embed_videos,
    find_videos,
    write_table,
)
from jobs.export import write_export
from jobs.exported import ExportedModel, load_exported
from jobs.pretrain import open_tokenizer
from jobs.progress import ProgressReport
from jobs.search_clips import search

Report = tuple[ProgressReport, Callable[[], list[str]]]


def showing(num_frames: int) -> ExportedModel:
    """Takes frames of 96 px and gives the barcode of each clip's first frame as its feature."""

    def encode_clips(video_BTCHW: torch.Tensor) -> torch.Tensor:
        numbers = [read_barcode(clip[0].permute(1, 2, 0).numpy()) for clip in video_BTCHW]
        return torch.tensor(numbers, dtype=torch.float32)[:, None]

    video = SimpleNamespace(num_frames=num_frames, image_size=96)
    fake: Any = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(video=video)), short_side=96, encode_clips=encode_clips
    )
    return cast(ExportedModel, fake)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An exported folder that no other process has looked at."""
    run, model = trained_run(tmp_path)
    folder = tmp_path / "model"
    write_export(folder, model, open_tokenizer(run.recipe()), run.recipe())
    return folder


def test_a_short_rest_belongs_to_the_last_piece_and_a_long_one_stands_alone() -> None:
    assert [(s.start_s, s.end_s) for s in cut(Path("v"), 4.9, 2.0, 2.0)] == [(0.0, 2.0), (2.0, 4.9)]
    assert [(s.start_s, s.end_s) for s in cut(Path("v"), 5.1, 2.0, 2.0)] == [
        (0.0, 2.0),
        (2.0, 4.0),
        (4.0, 5.1),
    ]
    assert [(s.start_s, s.end_s) for s in cut(Path("v"), 0.3, 2.0, 2.0)] == [(0.0, 0.3)]


def test_overlapping_pieces_begin_every_stride_and_the_last_one_goes_to_the_end() -> None:
    spans = [(s.start_s, s.end_s) for s in cut(Path("v"), 3.2, 2.0, 0.5)]
    assert spans == [(0.0, 2.0), (0.5, 2.5), (1.0, 3.2)]


def test_overlapping_pieces_share_their_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", num_frames=60)
    found = list(decode_spans(showing(2), path, clip_s=1.0, stride_s=0.5))
    numbers = []
    for _, frames in found:
        assert isinstance(frames, torch.Tensor)
        numbers.append([read_barcode(frame.permute(1, 2, 0).numpy()) for frame in frames])
    # At 30 frames a second: the middles of the halves of a second that begins at frame 0, 15 and 30.
    assert numbers == [[7, 22], [22, 37], [37, 52]]


def test_a_clip_shows_the_frames_at_the_middles_of_its_parts(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", num_frames=60)
    found = list(decode_spans(showing(3), path, clip_s=1.0, stride_s=1.0))
    assert [span for span, _ in found] == [Span(str(path), 0.0, 1.0), Span(str(path), 1.0, 2.0)]
    numbers = []
    for _, frames in found:
        assert isinstance(frames, torch.Tensor)
        assert frames.shape == (3, 3, 96, 96)
        numbers.append([read_barcode(frame.permute(1, 2, 0).numpy()) for frame in frames])
    # A third of a second is 10 frames; their middles lie at 5, 15 and 25.
    assert numbers == [[5, 15, 25], [35, 45, 55]]


def test_features_stand_beside_their_spans_whatever_the_batch(tmp_path: Path) -> None:
    first = write_video(tmp_path / "a.mp4", num_frames=60)
    second = write_video(tmp_path / "b.mp4", num_frames=60, first_number=100)
    found = embed_videos(showing(1), [first, second], clip_s=1.0, stride_s=1.0, batch_size=3)
    assert [(Path(span.path).name, span.start_s) for span in found.spans] == [
        ("a.mp4", 0.0),
        ("a.mp4", 1.0),
        ("b.mp4", 0.0),
        ("b.mp4", 1.0),
    ]
    assert torch.cat(found.features).flatten().tolist() == [15, 45, 115, 145]


def test_a_damaged_video_loses_the_clips_it_cannot_show_and_no_others(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", num_frames=120)
    # The index stands at the end, so the file opens; what lies in the second half is not a picture.
    content = bytearray(path.read_bytes())
    media = content.index(b"mdat") + 4
    length = content.index(b"moov") - 4 - media
    content[media + length * 5 // 8 : media + length * 7 // 8] = bytes(length * 7 // 8 - length * 5 // 8)
    path.write_bytes(content)
    found = embed_videos(showing(1), [path], clip_s=1.0, stride_s=1.0, batch_size=2)
    assert [span.start_s for span in found.spans][:2] == [0.0, 1.0]
    assert found.unreadable
    assert all(lost.start_s is not None and lost.start_s >= 2.0 for lost in found.unreadable)
    assert len(found.spans) + len(found.unreadable) == 4


def test_videos_become_rows_and_unreadable_ones_are_listed(
    tmp_path: Path, exported: Path, report_lines: Report
) -> None:
    report, lines = report_lines
    write_video(tmp_path / "videos" / "deep" / "v.mp4", num_frames=60)
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"no video at all")
    for name in ("rows.parquet", "rows.npy"):
        assert embed(exported, tmp_path / "videos", tmp_path / name, 1.0, 2, "cpu", report) == 0
    table = pq.read_table(tmp_path / "rows.parquet")
    assert table.column_names == ["path", "start_s", "end_s", "feature"]
    assert table["start_s"].to_pylist() == [0.0, 1.0]
    assert table["path"][0].as_py() == str(tmp_path / "videos" / "deep" / "v.mp4")
    features = np.stack(table["feature"].to_numpy())
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, rtol=1e-5)
    rows = np.load(tmp_path / "rows.npy", allow_pickle=False)
    assert rows.dtype.names == ("path", "start_s", "end_s", "feature")
    np.testing.assert_array_equal(rows["feature"], features)
    said = lines()
    assert any("unreadable:" in line and "bad.mp4: not_a_video" in line for line in said)
    assert any("2 clips of 1 videos" in line and "1 videos or clips unreadable" in line for line in said)


def test_sentences_become_rows_and_a_search_finds_the_one_that_is_the_same(
    tmp_path: Path, exported: Path, report_lines: Report
) -> None:
    report, lines = report_lines
    (tmp_path / "lines.txt").write_text("moves cup 1\n\n#C C moves jar\n")
    assert embed(exported, tmp_path / "lines.txt", tmp_path / "text.parquet", 1.0, 2, "cpu", report) == 0
    assert search(tmp_path / "text.parquet", exported, "moves jar", 1, report) == 0
    assert lines()[-1].split(maxsplit=2) == ["1", "+1.000", "#C C moves jar"]


def test_a_search_shows_spans_best_first(tmp_path: Path, exported: Path, report_lines: Report) -> None:
    report, lines = report_lines
    model = load_exported(exported)
    wanted = model.encode_sentences(["moves cup"])[0]
    features = torch.stack([-wanted, 0.5 * wanted, wanted])
    columns = {"path": ["a.mp4", "b.mp4", "c.mp4"], "start_s": [0.0, 1.0, 2.0], "end_s": [1.0, 2.0, 3.5]}
    write_table(tmp_path / "rows.parquet", {**columns}, features, model.digest)
    assert search(tmp_path / "rows.parquet", exported, "moves cup", 2, report) == 0
    assert [line.split(maxsplit=2) for line in lines()] == [
        ["1", "+1.000", "c.mp4  2.00 to 3.50 s"],
        ["2", "+0.500", "b.mp4  1.00 to 2.00 s"],
    ]
    write_table(tmp_path / "other.parquet", {**columns}, features, "f" * 64)
    with pytest.raises(EmbedError, match="they cannot be compared"):
        search(tmp_path / "other.parquet", exported, "moves cup", 2, report)


def test_what_cannot_be_embedded_is_said_before_anything_is_written(
    tmp_path: Path, exported: Path, report_lines: Report
) -> None:
    report, _ = report_lines
    with pytest.raises(EmbedError, match=r"expected a name that ends in \.parquet or \.npy"):
        embed(exported, tmp_path, tmp_path / "rows.csv", 1.0, 2, "cpu", report)
    with pytest.raises(EmbedError, match="no video below"):
        find_videos(exported)
    with pytest.raises(EmbedError, match="there is no"):
        find_videos(tmp_path / "absent")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"no video at all")
    with pytest.raises(EmbedError, match="none of 1 videos"):
        embed(exported, tmp_path / "videos", tmp_path / "rows.parquet", 1.0, 2, "cpu", report)
    assert not list(tmp_path.glob("*.parquet"))


def test_a_search_of_something_else_says_what_it_needs(tmp_path: Path, report_lines: Report) -> None:
    (tmp_path / "rows.parquet").write_text("no table")
    with pytest.raises(EmbedError, match=r"expected a \.parquet file of svitt embed"):
        search(tmp_path / "rows.parquet", tmp_path, "moves cup", 5, report_lines[0])
    with pytest.raises(EmbedError, match="expected at least 1"):
        search(tmp_path / "rows.parquet", tmp_path, "moves cup", 0, report_lines[0])


def test_a_whole_video_that_cannot_be_opened_has_no_times(tmp_path: Path) -> None:
    path = tmp_path / "empty.mp4"
    path.touch()
    ((span, found),) = decode_spans(showing(1), path, clip_s=1.0, stride_s=1.0)
    assert span is None
    assert found == Unreadable(str(path), "empty_video", f"{path} has 0 bytes")
