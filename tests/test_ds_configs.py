"""The configurations that come with the repository."""

import json
import re
from pathlib import Path

import pytest
import yaml


FOLDER = Path(__file__).parents[1] / "ds_configs"
ENGINE = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
ACCELERATE = {path.stem: yaml.safe_load(path.read_text()) for path in (FOLDER / "accelerate").glob("*.yaml")}


def test_there_is_one_for_each_stage():
    assert set(ENGINE) == {"zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"}
    assert set(ACCELERATE) == {*ENGINE, "ddp", "fsdp2"}


@pytest.mark.parametrize("name", ENGINE)
def test_it_says_what_its_name_says_and_leaves_the_rest_to_the_trainer(name):
    config = ENGINE[name]
    zero = config["zero_optimization"]
    assert zero["stage"] == int(re.search(r"\d", name)[0])
    assert ("offload_optimizer" in zero) == name.endswith("_offload")
    assert ("offload_param" in zero) == (name == "zero3_offload")
    assert not {"optimizer", "scheduler"} & set(config)
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {config[size] for size in sizes} == {"auto"}
    assert config["bf16"] == config["fp16"] == {"enabled": "auto"}


@pytest.mark.parametrize("name", ENGINE)
def test_accelerate_takes_it_from_the_same_file(name):
    settings = ACCELERATE[name]["deepspeed_config"]
    assert settings["deepspeed_config_file"] == f"ds_configs/{name}.json"
    assert settings["zero3_init_flag"] == ("zero3" in name)
