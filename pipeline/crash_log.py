"""Which video a process was decoding when it died. A decoder that takes its process down leaves no exception behind.

The note lies in a file beside the shards, which the next attempt at the same shard reads. Notes count within one run of
prepare only (`run_key`): a machine that was switched off is no fault of the video.
"""

import contextlib
from collections.abc import Iterator

from pipeline.storage import StoragePath, make_folder, storage_path

SUFFIX = ".decoding"
# So many deaths at a video, and it is not tried again.
MAX_CRASHES = 2


class CrashLog:
    """Notes of one shard in one run."""

    def __init__(self, folder: str | StoragePath, shard: str, run_key: str) -> None:
        self._path = storage_path(folder) / f".{shard}.{run_key}{SUFFIX}"
        # What stands here when an attempt begins was begun by attempts that did not live to take it out.
        self._died_at = self._path.read_text().split() if self._path.exists() else []

    def num_crashes(self, video_uid: str) -> int:
        """How often a process died while it decoded this video for this shard."""
        return self._died_at.count(video_uid)

    @contextlib.contextmanager
    def decoding(self, video_uid: str) -> Iterator[None]:
        """Around the decoding of one video."""
        make_folder(self._path.parent)
        self._path.write_text(" ".join([*self._died_at, video_uid]))
        try:
            yield
        finally:
            self._path.write_text(" ".join(self._died_at))

    def remove(self) -> None:
        """Takes the notes away when the work is done: there is one file of them for every video that is looked at."""
        self._path.unlink(missing_ok=True)
