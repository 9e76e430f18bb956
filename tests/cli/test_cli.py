"""The command `grpo-trl`, as a user types it."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from grpo_trl.cli import app
from grpo_trl.cli.configuration import REWARDS, Configuration, known_options, options_of
from grpo_trl.cli.launch import LAUNCHED, run_options, split_launch
from grpo_trl.plan import card_named, offloaded
from grpo_trl.report import Run, RunLog
from grpo_trl.report.live import ASCII_BLOCKS, sparkline, view
from tests.conftest import make_model, make_tokenizer


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a tiny model and a dataset, which is the working directory."""
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"question": f"{i}=", "answer": f"#### {i}"} for i in range(10)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own_rewards.py").write_text(
        "def long(completions):\n    return [float(len(str(c))) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


OPTIONS = {
    "model_name_or_path": "model",
    "dataset_name": "data.jsonl",
    "prompt_template": "{question}",
    "prompt_style": "plain",
    "reward_funcs": ["own_rewards.long"],
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 4,
    "max_steps": 2,
    "learning_rate": "1e-3",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "output_dir": "out",
}


def written(folder, **changes):
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in (OPTIONS | changes).items() if value is not None}))
    return file


def test_a_configuration_trains_and_saves_the_model(folder):
    done = run("train", written(folder), "--max_steps", 3)
    assert done.exit_code == 0, done.output
    out = folder / "out"
    assert (out / "model.safetensors").exists()
    assert f"The model is in {out}. Next: grpo-trl report {out}" in done.output


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"learnin_rate": 1},
            "learnin_rate=1 is no option; did you mean learning_rate?",
        ),
        ({"model_name_or_path": None}, "name no model; set model_name_or_path"),
        ({"dataset_name": None}, "dataset_name is missing"),
        ({"dataset_train_split": "tain"}, "dataset_train_split='tain' is not in the dataset; it has 'train'"),
        (
            {"reward_funcs": ["mth_answer"]},
            "mth_answer is unknown; use a dotted path (module.function), or one of gsm8k",
        ),
        ({"reward_funcs": ["own_rewards.short"]}, "own_rewards.short cannot be imported"),
        ({"reward_funcs": None}, "reward_funcs is empty"),
        ({"prompt_template": "{quest}"}, "names the column 'quest'; the dataset has question, answer"),
        ({"num_generations": 3}, "num_generations=2 or 4"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(folder, changes, message):
    done = run("train", written(folder, **changes))
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_a_mistake_on_the_command_line_is_one_too(folder):
    done = run("plan", written(folder), "--lerning_rate", 1)
    assert done.exit_code == 2
    assert "lerning_rate='1' is no option; did you mean learning_rate?" in done.output


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [", "only words"])
def test_a_file_that_holds_no_options_is_refused(folder, content):
    (folder / "empty.yaml").write_text(content)
    assert run("train", folder / "empty.yaml").exit_code == 2


def test_a_template_makes_messages_with_a_system_prompt(folder):
    file = written(
        folder, prompt_style="chat", system_prompt="be brief", eval_strategy="epoch", dataset_test_split="train"
    )
    train, evaluation = Configuration.parse(options_of(file)).datasets()
    assert train[3]["prompt"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "3="}]
    assert evaluation[3] == train[3]


@pytest.mark.parametrize("split, rows", [("train", 10), ("train[:3]", 3), ("train[:99]", 10)])
def test_a_split_may_be_its_first_rows(folder, split, rows):
    train, _ = Configuration.parse(OPTIONS | {"dataset_train_split": split}).datasets()
    assert [row["question"] for row in train] == [f"{i}=" for i in range(rows)]


def test_a_configuration_of_trl_is_taken_as_it_is(folder):
    """The options that documentation of `trl grpo` shows, environment variables included."""
    (folder / "prompts.jsonl").write_text('{"prompt": "1="}\n')
    file = folder / "trl.yaml"
    file.write_text(
        "env:\n  GRPO_TRL_TEST: 7\nmodel_name_or_path: model\ndtype: bfloat16\nuse_peft: true\nlora_r: 4\n"
        "lora_target_modules: [q_proj]\ndataset_name: prompts.jsonl\nreward_funcs:\n  - think_format_reward\n"
        "output_dir: out\nlearning_rate: 1.0e-5\nnum_generations: 8\nuse_cpu: true\nreport_to: none\n"
    )
    configuration = Configuration.parse(options_of(file))
    assert (configuration.training.learning_rate, configuration.training.num_generations) == (1e-5, 8)
    assert configuration.model_init_kwargs()["dtype"] == "bfloat16"
    assert [func.__name__ for func in configuration.reward_funcs()] == ["think_format_reward"]
    assert configuration.datasets()[0][0]["prompt"] == "1="


@pytest.mark.parametrize("words", [(), ("--gpu", "H100")], ids=str)
def test_a_run_in_fp16_is_planned_on_any_card(folder, words):
    assert run("plan", written(folder, fp16=True), *words).exit_code == 0


@pytest.mark.parametrize("flag", ["--no_shuffle_dataset", "--no-shuffle-dataset"])
def test_a_switch_that_is_on_can_be_turned_off_on_the_command_line(folder, flag):
    assert not Configuration.parse(options_of(written(folder)), [flag]).training.shuffle_dataset


def test_options_of_the_launcher_are_told_from_those_of_the_run():
    options = {"num_processes": 4, "accelerate_config": "zero3", "learning_rate": 1e-6, "debug": "underflow_overflow"}
    words = ["--num_processes=2", "--beta", "0.1", "--main-process-port", "29501", "--multi_gpu"]
    launched = split_launch(options, words, known_options())
    assert launched.options == {
        "num_processes": "2",
        "accelerate_config": "zero3",
        "main_process_port": "29501",
        "multi_gpu": True,
    }
    assert launched.training == {"learning_rate": 1e-6, "debug": "underflow_overflow"}
    assert launched.words == ["--beta", "0.1"]


def test_a_configuration_with_options_of_accelerate_launch_is_launched_once(folder, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda program, words, environment: started.append((words, environment)))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv(LAUNCHED, raising=False)
    file = written(folder, num_processes=2, accelerate_config="zero2", env={"GRPO_TRL_TEST": 7})
    assert run("train", file, "--max_steps", 1).exit_code == 0  # what stands in for execve returns
    ((words, environment),) = started
    assert words[1:4] == ["-m", "accelerate.commands.launch", words[3]]
    assert words[3].endswith("zero2.yaml")
    assert "--num_processes=2" in words
    assert words[-6:] == ["--module", "grpo_trl", "train", str(file), "--max_steps", "1"]
    assert environment["GRPO_TRL_TEST"] == "7"
    monkeypatch.setenv(LAUNCHED, environment[LAUNCHED])
    assert run("train", file, "--max_steps", 1).exit_code == 0
    assert len(started) == 1
    assert "on each of 2 ranks" in run("plan", file).output
    monkeypatch.delenv(LAUNCHED)
    for command in ("plan", "train"):
        done = run(command, written(folder, accelerate_config="zero9"))
        assert (done.exit_code, "one of fsdp1, fsdp2" in done.output) == (2, True)


OFFLOADED = {"use_deepspeed": True, "zero_stage": 2, "offload_optimizer_device": "cpu", "num_processes": 2}


@pytest.mark.parametrize(
    "launched, planned",
    [
        ({"accelerate_config": "zero3"}, "ZeRO-3, bf16"),
        ({"accelerate_config": "fsdp2"}, "FSDP2, float32"),
        ({"accelerate_config": "multi_gpu"}, "DDP, float32"),
        ({"accelerate_config": "single_gpu"}, "one process"),
        (OFFLOADED, "ZeRO-2, bf16"),
    ],
)
def test_the_plan_is_of_what_accelerate_would_launch(folder, launched, planned):
    options = {"num_generations": 2, "per_device_train_batch_size": 2}
    output = run("plan", written(folder, **options, **launched)).output
    assert planned in output
    ranks = 1 if "single" in str(launched) else launched.get("num_processes", 8)
    assert f"on each of {ranks} rank" in output
    assert "on each of 3 ranks" in run("plan", written(folder, **options, **launched), "--ranks", 3).output


def test_what_accelerate_offloads_is_offloaded_in_the_plan():
    assert offloaded(run_options(OFFLOADED)["deepspeed"]) == ["optimizer"]
    assert offloaded(run_options(OFFLOADED | {"offload_param_device": "nvme"})["deepspeed"]) == ["optimizer", "param"]
    assert offloaded(run_options({"accelerate_config": "zero3"})["deepspeed"]) == []


MIXTURE = [
    {"path": "json", "data_files": "data.jsonl", "fraction": 0.25},
    {"path": "json", "data_files": "more.jsonl", "fraction": 0.75},
]


@pytest.fixture
def more(folder):
    rows = [{"question": f"{i}+{i}=", "answer": f"#### {2 * i}"} for i in range(60)]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_several_datasets_are_mixed_by_their_fractions(more):
    file = written(more, dataset_name=None, datasets=MIXTURE)
    train, _ = Configuration.parse(options_of(file)).datasets()
    assert sorted("+" in prompt for prompt in train["prompt"]) == [False] * 10 + [True] * 30
    done = run("train", file)
    assert done.exit_code == 0, done.output


def test_several_datasets_are_streamed_and_split(more):
    whole = [{name: value for name, value in one.items() if name != "fraction"} for one in MIXTURE]
    done = run("train", written(more, dataset_name=None, datasets=whole, streaming=True))
    assert done.exit_code == 0, done.output
    file = written(more, dataset_name=None, datasets=whole, test_split_size=0.1, eval_strategy="steps")
    assert [len(one) for one in Configuration.parse(options_of(file)).datasets()] == [63, 7]


def test_a_stream_is_not_split(more):
    file = written(more, dataset_name=None, datasets=MIXTURE, streaming=True, test_split_size=0.1)
    done = run("train", file)
    assert (done.exit_code, "test_split_size=0.1 cannot split streamed datasets" in done.output) == (2, True)


def test_a_file_is_streamed(folder):
    done = run("train", written(folder, dataset_streaming=True))
    assert done.exit_code == 0, done.output
    done = run("train", written(folder, dataset_streaming=True, max_steps=None))
    assert (done.exit_code, "train_dataset is streamed" in done.output) == (2, True), done.output


@pytest.mark.parametrize("name", REWARDS)
def test_every_ready_made_reward_is_callable(name):
    if name == "accuracy_reward":
        pytest.importorskip("math_verify")
    assert callable(REWARDS[name](100))


def test_what_init_writes_can_be_planned(folder):
    rows = [json.dumps({"question": f"{i}=", "answer": f"#### {i}"}) for i in range(16)]
    (folder / "data.jsonl").write_text("\n".join(rows))
    done = run("init", "new.yaml", "--model", "model", "--dataset", "data.jsonl", "--output", "here")
    assert done.exit_code == 0, done.output
    assert run("init", "new.yaml").exit_code == 2  # nothing is overwritten
    done = run("plan", "new.yaml", "--ranks", 2, "--gpu", "h100")
    assert done.exit_code == 0, done.output
    assert "16 prompts x 8 = 128 completions, 64 on each of 2 ranks" in done.output
    assert "H100, estimated: at least" in done.output
    assert "ZeRO-3 with offload" in done.output


def test_the_plan_needs_no_gpu_no_engine_and_no_weights(folder):
    (folder / "model" / "model.safetensors").unlink()
    zero = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    file = written(folder, bf16=True, use_cpu=False, deepspeed=zero, report_to="wandb")
    done = run("plan", file, "--ranks", 4, "--gpu-memory", 1)
    assert done.exit_code == 0, done.output
    assert "ZeRO-3, bf16" in done.output
    assert "1 GiB: fits" in done.output


def test_quantized_weights_take_half_a_byte_or_a_little_more(folder):
    from grpo_trl.cli.planned import planned_run

    file = written(folder, load_in_4bit=True, use_peft=True, lora_target_modules="all-linear", tie_word_embeddings=None)
    job = planned_run(file, [], 1, card_named("L4"), None).setup.job
    assert 0.56 < job.frozen_bytes < 2


def logged(folder):
    log = RunLog(folder / "out")
    log.start(0, 4, {})
    for step in (1, 2):
        log.entry(step, {"reward": step / 2, "step_time": 30.0, "time/sampling": 1.0, "time/update": 3.0})
        columns = {"prompt": ["p", "p"], "completion": ["right \x1b[2J[bold]", "wrong"], "advantage": [0.7, -0.7]}
        log.completions(step, columns, 2)
    return log


def test_a_run_is_watched_until_it_ends(folder):
    log = logged(folder)
    done = run("watch", "out", "--once")
    assert done.exit_code == 0, done.output
    for part in (
        "step 2 of 4",
        "0:01:00 left",
        "▁█",
        "sampling 25%",
        "best completion",
        "right \\x1b[2J[bold]",
        "wrong",
    ):
        assert part in done.output
    log.end(2)
    assert "ended" in run("watch", "out").output
    assert run("watch", "model").exit_code == 2


def test_a_watch_ends_with_the_reason_of_a_run_that_stopped(folder):
    log = logged(folder)
    log.stop(2, "a signal")
    assert "stopped: a signal" in run("watch", "out").output
    log.start(2, 4, {})
    assert not Run.read("out").over  # resumed, by this process
    lines = (folder / "out" / "log.jsonl").read_text().replace(f'"pid": {os.getpid()}', '"pid": 4194999')
    (folder / "out" / "log.jsonl").write_text(lines)  # no process has this number
    assert "stopped: its process is gone" in " ".join(run("watch", "out").output.split())


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_view_has_only_characters_of_its_terminal(folder, encoding):
    log = logged(folder)
    table = {"prompt": ["p", "p"], "completion": ["caf\u00e9 \u25c6", "wrong"], "advantage": [0.7, -0.7]}
    log.completions(3, table, 2)
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding)
    Console(file=terminal, width=80).print(view(Run.read("out"), folder / "out"))
    terminal.flush()
    shown = written.getvalue().decode(encoding)
    assert "caf\u00e9 \u25c6" in shown or "caf\\xe9 \\u25c6" in shown
    assert sparkline([0.5, 1.0]) in shown or sparkline([0.5, 1.0], blocks=ASCII_BLOCKS) in shown


def test_a_report_is_written_beside_the_run(folder):
    pytest.importorskip("plotly")
    logged(folder)
    done = run("report", "out", "--png", "curves.png")
    assert done.exit_code == 0, done.output
    assert (folder / "out" / "report.html").exists()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert Run.read("out").step == 2
    assert run("report", "model").exit_code == 2


@pytest.mark.parametrize("command", [[], ["train"], ["plan"], ["init"], ["watch"], ["report"]])
def test_help_fits_on_a_screen(command):
    lines = run(*command, "--help").output.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "line, completed", [("grpo-trl p", ["plan"]), ("grpo-trl plan --gpu", ["--gpu", "--gpu-memory"])]
)
def test_a_shell_completes_commands_and_options(line, completed):
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = CliRunner().invoke(app, [], env={"_GRPO_TRL_COMPLETE": "complete_bash"} | variables, prog_name="grpo-trl")
    assert done.output.split() == completed


@pytest.fixture
def heeding_interrupts():
    """What a shell starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "reward, code, message",
    [
        ("return [1.0] * len(completions)", 1, "Stopped: "),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 75, ""),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, ""),
    ],
    ids=["guard", "signal", "interrupt"],
)
def test_a_run_that_stops_has_the_exit_code_of_the_page(folder, reward, code, message, heeding_interrupts):
    (folder / "stopping_rewards.py").write_text(f"import os, signal, time\ndef stops(completions):\n    {reward}\n")
    changes = {"reward_funcs": ["stopping_rewards.stops"], "dead_run_patience": 1, "on_dead_run": "stop"}
    done = run("train", written(folder, save_strategy="steps", save_steps=9, max_steps=9, **changes))
    sys.modules.pop("stopping_rewards")
    assert (done.exit_code, message in done.output) == (code, True), done.output
    assert f"\n| {code} | " in (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    assert Run.read("out").stopped


def test_help_and_completion_load_no_torch():
    code = "import sys, grpo_trl.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_help_names_the_exit_codes():
    output = " ".join(run("--help").output.split())
    assert "0 done, 1 stopped by a guard, 2 mistake, 75 signal, 130 Ctrl-C" in output


def test_retired_names_of_a_file_and_of_the_command_line_are_read(folder, caplog):
    file = written(folder, warmup_ratio=0.25, overwrite_output_dir=True, torch_dtype="float32")
    job = Configuration.parse(options_of(file), ["--max_new_tokens", "3"])
    assert (job.training.warmup_steps, job.training.max_completion_length, job.model.dtype) == (0.25, 3, "float32")
    done = run("plan", file, "--use_liger_loss=maybe")
    assert done.exit_code == 2
    assert "use_liger_loss='maybe' is no option; remove it" in " ".join(done.output.split())
