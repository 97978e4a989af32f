"""`evaluate` refuses what it cannot score, and says what is missing."""

from pathlib import Path

import pytest
from small_runs import small_run

from infra.config_io import ConfigError
from jobs.rescore import rescore


def test_a_stage_that_is_not_there_and_one_without_checkpoint_are_told_apart(
    tmp_path: Path, report_lines
) -> None:
    report, _ = report_lines
    run = small_run(tmp_path)
    with pytest.raises(ConfigError, match="there is no stage 9; there are 1 to 2"):
        rescore(run, 9, report)
    with pytest.raises(ConfigError, match="no checkpoint of stage 2 yet"):
        rescore(run, 2, report)
