"""Damaged shards and damaged videos: each is met and named, and no clip ever shows another frame than its own."""

import dataclasses
import io
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from stored_clips import NUM_FRAMES, write_set
from video_files import read_barcode, write_video

from pipeline.clip import make_record
from pipeline.config import LoaderConfig, PrepareConfig
from pipeline.decode_dali import DaliGpuDecoder
from pipeline.errors import ClipError, Reason, ShardError
from pipeline.loader import Batch, BatchLoader, eval_batches
from pipeline.manifest import build_manifest, write_index, write_manifest
from pipeline.order import batch_ids
from pipeline.prepare import build_shard, find_video, plan_shards, shard_settings
from pipeline.shards import find_intact, read_receipt
from pipeline.store import ClipStore
from pipeline.text import CaptionTokenizer

# ---------------------------------------------------------------------------------------------- shards

# The set has rows 0-4 in shard 0, 5-9 in shard 1, 10-11 in shard 2. Shard 1 is damaged, at row 7 where it can be.
FIRST_ROW, ROW = 5, 7
HTML = b"<html><body>503 Service Unavailable</body></html>\n"


def header_at(set_dir):
    """Where the header of the first member of `ROW` lies in shard 1: the block before its content."""
    return read_receipt(set_dir / "shard-00001.json").clips[ROW - FIRST_ROW].frame_offsets[0] - 512


def flip_in_header(tar, set_dir):
    content = bytearray(tar.read_bytes())
    content[header_at(set_dir) + 3] ^= 1
    tar.write_bytes(content)


def flip_in_frame(tar, set_dir):
    content = bytearray(tar.read_bytes())
    content[header_at(set_dir) + 512 + 300] ^= 1
    tar.write_bytes(content)


def zero_two_blocks(tar, set_dir):
    content = bytearray(tar.read_bytes())
    content[header_at(set_dir) : header_at(set_dir) + 1024] = bytes(1024)
    tar.write_bytes(content)


def cut_inside_a_member(tar, set_dir):
    tar.write_bytes(tar.read_bytes()[: header_at(set_dir) + 600])


def cut_on_a_member_border(tar, set_dir):
    tar.write_bytes(tar.read_bytes()[: header_at(set_dir)])


def empty(tar, set_dir):
    tar.write_bytes(b"")


def replace_by_html(tar, set_dir):
    tar.write_bytes(HTML)


def replace_by_html_of_the_same_size(tar, set_dir):
    size = tar.stat().st_size
    tar.write_bytes((HTML * (size // len(HTML) + 1))[:size])


def remove(tar, set_dir):
    tar.unlink()


def swap_with_shard_0(tar, set_dir):
    other = tar.with_name("shard-00000.tar")
    contents = tar.read_bytes(), other.read_bytes()
    assert len(contents[0]) == len(contents[1])
    other.write_bytes(contents[0])
    tar.write_bytes(contents[1])


def append(tar, set_dir):
    tar.write_bytes(tar.read_bytes() + bytes(10240))


@dataclasses.dataclass(frozen=True)
class Damage:
    """`refused` is said on opening, None where sizes are right; `rows` are those whose frames are not whole."""

    change: Callable[[Path, Path], None]
    refused: str | None
    rows: frozenset[int]


WRONG_SIZE = r"shard-00001\.tar: \d+ bytes, the manifest says \d+"
NONE, SHARD_1 = frozenset(), frozenset(range(5, 10))
DAMAGES = {
    # Rows are read by offset: a header is never looked at, and only the checksum of the whole file tells.
    "flipped byte in a header": Damage(flip_in_header, None, NONE),
    "flipped byte in a frame": Damage(flip_in_frame, None, frozenset({ROW})),
    "two zero blocks": Damage(zero_two_blocks, None, frozenset({ROW})),
    "cut inside a member": Damage(cut_inside_a_member, WRONG_SIZE, frozenset({7, 8, 9})),
    "cut on a member border": Damage(cut_on_a_member_border, WRONG_SIZE, frozenset({7, 8, 9})),
    "empty": Damage(empty, WRONG_SIZE, SHARD_1),
    "an error page": Damage(replace_by_html, WRONG_SIZE, SHARD_1),
    "an error page of the same size": Damage(replace_by_html_of_the_same_size, None, SHARD_1),
    "missing": Damage(remove, r"shard-00001\.tar: missing", SHARD_1),
    "swapped with another": Damage(swap_with_shard_0, None, frozenset(range(10))),
    "bytes appended": Damage(append, WRONG_SIZE, NONE),
}
every_damage = pytest.mark.parametrize("damage", list(DAMAGES.values()), ids=list(DAMAGES))


def frames_or_error(store, row):
    """Bytes of all frames of a row, or the error that reading them raised."""
    try:
        return [store.read_frame(row, frame).tobytes() for frame in range(store.num_frames)]
    except ClipError as error:
        return error


@pytest.fixture
def set_dir(tmp_path):
    return write_set(tmp_path / "set")


@every_damage
def test_a_damaged_shard_is_refused_on_opening_or_by_its_checksum(set_dir, damage):
    damage.change(set_dir / "shard-00001.tar", set_dir)
    if damage.refused is not None:
        with pytest.raises(ShardError, match=damage.refused):
            ClipStore(set_dir)
    else:
        with ClipStore(set_dir) as store, pytest.raises(ShardError, match=r"shard-00001\.tar: its SHA-256"):
            store.verify()


@every_damage
def test_prepare_does_not_take_a_damaged_shard_for_finished(set_dir, damage):
    assert find_intact(set_dir, "shard-00001", "key 1") is not None
    damage.change(set_dir / "shard-00001.tar", set_dir)
    assert find_intact(set_dir, "shard-00001", "key 1") is None


@every_damage
def test_a_shard_damaged_while_in_use_gives_its_own_frames_or_an_error_that_names_it(set_dir, damage):
    with ClipStore(set_dir) as store:
        whole = [frames_or_error(store, row) for row in range(len(store))]
    with ClipStore(set_dir) as store:
        damage.change(set_dir / "shard-00001.tar", set_dir)
        damaged = [frames_or_error(store, row) for row in range(len(store))]
        for row, found in enumerate(damaged):
            if row not in damage.rows:
                assert found == whole[row]
                continue
            assert isinstance(found, ClipError)
            assert (found.clip_id, found.reason) == (store.clip_id(row), Reason.DAMAGED_SHARD)
            assert store.shard_name(row) in found.detail


@every_damage
def test_a_step_that_shows_a_damaged_clip_has_its_error_and_the_others_are_whole(set_dir, damage):
    config = LoaderConfig(image_size=32, text_length=8)
    # Three steps of four clips in an epoch, twelve clips: every clip is shown.
    with ClipStore(set_dir) as store:
        tokenizer = CaptionTokenizer(set_dir / "vocab.txt", 8)
        loader = BatchLoader(store, tokenizer, config, NUM_FRAMES, seed=3, global_batch_size=4)
        damage.change(set_dir / "shard-00001.tar", set_dir)
        batches = loader.batches_from(0)
        for step in range(3):
            rows = batch_ids(3, step, [5, 5, 2], 4).tolist()
            found_step, found = next(batches)
            assert found_step == step
            if damage.rows & {*rows}:
                assert isinstance(found, ClipError)
                assert found.reason == Reason.DAMAGED_SHARD
                assert store.rows_of([found.clip_id])[0] in damage.rows & {*rows}
            else:
                assert isinstance(found, Batch)
                assert found.index_B.tolist() == rows
        batches.close()


def test_a_shard_that_is_not_in_the_manifest_is_never_read_and_the_next_publication_removes_it(set_dir):
    (set_dir / "shard-00003.tar").write_bytes((set_dir / "shard-00000.tar").read_bytes())
    (set_dir / "shard-00003.json").write_bytes((set_dir / "shard-00000.json").read_bytes())
    with ClipStore(set_dir) as store:
        assert len(store) == 12
        assert store.shard_sizes == (5, 5, 2)
        store.verify()
        write_manifest(set_dir, store.manifest, [f"shard-{number:05d}" for number in range(3)])
    assert sorted(path.name for path in set_dir.glob("*.tar")) == [
        "shard-00000.tar",
        "shard-00001.tar",
        "shard-00002.tar",
    ]


# ---------------------------------------------------------------------------------------------- videos

SIZE_HW = (64, 64)
QUALITY = 95
# The frames are stored as large as they are, so that stored bytes can be foretold from decoded pixels.
CONFIG = PrepareConfig(num_frames=4, short_side=64, jpeg_quality=QUALITY, clips_per_shard=100)
# Half-second clips every quarter of a second of a video of three seconds, at 30 frames per second.
STARTS_S = [quarter / 4 for quarter in range(11)]
# Midpoints of four segments of 0.5 s: 1/16, 3/16, 5/16 and 7/16 s after the start.
NUMBERS = [[round(30 * (start_s + odd / 16)) for odd in (1, 3, 5, 7)] for start_s in STARTS_S]


def decode_by_number(encoded, frame_numbers):
    """Stands in for DALI: frames of a stream in memory by their number in order of presentation."""
    with av.open(io.BytesIO(encoded)) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack([images[number] for number in frame_numbers])


@pytest.fixture
def source(tmp_path):
    """(the undamaged video with its index in front, checksum of every frame of it as a JPEG file)."""
    plain = write_video(tmp_path / "plain.mp4", num_frames=90, size_HW=SIZE_HW)
    path = tmp_path / "source.mp4"
    options = {"movflags": "faststart"}
    with av.open(str(plain)) as reading, av.open(str(path), "w", options=options) as writing:
        stream = writing.add_stream_from_template(reading.streams.video[0])
        for packet in reading.demux(video=0):
            if packet.size:
                packet.stream = stream
                writing.mux(packet)
    checksums = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            image = frame.to_ndarray(format="bgr24")
            jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
            checksums.append(zlib.crc32(jpeg))
    assert len(set(checksums)) == 90
    return path, checksums


def packets_of(path):
    """(byte position, size) of every frame, in order."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def build(tmp_path, content, decoder=None):
    """The receipt of a shard with all clips of a video with these bytes; None stands for no file."""
    (tmp_path / "videos").mkdir()
    if content is not None:
        (tmp_path / "videos" / "v.mp4").write_bytes(content)
    records = [make_record("v", s, s + 0.5, s, f"#C C moves cup {s}", (0,), (0,)) for s in STARTS_S]
    timelines = dict([find_video("v", str(tmp_path / "videos"), "raw")])
    (plan,) = plan_shards(records, timelines, CONFIG, len(records))
    return build_shard(plan, tmp_path / "shards", decoder)


def check_receipt(receipt, checksums, lost_frames, reasons):
    """Clips that touch no lost frame are stored with the checksums of the source; the others have a reason."""
    whole = {
        start_s: numbers
        for start_s, numbers in zip(STARTS_S, NUMBERS, strict=True)
        if not lost_frames & {*numbers}
    }
    assert {clip.start_s: clip.frame_crc32 for clip in receipt.clips} == {
        start_s: tuple(checksums[number] for number in numbers) for start_s, numbers in whole.items()
    }
    assert {clip.start_s for clip in receipt.rejected} == {*STARTS_S} - {*whole}
    assert {clip.reason for clip in receipt.rejected} <= reasons
    assert all(clip.detail for clip in receipt.rejected)


@pytest.mark.parametrize("decoder", [None, DaliGpuDecoder(decode_by_number)], ids=["pyav", "dali"])
def test_every_stored_frame_has_the_checksum_of_its_source_frame(tmp_path, source, decoder):
    path, checksums = source
    receipt = build(tmp_path, path.read_bytes(), decoder)
    assert receipt.num_clips == len(STARTS_S)
    check_receipt(receipt, checksums, set(), set())


def html_page(content):
    return HTML * 20


def without_index(content):
    # The box that lists the frames has a name that nobody knows.
    assert content.count(b"moov") == 1
    return content.replace(b"moov", b"xxxx")


def of_an_unknown_codec(content):
    assert content.count(b"avc1") >= 1
    return content.replace(b"avc1", b"zzz1")


def cut_in_the_index(content):
    # The index ends where the frames begin.
    return content[: content.index(b"mdat") // 2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: None, Reason.MISSING_VIDEO),
        (lambda content: b"", Reason.EMPTY_VIDEO),
        (html_page, Reason.NOT_A_VIDEO),
        (without_index, Reason.TRUNCATED_VIDEO),
        (cut_in_the_index, Reason.TRUNCATED_VIDEO),
        (of_an_unknown_codec, Reason.UNSUPPORTED_CODEC),
    ],
    ids=["missing", "empty", "an error page", "no index", "cut in the index", "unknown codec"],
)
def test_a_video_that_cannot_be_opened_loses_all_its_clips_with_the_reason(tmp_path, source, change, reason):
    path, checksums = source
    receipt = build(tmp_path, change(path.read_bytes()))
    check_receipt(receipt, checksums, set(range(90)), {reason})


@pytest.mark.parametrize("decoder", [None, DaliGpuDecoder(decode_by_number)], ids=["pyav", "dali"])
@pytest.mark.parametrize("num_bytes", [0, 10], ids=["between two frames", "inside a frame"])
@pytest.mark.parametrize("frame", [50, 51])
def test_a_video_cut_short_loses_the_clips_behind_the_cut_only(tmp_path, source, frame, num_bytes, decoder):
    path, checksums = source
    # A clip shows frames 39, 43, 47 and 51, the last one at 50.625: frame 50 must not stand in for it.
    position, _size = packets_of(path)[frame]
    receipt = build(tmp_path, path.read_bytes()[: position + num_bytes], decoder)
    check_receipt(receipt, checksums, set(range(frame, 90)), {Reason.TRUNCATED_VIDEO, Reason.DECODE_ERROR})
    assert 0 < receipt.num_clips < len(STARTS_S)


def test_a_damaged_keyframe_loses_the_clips_that_show_a_frame_up_to_the_next_one_only(tmp_path, source):
    path, checksums = source
    # A keyframe every 15 frames.
    position, size = packets_of(path)[45]
    content = bytearray(path.read_bytes())
    content[position : position + size] = bytes(size)
    receipt = build(tmp_path, bytes(content))
    check_receipt(receipt, checksums, set(range(45, 60)), {Reason.DECODE_ERROR})
    assert 0 < receipt.num_clips < len(STARTS_S)


def test_training_shows_the_frames_of_the_source_and_nothing_of_rejected_clips(tmp_path, source):
    path, _checksums = source
    position, size = packets_of(path)[45]
    content = bytearray(path.read_bytes())
    content[position : position + size] = bytes(size)
    receipt = build(tmp_path, bytes(content))
    shards_dir = tmp_path / "shards"
    (shards_dir / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n#\nc\nmoves\ncup\n")
    manifest = build_manifest("train", [receipt.summary], shard_settings(CONFIG), {}, None, (1, 1), {})
    write_index(shards_dir, [receipt])
    write_manifest(shards_dir, manifest, [receipt.name])
    shown = {}
    with ClipStore(shards_dir) as store:
        tokenizer = CaptionTokenizer(shards_dir / "vocab.txt", 8)
        config = LoaderConfig(image_size=64, text_length=8)
        for batch in eval_batches(store, range(len(store)), tokenizer, config, 4, 3):
            for clip_id, video_TCHW in zip(batch.clip_ids, batch.video_BTCHW, strict=True):
                images_THWC = video_TCHW.permute(0, 2, 3, 1).numpy()
                shown[clip_id] = [read_barcode(image) for image in images_THWC]
    # Clips at 1.25, 1.5 and 1.75 s show frames 45 .. 59, which are lost; that at 1.0 s ends with frame 43.
    kept = [0, 1, 2, 3, 4, 8, 9, 10]
    assert list(shown.values()) == [NUMBERS[position] for position in kept]
