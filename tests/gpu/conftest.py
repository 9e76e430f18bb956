"""Tests that need a CUDA GPU; `make gpu` runs them."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Mark what stands in this folder, and skip it where there is no GPU."""
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker("gpu")
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")
