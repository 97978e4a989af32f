"""A process in which one video takes everything down, as a fault inside a codec does."""

import os

from pipeline.decode import PyAvDecoder
from pipeline.prepare import build_shard


class CrashingDecoder(PyAvDecoder):
    """Dies at video b."""

    def decode_frames(self, timeline, requests):
        if timeline.video_uid == "b":
            os._exit(9)
        return super().decode_frames(timeline, requests)


def build(plan, out_dir, run_key):
    """The whole life of one attempt."""
    build_shard(plan, out_dir, CrashingDecoder(), run_key)
