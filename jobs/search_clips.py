"""The `search` verb: which embedded clips a sentence describes best."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.embed import MODEL_KEY, EmbedError
from jobs.exported import load_exported
from jobs.progress import ProgressReport


def search(embeddings: Path, model_dir: Path, sentence: str, top: int, report: ProgressReport) -> int:
    """Says the `top` rows of a table of `svitt embed` with the highest cosines to the sentence, best first.

    Raises EmbedError for a table that cannot be read or is of other weights, and a `top` below 1.
    """
    if top < 1:
        raise EmbedError(f"--top is {top}; expected at least 1")
    try:
        table = pq.read_table(embeddings)
        features_NP = np.stack(table["feature"].to_numpy(zero_copy_only=False))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise EmbedError(
            f"reading {embeddings} failed ({type(error).__name__}: {error}); expected a .parquet file of svitt embed"
        ) from error
    model = load_exported(model_dir)
    made_by = (table.schema.metadata or {}).get(MODEL_KEY, b"").decode()
    if made_by != model.digest:
        raise EmbedError(
            f"{embeddings} holds features of the weights {made_by[:12] or 'of an unknown model'}, {model_dir} has "
            f"{model.digest[:12]}: they cannot be compared; run svitt embed with {model_dir} again"
        )
    scores_N = features_NP @ model.encode_sentences([sentence])[0].numpy()
    # Stable, so that equal scores stand in the order of the table.
    best = np.argsort(-scores_N, kind="stable")[:top].tolist()
    for place, (row, found) in enumerate(zip(best, table.take(best).to_pylist(), strict=True), start=1):
        what = found["text"] if "text" in found else _span(found)
        report.say(f"{place:3d}  {scores_N[row]:+.3f}  {what}")
    return 0


def _span(row: dict[str, object]) -> str:
    return f"{row['path']}  {row['start_s']:.2f} to {row['end_s']:.2f} s"
