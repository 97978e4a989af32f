"""Tests of the compiled kernel are skipped where it cannot be built."""

import pytest

from model.kernel_build import unavailable_reason


@pytest.fixture(autouse=True)
def _skip_fused_without_compiler(request: pytest.FixtureRequest) -> None:
    if "fused" in request.node.name and (reason := unavailable_reason()):
        pytest.skip(reason)
