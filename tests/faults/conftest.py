"""Makes the fakes of the jobs' tests importable, and gives Ray its variables before it is imported."""

import sys
from pathlib import Path

from infra.runtime import prepare_process

prepare_process()  # Ray reads its variables when it is imported
sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))
sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))
