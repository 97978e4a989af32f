import cv2
import numpy as np
import pytest

from pipeline.resize import FrameResizer, encode_jpeg, short_side_size


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (256, 341)),
        ((640, 480), (341, 256)),
        ((1080, 1920), (256, 455)),
        ((200, 300), (200, 300)),
    ],
)
def test_the_short_side_is_met_and_small_frames_stay(size, expected):
    assert short_side_size(*size, 256) == expected


def test_frames_of_different_sizes_shrink_in_one_call_in_their_order():
    frames = [np.full((80, 120, 3), value, np.uint8) for value in range(20)]
    frames += [np.full((120, 60, 3), 99, np.uint8), np.full((10, 20, 3), 7, np.uint8)]
    resized = FrameResizer(40, max_frames=16).resize(frames)
    assert [frame.shape for frame in resized[:20]] == [(40, 60, 3)] * 20
    assert [int(frame.mean()) for frame in resized[:20]] == list(range(20))
    assert resized[20].shape == (80, 40, 3)
    assert np.array_equal(resized[21], frames[21])


def test_fine_stripes_become_grey_instead_of_coarse_stripes():
    stripes = np.zeros((120, 120, 3), np.uint8)
    stripes[:, ::2] = 254
    (shrunk,) = FrameResizer(40).resize([stripes])
    assert shrunk[:, 4:-4].min() > 100
    assert shrunk[:, 4:-4].max() < 155


def test_jpeg_keeps_the_order_of_colours():
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 200
    decoded = cv2.imdecode(np.frombuffer(encode_jpeg(image, 95), np.uint8), cv2.IMREAD_COLOR)
    assert decoded[8, 8, 2] > 190
    assert decoded[8, 8, 0] < 20
