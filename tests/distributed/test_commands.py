"""Command lines that the README and docs/deepspeed.md show, on two CPU processes with local files.

All train the same two steps: completions follow from their prompts, whatever the number of ranks, so the log is that of one
process with the same batch.
"""

import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.models import make_model, make_tokenizer


pytestmark = [
    pytest.mark.backends,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"),
]
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
EXTENSIONS = Path.home() / ".cache" / "grpo_trl" / "torch_extensions"
"""DeepSpeed compiles with other options here than in test_backends.py: in one folder each would build it again."""
TIMED = ("time", "per_second")


def shown(page, beginning):
    """The command of a page that begins so, as words."""
    lines = (ROOT / page).read_text().replace("\\\n", " ").splitlines()
    (command,) = {re.sub(r" +#.*", "", line.strip()) for line in lines if line.strip().startswith(beginning)}
    return shlex.split(command)


def local(shared, output, batch=8):
    return [
        *("--dataset", str(shared / "gsm8k"), "--model_name_or_path", str(shared / "models" / "gsm8k-mini")),
        *("--prompt_style", "plain", "--rewards", "arithmetic", "--max_steps", "2", "--max_completion_length", "40"),
        *("--per_device_train_batch_size", str(batch), "--logging_steps", "1", "--output_dir", str(output)),
        *("--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"),
        *("--seed", "1"),  # no two tokens are so nearly tied that rounding decides between them
    ]


def start(words):
    """Start a command, in a session of its own."""
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2", "PATH": f"{BIN}:{os.environ['PATH']}"}
    own |= {"TORCH_EXTENSIONS_DIR": str(EXTENSIONS)}
    return subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        env=os.environ | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(*commands):
    """What commands that run at the same time return and print; none is left behind."""
    processes = [start(words) for words in commands]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [process.returncode for process in processes], outputs


def log_of(output):
    """The entries of the steps, without times."""
    entries = [
        {name: float(value) for name, value in re.findall(r"'([^']+)': '?([-\d.e]+)", line)}
        for line in output.splitlines()
        if line.startswith("{'loss'")
    ]
    return [{k: v for k, v in entry.items() if not any(word in k for word in TIMED)} for entry in entries]


def assert_trained_as(alone, output, folder):
    entries = log_of(output)
    assert len(entries) == len(alone) == 2
    for entry, expected in zip(entries, alone, strict=True):
        assert entry == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() > 5e6
    assert (folder / "run.png").exists()


@pytest.fixture(scope="module")
def alone(shared, tmp_path_factory):
    (code,), (output,) = run(["python", "examples/gsm8k.py", *local(shared, tmp_path_factory.mktemp("one"), batch=16)])
    assert code == 0, output[-3000:]
    return log_of(output)


@pytest.mark.parametrize(
    "page, beginning",
    [
        ("README.md", "deepspeed examples/gsm8k.py --deepspeed ds_configs/zero3.json"),
        ("docs/deepspeed.md", "torchrun --nproc_per_node 8 examples/gsm8k.py --deepspeed ds_configs/zero2.json"),
        ("docs/deepspeed.md", "accelerate launch --config_file ds_configs/accelerate/zero3.yaml"),
    ],
    ids=["deepspeed", "torchrun", "accelerate"],
)
def test_gsm8k_on_two_ranks_trains_what_one_process_trains(page, beginning, shared, alone, tmp_path):
    words = ["2" if word == "8" else word for word in shown(page, beginning)]
    (code,), (output,) = run([*words, *local(shared, tmp_path)])
    assert code == 0, output[-3000:]
    assert_trained_as(alone, output, tmp_path)


@pytest.mark.parametrize("config", ["zero2_offload", "zero3_offload"])
def test_what_is_offloaded_trains_the_same(config, shared, alone, tmp_path):
    """accelerate's configuration names that of DeepSpeed; AdamW becomes DeepSpeed's for CPUs."""
    words = ["accelerate", "launch", "--config_file", f"ds_configs/accelerate/{config}.yaml", "--num_processes", "2"]
    (code,), (output,) = run([*words, "examples/gsm8k.py", *local(shared, tmp_path)])
    assert code == 0, output[-3000:]
    assert_trained_as(alone, output, tmp_path)


def test_two_machines_train_what_one_process_trains(shared, alone, tmp_path):
    """Two launchers that meet at a port, with one rank each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = [
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        f"127.0.0.1:{port}",
    ]
    words = [
        "torchrun",
        *meeting,
        "examples/gsm8k.py",
        "--deepspeed",
        "ds_configs/zero1.json",
        *local(shared, tmp_path),
    ]
    codes, outputs = run(words, words)
    assert codes == [0, 0], outputs
    for output in outputs:  # transformers logs on each machine
        assert_trained_as(alone, output, tmp_path)


def test_the_script_of_the_readme_runs_under_deepspeed(tmp_path):
    """With a small model, for two steps; `deepspeed` gives it an argument that it does not read."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    options = f"GRPOConfig(use_cpu=True, max_steps=2, report_to='none', deepspeed='{ROOT}/ds_configs/zero3.json', "
    for old, new in {
        "Qwen/Qwen2.5-0.5B": f"{tmp_path}/model",
        "GRPOConfig(": options,
        '"sums"': f'"{tmp_path}/sums"',
    }.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    code += "\nassert trainer.args.world_size == 2\ntrainer.save_model()\n"
    (tmp_path / "train.py").write_text(code)
    (code,), (output,) = run(["deepspeed", "--master_port", "29544", tmp_path / "train.py"])
    assert code == 0, output[-3000:]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "sums").num_parameters() == make_model().num_parameters()


def test_a_launch_that_would_train_each_rank_alone_is_refused(shared, tmp_path):
    words = ["torchrun", "--standalone", "--nproc_per_node", "2", "examples/gsm8k.py", *local(shared, tmp_path)]
    words[words.index("--use_cpu") + 1] = "false"
    (code,), (output,) = run(words)
    assert code != 0
    assert "WORLD_SIZE=2 processes and the trainer sees world_size=1" in output
    assert "--use_cpu true" in output
