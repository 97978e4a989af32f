"""The model against vectors of the published code, in every folder of `tests/golden` and in $SVITT_GOLDEN."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from model.attention import Backend
from tests.model import golden_cases
from tests.model.golden_set import GoldenSet
from tests.model.self_made_set import write_set

_FOLDERS = sorted(path.parent for path in (Path(__file__).parents[1] / "golden").glob("*/manifest.json"))
_FOLDERS += [Path(folder) for folder in os.environ.get("SVITT_GOLDEN", "").split(os.pathsep) if folder]
SETS = [GoldenSet(folder) for folder in _FOLDERS]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # On matrices this small, threads wait for one another longer than they work.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _cases(kind: str, only: str | None = None) -> list[object]:
    """Every case of a kind; `only` "free" of quirks, "quirky", or of a "curve"."""
    chosen = []
    for golden in SETS:
        for name in golden.names(kind):
            case = golden.case(name)
            needs = bool(case.get("needs_official_quirks"))
            curve = "token_3d_order" in case.get("vision_encoder_args", {})
            if only is None or {"free": not needs, "quirky": needs, "curve": curve}[only]:
                chosen.append(pytest.param(golden, name, id=f"{golden.folder.name}-{name}"))
    return chosen


@pytest.mark.parametrize(("golden", "name"), _cases("encoder"))
def test_encoder_with_quirks_equals_the_published_code(golden: GoldenSet, name: str) -> None:
    golden_cases.check_encoder(golden, name, quirks=True)


# Interpreted, the Triton kernels would take minutes here; their own tests hold them to the reference.
@pytest.mark.parametrize("backend", sorted(set(get_args(Backend)) - {"auto", "triton"}))
@pytest.mark.parametrize(("golden", "name"), _cases("encoder", "free"))
def test_corrected_encoder_equals_the_published_code_where_no_quirk_acts(
    golden: GoldenSet, name: str, backend: Backend
) -> None:
    golden_cases.check_encoder(golden, name, quirks=False, backend=backend)


@pytest.mark.parametrize(("golden", "name"), _cases("encoder", "quirky"))
def test_corrected_encoder_differs_where_a_quirk_acts(golden: GoldenSet, name: str) -> None:
    assert golden_cases.difference_without_quirks(golden, name) > 10 * golden_cases.HIDDEN


@pytest.mark.parametrize(("golden", "name"), _cases("encoder", "curve"))
def test_curves_through_the_clip_are_the_published_ones(golden: GoldenSet, name: str) -> None:
    golden_cases.check_token_order(golden, name)


@pytest.mark.parametrize("golden", SETS, ids=lambda golden: golden.folder.name)
def test_random_blocks_follow_from_the_numbers_drawn(golden: GoldenSet) -> None:
    assert sum(golden_cases.check_choice_of_blocks(golden, name) for name in golden.names("encoder"))


@pytest.mark.parametrize("golden", SETS, ids=lambda golden: golden.folder.name)
def test_rows_of_the_position_tables_are_the_published_ones(golden: GoldenSet) -> None:
    for path in golden.folder.glob("tables_T*.safetensors"):
        golden_cases.check_position_rows(golden, int(path.stem.removeprefix("tables_T")))


@pytest.mark.parametrize(("golden", "name"), _cases("inflate"))
def test_inflated_tables_are_the_published_ones(golden: GoldenSet, name: str) -> None:
    golden_cases.check_inflation(golden, name)


@pytest.mark.parametrize(("golden", "name"), _cases("pretrain"))
def test_pretraining_pass_equals_the_published_code(golden: GoldenSet, name: str) -> None:
    golden_cases.check_pretraining(golden, name)


@pytest.mark.parametrize(("golden", "name"), _cases("pretrain"))
def test_all_text_layers_with_video_equal_the_published_code(golden: GoldenSet, name: str) -> None:
    golden_cases.check_full_stack(golden, name)


@pytest.mark.parametrize(("golden", "name"), _cases("retrieval"))
def test_retrieval_scores_equal_the_published_code(golden: GoldenSet, name: str) -> None:
    golden_cases.check_retrieval(golden, name)


def test_the_checks_take_all_sizes_from_the_folder(tmp_path: Path) -> None:
    write_set(tmp_path)
    golden = GoldenSet(tmp_path)
    golden_cases.check_position_rows(golden, 3)
    golden_cases.check_encoder(golden, "encoder_T3/both", quirks=True)
    golden_cases.check_pretraining(golden, "pretrain_both_T3")
    golden_cases.check_full_stack(golden, "pretrain_both_T3")
    golden_cases.check_retrieval(golden, "retrieval/both")
    with pytest.raises(AssertionError, match="last_hidden"):
        golden_cases.check_encoder(golden, "encoder_T3/both", quirks=False)
