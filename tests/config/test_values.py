import dataclasses
import logging
import re
from typing import get_args, get_type_hints

import numpy as np
import pytest
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType

from grpo_trl import GRPOConfig
from grpo_trl.config.checks import OF_RENDERING
from grpo_trl.config.config import FOLLOWS_A_METRIC
from grpo_trl.config.inherited import ACCELERATOR, INHERITED
from grpo_trl.config.sampling import MOOT, OPTIONS, REFUSED
from grpo_trl.config.values import CHOICES, OFF
from tests.test_config import make_config, refusal


DEFAULTS = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}


NUMBERS = sorted(
    name for name, hint in get_type_hints(GRPOConfig).items() if {int, float} & set(get_args(hint) or [hint])
)


# ---- Numbers ----
@pytest.mark.parametrize(
    "name", [name for name in NUMBERS if name in DEFAULTS and not isinstance(DEFAULTS[name], bool)]
)
def test_no_number_is_nan_or_a_switch(name):
    """Apart from options that take several kinds of values."""
    if bool in get_args(get_type_hints(GRPOConfig)[name]) or str in get_args(get_type_hints(GRPOConfig)[name]):
        return
    for value in (float("nan"), "nan", True, np.False_):
        assert f"{name}={value!r} cannot work; it must be a" in refusal(**{name: value})


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("learning_rate", "1e-6", 1e-6),
        ("beta", " 0.5 ", 0.5),
        ("num_generations", 4.0, 4),
        ("num_generations", "4", 4),
        ("max_steps", np.int64(3), 3),
        ("temperature", np.float32(0.5), 0.5),
        ("dead_run_patience", "7", 7),
        ("dead_run_patience", None, None),
        ("disable_dropout", "true", True),
        ("disable_dropout", "False", False),
    ],
)
def test_a_number_or_switch_may_come_as_text_or_as_another_kind_of_number(name, value, expected):
    converted = getattr(make_config(**{name: value}), name)
    assert (converted, type(converted)) == (expected, type(expected))


@pytest.mark.parametrize("name", ["learning_rate", "num_generations", "max_steps", "beta", "disable_dropout", "seed"])
@pytest.mark.parametrize("value", ["many", "", [1], {}, object])
def test_what_is_no_number_is_refused_with_one_that_works(name, value):
    message = refusal(**{name: value})
    assert message.startswith(f"{name}={value!r} cannot work; it must be ")
    assert message.endswith(f"e.g. {DEFAULTS[name]!r}.")


@pytest.mark.parametrize("value", [4.5, "4.5", float("nan"), float("inf")])
def test_a_count_has_no_fraction(value):
    assert "it must be a whole number, e.g. 8" in refusal(num_generations=value)


@pytest.mark.parametrize("name", sorted(OFF))
def test_none_switches_off(name):
    assert getattr(make_config(**{name: None}), name) == OFF[name]


@pytest.mark.parametrize("value", [2, -1, "maybe", [True], 0.5])
def test_a_switch_is_on_or_off(value):
    assert f"disable_dropout={value!r} cannot work; it must be True or False" in refusal(disable_dropout=value)


@pytest.mark.parametrize("name", sorted(CHOICES))
@pytest.mark.parametrize("value", ["fourier", 3, True])
def test_an_unknown_choice_of_transformers_is_refused_with_those_that_there_are(name, value):
    known = next(iter(CHOICES[name])).value
    assert re.search(rf"{name}={value!r} is unknown; use one of .*{known!r}", refusal(**{name: value}))


@pytest.mark.parametrize("name", ["eval_strategy", "save_strategy", "logging_strategy"])
@pytest.mark.parametrize("value", [False, None, "no"])
def test_yaml_reads_no_as_false(name, value):
    assert getattr(make_config(**{name: value}), name) == "no"


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_scheduler_is_built_or_refused_with_its_options(name):
    given = {"eval_strategy": "steps", "eval_steps": 1} if name in FOLLOWS_A_METRIC else {}
    needed = {
        "cosine_with_min_lr": {"min_lr": 1e-7},
        "cosine_warmup_with_min_lr": {"min_lr": 1e-7},
        "warmup_stable_decay": {"num_decay_steps": 2},
    }
    make_config(lr_scheduler_type=name, lr_scheduler_kwargs=needed.get(name), **given)
    if name != "greedy":  # which takes any option
        text = refusal(lr_scheduler_type=name, lr_scheduler_kwargs=(needed.get(name) or {}) | {"unknown": 1}, **given)
        assert re.search(f"(cannot work|has no effect) with lr_scheduler_type={name!r}", text)


@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_seed_is_one_of_numpys(value):
    assert f"seed={value} cannot work; it must be from 0 to 2**32 - 1" in refusal(seed=value)


def test_unknown_options_of_checkpointing_are_refused_with_those_that_there_are():
    text = refusal(gradient_checkpointing_kwargs={"reentrant": False})
    assert re.search(r"has reentrant=False, which torch.* it takes .*preserve_rng_state.*use_reentrant", text)
    make_config(gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": True})


def test_a_best_checkpoint_needs_an_evaluation():
    assert "eval_strategy='no' makes none" in refusal(save_strategy="best")


@pytest.mark.parametrize("value", [None, "None", "none", ["none"], []])
def test_no_tracker_has_several_names(value):
    assert make_config(report_to=value).report_to == []


@pytest.mark.parametrize("value", ["wand", "wandb,tensorboard", ["tensorboard", "wand"], 3])
def test_an_unknown_tracker_is_refused_with_those_that_there_are(value):
    assert "which is unknown; use 'none', or a list of" in refusal(report_to=value)


@pytest.mark.parametrize("value", [-1e-6, "inf", float("inf")])
def test_a_learning_rate_that_cannot_work_is_refused(value):
    assert "it must be a finite number such as 1e-6" in refusal(learning_rate=value)


def test_top_k_is_off_as_vllm_says_it_too():
    assert make_config(top_k=-1).top_k == make_config(generation_kwargs={"top_k": -1}).top_k == 0


@pytest.mark.parametrize("name", ["temperature", "num_generations", "learning_rate", "use_cpu"])
def test_none_where_nothing_can_be_off_is_refused(name):
    assert f"{name}=None cannot work" in refusal(**{name: None})


# ---- generation_kwargs ----
@pytest.mark.parametrize(
    "name, value", [("max_new_tokens", 7), ("temperature", 0.5), ("top_p", "0.5"), ("top_k", 5), ("min_p", 0.1)]
)
def test_a_generation_kwarg_that_has_an_option_sets_it(name, value):
    config = make_config(generation_kwargs={name: value, "min_length": 1})
    assert getattr(config, OPTIONS[name]) == float(value)
    assert config.generation_kwargs == {"min_length": 1}
    assert dataclasses.replace(config).generation_kwargs == {"min_length": 1}


def test_a_generation_kwarg_is_checked_as_its_option_is():
    assert "top_p=1.5 cannot work" in refusal(generation_kwargs={"top_p": 1.5})


def test_a_generation_kwarg_that_contradicts_its_option_is_refused():
    message = refusal(generation_kwargs={"temperature": 0.5}, temperature=0.7)
    assert "temperature=0.5, and temperature=0.7; set temperature alone" in message
    assert make_config(generation_kwargs={"temperature": 0.7}, temperature=0.7).temperature == 0.7


@pytest.mark.parametrize(
    "name, nearest",
    [("stop", "stop_strings"), ("max_tokens", "max_new_tokens"), ("repetition_penalti", "repetition_penalty")],
)
def test_an_unknown_generation_kwarg_suggests_the_nearest(name, nearest):
    assert f"did you mean {nearest}?" in refusal(generation_kwargs={name: 2})


@pytest.mark.parametrize("name", ["generation_kwargs", "model_init_kwargs", "lr_scheduler_kwargs"])
@pytest.mark.parametrize("value", ["{x", "{'top_k': 3}", '{"top_k": 3'])
def test_a_dict_that_is_no_json_is_named(name, value):
    assert f"{name}={value!r} is no JSON" in refusal(**{name: value})


@pytest.mark.parametrize("name", OF_RENDERING)
def test_how_a_conversation_is_rendered_is_no_option_of_its_template(name):
    assert f"chat_template_kwargs has {name}=False, which the trainer sets" in refusal(
        chat_template_kwargs={name: False}
    )
    assert make_config(chat_template_kwargs={"enable_thinking": False}).template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_generation_kwarg_that_cannot_work_says_what_would(name):
    assert f"{name}=99, which cannot work: {REFUSED[name]}" in refusal(generation_kwargs={name: 99})
    assert make_config(generation_kwargs={name: MOOT.get(name)}).generation_kwargs is None


# ---- Options of TrainingArguments ----
VALUES = {
    "average_tokens_across_devices": False,
    "bf16_full_eval": True,
    "batch_eval_metrics": True,
    "dataloader_in_order": False,
    "eval_do_concat_batches": False,
    "include_for_metrics": ["loss"],
    "train_sampling_strategy": "sequential",
}


@pytest.mark.parametrize("name", sorted(INHERITED.keys() & {f.name for f in dataclasses.fields(TrainingArguments)}))
def test_an_option_of_transformers_that_has_no_meaning_is_refused_or_said(name, caplog):
    value = VALUES.get(name, True if DEFAULTS[name] is False else 2)
    with caplog.at_level(logging.WARNING):
        if INHERITED[name].refused:
            assert refusal(**{name: value}) == f"{name}={value!r} cannot work: {INHERITED[name].reason}."
        else:
            more = {"dataloader_num_workers": 2} if name == "dataloader_prefetch_factor" else {}
            make_config(**{name: value} | more)
            assert f"{name}={value!r} has no effect: {INHERITED[name].reason}" in caplog.text


def test_what_is_not_set_is_not_mentioned(caplog):
    dataclasses.replace(make_config(bf16=False))
    assert not caplog.records


@pytest.mark.parametrize("field", dataclasses.fields(AcceleratorConfig), ids=lambda field: field.name)
def test_each_option_of_accelerator_config_works_or_is_refused(field):
    value = {"sync_each_batch": True} if "kwargs" in field.name else not field.default
    config = {field.name: value}
    if field.name in ACCELERATOR:
        message = refusal(accelerator_config=config)
        assert f"{field.name}={value!r}, which cannot work: {ACCELERATOR[field.name]}." in message
    else:
        assert field.name in ("even_batches", "use_configured_state")
    unchanged = make_config(accelerator_config={field.name: field.default}).accelerator_config
    assert unchanged == AcceleratorConfig()
