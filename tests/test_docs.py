"""The pages of docs/ and the README: all pages are on the site, and every command that they show is checked or run."""

import ast
import os
import re
import runpy
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml
from trl import DatasetMixtureConfig, ModelConfig, TrlParser
from typer.testing import CliRunner

from grpo_trl import GRPOConfig
from grpo_trl.cli import app
from grpo_trl.cli.configuration import ScriptArguments
from tests.helpers.models import make_model, make_tokenizer


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NOT_RUN = {
    "pip install": "needs a package index; that the extras exist is checked here",
    "make": "the targets, which exist, are what CI calls",
    "torchrun": "starts processes: tests/distributed/test_commands.py",
    "deepspeed": "starts processes: tests/distributed/test_commands.py",
    "accelerate launch": "starts processes: tests/distributed/test_commands.py",
    "srun": "needs SLURM",
    "vllm serve": "needs vLLM: make vllm",
    "python -m vllm": "needs vLLM: tests/vllm/test_gsm8k.py",
    "cd": "the folder is that of a run with ZeRO-3",
    "python zero_to_fp32.py": "needs a checkpoint of ZeRO-3: tests/distributed/test_backends.py",
    "python examples/gsm8k.py": "needs the hub; with local files: tests/test_gsm8k.py",
    "python examples/quickstart.py": "trains for a minute: tests/test_quickstart.py",
    "python benchmarks/": "takes minutes; with small inputs: tests/test_benchmarks.py, tests/plan, tests/gpu",
}
"""Commands that are only parsed, by their beginning, and why. Those of grpo-trl are run."""
PROGRAMS = {command.split()[0] for command in NOT_RUN} | {"grpo-trl"}


@dataclass(frozen=True)
class Command:
    """A command of a page, without what is set for its environment."""

    page: str
    words: tuple[str, ...]

    def __str__(self):
        return f"{self.page}: {' '.join(self.words)}"


def lines_of(page):
    """The lines of a page that a shell could read: of indented blocks, and of fenced ones without another language."""
    language = None
    for line in page.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            language = line[3:].strip() if language is None else None
        elif language in ("", "bash") or (language is None and line.startswith("    ")):
            yield line.strip()


def commands_of(page):
    """All commands of a page, in order."""
    for line in lines_of(page):
        for part in re.sub(r"(^| +)#.*", "", line).split(" && "):
            words = [word for word in part.split() if not re.match(r"[A-Z_]+=", word)]
            if words and words[0] in PROGRAMS and "=" not in words[1:2]:
                yield Command(page.name, tuple(shlex.split(" ".join(words))))


COMMANDS = [command for page in [ROOT / "README.md", *PAGES] for command in commands_of(page)]


def test_every_page_is_on_the_site_and_every_entry_is_a_page():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = {page for entry in navigation for page in entry.values()}
    assert named == {page.name for page in PAGES}


def test_the_picture_of_the_packages_is_that_of_the_imports():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_code_map.py"))["graph"]()
    assert drawn in (ROOT / "docs" / "code_map.md").read_text()


# ---- Every command is known, and so are its options ----
def test_there_are_commands_of_each_kind():
    assert len(COMMANDS) >= 30
    for beginning in NOT_RUN:
        assert any(" ".join(command.words).startswith(beginning) for command in COMMANDS), beginning


def trl_options(*own):
    parser = TrlParser((*own, GRPOConfig, ModelConfig, DatasetMixtureConfig))
    return {option for action in parser._actions for option in action.option_strings}


def names(words):
    return {word.split("=")[0] for word in words if word.startswith("-") and word != "-"}


def check_pip(words):
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


def check_make(words):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(words) <= targets


def check_grpo_trl(words):
    name, *rest = words
    command = typer.main.get_command(app).commands[name]
    options = {option for parameter in command.params for option in parameter.opts}
    if command.context_settings.get("ignore_unknown_options"):
        options |= trl_options(ScriptArguments)
    assert names(rest) <= options
    assert all((ROOT / word).is_file() for word in rest if word.startswith("ds_configs/"))


def check_python(words):
    script, *rest = words
    if script == "-m" and rest[0].startswith("vllm."):
        return None
    if script == "-m":
        assert rest[0] == "grpo_trl"
        return check_grpo_trl(rest[1:])
    if script not in ("train.py", "zero_to_fp32.py"):
        known = set(re.findall(r'"(--?\w+)"', (ROOT / script).read_text()))
        if script.startswith("examples/") and rest:
            known |= trl_options(runpy.run_path(str(ROOT / script))["ScriptArguments"])
        assert names(rest) <= known
    assert all((ROOT / word).is_file() for word in rest if word.startswith("ds_configs/"))
    return None


def check_torchrun(words):
    from torch.distributed.run import get_args_parser

    words = [word.replace("$SLURM_NNODES", "4").replace("$head", "node1") for word in words]
    parsed = get_args_parser().parse_args(words)
    check_python([*["-m"] * parsed.module, parsed.training_script, *parsed.training_script_args])


def check_accelerate(words):
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args(list(words[1:]))
    assert (ROOT / parsed.config_file).is_file()
    check_python([parsed.training_script, *parsed.training_script_args])


def check_deepspeed(words):
    pytest.importorskip("deepspeed")
    from deepspeed.launcher.runner import parse_args

    parsed = parse_args(list(words))
    check_python([parsed.user_script, *parsed.user_args])


CHECKS = {
    "pip": check_pip,
    "make": check_make,
    "grpo-trl": check_grpo_trl,
    "python": check_python,
    "torchrun": check_torchrun,
    "accelerate": check_accelerate,
    "deepspeed": check_deepspeed,
}
CHECKED = list({command.words: command for command in COMMANDS if command.words[0] in CHECKS}.values())


@pytest.mark.parametrize("command", CHECKED, ids=str)
def test_a_command_has_the_options_that_it_is_shown_with(command):
    if command.words[0] != "grpo-trl":
        assert any(" ".join(command.words).startswith(beginning) for beginning in NOT_RUN)
    CHECKS[command.words[0]](list(command.words[1:]))


# ---- What can be run here is run, with a small model and few problems ----
SMALL = shlex.split(
    "--use_cpu true --max_steps 2 --max_completion_length 8 --num_generations 2 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 1 --disable_tqdm true"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a new user, with a model and data beside it that take the place of the hub's."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [f'{{"question": "{i}=", "answer": "#### {i}"}}\n' for i in range(64)]  # a step of eight ranks
    (tmp_path / "data" / "train.jsonl").write_text("".join(rows))
    (tmp_path / "data" / "test.jsonl").write_text("".join(rows[:10]))
    shutil.copytree(ROOT / "ds_configs", tmp_path / "ds_configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (words, done.output, done.exception)


def run_small(words):
    """Run a command of a page as it is, with the local model and data, and for two steps."""
    given = {"Qwen/Qwen2.5-0.5B-Instruct": "model", "openai/gsm8k": "data"}
    words = [given.get(word, word) for word in words]
    if words[0] == "init":
        words += [word for option in ("--model", "--dataset") if option not in words for word in (option, option[2:])]
        words = ["data" if word == "dataset" else word for word in words]
    run(*words, *(SMALL if words[0] == "train" else []))


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({command.page for command in COMMANDS if command.words[0] == "grpo-trl"}))
def test_the_commands_of_a_page_run_one_after_the_other(page, folder):
    commands = [command.words[1:] for command in COMMANDS if command.page == page and command.words[0] == "grpo-trl"]
    if commands[0][0] != "init":
        run_small(["init", "grpo.yaml"])
    for words in commands:
        if "--load_in_4bit" in words:
            pytest.importorskip("bitsandbytes")
        if "outputs/other" in words:
            shutil.copytree("outputs/grpo", "outputs/other")
        run_small(words)


# ---- Code ----
def blocks(language):
    fenced = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    pages = [ROOT / "README.md", *PAGES]
    return [pytest.param(code, id=page.name) for page in pages for code in fenced.findall(page.read_text())]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_of_a_page_is_python(code):
    compile(code, "page", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("code", blocks("yaml"))
def test_a_configuration_of_a_page_has_known_options(code):
    assert {f"--{name}" for name in yaml.safe_load(code)} <= trl_options(ScriptArguments)


@pytest.mark.slow
def test_the_script_of_the_start_page_trains(folder):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    for old, new in {"Qwen/Qwen2.5-0.5B": "model", "GRPOConfig(": "GRPOConfig(use_cpu=True, max_steps=2, "}.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(compile(code, "index.md", "exec"), {})
    assert os.path.exists("sums/log.jsonl")
