"""Which completions are scored, in which pieces, and which way."""

import logging

import pytest
import torch
from transformers import TrainerCallback

from grpo_trl.errors import RunStopped
from grpo_trl.policy import Completion, Packer, enable_scoring
from grpo_trl.scoring import Scorer

from .conftest import make_model
from .training import completion_of, train


GROUP = [Completion([5, 6, 7], [8, 9], [True] * 2, advantage=1.0), Completion([5, 6, 7], [4], [True], advantage=-1.0)]
COMPARISON = 3
"""Forwards of the comparison of both ways."""
FLAT = [Completion([5, 6], [8, 9], [True] * 2), Completion([5, 6], [4], [True])]


def make_scorer(model=None, *, shared_prefix="auto", needs_all=False, gather=lambda values: values, **packer):
    model = make_model() if model is None else model
    enable_scoring(model)
    packer = Packer(**({"batch_size": 4, "max_tokens": None, "pad_token_id": 0} | packer))
    settings = {
        "shared_prefix": shared_prefix,
        "temperature": 1.0,
        "mixed_precision": False,
        "needs_all": needs_all,
        "gather": gather,
    }
    return Scorer(model, packer, **settings), model


def computed_by(model, run):
    """Tokens of each forward of `model` that `run` makes."""
    sizes = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    run()
    hook.remove()
    return sizes


def pieces_of(scorer, completions, num_completions=4):
    return scorer.in_pieces(completions, num_completions, work=lambda pieces: pieces, undo=lambda: None)


def test_completions_without_advantage_count_and_are_not_computed():
    scorer, _ = make_scorer()
    (piece,) = pieces_of(scorer, GROUP + FLAT, num_completions=12)
    assert piece.num_completions == 12
    assert piece.advantages_B.tolist() == [1.0, -1.0]
    assert piece.input_ids_RS.tolist() == [[5, 6, 7, 8]]  # no last token: it predicts nothing


def test_the_kl_term_needs_all_of_them_but_those_without_a_trained_token():
    scorer, _ = make_scorer(needs_all=True)
    untrained = [Completion([5], [], []), Completion([5], [7], [False])]
    (piece,) = pieces_of(scorer, GROUP + FLAT + untrained, num_completions=6)
    assert len(piece.advantages_B) == 4
    assert piece.num_completions == 6


def test_without_signal_one_forward_of_one_token_is_left():
    scorer, _ = make_scorer()
    (piece,) = pieces_of(scorer, FLAT)
    assert piece.input_ids_RS.numel() == 1
    assert len(piece.targets_M) == 0


def test_log_probabilities_go_to_the_completions_that_they_belong_to():
    scorer, model = make_scorer(batch_size=1)
    scored = scorer.with_logps(model, FLAT + GROUP[::-1] + FLAT, "old_logps")
    assert [c.old_logps is None for c in scored] == [True, True, False, False, True, True]
    for completion in scored[2:4]:
        (alone,) = make_scorer(model)[0].with_logps(model, [completion], "ref_logps")
        torch.testing.assert_close(completion.old_logps, alone.ref_logps)


def test_a_model_that_disagrees_is_padded_with_one_line(caplog, monkeypatch):
    scorer, model = make_scorer()
    monkeypatch.setattr("grpo_trl.scoring.disagreement", lambda *args: "it differs")
    with caplog.at_level(logging.WARNING):
        scorer.compare(model, GROUP)
        scorer.compare(model, GROUP)
    assert [record.message for record in caplog.records] == [
        "Prompts are not shared between the completions of a group: it differs."
    ]
    assert pieces_of(scorer, GROUP)[0].layout is None


def test_a_reason_of_one_rank_is_a_reason_for_all():
    scorer, _ = make_scorer(gather=lambda values: [*values, "the other rank differs"])
    assert not scorer.packer.shared_prefix


def test_the_comparison_is_made_once():
    scorer, model = make_scorer()
    assert len(computed_by(model, lambda: scorer.compare(model, GROUP))) == COMPARISON
    assert computed_by(model, lambda: scorer.compare(model, GROUP)) == []
    assert scorer.packer.shared_prefix


@pytest.mark.parametrize("shared_prefix", ["auto", True, False])
def test_attention_dropout_pads_or_is_refused(shared_prefix, caplog):
    model = make_model(attention_dropout=0.1)
    if shared_prefix is True:
        with pytest.raises(
            ValueError, match=r"shared_prefix=True cannot work: .*attention_dropout=0.1; disable_dropout"
        ):
            make_scorer(model, shared_prefix=True)
        return
    scorer, _ = make_scorer(model, shared_prefix=shared_prefix)
    assert not scorer.packer.shared_prefix
    assert ("attention_dropout=0.1" in caplog.text) == (shared_prefix == "auto")


def test_disable_dropout_comes_before_the_choice():
    trainer = train(make_model(attention_dropout=0.1), ["ab="], disable_dropout=True, shared_prefix=True)
    assert trainer._scorer.packer.shared_prefix


# ---- In the trainer ----
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_mixed_precision_shares_prompts(architecture):
    trainer = train(
        make_model(architecture), ["ab=", "cde12="], per_device_train_batch_size=8, bf16=True, shared_prefix=True
    )
    assert trainer._scorer.packer.shared_prefix


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
    "accumulation, limit, pieces",
    [(1, None, [1]), (1, 12, [3]), (4, 1000, [0, 0, 0, 1]), (2, None, [0, 2])],
)
def test_only_the_last_piece_of_a_step_synchronises(monkeypatch, accumulation, limit, pieces):
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
        max_tokens_per_piece=limit,
    )
    ends = [place for place, event in enumerate(syncs.seen) if isinstance(event, str)]
    counts = [end - start - 1 for start, end in zip([-1, *ends], ends, strict=False)]
    flags = [event for event in syncs.seen if isinstance(event, bool)]
    assert len(counts) == accumulation
    assert flags == [False] * (len(flags) - 1) + [True]
    assert counts == pieces


def test_a_prompt_that_no_piece_can_hold_is_refused_before_training():
    with pytest.raises(ValueError, match=r"4 fit into max_tokens_per_piece.*set max_tokens_per_piece=16 or more"):
        train(make_model(), ["ab=", "abcdefgh"], rollout_func=None, max_tokens_per_piece=12)


def test_memory_that_runs_out_in_the_comparison_stops_a_run_with_the_remedy(tmp_path):
    model = make_model()

    def hook(module, args, kwargs):
        if kwargs.get("position_ids") is not None:
            raise torch.OutOfMemoryError("made up")

    model.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(RunStopped, match=r"two completions \(made up\)\. Lower max_completion_length"):
        train(model, ["ab=", "cde12="], output_dir=str(tmp_path))
