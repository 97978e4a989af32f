"""A process in which one video takes everything down, as a fault inside a codec does."""

import os

from pipeline import video_manifest
from pipeline.crash_log import CrashLog
from pipeline.decode import PyAvDecoder
from pipeline.prepare import build_shard, find_video


class CrashingDecoder(PyAvDecoder):
    """Dies at video b."""

    def decode_frames(self, timeline, requests):
        if timeline.video_uid == "b":
            os._exit(9)
        return super().decode_frames(timeline, requests)


def build(plan, out_dir, run_key):
    """The whole life of one attempt."""
    build_shard(plan, out_dir, CrashingDecoder(), run_key)


def probe(folder, video_uid, run_key):
    """One attempt at the files of a video; opening one of them takes the process down."""
    video_manifest.open_video = lambda *_: os._exit(9)
    _, found = find_video(video_uid, str(folder), "raw")
    video_manifest.probe_files(found, folder, (), CrashLog(folder, video_uid, run_key))
