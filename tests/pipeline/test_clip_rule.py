import pytest

from pipeline.clip_rule import NarrationTimes, clips_by_rule, mean_gap
from pipeline.config import ClipRuleConfig
from pipeline.errors import DataError


def spans(result):
    return [(clip.start_s, clip.end_s) for clip in result.clips]


def test_the_first_row_of_egoclip_is_reproduced():
    # b = 3.6926 s and a = 4.9 s give the published width 0.7536 s around t = 3.3445 s.
    times_s = (3.3445, 3.3445 + 3.6926)
    result = clips_by_rule({"v": NarrationTimes(None, {"one": times_s})}, ClipRuleConfig(mean_gap_s=4.9))
    clip = result.clips[0]
    assert clip.end_s - clip.start_s == pytest.approx(0.7536, abs=1e-4)
    assert clip.start_s == pytest.approx(2.967651, abs=2e-4)
    assert clip.end_s == pytest.approx(3.721266, abs=2e-4)


def test_the_width_is_the_gap_of_the_video_over_the_mean_gap_of_all():
    videos = {
        "slow": NarrationTimes(100.0, {"one": (10.0, 13.0, 16.0)}),
        "fast": NarrationTimes(100.0, {"one": (10.0, 11.0, 12.0)}),
    }
    result = clips_by_rule(videos, ClipRuleConfig())
    # gaps 3 and 1, so a = 2 and the widths are 1.5 and 0.5
    assert result.mean_gap_s == 2.0
    assert spans(result)[0] == (9.25, 10.75)
    assert spans(result)[3] == (9.75, 10.25)


def test_the_gap_is_taken_per_pass_or_over_both_passes():
    videos = {"v": NarrationTimes(100.0, {"one": (10.0, 14.0), "two": (10.0, 12.0)})}
    per_pass = clips_by_rule(videos, ClipRuleConfig(mean_gap_s=2.0))
    assert spans(per_pass) == [(9.0, 11.0), (13.0, 15.0), (9.5, 10.5), (11.5, 12.5)]
    # 10, 10, 12, 14: three gaps over four seconds; a = 4/3 gives a width of 1
    pooled = clips_by_rule(videos, ClipRuleConfig(mean_gap_s=4 / 3, per_pass=False))
    assert spans(pooled)[0] == pytest.approx((9.5, 10.5))


def test_a_video_counts_once_in_the_mean_whatever_its_passes():
    videos = {
        "two passes": NarrationTimes(100.0, {"one": (0.0, 1.0), "two": (0.0, 3.0)}),
        "one pass": NarrationTimes(100.0, {"one": (0.0, 8.0)}),
    }
    assert clips_by_rule(videos, ClipRuleConfig()).mean_gap_s == 5.0


def test_clips_are_clamped_to_the_video_and_counted():
    videos = {"v": NarrationTimes(10.0, {"one": (0.1, 5.0, 9.9)})}
    result = clips_by_rule(videos, ClipRuleConfig(mean_gap_s=4.9))
    edges_s = [edge for span in spans(result) for edge in span]
    assert edges_s == pytest.approx([0.0, 0.6, 4.5, 5.5, 9.4, 10.0])
    assert (result.counts["start_clamped"], result.counts["end_clamped"]) == (1, 1)


def test_without_clamping_starts_may_be_negative_as_in_egoclip():
    videos = {"v": NarrationTimes(10.0, {"one": (0.1, 5.0, 9.9)})}
    result = clips_by_rule(videos, ClipRuleConfig(mean_gap_s=4.9, clamp=False))
    assert spans(result)[0] == pytest.approx((-0.4, 0.6))


def test_a_clip_behind_the_end_of_the_video_is_dropped_and_counted():
    videos = {"v": NarrationTimes(8.0, {"one": (0.5, 5.0, 9.5)})}
    result = clips_by_rule(videos, ClipRuleConfig(mean_gap_s=4.5))
    assert len(result.clips) == 2
    assert result.counts["dropped_empty"] == 1
    assert result.counts["narrations"] == 3


def test_clips_under_the_shortest_length_are_dropped_and_counted():
    videos = {"v": NarrationTimes(10.0, {"one": (0.1, 5.0, 9.0)})}
    result = clips_by_rule(videos, ClipRuleConfig(mean_gap_s=4.45, min_clip_s=0.7))
    assert result.counts["dropped_short"] == 1
    assert result.counts["clips"] == 2


def test_one_narration_has_no_width_and_is_skipped_with_a_reason():
    videos = {"lonely": NarrationTimes(10.0, {"one": (5.0,)}), "v": NarrationTimes(10.0, {"one": (2.0, 4.0)})}
    result = clips_by_rule(videos, ClipRuleConfig())
    assert [clip.video_uid for clip in result.clips] == ["v", "v"]
    assert result.skipped[0][:2] == ("lonely", "one")
    assert "one narration" in result.skipped[0][2]
    assert result.counts["in_skipped_passes"] == 1


def test_nothing_but_lonely_narrations_gives_no_clip_and_no_mean():
    result = clips_by_rule({"v": NarrationTimes(10.0, {"one": (5.0,)})}, ClipRuleConfig())
    assert (result.clips, result.mean_gap_s) == ((), None)


def test_equal_times_everywhere_are_refused():
    with pytest.raises(DataError, match="share one time"):
        clips_by_rule({"v": NarrationTimes(10.0, {"one": (5.0, 5.0)})}, ClipRuleConfig())


def test_the_mean_gap_is_the_span_over_the_number_of_gaps():
    assert mean_gap((1.0, 2.0, 7.0)) == 3.0
    assert mean_gap((1.0,)) is None
