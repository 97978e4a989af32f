import hashlib
import json
import tarfile

import pytest

from pipeline.atomic import write_atomically
from pipeline.clip import make_record
from pipeline.errors import Reason, ShardError
from pipeline.shards import RejectedClip, ShardWriter, find_intact, read_receipt

RECORD = make_record("vid-1", 1.0, 2.5, 1.7, "#C C picks up a cup", (3,), (1, 2))


def write(out_dir, key="key", frames=(b"\xff\xd8one\xff\xd9", b"\xff\xd8twotwo\xff\xd9")):
    with ShardWriter(out_dir, "shard-00000") as writer:
        writer.add(RECORD, frames, [1.25, 1.25], height=4, width=6)
        return writer.finish(key, [])


def test_the_tar_is_plain_and_its_offsets_point_at_the_frames(tmp_path):
    receipt = write(tmp_path)
    content = (tmp_path / "shard-00000.tar").read_bytes()
    assert receipt.bytes == len(content)
    assert receipt.sha256 == hashlib.sha256(content).hexdigest()
    (clip,) = receipt.clips
    # One header block of 512 bytes before each member, contents padded to 512.
    assert clip.frame_offsets == (512, 1536)
    assert content[512:519] == b"\xff\xd8one\xff\xd9"
    assert content[1536:1546] == b"\xff\xd8twotwo\xff\xd9"
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        members = tar.getmembers()
        text = tar.extractfile(members[2])
        assert text is not None
        facts = json.load(text)
    assert [m.name for m in members] == [f"{RECORD.clip_id}{end}" for end in (".00.jpg", ".01.jpg", ".json")]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
    assert facts == {
        "caption": "#C C picks up a cup",
        "end_s": 2.5,
        "frame_times_s": [1.25, 1.25],
        "narration_s": 1.7,
        "nouns": [1, 2],
        "start_s": 1.0,
        "verbs": [3],
        "video_uid": "vid-1",
    }


def test_repeated_frames_are_counted(tmp_path):
    assert write(tmp_path).repeated_frames == 1


def test_equal_input_gives_equal_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    for name in ("shard-00000.tar", "shard-00000.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    def interrupt():
        with ShardWriter(tmp_path, "shard-00000") as writer:
            writer.add(RECORD, [b"x", b"y"], [1.0, 2.0], 4, 6)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_shard_is_found_again_by_its_content_key(tmp_path):
    receipt = write(tmp_path)
    assert find_intact(tmp_path, "shard-00000", "key") == receipt
    assert find_intact(tmp_path, "shard-00000", "other key") is None


@pytest.mark.parametrize(
    "damage", ["cut", "flip", "missing tar", "receipt cut", "receipt empty", "receipt missing"]
)
def test_any_damage_makes_a_shard_unfinished(tmp_path, damage):
    write(tmp_path)
    tar, receipt = tmp_path / "shard-00000.tar", tmp_path / "shard-00000.json"
    content = bytearray(tar.read_bytes())
    if damage == "cut":
        tar.write_bytes(content[:-512])
    elif damage == "flip":
        content[514] ^= 1
        tar.write_bytes(content)
    elif damage == "missing tar":
        tar.unlink()
    elif damage == "receipt cut":
        receipt.write_bytes(receipt.read_bytes()[:-20])
    elif damage == "receipt empty":
        receipt.write_bytes(b"")
    else:
        receipt.unlink()
    assert find_intact(tmp_path, "shard-00000", "key") is None


def test_a_shard_without_clips_is_a_receipt_only(tmp_path):
    rejected = RejectedClip(
        clip_id="c", video_uid="v", start_s=0, end_s=1, reason=Reason.MISSING_VIDEO, detail="no file"
    )
    with ShardWriter(tmp_path, "shard-00000") as writer:
        receipt = writer.finish("key", [rejected])
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.json"]
    assert find_intact(tmp_path, "shard-00000", "key") == receipt


def test_a_damaged_receipt_says_what_to_do(tmp_path):
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ShardError, match="Run prepare again"):
        read_receipt(tmp_path / "r.json")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
