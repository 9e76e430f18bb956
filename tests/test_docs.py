"""The pages of docs/: all of them are on the site, and the commands that they show exist."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from trl import DatasetMixtureConfig, ModelConfig, TrlParser

from grpo_trl import GRPOConfig
from grpo_trl.cli import app
from grpo_trl.cli.configuration import ScriptArguments


ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = sorted(
    {
        match[0].split("  ")[0]
        for page in [*PAGES, ROOT / "README.md"]
        for match in re.finditer(r"^ {4}grpo-trl \S.*$", page.read_text(), re.MULTILINE)
        for match in [re.match(r"grpo-trl [^#]*", match[0].strip())]
    }
)


def test_every_page_is_on_the_site_and_every_entry_is_a_page():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = {page for entry in navigation for page in entry.values()}
    assert named == {page.name for page in PAGES}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_documentation_exists_with_its_options(command):
    _, name, *words = shlex.split(command)
    known = typer.main.get_command(app).commands[name]
    options = {option for parameter in known.params for option in parameter.opts}
    if known.context_settings.get("ignore_unknown_options"):
        parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig, DatasetMixtureConfig))
        options |= {option for action in parser._actions for option in action.option_strings}
    assert {word for word in words if word.startswith("-")} <= options


def test_there_are_commands():
    assert len(COMMANDS) >= 5


def test_the_picture_of_the_rooms_is_that_of_the_imports():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_code_map.py"))["graph"]()
    assert drawn in (ROOT / "docs" / "code_map.md").read_text()
