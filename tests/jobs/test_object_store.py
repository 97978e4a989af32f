"""The whole data side against an S3-compatible server on loopback: videos, annotations and shards in buckets."""

import io
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from rich.console import Console
from s3fs.core import S3File
from video_files import write_video

from jobs.prepare import run_prepare
from jobs.prepare_plan import plan_lines
from jobs.prepare_work import serial_mapper
from jobs.progress import ProgressReport
from jobs.recipe import load_recipe, resolve_paths
from pipeline.config import LoaderConfig, PrepareConfig
from pipeline.decode import PyAvDecoder
from pipeline.egoclip import EgoClipRow, write_egoclip
from pipeline.errors import ClipError, DataError, Reason, ShardError, VideoError
from pipeline.frame_match import DecodedFrame, FrameRequest
from pipeline.loader import BatchLoader
from pipeline.manifest import read_manifest, require_whole, verify_set
from pipeline.storage import file_sizes, storage_path
from pipeline.store import ClipStore
from pipeline.text import CaptionTokenizer
from pipeline.video import resolve_timeline
from pipeline.video_manifest import probe_files

CONFIG = PrepareConfig(num_frames=2, short_side=48, clips_per_shard=3, max_rejected_share=0.0)
NUM_CLIPS = 8


@pytest.fixture(scope="module")
def server():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = pytest.MonkeyPatch()
    environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    environment.setenv("AWS_ACCESS_KEY_ID", "key")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield boto3.client("s3")
    environment.undo()
    server.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for uid in ("a", "b"):
        write_video(folder / "videos" / f"{uid}.mp4", num_frames=180)
    rows = [
        EgoClipRow(
            k,
            "ab"[k % 2],
            6.0,
            "narration_pass_1",
            k,
            0.6 * k + 0.5,
            0.6 * k,
            0.6 * k + 1,
            f"#C C {k}",
            (0,),
            (k,),
        )
        for k in range(NUM_CLIPS)
    ]
    write_egoclip(folder / "egoclip.csv", rows)
    return folder


@pytest.fixture
def bucket(server, world, request):
    """The name of a bucket that holds the world; every test has its own."""
    name = request.node.name.replace("_", "-")[:60]
    server.create_bucket(Bucket=name)
    for path in world.rglob("*"):
        if path.is_file():
            server.upload_file(str(path), name, str(path.relative_to(world)))
    return name


def prepare(where, out_dir):
    where = str(where)
    return run_prepare(
        egoclip=f"{where}/egoclip.csv",
        egomcq_json=None,
        videos_dir=f"{where}/videos",
        taxonomy=None,
        out_dir=out_dir,
        config=CONFIG,
        mapper=serial_mapper,
        progress=ProgressReport(Console(quiet=True)),
    ).train


def test_a_set_in_a_bucket_has_the_bytes_of_a_local_one(bucket, world, tmp_path):
    url = f"s3://{bucket}/shards"
    remote, local = prepare(f"s3://{bucket}", url), prepare(world, str(tmp_path))
    assert remote == local
    assert verify_set(f"{url}/train", remote) == []
    stored = {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()}
    assert file_sizes(storage_path(f"{url}/train")) == {
        name: len(content) for name, content in stored.items()
    }
    for name, content in stored.items():
        assert (storage_path(f"{url}/train") / name).read_bytes() == content


def test_a_rerun_builds_only_what_is_missing(bucket, server):
    url = f"s3://{bucket}/shards"
    prepare(f"s3://{bucket}", url)

    def written():
        found = server.list_objects_v2(Bucket=bucket, Prefix="shards/train/shard-")["Contents"]
        return {entry["Key"]: entry["LastModified"] for entry in found}

    before = written()
    server.delete_object(Bucket=bucket, Key="shards/train/shard-00001.tar")
    prepare(f"s3://{bucket}", url)
    changed = {key for key, time in written().items() if before[key] != time}
    assert changed <= {"shards/train/shard-00001.tar", "shards/train/shard-00001.json"}
    require_whole(f"{url}/train", read_manifest(f"{url}/train"))


def test_batches_from_a_bucket_are_those_of_a_local_set_and_the_cache_keeps_its_limit(
    bucket, world, tmp_path
):
    url = f"s3://{bucket}/shards"
    prepare(f"s3://{bucket}", url)
    prepare(world, str(tmp_path / "local"))
    one_shard_gib = 1.2 * read_manifest(f"{url}/train").shards[0].bytes / 2**30
    cache = tmp_path / "cache"
    config = LoaderConfig(image_size=32, text_length=8, shuffle_window_shards=2)

    def batches(store):
        loader = BatchLoader(store, CaptionTokenizer(store.shards_dir / "vocab.txt", 8), config, 2, 0, 2)
        stream = loader.batches_from(1)
        found = [next(stream)[1] for _ in range(6)]
        stream.close()
        return found

    with (
        ClipStore(f"{url}/train", str(cache), one_shard_gib) as remote,
        ClipStore(tmp_path / "local" / "train") as local,
    ):
        for ours, expected in zip(batches(remote), batches(local), strict=True):
            assert ours.clip_ids == expected.clip_ids
            assert (ours.video_BTCHW == expected.video_BTCHW).all()
        assert len(list(cache.glob("*.tar"))) == 1
        assert not list(cache.glob("*.partial"))


def test_a_shard_that_changed_in_the_bucket_is_named_and_not_kept(bucket, server, tmp_path):
    url = f"s3://{bucket}/shards"
    prepare(f"s3://{bucket}", url)
    key = "shards/train/shard-00000.tar"
    content = bytearray(server.get_object(Bucket=bucket, Key=key)["Body"].read())
    content[700] ^= 1
    server.put_object(Bucket=bucket, Key=key, Body=bytes(content))
    with ClipStore(f"{url}/train", str(tmp_path)) as store:
        with pytest.raises(ClipError, match=r"shard-00000\.tar: SHA-256") as caught:
            store.read_frame(0, 0)
        assert caught.value.reason == Reason.DAMAGED_SHARD
        assert not list(tmp_path.glob("*.tar"))
        # Another shard is read as before.
        assert store.read_frame(NUM_CLIPS - 1, 0).size
    server.delete_object(Bucket=bucket, Key="shards/train/shard-00001.tar")
    with pytest.raises(ShardError, match=r"shard-00001\.tar: missing"):
        ClipStore(f"{url}/train", str(tmp_path))


def test_a_damaged_copy_on_this_machine_is_fetched_again(bucket, tmp_path):
    url = f"s3://{bucket}/shards"
    prepare(f"s3://{bucket}", url)
    with ClipStore(f"{url}/train", str(tmp_path)) as store:
        expected = store.read_frame(0, 0).tobytes()
        (copy,) = tmp_path.glob("*.tar")
        content = bytearray(copy.read_bytes())
        content[int(store._offsets[0, 0]) + 20] ^= 1
        # In place: the store has the file open.
        copy.write_bytes(content)
        assert store.read_frame(0, 0).tobytes() == expected


def test_chunks_in_a_bucket_are_found_by_their_layout(bucket, server, world):
    for start in (0, 300):
        server.upload_file(str(world / "videos" / "a.mp4"), bucket, f"chunks/v.mp4/{start}.mp4")
    timeline = resolve_timeline(f"s3://{bucket}/chunks", "v", "lavila_300s")
    assert [chunk.start_s for chunk in timeline.chunks] == [0.0, 300.0]
    local = resolve_timeline(world / "videos", "a", "raw")
    assert timeline.chunks[0].digest == local.chunks[0].digest
    asked = [FrameRequest(1.5, 2.0), FrameRequest(304.25, 305.0)]
    answers = list(PyAvDecoder().decode_frames(timeline, asked))
    expected = list(PyAvDecoder().decode_frames(local, [FrameRequest(1.5, 2.0), FrameRequest(4.25, 5.0)]))
    for (_, found), (_, wanted) in zip(answers, expected, strict=True):
        assert np.array_equal(found.image, wanted.image)
    with pytest.raises(VideoError) as caught:
        resolve_timeline(f"s3://{bucket}/chunks", "w", "lavila_300s")
    assert caught.value.reason == Reason.MISSING_VIDEO


def test_facts_of_a_video_take_a_small_part_of_it(bucket, server, tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", num_frames=30)
    # A box that players skip, in front of the others and as large as many minutes of video.
    box = 24 * 2**20
    content = box.to_bytes(4, "big") + b"free" + bytes(box - 8)
    server.put_object(Bucket=bucket, Key="videos/v.mp4", Body=content + path.read_bytes())
    fetched = []
    fetch = S3File._fetch_range

    def counting_fetch(self, start, end):
        fetched.append(end - start)
        return fetch(self, start, end)

    monkeypatch.setattr(S3File, "_fetch_range", counting_fetch)
    videos_dir = f"s3://{bucket}/videos"
    (facts,) = probe_files(resolve_timeline(videos_dir, "v", "raw"), videos_dir)
    assert (facts.path, facts.num_frames, facts.rotation, facts.reason) == ("v.mp4", 30, 0, None)
    assert sum(fetched) < 4 * 2**20


def test_a_broken_connection_is_no_damage_of_the_video(bucket, server, tmp_path, monkeypatch):
    write_video(tmp_path / "long.mp4", num_frames=6000)
    server.upload_file(str(tmp_path / "long.mp4"), bucket, "videos/long.mp4")
    timeline = resolve_timeline(f"s3://{bucket}/videos", "long", "raw")
    whole = (tmp_path / "long.mp4").read_bytes()

    class Broken(io.BytesIO):
        """The header at the end of the file and some of the beginning, then a network that is gone."""

        def read(self, size=-1):
            if 32_768 <= self.tell() < len(whole) - 65_536:
                raise ConnectionError("the store does not answer")
            return super().read(size)

    assert len(whole) > 120_000
    monkeypatch.setattr("upath.UPath.open", lambda self, mode: Broken(whole))
    answers = PyAvDecoder().decode_frames(timeline, [FrameRequest(0.5, 1.0), FrameRequest(100.0, 101.0)])
    assert isinstance(next(answers)[1], DecodedFrame)
    with pytest.raises(ConnectionError, match="does not answer"):
        next(answers)


def test_the_plan_reads_a_bucket(bucket, tmp_path):
    recipe_file = tmp_path / "r.yaml"
    recipe_file.write_text(
        f"name: r\ndata:\n  egoclip: s3://{bucket}/egoclip.csv\n  egomcq: null\n  videos: s3://{bucket}/videos\n"
        f"  shards: s3://{bucket}/shards\nprepare:\n  clips_per_shard: 3\n"
    )
    recipe = resolve_paths(load_recipe(str(recipe_file)), Path(tmp_path))
    lines = "\n".join(plan_lines(recipe))
    assert "8 clips of 2 videos" in lines
    assert "2 videos are there" in lines
    assert "3 shards of up to 3 clips, 0 are on disk" in lines
    assert (storage_path(recipe.data.shards) / "train" / "videos-needed.txt").read_text() == "a\nb\n"


def test_a_store_that_is_not_known_is_refused_with_what_is():
    with pytest.raises(DataError, match=r"open xyz://bucket: .*xyz.*s3://bucket/folder works"):
        storage_path("xyz://bucket")
