"""Fixtures: a small model, its tokenizer, prompts, and the shared files where they exist."""

import os
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.helpers.garbage import freeze_imports
from tests.helpers.models import make_model, make_tokenizer


hypothesis.settings.register_profile("no deadline", deadline=None)  # of a machine that others use too
hypothesis.settings.load_profile("no deadline")
SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_finish() -> None:
    freeze_imports()


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def prompts() -> Dataset:
    """Sixteen ragged prompts with a column `answer`."""
    return Dataset.from_dict(
        {"prompt": [f"{'ab' * (i % 3)}{i}=" for i in range(16)], "answer": [str(i) for i in range(16)]}
    )


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real files that a checkout may have beside it; the test is skipped where they are not."""
    if not SHARED.is_dir():
        pytest.skip("no shared files beside this checkout")
    return SHARED
