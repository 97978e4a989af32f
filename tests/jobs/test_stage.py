"""What a stage job does before any worker starts."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import small_run

from infra.config_io import ConfigError
from jobs.stage import run_stage


def test_a_stage_job_leaves_the_heavy_imports_to_its_workers() -> None:
    """Seconds of processor time in two processes of every stage: the job and Ray Train's controlling actor."""
    code = (
        "from infra.runtime import prepare_process; prepare_process(); import sys, jobs.stage; "
        "print(sorted({'torch', 'transformers', 'nvidia.dali', 'deepspeed', 'mlflow'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_rank_leaves_out_what_it_does_not_use() -> None:
    """DeepSpeed and transformers bring MLflow, TorchDynamo, SymPy and SciPy along: 5 s of every rank's start."""
    code = (
        "from infra.runtime import prepare_process, prepare_worker; prepare_process(); prepare_worker(1); "
        "import sys, jobs.pretrain, infra.deepspeed_engine; "
        "print([name for name in ('mlflow', 'transformers', 'torch._dynamo', 'sympy') if sys.modules.get(name)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_stage_that_the_recipe_does_not_have_is_refused_before_a_cluster_is_opened(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    with pytest.raises(ConfigError, match="there is no stage 3; there are 1 to 2"):
        run_stage(run.path, 3, 1, None)


def test_a_folder_that_is_no_run_is_refused_before_a_cluster_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run directory"):
        run_stage(tmp_path, 1, 1, None)
