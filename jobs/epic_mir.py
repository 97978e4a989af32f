"""EPIC-KITCHENS-100's multi-instance retrieval, both ways, on shards that `svitt prepare` made of its test clips."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jobs.encoder import HeldOutClips
from jobs.evaluate import EvaluationError
from model.multi_instance import MultiInstanceScore, multi_instance_score, relevancy
from pipeline.epic_retrieval import RetrievalSet, read_epic_retrieval
from pipeline.storage import StoragePath

TEXT_TO_VIDEO, VIDEO_TO_TEXT = "eval/epic_mir/text_to_video", "eval/epic_mir/video_to_text"
MEAN, NUM_UNREADABLE = "eval/epic_mir/mean", "eval/epic_mir/num_unreadable"
CLIPS_FILE, CAPTIONS_FILE = "EPIC_100_retrieval_test.csv", "EPIC_100_retrieval_test_sentence.csv"


@dataclass(frozen=True)
class MirEvaluation:
    """Scores under their metric names; `num_unreadable` clips have no frames and are in no ranking."""

    scores: dict[str, MultiInstanceScore]
    num_unreadable: int

    def metrics(self) -> dict[str, float]:
        """Flat names and numbers, in percent. `mean` is that of both directions, as tables have it."""
        by_name = {
            name: {
                "map": score.mean_average_precision,
                "official_map": score.official_map,
                "ndcg": score.ndcg,
            }
            for name, score in self.scores.items()
        }
        flat = {f"{name}_{kind}": value for name, own in by_name.items() for kind, value in own.items()}
        for kind in ("map", "official_map", "ndcg"):
            flat[f"{MEAN}_{kind}"] = sum(own[kind] for own in by_name.values()) / len(by_name)
        flat |= {f"{name}_n": float(score.num_queries) for name, score in self.scores.items()}
        return flat | {NUM_UNREADABLE: float(self.num_unreadable)}


def read_benchmark(folder: StoragePath) -> RetrievalSet:
    """The test split in a folder of the official `retrieval_annotations`. Raises DataError as the reader does."""
    return read_epic_retrieval(folder / CLIPS_FILE, folder / CAPTIONS_FILE)


def score_multi_instance(
    clips: HeldOutClips, benchmark: RetrievalSet, max_unreadable_share: float
) -> MirEvaluation:
    """Ranks all captions for each clip and all clips for each caption. Collective: the same result on every rank.

    A clip without frames is left out, and with it captions that no other clip fits wholly. Raises EvaluationError when
    more clips than allowed have none.
    """
    row_of = {clips.store.clip_id(row): row for row in range(len(clips.store))}
    kept = [place for place, clip in enumerate(benchmark.clips) if clip.clip_id in row_of]
    num_unreadable = len(benchmark.clips) - len(kept)
    if num_unreadable > max_unreadable_share * len(benchmark.clips) or not kept:
        raise EvaluationError(
            f"{num_unreadable} of the {len(benchmark.clips)} clips of {CLIPS_FILE} are not in "
            f"{clips.store.shards_dir} (allowed: {max_unreadable_share:.1%}); prepare them with data.egoclip set to "
            "that file and data.egoclip_format to epic_kitchens, repair what rejected.jsonl there lists, or raise "
            "evaluation.max_unreadable_share"
        )
    verbs_NV, nouns_NU = benchmark.clip_classes()
    own_clips = list(benchmark.caption_clips)
    relevance_CN = relevancy(verbs_NV[own_clips], nouns_NU[own_clips], verbs_NV[kept], nouns_NU[kept])
    answerable = np.flatnonzero((relevance_CN == 1).any(axis=1))
    relevance_CN = relevance_CN[answerable]
    text_CP = clips.text([benchmark.captions[place] for place in answerable])
    video_NP = clips.video([row_of[benchmark.clips[place].clip_id] for place in kept])
    result = None
    if clips.ranks.rank == 0:
        similarity_CN = (text_CP @ video_NP.T).numpy()
        scores = {
            TEXT_TO_VIDEO: multi_instance_score(similarity_CN, relevance_CN),
            VIDEO_TO_TEXT: multi_instance_score(similarity_CN.T, relevance_CN.T),
        }
        result = MirEvaluation(scores, num_unreadable)
    return clips.ranks.gather(result)[0]


def mir_lines(metrics: Mapping[str, float]) -> list[str]:
    """The scores for a person, one line for each direction and one for their means."""
    lines = []
    for label, name in (("text to video", TEXT_TO_VIDEO), ("video to text", VIDEO_TO_TEXT), ("mean", MEAN)):
        queries = f" (n {metrics[f'{name}_n']:.0f})" if f"{name}_n" in metrics else ""
        lines.append(
            f"EPIC-KITCHENS-100 {label}: mAP {metrics[f'{name}_official_map']:.1f} as the official code has it, "
            f"{metrics[f'{name}_map']:.1f} without partial relevance; nDCG {metrics[f'{name}_ndcg']:.1f}{queries}"
        )
    if metrics[NUM_UNREADABLE]:
        lines.append(f"{metrics[NUM_UNREADABLE]:.0f} of its clips have no frames and were left out")
    return lines
