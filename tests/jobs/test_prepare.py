import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from video_files import write_video

from jobs.data import verify
from jobs.prepare import run_prepare
from jobs.prepare_plan import plan_lines
from jobs.prepare_videos import describe_videos
from jobs.prepare_work import serial_mapper
from jobs.progress import ProgressReport
from jobs.recipe import load_recipe
from jobs.submit import require_shards
from pipeline.config import PrepareConfig
from pipeline.egoclip import EgoClipRow, write_egoclip
from pipeline.errors import DataError, Reason, ShardError, TooManyRejectedError
from pipeline.manifest import read_manifest
from pipeline.questions import read_questions
from pipeline.shard_size import size_of, write_shard_size
from pipeline.store import ClipStore
from pipeline.video_manifest import VideoFileFacts, read_videos

CONFIG = PrepareConfig(num_frames=2, short_side=48, clips_per_shard=3, max_rejected_share=0.0)
# Six videos of 6 s, train: a. Held out: p, q, r, s, t.
HELD_OUT = ("p", "q", "r", "s", "t")


def row(number, uid, start_s, text="#C C opens a box", verbs=(0,), nouns=(0,)):
    return EgoClipRow(
        number, uid, 6.0, "narration_pass_1", number, start_s + 0.5, start_s, start_s + 1, text, verbs, nouns
    )


def mcq_clip(uid, start_s, verb, noun, text):
    return {
        "video_uid": uid,
        "clip_start": start_s,
        "clip_end": start_s + 1,
        "clip_text": text,
        "narration_time": start_s + 0.5,
        "tag_verb": str([verb]),
        "tag_noun": str([noun]),
    }


def question(kind, answer, choices):
    query = {**choices[answer]}
    return {
        "types": kind,
        "answer": answer,
        "query": query,
        "choices": {str(k): c for k, c in enumerate(choices)},
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    for uid in ("a", *HELD_OUT):
        write_video(folder / "videos" / f"{uid}.mp4", num_frames=180)
    write_egoclip(folder / "egoclip.csv", [row(k, "a", 0.7 * k) for k in range(7)])
    intra = [mcq_clip("p", k, k % 2, k // 2, f"#C C does {k}") for k in range(5)]
    inter = [mcq_clip(uid, 1, 0, 0, "#C C opens a box") for uid in HELD_OUT]
    # Answer 0 opens box 0 and choice 1 closes it: a probe. For answer 4 no choice closes noun 2.
    questions = {"0": question(2, 0, intra), "1": question(1, 3, inter), "2": question(2, 4, intra)}
    (folder / "egomcq.json").write_text(json.dumps(questions))
    taxonomy = {"verbs": ["open", "close"], "nouns": ["box", "jar", "lid"], "reversed_verbs": [[0, 1]]}
    (folder / "taxonomy.json").write_text(json.dumps(taxonomy))
    return folder


def prepare(world, out_dir, config=CONFIG, mapper=serial_mapper, progress=None, **changes):
    paths = {
        "egoclip": world / "egoclip.csv",
        "egomcq_json": world / "egomcq.json",
        "videos_dir": world / "videos",
        "taxonomy": world / "taxonomy.json",
        **changes,
    }
    progress = progress or ProgressReport(Console(quiet=True))
    return run_prepare(out_dir=out_dir, config=config, mapper=mapper, progress=progress, **paths)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_both_sets_are_published_and_agree_with_the_annotations(world, tmp_path):
    result = prepare(world, tmp_path)
    assert result.train == read_manifest(tmp_path / "train")
    assert (result.train.num_clips, len(result.train.shards)) == (7, 3)
    assert (result.train.num_verbs, result.train.num_nouns) == (2, 3)
    assert result.train.taxonomy is not None
    assert result.train.source["rows"] == 7
    assert result.egomcq is not None
    # Five intra clips and five inter clips; p from 1 s stands in both, with another caption.
    assert result.egomcq.num_clips == 10
    assert set(result.train.files) == {"vocab.txt"}
    assert set(result.egomcq.files) == {"questions.json"}
    with ClipStore(tmp_path / "egomcq") as store:
        assert len(store) == 10


def test_questions_name_stored_clips_and_the_probe(world, tmp_path):
    prepare(world, tmp_path)
    question_set = read_questions(tmp_path / "egomcq")
    assert question_set.unreadable == ()
    assert [(q.question_id, q.kind, q.answer, q.is_probe) for q in question_set.questions] == [
        (0, "intra", 0, True),
        (1, "inter", 3, False),
        (2, "intra", 4, False),
    ]
    with ClipStore(tmp_path / "egomcq") as store:
        for item in question_set.questions:
            rows = store.rows_of(item.choices)
            assert store.caption(rows[item.answer]) == item.caption
            assert item.query_clip_id == item.choices[item.answer]


def test_workers_and_their_order_do_not_change_a_byte(world, tmp_path):
    def threads_backwards(fn, items):
        with ThreadPoolExecutor(2) as pool:
            yield from reversed(list(pool.map(fn, items)))

    prepare(world, tmp_path / "one")
    prepare(world, tmp_path / "two", mapper=threads_backwards)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_rerun_after_loss_and_damage_rebuilds_only_that_and_gives_the_same_bytes(world, tmp_path):
    first = prepare(world, tmp_path)
    before = contents(tmp_path)
    kept = (tmp_path / "train" / "shard-00000.tar").stat().st_mtime_ns
    (tmp_path / "train" / "shard-00001.tar").unlink()
    (tmp_path / "train" / "shard-00002.tar").write_bytes(b"half")
    (tmp_path / "train" / "manifest.json").unlink()
    (tmp_path / "train" / ".shard-00002.tar.123.partial").write_bytes(b"left over")
    second = prepare(world, tmp_path)
    assert second == first
    assert contents(tmp_path) == before
    assert (tmp_path / "train" / "shard-00000.tar").stat().st_mtime_ns == kept


def test_work_items_survive_the_way_to_another_process(world, tmp_path):
    def pickled(fn, items):
        for item in items:
            copied_fn, copied_item = pickle.loads(cloudpickle.dumps((fn, item)))
            yield pickle.loads(pickle.dumps(copied_fn(copied_item)))

    tsv = tmp_path / "egoclip.csv"
    write_egoclip(tsv, [row(0, "a", 0.0), row(1, "gone", 0.0)])
    config = CONFIG.model_copy(update={"max_rejected_share": 0.5})
    result = prepare(world, tmp_path / "out", config, pickled, egoclip=tsv)
    assert result.train.rejected_by_reason == {"missing_video": 1}


def test_a_run_that_dies_in_the_middle_leaves_no_manifest_and_is_continued(world, tmp_path):
    prepare(world, tmp_path / "calm")

    def dies(fn, items):
        for number, item in enumerate(items):
            if number == 2:
                raise KeyboardInterrupt
            yield fn(item)

    with pytest.raises(KeyboardInterrupt):
        prepare(world, tmp_path / "killed", mapper=dies)
    assert not (tmp_path / "killed" / "train" / "manifest.json").exists()
    prepare(world, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")


def test_a_table_of_the_videos_is_written_before_any_shard_and_what_it_holds_is_said(
    world, tmp_path, report_lines
):
    tsv = tmp_path / "egoclip.csv"
    write_egoclip(tsv, [row(0, "a", 0.0), row(1, "gone", 0.0), row(2, "b", 0.0), row(3, "c", 0.0)])
    videos = tmp_path / "videos"
    write_video(videos / "a.mp4", num_frames=180)
    write_video(videos / "b.mp4", num_frames=50, fps=25)
    (videos / "c.mp4").write_bytes(b"no video")
    report, said = report_lines
    out_dir = tmp_path / "out" / "train"
    seen = []

    def looks(fn, items):
        seen.append([path.name for path in sorted(out_dir.iterdir())])
        return serial_mapper(fn, items)

    changes = {"videos_dir": videos, "egoclip": tsv, "egomcq_json": None, "progress": report}
    config = CONFIG.model_copy(update={"max_rejected_share": 0.5})
    result = prepare(world, tmp_path / "out", config, looks, **changes)
    assert seen == [[], ["videos.parquet"]]
    assert result.train.rejected_by_reason == {"missing_video": 1, "not_a_video": 1}
    # 6 s and 2 s are 0.002 hours.
    expected = (
        "train: 2 videos, 0.0 hours, h264 2; 30 fps 1, 25 fps 1; 2 unusable (not_a_video 1, missing_video 1)"
    )
    assert said().count(expected) == 1
    files = read_videos(out_dir)
    assert [(facts.video_uid, facts.path, facts.num_frames, facts.reason) for facts in files] == [
        ("a", "a.mp4", 180, None),
        ("b", "b.mp4", 50, None),
        ("c", "c.mp4", None, Reason.NOT_A_VIDEO),
        ("gone", None, None, Reason.MISSING_VIDEO),
    ]
    before = contents(out_dir)
    assert prepare(world, tmp_path / "out", config, **changes) == result
    assert contents(out_dir) == before


def test_facts_of_videos_are_summed_up_in_a_line():
    def files(number, **facts):
        return [
            VideoFileFacts(f"v{k}", f"{k}.mp4", duration_s=1800.0, codec="h264", **facts)
            for k in range(number)
        ]

    # 19 files of half an hour of 7 videos: v0 has a file of each kind.
    found = [
        *files(7, fps=30000 / 1001, is_rate_varying=False),
        *files(4, fps=28.3, is_rate_varying=True),
        *files(3, fps=25.0, is_rate_varying=False, is_cut_short=True),
        *files(2, fps=60.0),
        *files(2, fps=24.0),
        *files(1),
    ]
    assert describe_videos(found) == (
        "7 videos in 19 files, 9.5 hours, h264 19; 29.97 fps 7, varying rate 4, 25 fps 3, 60 fps 2, other rates 3; "
        "3 cut short"
    )
    assert describe_videos([VideoFileFacts("v", reason=Reason.MISSING_VIDEO)]) == (
        "0 videos, 0.0 hours; 1 unusable (missing_video 1)"
    )


def tar_bytes_a_clip(out_dir):
    """Mean bytes of the clips in the tars of a set: a header of 512 bytes a member, content in blocks of 512."""
    taken, num_clips = 0, 0
    for path in out_dir.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        taken += sum(512 + -(-member.size // 512) * 512 for member in members)
        num_clips += sum(member.name.endswith(".json") for member in members)
    return taken / num_clips


def measured_config(clips_that_fit, mean_bytes):
    return CONFIG.model_copy(
        update={"clips_per_shard": None, "shard_mib": clips_that_fit * mean_bytes / 2**20}
    )


def sizes_of_shards(manifest):
    return [shard.num_clips for shard in manifest.shards]


def test_without_a_number_shards_are_cut_to_the_size_aimed_at(world, tmp_path, report_lines):
    given = prepare(world, tmp_path / "given")
    assert not (tmp_path / "given" / "train" / "shard-size.json").exists()
    mean = tar_bytes_a_clip(tmp_path / "given" / "train")
    report, said = report_lines
    # Seven clips, which are all in the sample, three and a half to a shard.
    result = prepare(world, tmp_path / "out", measured_config(3.5, mean), progress=report, egomcq_json=None)
    assert sizes_of_shards(result.train) == [3, 3, 1]
    assert [shard.sha256 for shard in result.train.shards] == [shard.sha256 for shard in given.train.shards]
    pinned = json.loads((tmp_path / "out" / "train" / "shard-size.json").read_text())
    assert (pinned["clips_per_shard"], pinned["num_measured"]) == (3, 7)
    assert pinned["mean_clip_bytes"] == mean
    assert any("(mean of 7): 3 clips for a shard of" in line for line in said())
    assert not list((tmp_path / "out" / "train").glob(".*"))


def test_a_pinned_number_is_kept_when_videos_turn_up_and_found_anew_when_the_size_changes(world, tmp_path):
    videos = tmp_path / "videos"
    write_video(videos / "a.mp4", num_frames=180)
    tsv = tmp_path / "egoclip.csv"
    write_egoclip(tsv, [row(k, "ab"[k // 4], 0.7 * (k % 4)) for k in range(8)])
    out_dir = tmp_path / "out"
    passes = []

    def counting(fn, items):
        passes.append(len(items))
        return serial_mapper(fn, items)

    def run(config):
        passes.clear()
        config = config.model_copy(update={"max_rejected_share": 0.5})
        changes = {"egoclip": tsv, "egomcq_json": None, "videos_dir": videos}
        return prepare(world, out_dir, config, counting, **changes).train

    prepare(world, tmp_path / "given", egomcq_json=None)
    mean = tar_bytes_a_clip(tmp_path / "given" / "train")
    # Both videos, the four clips of the one that is there, three shards.
    first = run(measured_config(3.5, mean))
    assert (passes, sizes_of_shards(first)) == ([2, 4, 3], [3, 1])
    # Frames of b are larger. A sample with them would give another number, and it is not taken.
    write_video(videos / "b.mp4", num_frames=180, size_HW=(48, 480))
    kept = (out_dir / "train" / "shard-00000.tar").stat().st_mtime_ns
    second = run(measured_config(3.5, mean))
    assert (passes, sizes_of_shards(second)) == ([2, 3], [3, 3, 2])
    assert (out_dir / "train" / "shard-00000.tar").stat().st_mtime_ns == kept
    third = run(measured_config(100, mean))
    assert (passes, sizes_of_shards(third)) == ([2, 8, 1], [8])
    # Another size that leads to the same cut builds nothing.
    kept = (out_dir / "train" / "shard-00000.tar").stat().st_mtime_ns
    fourth = run(measured_config(90, mean))
    assert (passes, fourth.fingerprint) == ([2, 8, 1], third.fingerprint)
    assert (out_dir / "train" / "shard-00000.tar").stat().st_mtime_ns == kept


def test_a_sample_in_which_nothing_can_be_decoded_stops_with_the_reason(world, tmp_path):
    config = CONFIG.model_copy(update={"clips_per_shard": None})
    with pytest.raises(
        DataError, match=r"train: stored a sample of 7 clips .* \(missing_video 7\), such as: no file"
    ):
        prepare(world, tmp_path / "out", config, videos_dir=tmp_path)
    assert [facts.reason for facts in read_videos(tmp_path / "out" / "train")] == [Reason.MISSING_VIDEO]


def test_a_plan_counts_shards_of_a_measured_number_once_it_is_known(world, tmp_path):
    settings = {
        "egoclip": world / "egoclip.csv",
        "egomcq": "null",
        "videos": world / "videos",
        "shards": tmp_path,
    }
    overrides = [f"data.{key}={value}" for key, value in settings.items()]
    recipe = load_recipe("demo", (*overrides, "prepare.clips_per_shard=null"))
    assert (
        "train: the number of shards of 64 MiB follows from a sample of clips that prepare stores, 0 are on disk"
        in plan_lines(recipe)
    )
    # Two clips fit, if a clip takes 25 MiB.
    write_shard_size(tmp_path / "train", size_of([25 * 2**20], recipe.prepare))
    assert "train: 4 shards of up to 2 clips, 0 are on disk" in plan_lines(recipe)


def test_fewer_clips_leave_no_stale_shard_behind(world, tmp_path):
    first = prepare(world, tmp_path)
    second = prepare(world, tmp_path, CONFIG.model_copy(update={"clips_per_shard": 7}))
    assert [path.name for path in sorted((tmp_path / "train").glob("*.tar"))] == ["shard-00000.tar"]
    assert second.train.fingerprint != first.train.fingerprint
    assert second.train.num_clips == first.train.num_clips


def test_too_many_losses_stop_with_the_list_and_lose_nothing(world, tmp_path):
    rows = [row(k, "a", 0.7 * k) for k in range(7)] + [row(9, "gone", 1.0), row(10, "gone", 2.0)]
    tsv = tmp_path / "egoclip.csv"
    write_egoclip(tsv, rows)
    with tsv.open("a") as out:
        out.write("a bad row\n")
    out_dir = tmp_path / "out"
    with pytest.raises(TooManyRejectedError) as caught:
        prepare(world, out_dir, egoclip=tsv)
    message = str(caught.value)
    assert "train: 3 of 10 clips lost (30.0%, allowed 0.0%): missing_video 2, unusable rows 1" in message
    assert "line 11: 1 cells, expected 11" in message
    assert f"listed in {out_dir / 'train' / 'rejected.jsonl'}; one of each video:" in message
    assert message.count("gone.mp4") == 1
    assert "gone (2 clips): gone_000001000_000002000_" in message
    assert len((out_dir / "train" / "rejected.jsonl").read_text().splitlines()) == 2
    assert not (out_dir / "train" / "manifest.json").exists()
    kept = (out_dir / "train" / "shard-00000.tar").stat().st_mtime_ns
    result = prepare(world, out_dir, CONFIG.model_copy(update={"max_rejected_share": 0.3}), egoclip=tsv)
    assert (result.train.num_clips, result.train.num_rejected) == (7, 2)
    assert result.train.source["counts"] == {"bad_row": 1}
    assert (out_dir / "train" / "shard-00000.tar").stat().st_mtime_ns == kept


def test_lost_rows_alone_are_named_by_line_and_not_looked_for_among_the_clips(world, tmp_path):
    tsv = tmp_path / "egoclip.csv"
    write_egoclip(tsv, [row(0, "a", 0.0), row(1, "a", 1.0, text="")])
    with pytest.raises(TooManyRejectedError) as caught:
        prepare(world, tmp_path / "out", egoclip=tsv, egomcq_json=None)
    message = str(caught.value)
    assert "1 of 2 clips lost (50.0%, allowed 0.0%): unusable rows 1" in message
    assert "line 3: clip_text is empty" in message
    assert "rejected.jsonl" not in message


def test_questions_with_an_unreadable_clip_are_counted_and_not_scored(world, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in (world / "videos").iterdir():
        (videos / path.name).write_bytes(path.read_bytes() if path.stem != "t" else b"no video")
    result = prepare(
        world, tmp_path / "out", CONFIG.model_copy(update={"max_rejected_share": 0.2}), videos_dir=videos
    )
    assert result.egomcq is not None
    assert result.egomcq.rejected_by_reason == {"not_a_video": 1}
    assert result.egomcq.source["unreadable"] == 1
    question_set = read_questions(tmp_path / "out" / "egomcq")
    assert question_set.unreadable == (1,)
    assert [q.question_id for q in question_set.questions] == [0, 2]


def test_a_run_is_refused_before_it_starts_when_a_shard_is_gone(world, tmp_path):
    prepare(world, tmp_path)
    recipe = load_recipe("demo", ("data.shards=" + str(tmp_path),))
    require_shards(recipe)
    (tmp_path / "train" / "shard-00001.tar").unlink()
    with pytest.raises(ShardError, match=r"train: shard-00001\.tar: missing\. .*run prepare again"):
        require_shards(recipe)


def test_clips_without_tags_are_prepared_and_refused_for_positives_by_action(world, tmp_path):
    pickled = tmp_path / "train.pkl"
    pickled.write_bytes(pickle.dumps([("p", 0.0, 1.0, ["#C C opens a box"]), ("p", 1.0, 2.0, "#C C waits")]))
    result = prepare(world, tmp_path / "out", egoclip=pickled, egoclip_format="lavila", taxonomy=None)
    assert (result.train.num_clips, result.train.source["has_tags"]) == (2, False)
    shards = f"data.shards={tmp_path / 'out'}"
    with pytest.raises(DataError, match=r"train\.pkl \(format lavila\) have no verb and noun classes"):
        require_shards(load_recipe("demo", (shards,)))
    require_shards(load_recipe("demo", (shards, "model.vtc_positives=identity")))


def test_without_a_taxonomy_the_tags_still_have_a_width_and_there_is_no_probe(world, tmp_path):
    result = prepare(world, tmp_path, taxonomy=None)
    assert (result.train.num_verbs, result.train.num_nouns) == (2, 3)
    assert not any(q.is_probe for q in read_questions(tmp_path / "egomcq").questions)


def test_a_tag_the_taxonomy_does_not_have_is_an_error_that_names_the_clip(world, tmp_path):
    tsv = tmp_path / "egoclip.csv"
    write_egoclip(tsv, [row(0, "a", 0.0, verbs=(7,))])
    with pytest.raises(DataError, match="verbs class 7, the taxonomy has 2 verbs"):
        prepare(world, tmp_path / "out", egoclip=tsv)


def test_a_plan_says_what_is_needed_and_absent_without_opening_a_video(world, tmp_path):
    settings = {
        "egoclip": world / "egoclip.csv",
        "egomcq": "null",
        "videos": tmp_path,
        "shards": tmp_path / "out",
    }
    overrides = [f"data.{key}={value}" for key, value in settings.items()]
    recipe = load_recipe("demo", (*overrides, "prepare.clips_per_shard=3"))
    lines = "\n".join(plan_lines(recipe))
    assert "7 rows, 7 kept" in lines
    # The last clip ends at 5.2 s.
    assert "train: 7 clips of 1 videos, 0.0 hours up to their last clips" in lines
    assert "train: 3 shards of up to 3 clips, 0 are on disk" in lines
    assert "train: 1 videos with 7 clips (100.0%, allowed 1.0%) are absent" in lines
    listed = [
        (tmp_path / "out" / "train" / f"videos-{kind}.txt").read_text() for kind in ("needed", "absent")
    ]
    assert listed == ["a\n", "a\n"]
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    lines = "\n".join(plan_lines(recipe))
    assert "train: 1 videos are there, 0.00 GiB" in lines
    assert "are absent" not in lines
    assert (tmp_path / "out" / "train" / "videos-absent.txt").read_text() == ""


class HereCluster:
    """Runs tasks in this process."""

    def map_tasks(self, fn, items):
        return ((number, fn(item)) for number, item in enumerate(items))


def test_verification_names_every_damaged_file_and_finds_nothing_in_a_whole_set(
    world, tmp_path, report_lines
):
    prepare(world, tmp_path)
    recipe = load_recipe("demo", (f"data.shards={tmp_path}",))
    report, said = report_lines
    assert verify(recipe, report, HereCluster()) == 0
    train = tmp_path / "train"
    flipped = bytearray((train / "shard-00000.tar").read_bytes())
    flipped[1000] ^= 1
    (train / "shard-00000.tar").write_bytes(flipped)
    (train / "shard-00001.tar").unlink()
    (train / "shard-00002.json").write_text("{}")
    (tmp_path / "egomcq" / "questions.json").write_text("[]")
    table = pq.read_table(tmp_path / "egomcq" / "index.parquet")
    captions = pa.array(["other", *table["caption"].to_pylist()[1:]])
    place = table.schema.get_field_index("caption")
    pq.write_table(table.set_column(place, "caption", captions), tmp_path / "egomcq" / "index.parquet")
    assert verify(recipe, report, HereCluster()) == 5
    text = "\n".join(said())
    for fault in (
        "train: shard-00000.tar: its SHA-256 differs from the manifest",
        "train: shard-00001.tar: missing",
        "train: shard-00002.json: read the receipt",
        "egomcq: questions.json: its SHA-256 differs",
        "egomcq: index.parquet: clips of shard-00000 differ from its receipt",
    ):
        assert fault in text
