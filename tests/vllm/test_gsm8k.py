"""GSM8K with a real server, by the commands of docs/vllm.md; the server is killed and started again in the middle."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .helpers import free_port


pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]


def shown(beginning, shared, output, port):
    """The command of the page that begins so: its environment, and its words with the placeholders filled in."""
    page = (ROOT / "docs" / "vllm.md").read_text().replace("\\\n", " ")
    (command,) = {line.strip() for line in page.splitlines() if re.search(beginning, line)}
    local = command.replace("PATH/model", str(shared / "models" / "gsm8k-mini")).replace(
        "PATH/gsm8k", f"{shared}/gsm8k"
    )
    words = shlex.split(local.replace("outputs/gsm8k", str(output)).replace("8000", str(port)))
    start = words.index("python")
    return dict(word.split("=") for word in words[:start]), [sys.executable, *words[start + 1 :]]


def test_a_run_goes_on_when_its_server_is_killed_and_started_again(shared, tmp_path):
    port = free_port()
    environment, serve = shown(r"openai\.api_server .*--model PATH/model", shared, tmp_path, port)
    _, train = shown(r"gsm8k\.py --dataset .*--use_vllm true", shared, tmp_path / "run", port)
    log = tmp_path / "server.log"

    def start():
        with log.open("a") as file:
            return subprocess.Popen(
                [*serve, "--port", str(port), "--max-model-len", "1024"],
                env=os.environ | environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    server = start()
    trainer = subprocess.Popen(
        [*train, "--disable_tqdm", "true", "--report_to", "none", "--max_completion_length", "60"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines = []
    try:
        for line in trainer.stdout:
            lines.append(line)
            if line.startswith("{'loss'") and sum(one.startswith("{'loss'") for one in lines) == 2:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
                time.sleep(1)
                server = start()
        assert trainer.wait(timeout=60) == 0, "".join(lines)[-3000:] + log.read_text()[-3000:]
    finally:
        for process in (trainer, server):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    output = "".join(lines)
    assert "waiting for it, to sample again from the current weights" in output
    steps = [line for line in lines if line.startswith("{'loss'")]
    assert len(steps) == 5
    differences = [re.search(r"sampling_logp_difference/mean': '?([-\d.e]+)", step) for step in steps]
    known = [float(found[1]) for found in differences if found]  # a step whose rewards are all equal trains on nothing
    assert differences[-1], steps
    assert max(known) < 1e-3
