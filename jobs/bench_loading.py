"""Loading as measured by `svitt bench data`: our loader on shards against `VideoClips` in a torch DataLoader.

Both show the same clips in the same batches, in turn, to a consumer that does nothing but take them. Files are in the
page cache after the first, untimed pass of each: what is measured is work, not a disk.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter, process_time

import psutil
from torch import Tensor
from torch.utils.data import DataLoader

from jobs.bench_peer import VideoClip, VideoClips
from jobs.bench_record import BenchError, Ratio, Spread
from pipeline.config import VideoLayout
from pipeline.errors import VideoError
from pipeline.loader import BatchLoader
from pipeline.shards import read_receipt, shard_paths
from pipeline.store import ClipStore
from pipeline.video import resolve_timeline

OURS, PEER = "shards, BatchLoader", "mp4 per clip, PyAV in DataLoader"


@dataclass(frozen=True, slots=True)
class LoadingRow:
    """One way of loading. CPU milliseconds are those of all its threads and processes."""

    name: str
    clips_per_s: Spread
    cpu_ms_per_clip: Spread
    wait_ms_per_step: Spread
    bytes_per_clip: float


@dataclass(frozen=True, slots=True)
class Loading:
    """Ours and the peer's. `speedup` is the peer's time over ours, `cpu_saving` the same of CPU time."""

    rows: tuple[LoadingRow, ...]
    speedup: Ratio
    cpu_saving: Ratio


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass over the clips of a round."""

    wall_s: float
    cpu_s: float
    read_bytes: int
    wait_s: tuple[float, ...]


def clips_in_videos(
    store: ClipStore, rows: Sequence[int], videos_dir: str, layout: str | VideoLayout
) -> dict[str, VideoClip]:
    """Clip id -> where the clip of a row lies in its video file; a clip over a border ends with its first file.

    Raises BenchError for a video that is not there any more.
    """
    wanted = {store.clip_id(row) for row in rows}
    names = sorted({store.shard_name(row) for row in rows})
    stored = [clip for name in names for clip in read_receipt(shard_paths(store.shards_dir, name)[1]).clips]
    try:
        timelines = {
            uid: resolve_timeline(videos_dir, uid, layout)
            for uid in {clip.video_uid for clip in stored if clip.clip_id in wanted}
        }
    except VideoError as error:
        raise BenchError(
            f"find the videos of the shards in {store.shards_dir}: {error}; set data.videos"
        ) from error
    found: dict[str, VideoClip] = {}
    for clip in stored:
        if clip.clip_id not in wanted:
            continue
        timeline = timelines[clip.video_uid]
        position = timeline.position_at(clip.start_s)
        if position is None:
            raise BenchError(
                f"no file of video {clip.video_uid} holds second {clip.start_s}; set data.videos"
            )
        chunk = timeline.chunks[position]
        found[clip.clip_id] = VideoClip(
            clip.clip_id, chunk.path, clip.start_s - chunk.start_s, clip.end_s - chunk.start_s
        )
    return found


def measure_loading(
    loader: BatchLoader,
    videos: VideoClips,
    batch_size: int,
    num_workers: int,
    num_rounds: int,
    on_round: Callable[[], None],
) -> Loading:
    """Alternates passes of the two over the same clips: `videos` are those that the loader shows from step 1 on."""
    num_steps = len(videos) // batch_size
    peer = DataLoader(
        videos,
        batch_size,
        num_workers=num_workers,
        persistent_workers=True,
        # DALI and its threads live in this process: a fork would copy their locks.
        multiprocessing_context="spawn",
    )
    ours: list[_Pass] = []
    peers: list[_Pass] = []
    for number in range(num_rounds + 1):
        pair = _our_pass(loader, num_steps), _peer_pass(peer, num_steps)
        if number:
            ours.append(pair[0])
            peers.append(pair[1])
        on_round()
    num_clips = num_steps * batch_size
    return Loading(
        rows=(_row(OURS, ours, num_clips), _row(PEER, peers, num_clips)),
        speedup=Ratio.of([one.wall_s for one in peers], [one.wall_s for one in ours]),
        cpu_saving=Ratio.of([one.cpu_s for one in peers], [one.cpu_s for one in ours]),
    )


def _our_pass(loader: BatchLoader, num_steps: int) -> _Pass:
    """From the first batch in hand to the last, with nothing ready ahead; building the graph, once a stage, is left
    out.
    """
    process = psutil.Process()
    batches = loader.batches_from(0)
    next(batches)
    taken = _take(batches, num_steps, process_time, lambda: process.io_counters().read_chars)
    # Ends the thread: it must not decode ahead while the other is measured.
    del batches
    return taken


def _peer_pass(peer: "DataLoader[Tensor]", num_steps: int) -> _Pass:
    """From asking to the last batch. The workers have been there since the first pass."""
    workers = psutil.Process().children()

    def cpu_s() -> float:
        return process_time() + sum(sum(worker.cpu_times()[:2]) for worker in workers)

    def read_bytes() -> int:
        return sum(worker.io_counters().read_chars for worker in workers)

    return _take(peer, num_steps, cpu_s, read_bytes)


def _take(
    batches: Iterable[object], num_steps: int, cpu_s: Callable[[], float], read_bytes: Callable[[], int]
) -> _Pass:
    """Takes `num_steps` batches and reads the counters before and after."""
    cpu_before, bytes_before = cpu_s(), read_bytes()
    waits: list[float] = []
    asked = perf_counter()
    for _ in islice(batches, num_steps):
        now = perf_counter()
        waits.append(now - asked)
        asked = now
    return _Pass(sum(waits), cpu_s() - cpu_before, read_bytes() - bytes_before, tuple(waits))


def _row(name: str, passes: Sequence[_Pass], num_clips: int) -> LoadingRow:
    return LoadingRow(
        name=name,
        clips_per_s=Spread.of([num_clips / one.wall_s for one in passes]),
        cpu_ms_per_clip=Spread.of([one.cpu_s * 1e3 / num_clips for one in passes]),
        wait_ms_per_step=Spread.of([wait_s * 1e3 for one in passes for wait_s in one.wait_s]),
        bytes_per_clip=statistics.median(one.read_bytes / num_clips for one in passes),
    )
