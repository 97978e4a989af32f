import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.resize import FrameResizer, _DaliResizer, encode_jpeg, resize_frames, short_side_size


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


def test_halving_weighs_the_four_nearest_pixels_of_a_row_by_a_triangle():
    row = np.array([0, 80, 160, 240, 0, 80, 160, 240], np.uint8)
    frame = np.repeat(np.repeat(row[None, :, None], 4, axis=0), 3, axis=2)
    shrunk = resize_frames(torch.from_numpy(frame)[None], 4, 4)[0]
    # Weights 1, 3, 3, 1 of 8 around the centre; at the border the outer one is left out: 3, 3, 1 of 7.
    expected = [(0 * 3 + 80 * 3 + 160) / 7, (80 + 160 * 3 + 240 * 3 + 0) / 8]
    expected += [(240 + 0 * 3 + 80 * 3 + 160) / 8, (80 + 160 * 3 + 240 * 3) / 7]
    assert shrunk.shape == (3, 4, 4)
    assert (shrunk.float() - torch.tensor(expected)).abs().max() <= 1


@pytest.mark.parametrize("size", [(90, 160), (240, 135), (65, 65)])
def test_torch_and_dali_resize_alike_and_as_in_floating_point(size):
    rng = np.random.default_rng(size[0])
    coarse = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
    frame = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    (by_torch,) = FrameResizer(64).resize([frame])
    wanted = short_side_size(*size, 64)
    (by_dali,) = _DaliResizer(4, device_id=None).resize([frame], [wanted])
    exact = functional.interpolate(
        torch.from_numpy(frame).permute(2, 0, 1)[None].double(), wanted, mode="bilinear", antialias=True
    )[0].permute(1, 2, 0)
    assert np.abs(by_torch - exact.numpy()).max() <= 1
    inner = np.s_[2:-2, 2:-2]
    assert np.abs(by_torch[inner].astype(int) - by_dali[inner].astype(int)).max() <= 2


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
