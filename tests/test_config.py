import ast
import dataclasses
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import trl
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from grpo_trl import GRPOConfig
from grpo_trl.rollout.base import SamplingOptions
from grpo_trl.trainer.build import make_prompt_limit, make_sampling_options


def make_config(**options) -> GRPOConfig:
    return GRPOConfig(**({"output_dir": "unused", "use_cpu": True, "report_to": "none"} | options))


def refusal(**options) -> str:
    """The message of the ValueError that `options` raise."""
    with pytest.raises(ValueError, match=r"\w") as raised:
        make_config(**options)
    assert type(raised.value) is ValueError
    return str(raised.value)


# ---- Defaults ----
OWN_OPTIONS = {
    "loss_level",
    "kl_estimator",
    "max_rows_in_flight",
    "max_tokens_per_micro_batch",
    "prompt_overflow",
    "shared_prefix",
    "speculative_ngrams",
    *("generations_ahead", "old_logprobs", "vllm_check_steps"),
    *("reward_workers", "reward_timeout", "reward_retries", "reward_memory_limit", "on_reward_error"),
    *("max_reward_failure_rate", "max_nonfinite_steps", "dead_run_patience", "on_dead_run", "phase_warning_seconds"),
}
OTHER_DEFAULTS = {
    "loss_type": (None, "dapo"),  # loss_level is the first choice, and its default is GRPO's own paper
    "importance_sampling_level": (None, "token"),  # as in the paper of loss_type
    "router_aux_loss_coef": (0.0, None),  # no such term in the published objectives, and it costs a forward
    "use_bias_correction_kl": (False, True),  # as in DeepSeekMath's Eq. (4)
    "ddp_broadcast_buffers": (False, None),  # a forward that is made anew must wait for nobody
    "gradient_checkpointing": (None, True),  # chosen by the memory that is free
    "vllm_importance_sampling_correction": (None, True),  # on with vLLM, where alone TRL reads it
    "vllm_importance_sampling_mode": (None, "sequence_mask"),  # which vanishes where top_p and the like hold
    "logging_nan_inf_filter": (False, True),  # a loss that is not finite must be seen
}


def default(field: dataclasses.Field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def test_names_and_defaults_are_those_of_trl_but_for_a_few():
    ours = {field.name: default(field) for field in dataclasses.fields(GRPOConfig)}
    theirs = {field.name: default(field) for field in dataclasses.fields(trl.GRPOConfig)}
    assert set(ours) - set(theirs) == OWN_OPTIONS
    differences = {name: (ours[name], theirs[name]) for name in ours.keys() & theirs if ours[name] != theirs[name]}
    assert differences == OTHER_DEFAULTS


CHECKPOINTING = [n for n in ("gradient_checkpointing", "activation_checkpointing") if hasattr(GRPOConfig, n)]


@pytest.mark.parametrize("set_name", CHECKPOINTING)
@pytest.mark.parametrize("value", [None, True, False])
@pytest.mark.filterwarnings("error:.*_checkpointing. is deprecated:FutureWarning")
def test_gradient_checkpointing_is_left_open_unless_it_is_set_under_either_name(set_name, value):
    config = make_config(**{set_name: value})
    assert [getattr(config, name) for name in CHECKPOINTING] == [value] * len(CHECKPOINTING)


def test_activations_that_fsdp_recomputes_are_not_recomputed_twice():
    config = make_config()
    config.fsdp_config = {"activation_checkpointing": True}
    config._leave_checkpointing_open()
    assert [getattr(config, name) for name in CHECKPOINTING] == [False] * len(CHECKPOINTING)


def no_questions_to_the_gpu(args):
    args.accelerator_config = AcceleratorConfig()


@pytest.mark.parametrize(
    "options, on_gpu",
    [({}, True), ({"fp16": True}, False), ({"use_cpu": True}, False), ({"bf16": False}, False)],
)
@pytest.mark.parametrize("gpu", [True, False])
def test_bf16_is_chosen_where_the_gpu_has_it(monkeypatch, options, on_gpu, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(TrainingArguments, "__post_init__", no_questions_to_the_gpu)
    monkeypatch.setattr(GRPOConfig, "deepspeed_plugin", None, raising=False)
    monkeypatch.setattr(GRPOConfig, "world_size", 1)
    monkeypatch.setattr(GRPOConfig, "device", torch.device("cuda"))
    assert GRPOConfig(output_dir="unused", report_to=[], **options).bf16 == (on_gpu and gpu)


def test_the_best_model_is_that_with_the_highest_reward_held_out():
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 10}
    config = make_config(**options)
    assert (config.metric_for_best_model, config.greater_is_better) == ("eval_reward", True)
    config = make_config(**options, metric_for_best_model="eval_loss")
    assert (config.metric_for_best_model, config.greater_is_better) == ("eval_loss", False)
    assert make_config(save_strategy="best", eval_strategy="steps").metric_for_best_model == "eval_reward"


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize("metric, mode", [(None, "max"), ("eval_reward", "max"), ("eval_loss", "min")])
def test_a_schedule_that_follows_a_metric_knows_which_way_is_better(name, metric, mode):
    options = {"eval_strategy": "steps", "metric_for_best_model": metric, "lr_scheduler_kwargs": {"patience": 3}}
    config = make_config(lr_scheduler_type=name, **options)
    assert config.metric_for_best_model == (metric or "eval_reward")
    assert config.lr_scheduler_kwargs == {"mode": mode, "patience": 3}


def test_evaluation_samples_num_generations_unless_it_is_told_otherwise():
    assert make_config(num_generations=4).eval_generations == 4
    assert make_config(num_generations_eval=1).eval_generations == 1


def test_every_sampling_option_is_handed_on():
    options = {
        "max_completion_length": 7,
        "temperature": 0.5,
        "top_p": 0.6,
        "top_k": 8,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "generation_kwargs": {"no_repeat_ngram_size": 3},
    }
    expected = SamplingOptions(pad_token_id=11, eos_token_ids=(12, 13), **options)
    tokenizer = SimpleNamespace(pad_token_id=11)
    assert make_sampling_options(make_config(**options), tokenizer, (12, 13)) == expected
    assert make_sampling_options(make_config(), tokenizer, (12,)).generation_kwargs == {}


# ---- Dict options ----
DICT_OPTIONS = ["model_init_kwargs", "generation_kwargs", "chat_template_kwargs"]


@pytest.mark.parametrize("name", DICT_OPTIONS)
def test_a_dict_option_is_parsed_from_json_on_the_command_line(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = ["--output_dir", "unused", "--use_cpu", "true", "--" + name, '{"min_length": 1, "stop_strings": "c"}']
    (config,) = trl.TrlParser(GRPOConfig).parse_args_and_config(arguments)
    assert getattr(config, name) == {"min_length": 1, "stop_strings": "c"}


@pytest.mark.parametrize("name", DICT_OPTIONS)
def test_a_dict_option_is_read_from_a_config_file(name, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: unused\nuse_cpu: true\nnum_generations: 4\n{name}:\n  min_length: 1\n")
    (config,) = trl.TrlParser(GRPOConfig).parse_args_and_config(["--config", str(path)])
    assert (getattr(config, name), config.num_generations) == ({"min_length": 1}, 4)


@pytest.mark.parametrize("name", DICT_OPTIONS)
@pytest.mark.parametrize("value", ["top_a=1", ["a"]])
def test_a_dict_option_that_is_no_dict_is_refused(name, value):
    assert f"{name}={value}" in refusal(**{name: value})


# ---- Choices and ranges ----
@pytest.mark.parametrize(
    "value, resolved",
    [
        ("auto", "auto"),
        (True, True),
        (False, False),
        ("true", True),
        ("false", False),
        ("True", True),
        ("False", False),
    ],
)
def test_a_prefix_is_shared_always_never_or_where_it_can_be(value, resolved):
    config = make_config(shared_prefix=value)
    assert (config.shared_prefix, type(config.shared_prefix)) == (resolved, type(resolved))


@pytest.mark.parametrize("value, resolved", [("auto", "auto"), ("true", True), ("false", False)])
def test_how_a_step_is_cut_is_read_from_the_command_line_and_from_a_file(value, resolved, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = ["--output_dir", "unused", "--use_cpu", "true", "--max_tokens_per_micro_batch", "4096"]
    (config,) = trl.TrlParser(GRPOConfig).parse_args_and_config([*arguments, "--shared_prefix", value])
    assert (config.shared_prefix, type(config.shared_prefix)) == (resolved, type(resolved))
    assert config.max_tokens_per_micro_batch == 4096
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: unused\nuse_cpu: true\nshared_prefix: {value}\nmax_tokens_per_micro_batch: 2048\n")
    (config,) = trl.TrlParser(GRPOConfig).parse_args_and_config(["--config", str(path)])
    assert (config.shared_prefix, type(config.shared_prefix)) == (resolved, type(resolved))
    assert config.max_tokens_per_micro_batch == 2048


@pytest.mark.parametrize("value", ["never", "", None, 2])
def test_an_unknown_way_to_share_a_prefix_is_refused_with_those_that_work(value):
    assert refusal(shared_prefix=value) == f"shared_prefix={value!r} is unknown; use one of 'auto', True, False."


@pytest.mark.parametrize("length", [1, 7])
def test_a_micro_batch_that_no_completion_fits_in_is_refused_with_the_least_that_works(length):
    for value in (-1, 0, length):
        message = refusal(max_tokens_per_micro_batch=value, max_completion_length=length)
        assert message.startswith(f"max_tokens_per_micro_batch={value} cannot work; ")
        assert f"max_completion_length={length} " in message
        assert re.search(r"(\d+) or more", message)[1] == str(length + 1)
    for value in (None, length + 1, 10**6):
        assert (
            make_config(max_tokens_per_micro_batch=value, max_completion_length=length).max_tokens_per_micro_batch
            == value
        )


@pytest.mark.parametrize(
    "context, trained_on, expected",
    [
        (100, True, (20, "max_tokens_per_micro_batch")),
        (None, True, (20, "max_tokens_per_micro_batch")),
        (25, True, (15, "the model's context")),
        (100, False, (90, "the model's context")),
        (None, False, (None, "the model's context")),
    ],
)
def test_a_prompt_that_is_trained_on_leaves_room_for_its_completion_in_a_micro_batch(context, trained_on, expected):
    args = make_config(max_completion_length=10, max_tokens_per_micro_batch=30)
    limit = make_prompt_limit(args, context, trained_on=trained_on)
    assert (limit.max_length, limit.limited_by) == expected


@pytest.mark.parametrize("value, word", [(True, "group"), (False, "none"), ("True", "group"), ("batch", "batch")])
def test_scale_rewards_is_a_word_or_yes_or_no(value, word):
    assert make_config(scale_rewards=value).scale_rewards == word


def test_options_of_the_objective_are_checked_together_when_the_configuration_is_made():
    message = refusal(loss_level="sequence", loss_type="dapo")
    assert "does not go with loss_type='dapo'" in message
    assert "beta=-1.0 cannot work" in refusal(beta=-1.0)


@pytest.mark.parametrize(
    "name, choices",
    [
        ("loss_level", {"token", "sequence"}),
        ("scale_rewards", {"group", "batch", "none"}),
        ("loss_type", {"grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"}),
        ("kl_estimator", {"k1", "k2", "k3"}),
        ("multi_objective_aggregation", {"sum_then_normalize", "normalize_then_sum"}),
        ("prompt_overflow", {"error", "drop", "truncate_left"}),
    ],
)
def test_an_unknown_choice_is_refused_with_those_that_work(name, choices):
    message = refusal(**{name: "tokens"})
    assert f"{name}='tokens' is unknown" in message
    suggested = re.findall(r"'(\w+)'", message.split("use one of")[1])
    assert set(suggested) == choices
    for choice in suggested:
        assert getattr(make_config(**{name: choice}), name) == choice


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("num_generations", 1),
        ("num_generations", 0),
        ("num_iterations", 0),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("steps_per_generation", 0),
        ("steps_per_generation", -2),
        ("max_completion_length", 0),
        ("max_completion_length", None),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("beta", -0.1),
        ("beta", math.inf),
        ("beta", math.nan),
        ("epsilon", 0.0),
        ("epsilon", 1.0),
        ("epsilon_high", 0.0),
        ("num_generations_eval", 0),
        ("ref_model_sync_steps", 0),
        ("ref_model_mixup_alpha", -0.1),
        ("ref_model_mixup_alpha", 1.1),
    ],
)
def test_a_value_out_of_range_is_refused_with_one_that_works(name, value):
    message = refusal(**{name: value})
    assert message.startswith(f"{name}={value} cannot work; ")
    remedy = message.split("; ", 1)[1]
    for word in ("e.g.", "such as", "use at least"):
        if found := re.search(rf"{re.escape(word)} (\d[\d.e-]*)", remedy):
            suggested = ast.literal_eval(found[1].rstrip("."))
            assert getattr(make_config(**{name: suggested}), name) == suggested
            break
    else:
        assert re.search(r"between 0 and 1|above 0 and at most 1|0 \(all tokens\) or more|1\.0 changes nothing", remedy)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1.0, "top_k": 0, "min_p": 0.0},
        {"min_p": 1.0, "temperature": 1e-3},
        {"beta": 0.0, "epsilon_high": 5.0},
        {"num_generations_eval": 1, "num_generations": 2},
        {"ref_model_mixup_alpha": 0.0, "ref_model_sync_steps": 1},
        {"ref_model_mixup_alpha": 1.0, "max_completion_length": 1},
    ],
)
def test_the_ends_of_the_ranges_are_accepted(options):
    config = make_config(**options)
    assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reward_timeout": 2.0}, "reward_timeout=2.0 needs reward_workers=1 or more"),
        (
            {"loss_type": "vespo", "vllm_importance_sampling_correction": True},
            "vllm_importance_sampling_mode='sequence_mask' does not go with loss_type='vespo'",
        ),
        (
            {"reward_timeout": math.nan, "reward_workers": 1},
            "reward_timeout=nan cannot work; it must be a number, or None",
        ),
        ({"reward_workers": -1}, "reward_workers=-1 cannot work; use 0"),
        ({"reward_retries": -1}, "reward_retries=-1 cannot work; use 0"),
        ({"reward_memory_limit": 0.0}, "reward_memory_limit=0.0 cannot work; it must be above 0"),
        ({"on_reward_error": "ignore"}, "on_reward_error='ignore' is unknown; use one of 'exclude', 'raise'"),
        ({"reward_weights": [1.0, math.nan]}, "reward_weights=[1.0, nan] cannot work; it must be a list of finite"),
        ({"reward_weights": 0.5}, "reward_weights=0.5 cannot work; it must be a list of finite"),
    ],
)
def test_reward_options_that_cannot_work_are_refused(options, message):
    assert message in refusal(**options)


def test_a_checkpoint_on_each_node_is_refused(monkeypatch):
    assert make_config(save_on_each_node=True).save_on_each_node  # of one process
    monkeypatch.setattr(GRPOConfig, "world_size", 2)
    assert "output_dir on a file system that all machines share" in refusal(save_on_each_node=True)


def test_auto_find_batch_size_is_refused():
    message = refusal(auto_find_batch_size=True)
    assert "auto_find_batch_size=True" in message
    assert "set it to False and lower per_device_train_batch_size" in message


def test_half_precision_that_a_cpu_does_not_compute_is_refused():
    message = refusal(fp16=True)
    assert "fp16=True cannot work on a CPU" in message
    assert make_config(fp16=False).fp16 is make_config(bf16=True).fp16 is False


def test_buffers_that_make_ranks_wait_are_refused():
    message = refusal(ddp_broadcast_buffers=True)
    assert "ddp_broadcast_buffers=True" in message
    assert "set it to False" in message


def test_a_sync_without_a_reference_is_refused():
    message = refusal(sync_ref_model=True)
    assert "sync_ref_model=True" in message
    assert "beta=0.0" in message
    beta = float(re.search(r"set beta, e\.g\. to ([\d.]+\d)", message)[1])
    assert make_config(sync_ref_model=True, beta=beta).beta == beta


# ---- Geometry ----
@pytest.fixture(params=[1, 2])
def world_size(request, monkeypatch):
    monkeypatch.setattr(GRPOConfig, "world_size", request.param)
    return request.param


@pytest.mark.parametrize(
    "options, steps",
    [
        ({}, 1),
        ({"gradient_accumulation_steps": 4}, 4),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, 2),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 6, "num_iterations": 3}, 6),
        ({"per_device_train_batch_size": 2, "steps_per_generation": 4}, 4),
        ({"per_device_train_batch_size": 3, "num_generations": 6, "steps_per_generation": 2}, 2),
    ],
)
def test_the_generation_batch_follows_from_the_steps(world_size, options, steps):
    config = make_config(**options)
    assert config.steps_per_generation == steps
    assert config.generation_batch_size == config.per_device_train_batch_size * world_size * steps


def test_the_steps_follow_from_the_generation_batch(world_size):
    config = make_config(per_device_train_batch_size=4, generation_batch_size=16 * world_size)
    assert config.steps_per_generation == 4
    assert config.generation_batch_size == 16 * world_size


def test_a_resolved_config_can_be_built_again():
    config = make_config(gradient_accumulation_steps=2, steps_per_generation=4)
    assert dataclasses.replace(config, learning_rate=1e-5).steps_per_generation == 4


def test_steps_and_generation_batch_that_contradict_each_other_are_refused(world_size):
    message = refusal(generation_batch_size=16 * world_size, steps_per_generation=3)
    assert f"generation_batch_size={16 * world_size} and steps_per_generation=3 contradict each other" in message
    assert f"a micro-step has {8 * world_size} completions" in message


def suggestions(message: str, name: str) -> list[int]:
    """The last `name=A or B` of a message; there is one at least."""
    found = re.findall(rf"{name}=(\d+(?: or \d+)?)", message)
    return [int(value) for value in found[-1].split(" or ")]


WINDOWS = [
    {"generation_batch_size": 12},
    {"generation_batch_size": 0},
    {"generation_batch_size": -8},
    {"generation_batch_size": 28, "gradient_accumulation_steps": 4},
    {"generation_batch_size": 28, "gradient_accumulation_steps": 4, "num_iterations": 2},
    {"generation_batch_size": 10, "per_device_train_batch_size": 3, "num_generations": 4},
    {"generation_batch_size": 3, "per_device_train_batch_size": 4},
]


@pytest.mark.parametrize("options", WINDOWS)
def test_a_generation_batch_that_is_no_number_of_micro_steps_is_refused_with_generation_batches_that_work(
    world_size, options
):
    options = options | {"generation_batch_size": options["generation_batch_size"] * world_size + world_size // 2}
    message = refusal(**options)
    assert message.startswith(f"generation_batch_size={options['generation_batch_size']} must be a multiple of the ")
    batch = options.get("per_device_train_batch_size", 8)
    assert f"{batch * world_size} completions" in message
    assert f"per_device_train_batch_size={batch} x {world_size} ranks" in message
    values = [int(value) for value in re.search(r"e\.g\. (\d+(?: or \d+)?)\.", message)[1].split(" or ")]
    for value in values:
        assert make_config(**options | {"generation_batch_size": value}).generation_batch_size == value


STEPS = [
    {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
    {"steps_per_generation": 4, "gradient_accumulation_steps": 6},
    {"steps_per_generation": 2, "gradient_accumulation_steps": 4, "num_iterations": 2},
    {
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 6,
        "per_device_train_batch_size": 1,
        "num_generations": 4,
    },
    {"steps_per_generation": 9, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
]


@pytest.mark.parametrize("options", STEPS)
def test_steps_that_split_an_optimizer_step_are_refused_with_steps_that_work(world_size, options):
    message = refusal(**options)
    steps, accumulation = options["steps_per_generation"], options["gradient_accumulation_steps"]
    assert f"steps_per_generation={steps} does not go with gradient_accumulation_steps={accumulation}" in message
    assert f"num_iterations={options.get('num_iterations', 1)}" in message
    assert ("or a divisor of it" in message) == ("num_iterations" not in options)
    for value in map(int, re.search(r"e\.g\. (\d+(?: or \d+)?)\.", message)[1].split(" or ")):
        assert make_config(**options | {"steps_per_generation": value}).steps_per_generation == value


def test_a_generation_batch_that_splits_an_optimizer_step_is_refused_with_generation_batches_that_work(world_size):
    options = {"generation_batch_size": 24 * world_size, "gradient_accumulation_steps": 2}
    message = refusal(**options)
    assert "steps_per_generation=3 does not go with gradient_accumulation_steps=2" in message
    for value in suggestions(message, "generation_batch_size"):
        assert make_config(**options | {"generation_batch_size": value}).generation_batch_size == value


GROUPS = [
    {"per_device_train_batch_size": 4},
    {"per_device_train_batch_size": 12},
    {"per_device_train_batch_size": 1},
    {"per_device_train_batch_size": 1, "num_generations": 2},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
    {"per_device_train_batch_size": 6, "steps_per_generation": 2, "num_generations": 5},
    {"per_device_train_batch_size": 4, "generation_batch_size": 12},
    {"per_device_train_batch_size": 4, "generation_batch_size": 12, "gradient_accumulation_steps": 3},
]


@pytest.mark.parametrize("options", GROUPS)
def test_generation_batches_that_split_a_group_are_refused_with_values_that_work(world_size, options):
    given = "per_device_train_batch_size"
    if "generation_batch_size" in options:
        options = options | {"generation_batch_size": options["generation_batch_size"] * world_size}
        given = "generation_batch_size"
    batch, group = options["per_device_train_batch_size"], options.get("num_generations", 8)
    steps = options.get("steps_per_generation", options.get("gradient_accumulation_steps", 1))
    total = options.get("generation_batch_size", batch * steps * world_size)
    if total % group == 0:  # whole groups over all ranks
        assert make_config(**options).generation_batch_size == total
        return
    message = refusal(**options)
    assert f"per_device_train_batch_size={batch} x {world_size} ranks x steps_per_generation=" in message
    assert f"groups of num_generations={group}; use {given}=" in message
    names = [given] + ["num_generations"] * message.count(", or num_generations=")
    for name in names:
        for value in suggestions(message, name):
            assert getattr(make_config(**options | {name: value}), name) == value


def test_no_number_of_generations_is_suggested_where_none_works():
    message = refusal(per_device_train_batch_size=1)
    assert "or num_generations" not in message
    assert suggestions(message, "per_device_train_batch_size") == [8]
    assert ", or num_generations=2 or 4." in refusal(per_device_train_batch_size=4, num_generations=3)
