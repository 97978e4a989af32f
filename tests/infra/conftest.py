"""Modules beside the tests are importable, also in the processes the tests start."""

import sys
from pathlib import Path

from infra.runtime import prepare_process

prepare_process()  # Ray reads its variables when it is imported
sys.path.insert(0, str(Path(__file__).parent))
