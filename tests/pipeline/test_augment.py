import numpy as np
import pytest

from pipeline.augment import draw_frames, draw_window, middle_frames, reorder_frames
from pipeline.errors import DataError


def test_draws_depend_on_seed_epoch_and_clip_and_on_nothing_else():
    def draw(seed=1, epoch=2, clip_id="c"):
        return draw_window(seed, epoch, clip_id, 240, 320, (0.5, 1.0), (0.75, 4 / 3)), draw_frames(
            seed, epoch, clip_id, 160, 4
        ).tolist()

    assert draw() == draw()
    for other in (draw(seed=2), draw(epoch=3), draw(clip_id="d")):
        assert other[0] != draw()[0]
        assert other[1] != draw()[1]


def test_windows_lie_inside_the_frame_and_have_the_asked_share_of_it():
    shares = []
    for i in range(500):
        top, left, height, width = draw_window(0, 0, str(i), 240, 320, (0.5, 1.0), (0.75, 4 / 3))
        assert 0 <= top <= top + height <= 240
        assert 0 <= left <= left + width <= 320
        # Relative to the frame's own 4:3; a pixel of rounding allowed.
        assert 0.73 < (width / height) / (4 / 3) < 1.36
        shares.append(height * width / (240 * 320))
    assert min(shares) > 0.49
    assert max(shares) > 0.85


def test_a_window_that_cannot_fit_is_the_whole_frame():
    # A crop of all of the frame's area and half as wide again as the frame does not exist.
    assert draw_window(0, 0, "c", 100, 400, (1.0, 1.0), (1.5, 1.5)) == (0, 0, 100, 400)
    assert draw_window(0, 0, "c", 100, 400, (1.0, 1.0), (1.0, 1.0)) == (0, 0, 100, 400)


def test_one_frame_comes_from_each_segment_and_all_are_met():
    seen = [set() for _ in range(4)]
    for epoch in range(300):
        for segment, frame in enumerate(draw_frames(0, epoch, "c", 16, 4)):
            seen[segment].add(int(frame))
    assert seen == [set(range(4 * k, 4 * k + 4)) for k in range(4)]


def test_segments_that_do_not_divide_still_cover_every_stored_frame():
    seen = {int(frame) for epoch in range(200) for frame in draw_frames(0, epoch, "c", 7, 3)}
    assert seen == set(range(7))


@pytest.mark.parametrize(
    ("num_stored", "num_frames", "expected"),
    [(16, 4, [2, 6, 10, 14]), (8, 8, list(range(8))), (7, 3, [1, 3, 5]), (5, 1, [2])],
)
def test_evaluation_takes_the_middle_of_each_segment(num_stored, num_frames, expected):
    assert middle_frames(num_stored, num_frames).tolist() == expected


def test_more_frames_than_stored_is_an_error():
    with pytest.raises(DataError, match="9 frames wanted per clip, 8 are stored"):
        middle_frames(8, 9)


def test_the_probe_orders_are_ordered_reversed_and_never_accidentally_ordered():
    frames = np.array([2, 6, 10, 14])
    assert reorder_frames(frames, "ordered", 0, "c").tolist() == [2, 6, 10, 14]
    assert reorder_frames(frames, "reversed", 0, "c").tolist() == [14, 10, 6, 2]
    drawn = {tuple(reorder_frames(frames, "shuffled", 0, str(i)).tolist()) for i in range(400)}
    # 4! orders but the true one.
    assert len(drawn) == 23
    assert (2, 6, 10, 14) not in drawn
