"""Options of `accelerate launch` in a configuration or on the command line, as `trl grpo` takes them."""

import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from accelerate.commands.launch import launch_command_parser


LAUNCHED = "GRPO_TRL_LAUNCHED"
"""Set in the environment of the processes that are started."""
CONFIG = "accelerate_config"


class Launch(NamedTuple):
    """How the processes of a run are started, and what is left for the run itself."""

    options: dict[str, Any]
    """Of `accelerate launch`; empty if this process is the run."""
    training: dict[str, Any]
    """Options of the file that are not of the launcher."""
    words: list[str]
    """Words of the command line that are not."""


def split_launch(options: dict[str, Any], words: Sequence[str], known: set[str]) -> Launch:
    """Take the options of `accelerate launch`, and `accelerate_config`, out of all options.

    Args:
        options: Of the file.
        words: Of the command line, which win.
        known: Names of the run's own options; these are never the launcher's.
    """
    parser = launch_command_parser()
    valued = {action.dest: action.nargs != 0 for action in parser._actions if action.dest not in known} | {CONFIG: True}
    found = {name: value for name, value in options.items() if name in valued}
    left: list[str] = []
    given = iter(words)
    for word in given:
        name, _, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in valued:
            left.append(word)
        elif valued[name]:
            found[name] = value or next(given, "")
        else:
            found[name] = True
    return Launch(found, {name: value for name, value in options.items() if name not in found}, left)


def launch(planned: Launch, config: Path) -> None:
    """Become `accelerate launch`, which starts `grpo-trl train`; return where there is nothing to launch.

    Raises:
        ValueError: `accelerate_config` is neither a file nor a configuration of TRL's.
    """
    if not planned.options or LAUNCHED in os.environ or "LOCAL_RANK" in os.environ:
        return
    given = {name: value for name, value in _resolved(planned.options).items() if value not in (None, False)}
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    command = ["-m", "accelerate.commands.launch", *flags, "--module", "grpo_trl", "train", str(config), *planned.words]
    own = {name: str(value) for name, value in (planned.training.get("env") or {}).items()}
    os.execve(sys.executable, [sys.executable, *command], os.environ | own | {LAUNCHED: "1"})


def run_options(options: dict[str, Any]) -> dict[str, Any]:
    """Express options of `accelerate launch` as those of a run: `num_processes`, `deepspeed`, `fsdp`, where they are given.

    Raises:
        ValueError: `accelerate_config` is neither a file nor a configuration of TRL's.
    """
    settings = _resolved(options)
    if "config_file" in settings:
        settings = yaml.safe_load(Path(settings["config_file"]).read_text(encoding="utf-8")) | settings
    settings |= settings.get("deepspeed_config") or {}
    kind = settings.get("distributed_type")
    found: dict[str, Any] = {}
    if settings.get("num_processes"):
        found["num_processes"] = 1 if kind == "NO" else int(settings["num_processes"])
    if kind == "DEEPSPEED" or settings.get("use_deepspeed"):
        found["deepspeed"] = settings.get("deepspeed_config_file") or _deepspeed_config(settings)
    elif kind == "FSDP" or settings.get("use_fsdp"):
        found["fsdp"] = "full_shard"
    return found


def _deepspeed_config(settings: dict[str, Any]) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": int(settings.get("zero_stage", 2))}  # accelerate's default
    for name in ("offload_optimizer", "offload_param"):
        zero[name] = {"device": settings.get(f"{name}_device") or "none"}
    return {"zero_optimization": zero}


def _resolved(options: dict[str, Any]) -> dict[str, Any]:
    if CONFIG not in options:
        return options
    name, others = str(options[CONFIG]), {key: value for key, value in options.items() if key != CONFIG}
    shipped = resources.files("trl.accelerate_configs")
    if Path(name).is_file():
        return {"config_file": name} | others
    names = sorted(file.name.removesuffix(".yaml") for file in shipped.iterdir() if file.name.endswith(".yaml"))
    if name not in names:
        raise ValueError(f"accelerate_config={name!r} is no file; give the path of one, or one of {', '.join(names)}.")
    return {"config_file": str(shipped / f"{name}.yaml")} | others
