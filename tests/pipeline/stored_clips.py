"""A small published shard set without videos: frame j of clip i is a flat colour that tells both."""

import numpy as np

from pipeline.clip import make_record
from pipeline.manifest import build_manifest, write_index, write_manifest, write_rejected
from pipeline.resize import encode_jpeg
from pipeline.shards import ShardWriter
from pipeline.text import build_vocabulary

NUM_FRAMES = 8


def colour(clip, frame):
    """RGB of a stored frame: red tells the clip, green the frame."""
    return np.array([10 * clip, 20 * frame, 0], dtype=np.uint8)


def image_of(clip, frame, size=(48, 64)):
    """Blue rises from left to right, so that a crop can be read back."""
    image = np.zeros((*size, 3), np.uint8)
    image[...] = colour(clip, frame)
    image[..., 2] = np.linspace(0, 255, size[1]).astype(np.uint8)
    return image


def write_set(out_dir, num_clips=12, clips_per_shard=5):
    """Clips 0, 1, ... two seconds apart, alternating between two videos; verb i % 3, noun i % 2."""
    records = [
        make_record(
            f"v{i % 2}", 2.0 * i, 2.0 * i + 1, 2.0 * i + 0.5, f"#C C moves cup {i}", (i % 3,), (i % 2,)
        )
        for i in range(num_clips)
    ]
    receipts = []
    for number, first in enumerate(range(0, num_clips, clips_per_shard)):
        with ShardWriter(out_dir, f"shard-{number:05d}") as writer:
            for i in range(first, min(first + clips_per_shard, num_clips)):
                frames = [encode_jpeg(image_of(i, j), 95) for j in range(NUM_FRAMES)]
                writer.add(records[i], frames, [float(j) for j in range(NUM_FRAMES)], 48, 64)
            receipts.append(writer.finish(f"key {number}", []))
    vocabulary = build_vocabulary(record.caption for record in records)
    (out_dir / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    write_rejected(out_dir, receipts)
    manifest = build_manifest(
        "train", [receipt.summary for receipt in receipts], {"num_frames": NUM_FRAMES}, {}, None, (3, 2), {}
    )
    write_index(out_dir, receipts)
    write_manifest(out_dir, manifest, [receipt.name for receipt in receipts])
    return out_dir
