import pytest
from pydantic import ValidationError

from pipeline.config import PrepareConfig, VideoLayout
from pipeline.errors import VideoError
from pipeline.layout import locate_files


def put(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_pattern_finds_files_by_uid_and_the_part_before_its_first_underscore(tmp_path):
    path = put(tmp_path / "P01" / "videos" / "P01_101.MP4")
    layout = VideoLayout(pattern="{prefix}/videos/{uid}.MP4")
    assert locate_files(tmp_path, "P01_101", layout) == [(path, 0.0)]
    with pytest.raises(VideoError, match=r"no file .*P02_1\.MP4; layout is \{prefix\}/videos/\{uid\}\.MP4"):
        locate_files(tmp_path, "P02_1", layout)


def test_a_pattern_of_chunks_counts_them_or_reads_their_first_second(tmp_path):
    by_start = [put(tmp_path / "v" / f"part-{start}.mkv") for start in (0, 120, 60)]
    put(tmp_path / "v" / "part-180.mp4")
    files = locate_files(tmp_path, "v", VideoLayout(pattern="{uid}/part-{start}.mkv", chunk_s=60))
    assert files == [(by_start[0], 0.0), (by_start[2], 60.0), (by_start[1], 120.0)]
    by_number = [put(tmp_path / f"w.{number}.mp4") for number in range(3)]
    files = locate_files(tmp_path, "w", VideoLayout(pattern="{uid}.{number}.mp4", chunk_s=7.5))
    assert files == [(path, 7.5 * number) for number, path in enumerate(by_number)]


@pytest.mark.parametrize(
    ("pattern", "chunk_s", "message"),
    [
        ("videos.mp4", None, "expected {uid}"),
        ("{uid}/{name}.mp4", None, "has the fields"),
        ("../{uid}.mp4", None, "leaves the folder"),
        ("/{uid}.mp4", None, "leaves the folder"),
        ("{uid}/{start}.mp4", None, "has chunk_s and one of"),
        ("{uid}.mp4", 60, "has chunk_s and one of"),
        ("{start}/{uid}.mp4", 60, "has chunk_s and one of"),
        ("{uid}/{start}-{number}.mp4", 60, "has chunk_s and one of"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused(pattern, chunk_s, message):
    with pytest.raises(ValidationError) as caught:
        VideoLayout(pattern=pattern, chunk_s=chunk_s)
    assert message in str(caught.value)


def test_a_recipe_takes_a_name_or_a_pattern():
    assert PrepareConfig(layout="raw").layout == "raw"
    config = PrepareConfig.model_validate({"layout": {"pattern": "{uid}.mkv"}})
    assert config.layout == VideoLayout(pattern="{uid}.mkv")
    with pytest.raises(ValidationError):
        PrepareConfig.model_validate({"layout": "raww"})
