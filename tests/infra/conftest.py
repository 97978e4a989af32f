"""Modules beside the tests are importable, also in the processes the tests start."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
