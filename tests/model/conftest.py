"""Tests of the compiled kernel are skipped where it cannot be built; Triton is interpreted where no GPU is."""

import os
from pathlib import Path

import pytest

from model.kernel_build import unavailable_reason

# Triton reads it when it is imported, which other packages may do.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _skip_fused_without_compiler(request: pytest.FixtureRequest) -> None:
    if "fused" in request.node.name and (reason := unavailable_reason()):
        pytest.skip(reason)
