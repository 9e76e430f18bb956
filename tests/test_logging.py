"""Who says what."""

import pytest

from grpo_trl.logging import EVERY_RANK, get_logger


@pytest.mark.parametrize("rank, said", [(None, ["alike", "mine"]), ("0", ["alike", "mine"]), ("3", ["mine"])])
def test_what_ranks_find_alike_is_said_by_the_first(monkeypatch, caplog, rank, said):
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    logger = get_logger("grpo_trl.test")
    logger.warning("alike")
    logger.warning("mine", extra=EVERY_RANK)
    assert caplog.messages == said
