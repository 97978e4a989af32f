"""Is search any good: `python -m tests.soak.search_demo --workspace demo --folder SCRATCH [--run NAME]`.

Exports a finished run on the demo's videos (the demo's own by default), embeds its videos in pieces of a second that
begin every half second, and asks for sentences that were narrated in them, as `svitt search` does. A hit: at least half
of the best piece lies in the window of a narration of the same action (verb and noun; several sentences name one).
Prints the share of hits beside that of a piece drawn at random, for all videos and for the held-out ones, of which
training has seen nothing.
"""

import argparse
import csv
import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console

from jobs.embed import embed
from jobs.export import export
from jobs.exported import load_exported
from jobs.progress import ProgressReport
from jobs.run_dir import RunDir

CLIP_S, STRIDE_S = 1.0, 0.5
HALF_WINDOW_S = 0.5  # about that of the training clips: 0.43 to 0.58 s


def actions(annotations: Path) -> dict[str, str]:
    """Which action each narrated sentence of the training videos names."""
    with annotations.open(newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {row["clip_text"]: f"{row['tag_verb']} {row['tag_noun']}" for row in rows}


def narrations(world: Path, uids: set[str], named: dict[str, str]) -> list[tuple[str, float, str]]:
    """(video, seconds, action) of the narrations of some videos."""
    told = json.loads((world / "narration.json").read_text())["videos"]
    return [
        (uid, float(line["timestamp_sec"]), named.get(line["narration_text"], ""))
        for uid in sorted(uids)
        for name in ("narration_pass_1", "narration_pass_2")
        for line in told[uid].get(name, {"narrations": []})["narrations"]
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--workspace", type=Path, required=True, help="of a finished demo")
    arguments.add_argument("--run", default="demo", help="its name in the workspace")
    arguments.add_argument("--folder", type=Path, required=True)
    arguments.add_argument("--queries", type=int, default=100)
    given = arguments.parse_args()
    world, folder = given.workspace / "world", given.folder
    report = ProgressReport(Console())
    export(RunDir((given.workspace / "runs" / given.run).resolve()), folder / "model", None, report)
    table = folder / "clips.parquet"
    embed(folder / "model", world / "videos", table, CLIP_S, 16, "cpu", report, STRIDE_S)

    rows = pq.read_table(table)
    features_NP = np.stack(rows["feature"].to_numpy(zero_copy_only=False))
    pieces = [(Path(row["path"]).stem, row["start_s"], row["end_s"]) for row in rows.to_pylist()]
    model = load_exported(folder / "model")
    named = actions(given.workspace / "annotations" / "egoclip.csv")
    splits = json.loads((world / "splits.json").read_text())
    for name, uids in (("all", {*splits["train"], *splits["heldout"]}), ("held-out", set(splits["heldout"]))):
        told = narrations(world, uids, named)
        shown = {action for _, _, action in told}
        sentences = sorted(sentence for sentence, action in named.items() if action in shown)
        asked = random.Random(0).sample(sentences, min(given.queries, len(sentences)))
        chosen = [number for number, (uid, _, _) in enumerate(pieces) if uid in uids]
        scores_QN = model.encode_sentences(asked).numpy() @ features_NP[chosen].T
        hits, by_chance = 0, 0.0
        for scores_N, sentence in zip(scores_QN, asked, strict=True):
            shows = [is_shown(pieces[number], named[sentence], told) for number in chosen]
            hits += shows[int(scores_N.argmax())]
            by_chance += sum(shows) / len(shows)
        print(
            f"{name}: {len(asked)} queries over {len(chosen)} pieces of {len(uids)} videos: named action first "
            f"{100 * hits / len(asked):.0f} %, by chance {100 * by_chance / len(asked):.1f} %"
        )


def is_shown(piece: tuple[str, float, float], action: str, told: list[tuple[str, float, str]]) -> bool:
    """Whether at least half of a piece lies in the window of a narration of this action."""
    uid, start_s, end_s = piece
    return any(
        min(end_s, time_s + HALF_WINDOW_S) - max(start_s, time_s - HALF_WINDOW_S) >= (end_s - start_s) / 2
        for video, time_s, named in told
        if video == uid and named == action
    )


if __name__ == "__main__":
    main()
