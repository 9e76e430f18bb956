"""Tests that need a CUDA GPU; `make gpu` runs them."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Mark what stands in this folder, skip it where there is no GPU, and start with the runs, which take longest."""
    mine = [item for item in items if "tests/gpu/" in item.path.as_posix()]
    for item in mine:
        item.add_marker("gpu")
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    items[:] = [item for item in items if item not in mine] + mine[::-1]
