"""Reading, ordering and drawing at the size of EgoClip: `python -m tests.soak.egoclip_scale`, run by hand.

Writes an annotation file of 3,847,723 rows in the shapes of the real one, reads it, and prints seconds and peak memory.
"""

import argparse
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.egoclip import COLUMNS, read_egoclip
from pipeline.order import SampleOrder, build_scene_index, scene_companions

ROWS, VIDEOS, CLIPS_PER_SHARD, BATCH = 3_847_723, 9_600, 256, 1024
ValueT = TypeVar("ValueT")


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    num_rows: int = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "egoclip.csv"
        _timed("write the file", lambda: write_rows(path, num_rows))
        # What reading takes is told apart from what writing took.
        if os.fork():
            os.wait()
        else:
            measure(path)
            os._exit(0)


def write_rows(path: Path, num_rows: int) -> None:
    """Rows of videos in turn, two passes, a clip every few seconds, captions of five to fifteen words."""
    generator = random.Random(0)
    words = [f"word{number}" for number in range(2000)]
    uids = [f"{generator.getrandbits(128):032x}" for _ in range(VIDEOS)]
    uids = [f"{uid[:8]}-{uid[8:12]}-{uid[12:16]}-{uid[16:20]}-{uid[20:]}" for uid in uids]
    with path.open("w") as file:
        file.write("\t".join(COLUMNS) + "\n")
        for row in range(num_rows):
            time_s = (row // VIDEOS) * 3.7 + generator.random()
            caption = "#C C " + " ".join(generator.choices(words, k=generator.randint(5, 15)))
            cells = (
                row,
                uids[row % VIDEOS],
                1800.0,
                f"narration_pass_{1 + row % 2}",
                row // VIDEOS,
                f"{time_s:.7f}",
                f"{time_s - 0.7:.7f}",
                f"{time_s + 0.9:.7f}",
                caption,
                [row % 118],
                [row % 582, (row * 7) % 582],
            )
            file.write("\t".join(map(str, cells)) + "\n")


def measure(path: Path) -> None:
    """Reads, sorts, draws; prints each step."""
    clips, report = _timed("read and validate", lambda: read_egoclip(path))
    print("\n".join(report.lines()))
    ordered = _timed("sort by video and time", clips.in_order)
    del clips
    index = _timed("index scenes", lambda: build_scene_index(ordered.video_codes, ordered.narration_s))
    sizes = [CLIPS_PER_SHARD] * (len(ordered) // CLIPS_PER_SHARD)
    order = SampleOrder(0, sizes, BATCH)
    _timed("order of the first epoch", lambda: order.batch_ids(0))
    resumed = SampleOrder(0, sizes, BATCH)
    rows = _timed("resume at step 1,000,000", lambda: resumed.batch_ids(1_000_000))
    one = rows[:1]
    draws = _seconds(lambda: scene_companions(index, one, 0, 7), 200)
    batch = _seconds(lambda: scene_companions(index, rows, 0, 7), 50)
    print(f"scene-aware draw: {draws * 1e6:.0f} us for one clip, {batch * 1e6:.0f} us for {BATCH}")
    assert np.array_equal(rows, SampleOrder(0, sizes, BATCH).batch_ids(1_000_000))


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _timed(what: str, call: Callable[[], ValueT]) -> ValueT:
    start = time.perf_counter()
    value = call()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.perf_counter() - start:.2f} s, peak {peak:.2f} GiB so far", flush=True)
    return value


if __name__ == "__main__":
    main()
