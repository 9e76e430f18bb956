"""One real server for all tests of it: starting one takes most of their time."""

import pytest

from grpo_trl.rollout.vllm.worker import EXTENSION

from .helpers import Server, make_server_engine, policy


@pytest.fixture(scope="session")
def started_server(tmp_path_factory):
    arguments = ["--worker-extension-cls", EXTENSION, "--enable-lora", "--max-lora-rank", "8"]
    with Server(policy(), tmp_path_factory.mktemp("served") / "model", *arguments).running() as server:
        yield server


@pytest.fixture
def server(started_server, tmp_path):
    """Serves `policy()`, whatever another test has left, and adapters of it."""
    make_server_engine(started_server, policy(), tmp_path / "base").sync_weights()
    return started_server
