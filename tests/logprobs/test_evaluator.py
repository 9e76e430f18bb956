"""Which completions are scored, in which micro-batches, and which way."""

import dataclasses
import logging

import pytest
import torch
from transformers import TrainerCallback

from grpo_trl.errors import RunStopped
from grpo_trl.logprobs.evaluator import RETRY_STEPS, LogprobEvaluator
from grpo_trl.logprobs.head import enable_logprobs
from grpo_trl.logprobs.packing import Packer
from grpo_trl.types import Completion, Ranks
from tests.helpers.models import make_model
from tests.helpers.training import completion_of, train


OUT_OF_MEMORY = torch.OutOfMemoryError("made up")
HOST = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
GROUP = [Completion([5, 6, 7], [8, 9], [True] * 2, advantage=1.0), Completion([5, 6, 7], [4], [True], advantage=-1.0)]
COMPARISON = 3
"""Forwards of the comparison of both ways."""
FLAT = [Completion([5, 6], [8, 9], [True] * 2), Completion([5, 6], [4], [True])]


def make_evaluator(model=None, *, shared_prefix="auto", needs_all=False, ranks=None, **packer):
    model = make_model() if model is None else model
    enable_logprobs(model)
    packer = Packer(**({"batch_size": 4, "max_tokens": None, "pad_token_id": 0} | packer))
    settings = {
        "shared_prefix": shared_prefix,
        "temperature": 1.0,
        "mixed_precision": False,
        "needs_all": needs_all,
        "ranks": ranks or Ranks(),
    }
    return LogprobEvaluator(model, packer, **settings), model


def computed_by(model, run):
    """Tokens of each forward of `model` that `run` makes."""
    sizes = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    run()
    hook.remove()
    return sizes


def micro_batches_of(evaluator, completions, divisor=4):
    return evaluator.in_micro_batches(completions, divisor, work=lambda micro_batches: micro_batches, undo=lambda: None)


def test_completions_without_advantage_count_and_are_not_computed():
    evaluator, _ = make_evaluator()
    (micro_batch,) = micro_batches_of(evaluator, GROUP + FLAT, divisor=12)
    assert micro_batch.divisor == 12
    assert micro_batch.advantages_BU.flatten().tolist() == [1.0, -1.0]
    assert micro_batch.input_ids_RS.tolist() == [[5, 6, 7, 8]]  # no last token: it predicts nothing


def test_the_kl_term_needs_all_of_them_but_those_without_a_trained_token():
    evaluator, _ = make_evaluator(needs_all=True)
    untrained = [Completion([5], [], []), Completion([5], [7], [False])]
    (micro_batch,) = micro_batches_of(evaluator, GROUP + FLAT + untrained, divisor=6)
    assert len(micro_batch.advantages_BU) == 4
    assert micro_batch.divisor == 6


def test_without_signal_one_forward_of_one_token_is_left():
    evaluator, _ = make_evaluator()
    (micro_batch,) = micro_batches_of(evaluator, FLAT)
    assert micro_batch.input_ids_RS.numel() == 1
    assert len(micro_batch.targets_M) == 0


def test_log_probabilities_go_to_the_completions_that_they_belong_to():
    evaluator, model = make_evaluator(batch_size=1)
    scored = evaluator.with_logps(model, FLAT + GROUP[::-1] + FLAT, "old_logps")
    assert [c.old_logps is None for c in scored] == [True, True, False, False, True, True]
    for completion in scored[2:4]:
        (alone,) = make_evaluator(model)[0].with_logps(model, [completion], "ref_logps")
        torch.testing.assert_close(completion.old_logps, alone.ref_logps)


def test_a_model_that_disagrees_is_padded_with_one_line(caplog, monkeypatch):
    evaluator, model = make_evaluator()
    monkeypatch.setattr("grpo_trl.logprobs.evaluator.packed_mismatch", lambda *args: "it differs")
    with caplog.at_level(logging.WARNING):
        evaluator.compare(model, GROUP)
        evaluator.compare(model, GROUP)
    assert [record.message for record in caplog.records] == [
        "Prompts are not shared between the completions of a group: it differs."
    ]
    assert micro_batches_of(evaluator, GROUP)[0].layout is None


def test_a_reason_of_one_rank_is_a_reason_for_all():
    evaluator, _ = make_evaluator(ranks=Ranks(0, 2, lambda values: [*values, "the other rank differs"]))
    assert not evaluator.packer.shared_prefix


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("made up"), FloatingPointError("made up")])
def test_an_error_of_one_rank_in_the_comparison_is_an_error_on_all(error, monkeypatch):
    told: list = []
    heard: list = []

    def fail(*args):
        raise error

    failing, model = make_evaluator(ranks=Ranks(0, 2, lambda values: told.extend(values) or values))
    other, _ = make_evaluator(ranks=Ranks(1, 2, lambda values: [*values, *heard]))
    told.clear()
    with monkeypatch.context() as patched:
        patched.setattr("grpo_trl.logprobs.evaluator.packed_mismatch", fail)
        with pytest.raises(type(error)):
            failing.compare(model, GROUP)
    assert len(told) == 1
    heard += told
    with pytest.raises(RuntimeError, match=r"Another rank failed .*made up"):
        other.compare(model, GROUP)


def test_a_difference_is_judged_again_against_the_noise_before_packing_is_given_up(monkeypatch):
    evaluator, model = make_evaluator()
    seen = []

    def mismatch(*args):
        seen.append(args[-1])
        return None if args[-1] else "it differs"

    monkeypatch.setattr("grpo_trl.logprobs.evaluator.packed_mismatch", mismatch)
    evaluator.compare(model, GROUP)
    assert seen == [False, True]
    assert evaluator.packer.shared_prefix


def run_out_above(evaluator, limit, error=OUT_OF_MEMORY):
    """A step that fits in micro-batches of at most `limit` tokens; returns the largest one."""

    def work(micro_batches):
        largest = max(micro_batch.input_ids_RS.numel() for micro_batch in micro_batches)
        if largest > limit:
            raise error
        return largest

    return evaluator.in_micro_batches(GROUP * 4, 8, work, undo=lambda: None)


@pytest.mark.parametrize("error", [RuntimeError(HOST), MemoryError()], ids=repr)
def test_a_step_is_made_in_halves_whichever_allocator_has_failed(error, caplog):
    evaluator, _ = make_evaluator(batch_size=8)
    whole = evaluator.packer.largest(GROUP * 4)
    assert run_out_above(evaluator, whole - 1, error) < whole
    assert (str(error) or type(error).__name__) in caplog.text


def test_another_error_of_a_step_is_raised_unchanged():
    evaluator, _ = make_evaluator(batch_size=8)
    with pytest.raises(RuntimeError, match="made up"):
        run_out_above(evaluator, 1, RuntimeError("made up"))
    assert evaluator.packer.max_tokens is None


def test_a_limit_after_memory_ran_out_is_raised_again_and_each_failure_doubles_the_wait():
    evaluator, _ = make_evaluator(batch_size=8)
    whole = evaluator.packer.largest(GROUP * 4)
    sizes = [run_out_above(evaluator, whole - 1) for _ in range(RETRY_STEPS + 3)]
    assert max(sizes) < whole
    assert evaluator.state_dict()["patience"] == 2 * RETRY_STEPS
    sizes = [run_out_above(evaluator, whole) for _ in range(2 * RETRY_STEPS + 1)]
    assert sizes[-1] == whole
    assert evaluator.packer.max_tokens is None


@pytest.mark.parametrize("option, expected", [(64, 32), (200, 200), (None, None)])
def test_a_resumed_run_keeps_the_limit_unless_the_option_has_changed(option, expected):
    evaluator, _ = make_evaluator(max_tokens=64)
    evaluator.packer = dataclasses.replace(evaluator.packer, max_tokens=32)
    resumed, _ = make_evaluator(max_tokens=option)
    resumed.load_state_dict(evaluator.state_dict())
    assert resumed.packer.max_tokens == expected


def test_the_comparison_is_made_once():
    evaluator, model = make_evaluator()
    assert len(computed_by(model, lambda: evaluator.compare(model, GROUP))) == COMPARISON
    assert computed_by(model, lambda: evaluator.compare(model, GROUP)) == []
    assert evaluator.packer.shared_prefix


@pytest.mark.parametrize("shared_prefix", ["auto", True, False])
def test_attention_dropout_pads_or_is_refused(shared_prefix, caplog):
    model = make_model(attention_dropout=0.1)
    if shared_prefix is True:
        with pytest.raises(
            ValueError, match=r"shared_prefix=True cannot work: .*attention_dropout=0.1; disable_dropout"
        ):
            make_evaluator(model, shared_prefix=True)
        return
    evaluator, _ = make_evaluator(model, shared_prefix=shared_prefix)
    assert not evaluator.packer.shared_prefix
    assert ("attention_dropout=0.1" in caplog.text) == (shared_prefix == "auto")


def test_disable_dropout_comes_before_the_choice():
    trainer = train(make_model(attention_dropout=0.1), ["ab="], disable_dropout=True, shared_prefix=True)
    assert trainer._evaluator.packer.shared_prefix


# ---- In the trainer ----
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_mixed_precision_shares_prompts(architecture):
    trainer = train(
        make_model(architecture), ["ab=", "cde12="], per_device_train_batch_size=8, bf16=True, shared_prefix=True
    )
    assert trainer._evaluator.packer.shared_prefix


def test_a_step_computes_each_prompt_once_and_no_group_without_signal():
    model = make_model()
    prompts = ["ab=", "equal", "cde12=", "equal"]
    rows = [completion_of(prompt, place) for prompt in ("ab=", "cde12=") for place in range(4)]
    options = {"per_device_train_batch_size": 16, "max_steps": 2, "num_generations": 4}
    sizes = computed_by(model, lambda: train(model, prompts, **options))
    expected = len("ab=") + len("cde12=") + sum(max(0, len(ids) - 1) for _, ids, _ in rows)
    assert sizes[COMPARISON:] == [expected, expected]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_off_policy_and_with_a_reference_every_pass_shares_its_prompts(level):
    model = make_model()
    prompts = ["ab=", "cde12="]
    options = {"num_iterations": 2, "max_steps": 2, "per_device_train_batch_size": 8, "loss_level": level, "beta": 0.1}
    sizes = computed_by(model, lambda: train(model, prompts, **options))[COMPARISON:]
    rows = [completion_of(prompt, place) for prompt in prompts for place in range(4)]
    expected = sum(map(len, prompts)) + sum(max(0, len(ids) - 1) for _, ids, _ in rows)
    assert sizes == [expected] * 4  # the old policy, the reference (a copy with its hooks) and two updates


class Syncs(TrainerCallback):
    """What each backward pass was told of synchronising."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen = []

    def on_substep_end(self, args, state, control, **kwargs):
        self.seen.append("substep")

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append("step")


@pytest.mark.parametrize(
    "accumulation, limit, micro_batches",
    [(1, None, [1]), (1, 12, [3]), (4, 1000, [0, 0, 0, 1]), (2, None, [0, 2])],
)
def test_only_the_last_micro_batch_of_a_step_synchronises(monkeypatch, accumulation, limit, micro_batches):
    syncs = Syncs()
    from grpo_trl import GRPOTrainer

    compute_loss = GRPOTrainer.compute_loss

    def recorded(self, *args, **kwargs):
        syncs.seen.append(self.accelerator.sync_gradients)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "compute_loss", recorded)
    train(
        make_model(),
        ["ab=", "cde12="],
        callbacks=[syncs],
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_tokens_per_micro_batch=limit,
    )
    ends = [place for place, event in enumerate(syncs.seen) if isinstance(event, str)]
    counts = [end - start - 1 for start, end in zip([-1, *ends], ends, strict=False)]
    flags = [event for event in syncs.seen if isinstance(event, bool)]
    assert len(counts) == accumulation
    assert flags == [False] * (len(flags) - 1) + [True]
    assert counts == micro_batches


def test_a_prompt_that_no_micro_batch_can_hold_is_refused_before_training():
    with pytest.raises(
        ValueError, match=r"4 fit into max_tokens_per_micro_batch.*set max_tokens_per_micro_batch=16 or more"
    ):
        train(make_model(), ["ab=", "abcdefgh"], rollout_func=None, max_tokens_per_micro_batch=12)


def test_memory_that_runs_out_in_the_comparison_stops_a_run_with_the_remedy(tmp_path):
    model = make_model()

    def hook(module, args, kwargs):
        if kwargs.get("position_ids") is not None:
            raise torch.OutOfMemoryError("made up")

    model.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(RunStopped, match=r"a few completions \(made up\)\. Lower max_completion_length"):
        train(model, ["ab=", "cde12="], output_dir=str(tmp_path))
