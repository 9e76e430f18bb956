"""How a run that sets no option fits into the memory that it finds."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig

from grpo_trl.logprobs.packing import Packer
from grpo_trl.model_utils import causal_lm
from grpo_trl.plan import GPU_TOKENS
from grpo_trl.trainer import memory_budget
from grpo_trl.types import Ranks
from tests.helpers.models import make_model
from tests.helpers.training import completions_of, needed, relative_error, sampling_trainer, train, weights


PROMPTS = ["ab=", "cde12="]
OPEN = {"gradient_checkpointing": None, "per_device_train_batch_size": 8}
LONGEST = 8 * 8 + 2 * 4
"""Tokens of a micro-batch of two groups whose completions are all as long as they may be."""
SMALL_GPU = 2**20
"""Bytes of a GPU whose slices of logits are as small as those of a CPU."""


def with_free(monkeypatch, size):
    monkeypatch.setattr(memory_budget, "free_memory", lambda device: size)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == memory_budget.__name__]


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules="all-linear")], ids=["full", "lora"])
@pytest.mark.parametrize("option", [None, True, False])
@pytest.mark.parametrize("fits", [True, False])
def test_activations_are_kept_where_they_fit_unless_the_option_says_otherwise(
    option, fits, peft_config, monkeypatch, caplog
):
    with_free(monkeypatch, 2**40 if fits else needed(LONGEST, False) / 2)
    trainer = train(make_model(), PROMPTS, peft_config=peft_config, **(OPEN | {"gradient_checkpointing": option}))
    assert causal_lm(trainer.model).is_gradient_checkpointing == (not fits if option is None else option)
    if option is None:
        assert len(lines(caplog)) == 1
        assert f"activations are {'kept' if fits else 'recomputed'}" in lines(caplog)[0]


@pytest.mark.parametrize("recomputed", [True, False])
def test_micro_batches_have_as_many_tokens_as_the_plan_fits_into_the_free_memory(recomputed, monkeypatch):
    for tokens in (16, 40, 700):
        with_free(monkeypatch, needed(tokens, recomputed))
        trainer = train(make_model(), PROMPTS, **(OPEN | {"gradient_checkpointing": recomputed}))
        limit = trainer._evaluator.packer.max_tokens
        assert tokens * 7 / 8 <= limit <= tokens
        sizes = [len(p.input_ids_RS[0]) for p in trainer._evaluator.packer.micro_batches(completions_of(trainer), 1)]
        assert max(sizes) <= limit


def test_the_gradient_is_the_same_whatever_fits(monkeypatch):
    start, moved = weights(make_model()), []
    for size in (2**40, needed(24, True)):
        with_free(monkeypatch, size)
        moved.append(weights(train(make_model(), PROMPTS, max_steps=2, **OPEN).model))
    assert relative_error(start, moved[1], moved[0]) < 1e-5


@pytest.mark.parametrize("option", [None, 9])
def test_with_memory_to_spare_a_step_is_cut_as_the_options_say(option, monkeypatch):
    with_free(monkeypatch, 2**40)
    options = OPEN | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = train(make_model(), PROMPTS, max_tokens_per_micro_batch=option, **options)
    packer = Packer(None if option else 4, option, pad_token_id=0)
    completions = completions_of(trainer)
    assert trainer._evaluator.packer.cut(completions) == packer.cut(completions)


def test_all_ranks_choose_for_the_one_with_the_least_memory(monkeypatch, tmp_path):
    with_free(monkeypatch, 2**40)
    trainer = sampling_trainer(tmp_path, 8, **{"gradient_checkpointing": None, "optim": "sgd"})
    asked = []
    ranks = Ranks(0, 2, lambda sizes: asked.extend(sizes) or [*sizes, needed(24, True)])
    budget = memory_budget.MemoryBudget(trainer.args, trainer.model, trainer._evaluator, ranks, trainer._setup)
    budget.choose()
    budget.choose()
    assert asked == [2**40]
    assert 20 < trainer._evaluator.packer.max_tokens <= 24
    assert trainer.model.is_gradient_checkpointing


def test_a_resumed_run_keeps_what_its_checkpoint_has_chosen(monkeypatch, tmp_path):
    options = {"gradient_checkpointing": None, "max_steps": 4, "optim": "sgd"}
    with_free(monkeypatch, needed(24, True))
    whole = sampling_trainer(tmp_path / "whole", 8, **options)
    whole.train()
    limit = whole._evaluator.packer.max_tokens
    with_free(monkeypatch, 2**40)
    resumed = sampling_trainer(tmp_path / "whole", 8, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert resumed._evaluator.packer.max_tokens == limit
    assert resumed.model.is_gradient_checkpointing
    ends = [weights(trainer.model) for trainer in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_an_option_that_comes_and_goes_leaves_the_limit_that_fits(monkeypatch, tmp_path):
    options = {"gradient_checkpointing": None, "optim": "sgd"}
    with_free(monkeypatch, needed(24, True))
    limits = []
    for steps, option in enumerate((None, 100, None), start=1):
        trainer = sampling_trainer(tmp_path, 8, max_steps=steps, max_tokens_per_micro_batch=option, **options)
        trainer.train(resume_from_checkpoint=True)
        limits.append(trainer._evaluator.packer.max_tokens)
    assert limits == [limits[0], 100, limits[0]]


PIECES = 3 * 4 * 48 * LONGEST + needed(LONGEST, True)
"""Of logits and activations of the longest micro-batch, at most."""


@pytest.mark.parametrize(
    "size, given_back", [(needed(LONGEST, True), True), (needed(LONGEST, True) + 2 * PIECES, False)]
)
def test_freed_memory_is_given_back_where_what_malloc_may_keep_would_not_fit(size, given_back, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(memory_budget, "return_freed_blocks", lambda: calls.append(0))
    with_free(monkeypatch, size)
    options = {"gradient_checkpointing": True, "max_steps": 2, "optim": "sgd", "beta": 0.0}
    sampling_trainer(tmp_path, 8, **options).train()
    assert len(calls) == given_back
    with_free(monkeypatch, 2**40)
    resumed = sampling_trainer(tmp_path, 8, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(calls) == 2 * given_back


@pytest.mark.parametrize("plannable", [True, False])
@pytest.mark.parametrize("kind", ["unsupported", "prefix tuning"])
def test_layers_that_cannot_be_recomputed_never_are(kind, plannable, monkeypatch):
    model, peft_config = make_model(), None
    if kind == "unsupported":
        monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    else:
        peft_config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    if not plannable:
        monkeypatch.setattr("grpo_trl.trainer.recording.setup_of", lambda *args, **kwargs: _refuse())
    with_free(monkeypatch, needed(24, True))
    trainer = train(model, PROMPTS, peft_config=peft_config, **OPEN)
    assert trainer.state.global_step
    assert not causal_lm(trainer.model).is_gradient_checkpointing


def test_a_model_that_the_plan_cannot_read_is_trained_as_before(monkeypatch, caplog):
    monkeypatch.setattr("grpo_trl.trainer.recording.setup_of", lambda *args, **kwargs: _refuse())
    trainer = train(make_model(), PROMPTS, **OPEN)
    assert trainer.model.is_gradient_checkpointing
    assert trainer._evaluator.packer.max_tokens is None
    assert lines(caplog) == ["Memory is not planned; unless an option says no, activations are recomputed: no sizes"]


def _refuse():
    raise ValueError("no sizes")


@pytest.mark.parametrize("size, expected", [(2**40, GPU_TOKENS), (needed(24, False, SMALL_GPU), 24)])
def test_on_a_gpu_a_micro_batch_has_what_fits_and_is_worth_it_however_many_completions(
    size, expected, monkeypatch, tmp_path
):
    with_free(monkeypatch, size)
    trainer = sampling_trainer(tmp_path, 4, optim="sgd", beta=0.0)
    args = SimpleNamespace(max_tokens_per_micro_batch=None, gradient_checkpointing=False, device=torch.device("cuda"))
    setup = replace(trainer._setup(), gpu_bytes=SMALL_GPU)
    memory_budget.MemoryBudget(args, trainer.model, trainer._evaluator, Ranks(), lambda: setup).choose()
    assert trainer._evaluator.packer.batch_size is None
    assert expected * 7 / 8 <= trainer._evaluator.packer.max_tokens <= expected
