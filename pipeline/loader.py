"""Rows of a `ClipStore` to batches: read, decode the window of every frame by DALI, resize, tokenise, ahead of the
training step.

A batch is a function of (seed, step, rank share) only. uint8 leaves this module; normalising belongs to the
model's device. A damaged clip is never replaced: its `ClipError` comes in the place of the batch.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, repeat
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64, UInt8
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from nvidia.dali.types import DALIDataType, DALIImageType
from torch import Tensor

from pipeline.augment import FrameOrder, Window, draw_frames, draw_window, middle_frames, reorder_frames
from pipeline.config import LoaderConfig
from pipeline.errors import ClipError, DataError, Reason
from pipeline.order import SampleOrder, rank_slice, scene_companions
from pipeline.resize import resize_frames, resize_graph
from pipeline.store import ClipStore
from pipeline.text import CaptionTokenizer

__all__ = ["Batch", "BatchLoader", "ClipView", "FrameOrder", "FramePipeline", "eval_batches"]

ValueT = TypeVar("ValueT")
# Shards of a remote store are asked for this many steps before their clips.
FETCH_AHEAD_STEPS = 16


@dataclass(frozen=True)
class Batch:
    """B clips. With companions the first half are anchors and row i + B/2 is the companion of row i.

    `index_B` holds row numbers of the store; V and U are the verb and noun classes of its taxonomy.
    """

    video_BTCHW: UInt8[Tensor, "B T C H W"]
    text_ids_BL: Int64[Tensor, "B L"]
    text_mask_BL: Bool[Tensor, "B L"]
    verbs_BV: Bool[Tensor, "B V"]
    nouns_BU: Bool[Tensor, "B U"]
    clip_ids: tuple[str, ...]
    index_B: Int64[Tensor, " B"]


@dataclass(frozen=True, slots=True)
class ClipView:
    """What a batch shows of a clip: stored frames in the order shown, one window for all of them."""

    row: int
    frames: Int64[np.ndarray, " T"]
    window: Window


class FramePipeline:
    """From JPEG bytes and windows to square frames; the DALI graph is built once, for up to `max_clips` clips.

    On the GPU it decodes with the JPEG engine and resizes too; that path has never been run on a GPU. On the CPU torch
    resizes (`resize_frames`).
    """

    def __init__(
        self,
        max_clips: int,
        num_frames: int,
        image_size: int,
        num_threads: int = 1,
        device: Literal["cpu", "gpu"] = "cpu",
        on_thread: Callable[[], None] = lambda: None,
    ) -> None:
        if device == "gpu" and not torch.cuda.is_available():
            raise DataError("loader.device is gpu, and torch finds no GPU here; set loader.device to cpu")
        self.num_frames = num_frames
        self.image_size = image_size
        self._device = device
        self._threads = ThreadPoolExecutor(num_threads, "resize", initializer=on_thread)
        self._pipeline = Pipeline(
            batch_size=max_clips * num_frames,
            num_threads=num_threads,
            device_id=torch.cuda.current_device() if device == "gpu" else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with self._pipeline:
            jpeg = fn.external_source(name="jpeg", dtype=DALIDataType.UINT8, ndim=1)
            start = fn.external_source(name="start", dtype=DALIDataType.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=DALIDataType.INT32, ndim=1)
            window = fn.decoders.image_slice(
                jpeg,
                start=start,
                shape=shape,
                axes=(0, 1),
                output_type=DALIImageType.RGB,
                device="mixed" if device == "gpu" else "cpu",
            )
            size = float(image_size)
            self._pipeline.set_outputs(resize_graph(window, size, size) if device == "gpu" else window)
        self._pipeline.build()

    def decode(self, store: ClipStore, views: Sequence[ClipView]) -> UInt8[Tensor, "B T C H W"]:
        """Read and decode the views. Raises ClipError naming the clip, shard and frame that cannot be."""
        jpegs = [store.read_frame(view.row, int(frame)) for view in views for frame in view.frames]
        windows = np.asarray([view.window for view in views], dtype=np.int32).repeat(self.num_frames, axis=0)
        try:
            decoded = self._run(jpegs, windows)
        except RuntimeError as error:
            raise self._find_damaged(store, views, error) from error
        return self._resized_by_dali(decoded) if self._device == "gpu" else self._resized_by_torch(decoded)

    def _run(self, jpegs: list[Any], windows: Int32[np.ndarray, "n 4"]) -> Any:
        """What the graph gives: one picture for each JPEG, in buffers that the next run uses again."""
        start, shape = (np.ascontiguousarray(part) for part in np.split(windows, 2, axis=1))
        (output,) = self._pipeline.run(jpeg=jpegs, start=start, shape=shape)
        return output

    def _resized_by_dali(self, decoded: Any) -> UInt8[Tensor, "B T C H W"]:
        size = self.image_size
        video_BTHWC = torch.from_dlpack(decoded.as_tensor()).view(-1, self.num_frames, size, size, 3)
        return video_BTHWC.permute(0, 1, 4, 2, 3).contiguous()

    def _resized_by_torch(self, decoded: Any) -> UInt8[Tensor, "B T C H W"]:
        num_clips, size = len(decoded) // self.num_frames, self.image_size
        video_BTCHW = torch.empty((num_clips, self.num_frames, 3, size, size), dtype=torch.uint8)

        def resize(clip: int) -> None:
            places = range(clip * self.num_frames, (clip + 1) * self.num_frames)
            window_THWC = np.stack([decoded.at(place) for place in places])
            video_BTCHW[clip] = resize_frames(torch.from_numpy(window_THWC), size, size)

        # Waits for all, and raises what any of them raised.
        list(self._threads.map(resize, range(num_clips)))
        return video_BTCHW

    def _find_damaged(self, store: ClipStore, views: Sequence[ClipView], error: RuntimeError) -> DataError:
        """One frame at a time, after a batch failed: DALI does not say which one it was."""
        for view in views:
            window = np.asarray([view.window], dtype=np.int32)
            for frame in view.frames:
                try:
                    self._run([store.read_frame(view.row, int(frame))], window)
                except RuntimeError:
                    name = store.shard_name(view.row)
                    detail = f"frame {frame} in {name}.tar is no JPEG image that can be decoded"
                    return ClipError(store.clip_id(view.row), Reason.DAMAGED_FRAME, detail)
        return DataError(f"DALI failed on a batch of {len(views)} clips but decodes each one alone: {error}")


def collate(
    store: ClipStore, views: Sequence[ClipView], tokenizer: CaptionTokenizer, pipeline: FramePipeline
) -> Batch:
    """Views to a batch."""
    rows = np.asarray([view.row for view in views], dtype=np.int64)
    text_ids_BL, text_mask_BL = tokenizer([store.caption(row) for row in rows])
    return Batch(
        video_BTCHW=pipeline.decode(store, views),
        text_ids_BL=text_ids_BL,
        text_mask_BL=text_mask_BL,
        verbs_BV=torch.from_numpy(store.verbs_of(rows)),
        nouns_BU=torch.from_numpy(store.nouns_of(rows)),
        clip_ids=tuple(store.clip_id(row) for row in rows),
        index_B=torch.from_numpy(rows),
    )


class BatchLoader:
    """Training batches of one rank. Any rank of any world size sees its share of the same global batches.

    `on_thread` is called in each thread that it starts, before its work.
    Raises DataError on construction when an epoch holds less than one global batch, when the batch does not
    divide over the ranks, or when more frames are wanted than are stored.
    """

    def __init__(
        self,
        store: ClipStore,
        tokenizer: CaptionTokenizer,
        config: LoaderConfig,
        num_frames: int,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        with_companions: bool = False,
        on_thread: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._on_thread = on_thread
        self._tokenizer = tokenizer
        self._config = config
        self._num_frames = num_frames
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._cut = (store.shard_sizes, global_batch_size, config.shuffle_window_shards)
        self._order = SampleOrder(seed, *self._cut)
        self._scenes = store.scene_index() if with_companions else None
        share = rank_slice(np.arange(global_batch_size), rank, world_size)
        self._local_batch_size = len(share) * (2 if with_companions else 1)
        middle_frames(store.num_frames, num_frames)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches per epoch."""
        return self._order.steps_per_epoch

    def views(self, step: int) -> list[ClipView]:
        """What this rank shows at `step`: pure, reads no frame."""
        anchors = rank_slice(self._order.batch_ids(step), self._rank, self._world_size)
        rows = anchors
        if self._scenes is not None:
            rows = np.concatenate([anchors, scene_companions(self._scenes, anchors, self._seed, step)])
        epoch = self._order.epoch_of(step)
        return [self._view(int(row), epoch) for row in rows]

    def batches_from(self, step: int) -> Iterator[tuple[int, Batch | ClipError]]:
        """(step, batch) from `step` on without end, decoded ahead in a thread; close it to end it.

        A step that shows a damaged clip has its error instead of a batch, and the next step follows as ever.
        """

        def produce() -> Iterator[tuple[int, Batch | ClipError]]:
            self._on_thread()
            pipeline = FramePipeline(
                self._local_batch_size,
                self._num_frames,
                self._config.image_size,
                self._config.num_threads,
                self._config.device,
                self._on_thread,
            )
            fetch_ahead = self._fetching_ahead(step)
            for now in count(step):
                next(fetch_ahead)
                try:
                    batch = collate(self._store, self.views(now), self._tokenizer, pipeline)
                except ClipError as error:
                    batch = error
                yield now, batch

        return prefetch(produce, self._config.prefetch_batches)

    def _fetching_ahead(self, step: int) -> Iterator[None]:
        """Advanced once a step, has the shards of a remote store fetched `FETCH_AHEAD_STEPS` steps before they are
        read.
        """
        if not self._store.is_remote:
            yield from repeat(None)
        # An order of its own: the other one would change between two epochs at the end of each.
        order = SampleOrder(self._seed, *self._cut)
        for coming in range(step, step + FETCH_AHEAD_STEPS):
            self._store.fetch_ahead(order.batch_ids(coming))
        for coming in count(step + FETCH_AHEAD_STEPS):
            self._store.fetch_ahead(order.batch_ids(coming))
            yield

    def _view(self, row: int, epoch: int) -> ClipView:
        store, clip_id = self._store, self._store.clip_id(row)
        height, width = int(store.height[row]), int(store.width[row])
        config = self._config
        window = draw_window(self._seed, epoch, clip_id, height, width, config.crop_scale, config.crop_aspect)
        frames = draw_frames(self._seed, epoch, clip_id, store.num_frames, self._num_frames)
        return ClipView(row, frames, window)


def eval_batches(
    store: ClipStore,
    rows: Sequence[int] | np.ndarray,
    tokenizer: CaptionTokenizer,
    config: LoaderConfig,
    num_frames: int,
    batch_size: int,
    frame_order: FrameOrder = "ordered",
    seed: int = 0,
) -> Iterator[Batch]:
    """Batches of the given rows in their order, the last one possibly smaller; repeatable.

    Whole frames are resized to the square, frames are the middles of `num_frames` equal segments of the
    stored ones. `frame_order` and `seed` serve the temporal probe.
    """
    chosen = middle_frames(store.num_frames, num_frames)

    def produce() -> Iterator[Batch]:
        pipeline = FramePipeline(batch_size, num_frames, config.image_size, config.num_threads, config.device)
        for first in range(0, len(rows), batch_size):
            views: list[ClipView] = []
            for row in rows[first : first + batch_size]:
                frames = reorder_frames(chosen, frame_order, seed, store.clip_id(row))
                views.append(
                    ClipView(int(row), frames, (0, 0, int(store.height[row]), int(store.width[row])))
                )
            yield collate(store, views, tokenizer, pipeline)

    return prefetch(produce, config.prefetch_batches)


def prefetch(produce: Callable[[], Iterator[ValueT]], depth: int) -> Iterator[ValueT]:
    """Run `produce` in a thread, at most `depth` values ahead; its error is raised here, in order.

    Closing the returned generator (or leaving it to the garbage collector) stops and joins the thread.
    """
    values: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    is_closed = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not is_closed.is_set():
            try:
                values.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for value in produce():
                if not put("value", value):
                    return
        except BaseException as error:
            put("error", error)
        else:
            put("end", None)

    thread = threading.Thread(target=work, name="batch-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = values.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        is_closed.set()
        thread.join()
