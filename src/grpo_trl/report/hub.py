"""Uploads the completions of a run to a dataset of the hub, while it trains."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from huggingface_hub import CommitScheduler, DatasetCard

from .tolerant import tolerated


EVERY = 2
"""Minutes between two uploads, as in TRL."""
CARD = """---
tags: [grpo_trl, completions]
---
# Completions

Prompts, completions, rewards and advantages of a run of GRPO with `grpo_trl`, one file per logged step.
"""


class CompletionsUpload:
    """Uploads the parquet files of a folder every two minutes; what fails is a warning.

    Args:
        repo: The dataset on the hub, which is made if it does not exist.
        folder: Where the files are.
        private: Whether a new dataset is private; None as the account has it.
        token: For the hub; None takes that of the machine.
    """

    def __init__(self, repo: str, folder: Path, private: bool | None, token: str | None):
        self._scheduler: CommitScheduler | None = None
        self._what = f"Uploading completions to {repo}"
        with tolerated(self._what):
            self._scheduler = CommitScheduler(
                repo_id=repo,
                repo_type="dataset",
                folder_path=folder,
                every=EVERY,
                private=private,
                token=token,
                allow_patterns=["*.parquet"],
            )
            DatasetCard(CARD).push_to_hub(self._scheduler.repo_id, token=token)

    def writing(self) -> AbstractContextManager[object]:
        """Return what to enter while a file is written, so that no half of it is uploaded."""
        return nullcontext() if self._scheduler is None else self._scheduler.lock

    def finish(self) -> None:
        """Upload what is new, wait for it, and stop."""
        if self._scheduler is not None:
            with tolerated(self._what):
                self._scheduler.trigger().result()
            self._scheduler.stop()
