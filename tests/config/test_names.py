"""Every name that TRL has or had is an option, or is answered with what to use."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import trl
import yaml

import grpo_trl
from grpo_trl import GRPOConfig, TrlParser
from grpo_trl.cli.configuration import known_options
from grpo_trl.config.names import NOT_HERE, OF_SCRIPTS, RENAMED, RETIRED
from tests.test_config import make_config


OURS = {field.name for field in dataclasses.fields(GRPOConfig)}
TRL = {field.name: field for field in dataclasses.fields(trl.GRPOConfig)}
DOCS = Path(grpo_trl.__file__).parents[2] / "docs" / "from-trl.md"


def refused(**options) -> str:
    with pytest.raises(TypeError, match=r"\w") as raised:
        make_config(**options)
    return str(raised.value)


def documented_names() -> set[str]:
    """What stands in the first column of the page's tables."""
    rows = [line.split("|")[1] for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_every_option_of_trl_has_a_row_in_the_docs():
    assert set(TRL) - documented_names() == set()


def test_every_retired_name_and_option_of_a_script_has_a_row_in_the_docs():
    assert (RENAMED.keys() | RETIRED.keys() | OF_SCRIPTS.keys()) - documented_names() == set()


def test_every_option_of_trl_is_an_option_or_has_a_remedy():
    assert set(TRL) - OURS - RENAMED.keys() - NOT_HERE.keys() == set()


@pytest.mark.parametrize("name", sorted(NOT_HERE.keys() - OURS))
def test_an_option_that_is_not_here_may_only_ask_for_what_is_done_anyway(name):
    for value in NOT_HERE[name].moot:
        assert not hasattr(make_config(**{name: value}), name)
    value = "some value"
    assert refused(**{name: value}).startswith(f"{name}={value!r} is no option; ")
    assert NOT_HERE[name].remedy in refused(**{name: value})


@pytest.mark.parametrize("old, new", [(o, n) for o, n in RENAMED.items() if n in OURS])
def test_a_retired_name_sets_the_option_of_today_with_one_line(old, new, caplog):
    values = {"evaluation_strategy": "epoch", "no_cuda": True, "wandb_log_unique_prompts": True, "warmup_ratio": 0.25}
    values |= {"vllm_importance_sampling_cap": 2.0, "vllm_max_model_len": 512}
    value = values.get(old, 8 if "per_gpu" in old or "tokens" in old else "text")
    device = {} if new == "use_cpu" else {"use_cpu": True}
    assert getattr(GRPOConfig(output_dir="unused", report_to="none", **{old: value} | device), new) == value
    assert [record.getMessage() for record in caplog.records if old in record.getMessage()] == [
        f"{old}={value!r} is read as {new}={value!r}, its name today."
    ]


def test_an_option_under_two_names_is_refused():
    assert "give one of them" in refused(warmup_ratio=0.1, warmup_steps=5)


@pytest.mark.parametrize("ratio", [1.0, 7, -0.1])
def test_a_ratio_that_would_be_read_as_steps_is_refused(ratio):
    assert "set warmup_steps" in refused(warmup_ratio=ratio)


@pytest.mark.parametrize("name", sorted(RETIRED | OF_SCRIPTS))
def test_a_retired_option_says_what_to_use_or_that_it_changes_nothing(name, caplog):
    absent = RETIRED.get(name) or OF_SCRIPTS[name]
    for value in absent.moot:
        make_config(**{name: value})
        assert f"{name}={value!r} changes nothing" in caplog.text
    assert absent.remedy in refused(**{name: "some value"})


def test_remedies_name_options_that_exist():
    known = OURS | known_options() | {"the", "min_num_params", "transformer_layer_cls_to_wrap"}
    for absent in [*RETIRED.values(), *OF_SCRIPTS.values(), *NOT_HERE.values()]:
        for name in re.findall(r"set (\w+)=?", absent.remedy):
            assert name in known, absent


def test_all_options_that_are_refused_are_named_at_once():
    message = refused(num_generation=4, vllm_device="cuda:3", callbacks=["push"], beta=0.1)
    assert [line.split("=")[0] for line in message.splitlines()] == ["num_generation", "vllm_device", "callbacks"]


@pytest.mark.parametrize("typo, meant", [("num_generation", "num_generations"), ("learning_rat", "learning_rate")])
def test_an_unknown_name_suggests_the_nearest(typo, meant):
    assert refused(**{typo: 4}) == f"{typo}=4 is no option; did you mean {meant}?"
    assert "docs/options.md" in refused(zzzzzz=4)


def test_classes_derived_from_the_config_take_retired_names_too():
    @dataclasses.dataclass
    class Extended(GRPOConfig):
        system_prompt: str = "none"

    config = Extended(output_dir="unused", use_cpu=True, warmup_ratio=0.1, system_prompt="be brief")
    assert (config.warmup_steps, config.system_prompt) == (0.1, "be brief")


def test_a_config_that_was_translated_can_be_built_again(caplog):
    config = make_config(warmup_ratio=0.1, model_init_kwargs={"torch_dtype": "bfloat16"})
    caplog.clear()
    again = dataclasses.replace(config, learning_rate=1e-5)
    assert (again.warmup_steps, again.model_init_kwargs) == (0.1, {"dtype": "bfloat16"})
    assert not caplog.records


def test_torch_dtype_is_read_as_dtype(caplog):
    assert make_config(model_init_kwargs='{"torch_dtype": "bfloat16"}').model_init_kwargs == {"dtype": "bfloat16"}
    assert "torch_dtype='bfloat16' is read as dtype" in caplog.text
    with pytest.raises(ValueError, match="give dtype alone"):
        make_config(model_init_kwargs={"torch_dtype": "bfloat16", "dtype": "float32"})


def test_options_of_a_yaml_file_that_are_numbers_in_its_own_spelling(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    options = {"output_dir": "unused", "use_cpu": True, "learning_rate": "1e-6", "num_generations": 4.0, "beta": "1e-3"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(options))
    (config,) = trl.TrlParser(GRPOConfig).parse_args_and_config(["--config", str(path)])
    assert (config.learning_rate, config.num_generations, config.beta) == (1e-6, 4, 1e-3)


# ---- The parser of scripts ----
@dataclasses.dataclass
class Script:
    dataset_name: str = "none"


def parsed(tmp_path, monkeypatch, *words, classes=(Script, GRPOConfig, trl.ModelConfig), **options):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"output_dir": "unused", "use_cpu": True, "report_to": "none"} | options))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path), *words])
    return TrlParser(classes).parse_args_and_config()


def test_the_parser_reads_retired_names_of_a_file(tmp_path, monkeypatch, caplog):
    options = {"warmup_ratio": 0.25, "overwrite_output_dir": True, "torch_dtype": "bfloat16", "max_prompt_length": None}
    script, config, model = parsed(tmp_path, monkeypatch, dataset_name="sums", **options)
    assert (script.dataset_name, config.warmup_steps, model.dtype) == ("sums", 0.25, "bfloat16")
    assert "warmup_ratio=0.25 is read as warmup_steps=0.25" in caplog.text
    assert "overwrite_output_dir=True changes nothing" in caplog.text


@pytest.mark.parametrize(
    "words", [["--warmup_ratio", "0.5"], ["--warmup-ratio=0.5"], ["--overwrite_output_dir", "--warmup_ratio=0.5"]]
)
def test_the_parser_reads_retired_names_of_the_command_line_which_wins(tmp_path, monkeypatch, words):
    _, config, _ = parsed(tmp_path, monkeypatch, *words, "--reward_weights", "1.0", "-2.0", warmup_ratio=0.25)
    assert (config.warmup_steps, config.reward_weights) == (0.5, [1.0, -2.0])


@pytest.mark.parametrize("name", sorted(RETIRED.keys() - RENAMED.keys()))
def test_the_parser_names_todays_way(tmp_path, monkeypatch, name):
    with pytest.raises(TypeError, match=re.escape(RETIRED[name].remedy)):
        parsed(tmp_path, monkeypatch, classes=(GRPOConfig,), **{name: "some value"})
    with pytest.raises(TypeError, match=re.escape(RETIRED[name].remedy)):
        parsed(tmp_path, monkeypatch, f"--{name}", "some value", classes=(GRPOConfig,))


def test_the_parser_leaves_unknown_names_to_trl(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Unknown arguments from config file.*learning_rat"):
        parsed(tmp_path, monkeypatch, learning_rat=1)
    with pytest.raises(ValueError, match=r"not used by the HfArgumentParser.*zzz"):
        parsed(tmp_path, monkeypatch, "--zzz", "1")


def test_the_parser_reads_retired_names_of_a_dict():
    options = {"output_dir": "unused", "use_cpu": True, "report_to": "none", "warmup_ratio": 0.25}
    (config,) = TrlParser(GRPOConfig).parse_dict(options)
    assert config.warmup_steps == 0.25
