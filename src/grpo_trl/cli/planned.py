"""The plan of a configuration: the model is built on the meta device, and no weights are loaded."""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import get_peft_config

from ..config import GRPOConfig
from ..plan import MEASURED_PROMPTS, Card, RunPlan, offloaded, setup_of
from ..trainer.build import make_schedule
from .configuration import Configuration, known_options, options_of
from .launch import run_options, split_launch


FOUR_BIT = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / 64 / 256}
"""Bytes of a weight in 4 bits with the scale of its block of 64; True where scales are quantized too."""


def planned_run(
    file: Path, overrides: Sequence[str], ranks: int | None, card: Card | None, gpu_gib: float | None
) -> RunPlan:
    """Plan the run of a configuration.

    Args:
        file: The YAML file.
        overrides: Options of the command line.
        ranks: Plan for so many, whatever this machine has; None: for as many as `accelerate launch` would start, or one.
        card: What the time of a step is estimated for.
        gpu_gib: The memory of a rank's card; that of `card` if None.

    Raises:
        ValueError: The configuration cannot work.
    """
    launched = split_launch(options_of(file), overrides, known_options())
    options, overrides = _with_backend(run_options(launched.options) | launched.training, launched.words)
    launched_ranks = options.pop("num_processes", 1)
    ranks = ranks or launched_ranks
    method, offload = _backend(options)
    fp16, bf16 = options.pop("fp16", False), options.pop("bf16", None)
    options["bf16"] = bool((card is not None if bf16 is None else bf16) or fp16)
    configuration = _parsed_for(options, overrides, ranks)
    train, _ = configuration.datasets()
    model = _meta_model(configuration)
    setup = setup_of(
        configuration.training,
        model,
        make_schedule(configuration.training, len(train) if hasattr(train, "__len__") else None),
        prompt_tokens=_prompt_tokens(configuration, train),
        method=method,
        offload=offload,
        new_adapter=bool(configuration.model.use_peft),
    )
    if configuration.model.load_in_4bit:
        frozen = _bytes_in_4_bits(model, bool(configuration.model.use_bnb_nested_quant))
        setup = replace(setup, job=replace(setup.job, frozen_bytes=frozen))
    if gpu_gib is None and card is not None:
        gpu_gib = card.memory_gib
    return RunPlan(setup, card, None if gpu_gib is None else gpu_gib * 2**30)


def _with_backend(options: dict[str, Any], words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Move `--deepspeed` and `--fsdp` of the command line to the options of the file, which they override."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--deepspeed")
    parser.add_argument("--fsdp", nargs="?", const="full_shard")
    known, others = parser.parse_known_args(list(words))
    return options | vars(known), others


def _backend(options: dict[str, Any]) -> tuple[str, list[str]]:
    """Take the backend out of the options: one of `METHODS`, and what is offloaded."""
    deepspeed, fsdp = options.pop("deepspeed", None), options.pop("fsdp", None)
    options.pop("fsdp_config", None)
    if deepspeed is None:
        return ("FSDP2" if fsdp else "DDP"), []
    content = deepspeed if isinstance(deepspeed, dict) else json.loads(Path(deepspeed).read_text(encoding="utf-8"))
    stage = content.get("zero_optimization", {}).get("stage")
    return (f"ZeRO-{stage}" if stage else "DDP"), offloaded(content)


def _parsed_for(options: dict[str, Any], overrides: Sequence[str], ranks: int) -> Configuration:
    """Parse options as on a machine with so many ranks; a plan needs neither a GPU, nor an engine, nor a tracker."""
    planned = type("GRPOConfig", (GRPOConfig,), {"world_size": property(lambda self: ranks)})
    return Configuration.parse(options | {"use_cpu": True, "report_to": "none", "tf32": None}, overrides, planned)


def _meta_model(configuration: Configuration) -> Any:
    """Build the model with its adapter, without weights."""
    path, kwargs = str(configuration.model.model_name_or_path), configuration.model_init_kwargs()
    trust = configuration.training.trust_remote_code
    sizes = AutoConfig.from_pretrained(path, revision=kwargs.get("revision"), trust_remote_code=trust)
    frozen_in_half = configuration.model.use_peft and configuration.training.bf16
    dtype = kwargs.get("dtype", "bfloat16" if frozen_in_half else "float32")
    dtype = (getattr(sizes, "dtype", None) or torch.float32) if dtype == "auto" else dtype
    adapter = get_peft_config(configuration.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(sizes, trust_remote_code=trust)
        model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model if adapter is None else get_peft_model(model, adapter)


def _bytes_in_4_bits(model: Any, nested: bool) -> float:
    """Bytes of a frozen parameter where linear layers, except the head, are quantized and the rest is bfloat16."""
    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    linear = {id(layer.weight) for layer in layers}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    size = sum(p.numel() * (FOUR_BIT[nested] if id(p) in linear else 2) for p in frozen)
    return size / max(1, sum(p.numel() for p in frozen))


def _prompt_tokens(configuration: Configuration, dataset: Any) -> int:
    """The median tokens of some prompts; a guess where the tokenizer cannot be had."""
    rows = list(dataset.take(MEASURED_PROMPTS))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(configuration.model.model_name_or_path))
    except OSError:
        return int(statistics.median(len(str(row["prompt"])) for row in rows) / 4)
    return int(statistics.median(len(_ids(tokenizer, row["prompt"])) for row in rows))


def _ids(tokenizer: Any, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
