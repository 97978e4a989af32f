from dataclasses import replace

import av
import numpy as np
import pytest

from pipeline.config import WorldConfig
from pipeline.scene import Scene
from pipeline.script import PICTURE_FORMATS, video_specs
from pipeline.world import frame_times_s, is_complete, write_video

SPECS = video_specs(WorldConfig(seed=2, num_train_videos=8, num_heldout_videos=0, video_s=(4.0, 4.5)))


def read(path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return container.streams.video[0], [frame.time for frame in frames], frames


@pytest.mark.parametrize("index", range(len(PICTURE_FORMATS)))
def test_a_video_has_the_size_codec_and_frame_times_of_its_spec(tmp_path, index):
    spec, path = SPECS[index], tmp_path / "video.mp4"
    assert write_video(spec, path)
    stream, times_s, frames = read(path)
    assert stream.codec_context.name == "h264"
    assert (frames[0].width, frames[0].height) == (spec.picture.width, spec.picture.height)
    np.testing.assert_allclose(times_s, frame_times_s(spec), atol=1e-5)
    assert sum(frame.key_frame for frame in frames) >= 4


def test_decoded_frames_show_what_was_drawn(tmp_path):
    write_video(SPECS[0], tmp_path / "video.mp4")
    _, times_s, frames = read(tmp_path / "video.mp4")
    drawn = Scene(SPECS[0]).frame_at(times_s[40]).astype(int)
    assert np.abs(frames[40].to_ndarray(format="rgb24").astype(int) - drawn).mean() < 6


def test_a_variable_frame_rate_misses_frames_and_keeps_time_order():
    spec = next(spec for spec in SPECS if spec.picture.has_variable_rate)
    gaps_s = np.diff(frame_times_s(spec))
    assert gaps_s.min() > 0.02
    assert gaps_s.max() > 1.7 / 30


def test_a_complete_video_is_left_alone_and_bytes_repeat(tmp_path):
    first, second = tmp_path / "a.mp4", tmp_path / "b.mp4"
    assert write_video(SPECS[1], first)
    written_ns = first.stat().st_mtime_ns
    assert not write_video(SPECS[1], first)
    assert first.stat().st_mtime_ns == written_ns
    write_video(SPECS[1], second)
    assert first.read_bytes() == second.read_bytes()


def test_a_cut_file_or_another_spec_is_written_anew(tmp_path):
    path = tmp_path / "video.mp4"
    write_video(SPECS[0], path)
    assert not is_complete(replace(SPECS[0], tempo=2.0), path)
    path.write_bytes(path.read_bytes()[:5000])
    assert not is_complete(SPECS[0], path)
    assert write_video(SPECS[0], path)
    assert is_complete(SPECS[0], path)


def test_a_failing_video_leaves_no_file_behind(tmp_path):
    broken = replace(SPECS[0], picture=replace(SPECS[0].picture, width=255))
    with pytest.raises(Exception, match=r".+"):
        write_video(broken, tmp_path / "video.mp4")
    assert list(tmp_path.iterdir()) == []
