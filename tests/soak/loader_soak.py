"""The loader under fire for as long as you like: `python -m tests.soak.loader_soak --minutes 10`.

Loaders are closed and go on from the cursor, at random steps and on other world sizes; ranks in processes of their own
are killed; bytes of shards are flipped and healed; the disk stalls now and then. Prints what was met, and ends with 1
when anything was off.
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from pipeline.config import LoaderConfig
from pipeline.errors import ClipError, Reason
from pipeline.loader import BatchLoader
from pipeline.order import batch_ids
from pipeline.shards import read_receipt
from pipeline.store import ClipStore
from pipeline.text import CaptionTokenizer
from tests.pipeline.stored_clips import NUM_FRAMES, write_set

SEED, GLOBAL_BATCH, NUM_CLIPS, CLIPS_PER_SHARD = 1, 8, 25, 7
STEPS_PER_LIFE, DAMAGE_SHARE, STALL_SHARE, STALL_S = 60, 0.3, 0.001, 0.2
KILL_EVERY_S, HANG_S = 20.0, 60.0
# The last minute may use a tenth more memory than the first one, or in short runs the last third.
MAX_GROWTH = 1.1


class Soak:
    """One run over a small shard set: the cursor, what went wrong, and what was counted."""

    def __init__(self, set_dir: Path, minutes: float, draw: random.Random) -> None:
        self.store = ClipStore(set_dir)
        self.tokenizer = CaptionTokenizer(set_dir / "vocab.txt", 8)
        self.draw = draw
        self.started, self.minutes = time.monotonic(), minutes
        self.cursor = 0
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.longest_step_s = 0.0
        self.resident_mib: list[tuple[float, float]] = []

    def run(self) -> None:
        """Lives of the loader, one after the other, each begun at the cursor."""
        killed_at = self.started
        while time.monotonic() - self.started < 60 * self.minutes:
            if time.monotonic() - killed_at > KILL_EVERY_S:
                self.live_until_killed()
                killed_at = time.monotonic()
            if self.draw.random() < DAMAGE_SHARE:
                self.live_with_damage()
            self.live(self.draw.randrange(1, STEPS_PER_LIFE))
            self.counts["restarts"] += 1

    def live(self, num_steps: int) -> ClipError | None:
        """Up to `num_steps` steps on a random world size, or to the first error of a rank."""
        world_size = self.draw.choice([1, 2, 4])
        config = LoaderConfig(image_size=32, text_length=8, num_threads=self.draw.choice([1, 2]))
        settings = (self.store, self.tokenizer, config, NUM_FRAMES, SEED, GLOBAL_BATCH)
        ranks = [
            BatchLoader(*settings, rank, world_size).batches_from(self.cursor) for rank in range(world_size)
        ]
        try:
            for _ in range(num_steps):
                began = time.monotonic()
                parts = [next(rank) for rank in ranks]
                if errors := [found for _step, found in parts if isinstance(found, ClipError)]:
                    return errors[0]
                self.check([(step, batch.index_B.tolist()) for step, batch in parts])
                self.longest_step_s = max(self.longest_step_s, time.monotonic() - began)
        finally:
            for rank in ranks:
                rank.close()
        return None

    def live_until_killed(self) -> None:
        """Two ranks in processes; one is killed at a random step, and a step that one of them missed is not counted."""
        spawn = multiprocessing.get_context("spawn")
        ranks = []
        for rank in range(2):
            here, there = spawn.Pipe()
            settings = (str(self.store.shards_dir), rank, 2, self.cursor, there)
            process = spawn.Process(target=serve_rank, args=settings, daemon=True)
            process.start()
            there.close()
            ranks.append((process, here))
        last = self.draw.randrange(1, STEPS_PER_LIFE)
        try:
            for number in range(last + 1):
                if number == last:
                    self.draw.choice(ranks)[0].kill()
                    self.counts["ranks killed"] += 1
                parts = []
                for _process, here in ranks:
                    here.send("next")
                    if not here.poll(HANG_S):
                        self.problems.append(f"step {self.cursor}: no answer for {HANG_S} s")
                        return
                    parts.append(here.recv())
                self.check(parts)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        finally:
            for process, here in ranks:
                here.close()
                process.kill()
                process.join()

    def check(self, parts: list[tuple[int, list[int]]]) -> None:
        """The ranks together must have brought the rows of the pure order function, at the step that is due."""
        due = Counter(batch_ids(SEED, self.cursor, self.store.shard_sizes, GLOBAL_BATCH).tolist())
        brought = Counter(row for _step, rows in parts for row in rows)
        if {step for step, _rows in parts} != {self.cursor}:
            self.problems.append(f"step {self.cursor}: brought {[step for step, _rows in parts]}")
        self.counts["lost"] += (due - brought).total()
        self.counts["doubled"] += (brought - due).total()
        self.cursor += 1
        used = psutil.Process().memory_info().rss / 2**20
        self.resident_mib.append((time.monotonic() - self.started, used))

    def live_with_damage(self) -> None:
        """Flip a byte of a frame that is due within an epoch; its clip must be named. Then heal it."""
        step = self.cursor + self.draw.randrange(NUM_CLIPS // GLOBAL_BATCH)
        row = int(self.draw.choice(batch_ids(SEED, step, self.store.shard_sizes, GLOBAL_BATCH)))
        shard, clip_id = self.store.shard_name(row), self.store.clip_id(row)
        clips = read_receipt(self.store.shards_dir / f"{shard}.json").clips
        (clip,) = (clip for clip in clips if clip.clip_id == clip_id)
        frame = self.draw.randrange(NUM_FRAMES)
        at = clip.frame_offsets[frame] + self.draw.randrange(clip.frame_sizes[frame])
        path = self.store.shards_dir / f"{shard}.tar"
        flip(path, at)
        self.counts["faults injected"] += 1
        error = self.live(NUM_CLIPS)
        flip(path, at)
        if error is not None and (error.clip_id, error.reason) == (clip_id, Reason.DAMAGED_SHARD):
            self.counts["faults met"] += 1
        else:
            self.problems.append(f"step {step}: flipped a byte of {clip_id} in {shard}, met {error}")

    def report(self) -> bool:
        """Print the outcome; True when all is well."""
        window_s = min(60.0, 20 * self.minutes)
        resident_mib = [0.0] * (int(self.resident_mib[-1][0] / window_s) + 1)
        for at_s, used in self.resident_mib:
            resident_mib[int(at_s / window_s)] = max(resident_mib[int(at_s / window_s)], used)
        if resident_mib[-1] > MAX_GROWTH * resident_mib[0]:
            self.problems.append("memory grows")
        for name in ("lost", "doubled"):
            if self.counts[name]:
                self.problems.append(f"{name} samples")
        print(
            f"steps {self.cursor}, restarts {self.counts['restarts']}, ranks killed {self.counts['ranks killed']}"
        )
        print(f"faults injected {self.counts['faults injected']}, met {self.counts['faults met']}")
        print(f"disk stalls {self.counts['stalls']} of {STALL_S} s")
        print(f"samples lost {self.counts['lost']}, doubled {self.counts['doubled']}")
        print(f"longest step {self.longest_step_s:.3f} s")
        print(f"largest resident MiB every {window_s:.0f} s: {[round(used) for used in resident_mib]}")
        print(f"problems: {self.problems[:10] or 'none'}")
        return not self.problems


def serve_rank(set_dir: str, rank: int, world_size: int, cursor: int, asks: Connection) -> None:
    """One rank in its own process: a step and its rows for every message."""
    config = LoaderConfig(image_size=32, text_length=8)
    store, tokenizer = ClipStore(set_dir), CaptionTokenizer(Path(set_dir) / "vocab.txt", 8)
    loader = BatchLoader(store, tokenizer, config, NUM_FRAMES, SEED, GLOBAL_BATCH, rank, world_size)
    for step, batch in loader.batches_from(cursor):
        asks.recv()
        asks.send((step, batch.index_B.tolist()))


def flip(path: Path, at: int) -> None:
    """Invert one byte of a file, in place; the same again restores it."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 255]))


def stall_reads(soak: Soak) -> None:
    """From now on one read in a thousand takes as long as a busy disk does."""
    read = os.pread

    def slow(descriptor: int, size: int, offset: int) -> bytes:
        if random.random() < STALL_SHARE:
            soak.counts["stalls"] += 1
            time.sleep(STALL_S)
        return read(descriptor, size, offset)

    os.pread = slow


def main() -> int:
    """Runs and reports; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="decides the faults, not the order of samples")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        set_dir = write_set(Path(folder), NUM_CLIPS, CLIPS_PER_SHARD)
        soak = Soak(set_dir, arguments.minutes, random.Random(arguments.seed))
        stall_reads(soak)
        soak.run()
        soak.store.close()
    return 0 if soak.report() else 1


if __name__ == "__main__":
    sys.exit(main())
