"""One generation batch of injected completions moves the weights as the papers say."""

import functools

import pytest
import torch

from tests.helpers import oracle as paper
from tests.helpers.models import ARCHITECTURES, make_model, make_tokenizer
from tests.helpers.training import Oracle, completion_of, injected, relative_error, rows_of, train, weights


PROMPTS = ["ab=", "equal", "a", "cde12="]
STEP = 1e-4


def expected_move(model, level, *, beta=0.0, iterations=1, steps=1, temperature=1.0, prompts=PROMPTS):
    """Weights after a generation batch of `prompts`, divided into `steps` optimizer steps, used `iterations` times."""
    oracle = Oracle(model, level, beta, temperature)
    rows, advantages = rows_of(prompts)
    old = oracle.sampled_by(rows)
    size = len(rows) // steps
    for _ in range(iterations):
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            oracle.step(rows[part], advantages[part], old[part])
    return weights(oracle.model)


@functools.cache
def move_of_the_paper(level, beta, iterations):
    return expected_move(make_model(), level, beta=beta, iterations=iterations)


def move_error(level, beta, iterations, **options):
    """How far one generation batch, used `iterations` times, moves the weights from where the paper says."""
    model = make_model()
    before = weights(model)
    expected = move_of_the_paper(level, beta, iterations)
    steps = {"num_iterations": iterations, "max_steps": iterations}
    trainer = train(model, PROMPTS, loss_level=level, beta=beta, **steps, **options)
    return relative_error(before, weights(trainer.model), expected)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "beta, iterations, batch_size, accumulation",
    [(0.0, 1, 16, 1), (0.1, 2, 16, 1), (0.1, 1, 8, 2), (0.0, 2, 8, 2), (0.1, 2, 4, 4), (0.0, 1, 2, 8)],
)
def test_a_generation_batch_moves_the_weights_as_the_paper_says(level, beta, iterations, batch_size, accumulation):
    batches = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    assert move_error(level, beta, iterations, **batches) < STEP


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "beta, iterations, limit", [(0.0, 1, None), (0.1, 2, 10), (0.0, 2, 14), (0.1, 1, 40), (0.1, 2, 1000)]
)
def test_no_cut_of_a_step_into_micro_batches_changes_the_move(level, beta, iterations, shared, limit):
    batches = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    cut = {"shared_prefix": shared, "max_tokens_per_micro_batch": limit}
    assert move_error(level, beta, iterations, **batches, **cut) < STEP


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_with_temperature_and_gradient_checkpointing(level, architecture):
    model = make_model(architecture)
    before = weights(model)
    expected = expected_move(model, level, beta=0.1, temperature=0.7)
    options = {"loss_level": level, "beta": 0.1, "temperature": 0.7, "per_device_train_batch_size": 16}
    trainer = train(model, PROMPTS, gradient_checkpointing=True, **options)
    assert relative_error(before, weights(trainer.model), expected) < STEP


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_generation_batch_longer_than_an_optimizer_step_keeps_its_old_policy(level, iterations):
    model = make_model()
    before = weights(model)
    expected = expected_move(model, level, iterations=iterations, steps=2)
    trainer = train(
        model,
        PROMPTS,
        loss_level=level,
        num_iterations=iterations,
        max_steps=2 * iterations,
        steps_per_generation=4,
        gradient_accumulation_steps=2,
    )
    assert relative_error(before, weights(trainer.model), expected) < STEP


def test_an_optimizer_step_of_several_generation_batches_divides_by_all_their_completions():
    model = make_model()
    before = weights(model)
    expected = expected_move(model, "token")
    trainer = train(model, PROMPTS, steps_per_generation=1, gradient_accumulation_steps=4)
    assert relative_error(before, weights(trainer.model), expected) < STEP


def test_the_short_last_step_of_an_epoch_divides_by_its_own_completions():
    model = make_model()
    oracle = Oracle(model, "token")
    before = weights(model)
    for part in (PROMPTS[:2], PROMPTS[2:3]):
        rows, advantages = rows_of(part)
        oracle.step(rows, advantages, oracle.sampled_by(rows))
    trainer = train(model, PROMPTS[:3], steps_per_generation=1, gradient_accumulation_steps=2, max_steps=2)
    assert relative_error(before, weights(trainer.model), weights(oracle.model)) < STEP


def test_the_token_level_agrees_with_trl_at_its_deepseekmath_settings(tmp_path, monkeypatch):
    import trl
    from datasets import Dataset

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    names = ("equal", *(f"{a}{b}" for a in "abcdefgh" for b in range(10)))
    # TRL fails on an empty completion.
    prompts = [name for name in names if all(completion_of(name, place)[1] for place in range(4))][:4]
    ours = train(str(tmp_path / "model"), prompts, beta=0.04, per_device_train_batch_size=16, max_steps=3)

    def with_logprobs(prompts, trainer):
        output = injected(prompts, trainer)
        return output | {"logprobs": [[0.0] * len(ids) for ids in output["completion_ids"]]}

    args = trl.GRPOConfig(
        output_dir=str(tmp_path / "out"),
        loss_type="grpo",
        beta=0.04,
        use_bias_correction_kl=False,
        per_device_train_batch_size=16,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        num_generations=4,
        max_steps=3,
        max_completion_length=8,
        shuffle_dataset=False,
        bf16=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    theirs = trl.GRPOTrainer(
        str(tmp_path / "model"),
        lambda score, **kwargs: score,
        args,
        Dataset.from_dict({"prompt": prompts}),
        processing_class=make_tokenizer(),
        rollout_func=with_logprobs,
    )
    before = weights(theirs.model)
    theirs.train()
    assert relative_error(before, weights(ours.model), weights(theirs.model)) < STEP


def test_equal_rewards_everywhere_leave_the_weights_as_they_are():
    model = make_model()
    before = weights(model)
    trainer = train(model, ["equal"], per_device_train_batch_size=4)
    assert all(torch.equal(before[n], w) for n, w in weights(trainer.model).items())


def test_rewards_of_none_take_no_part():
    """A completion without a reward is as if it were not in its group, but counts in the loss's divisor."""

    def sometimes(score):
        return [None if row % 4 == 1 else value for row, value in enumerate(score)]

    model = make_model()
    before = weights(model)
    oracle = Oracle(model, "token")
    rows, _ = rows_of(PROMPTS)
    values = sometimes([value for _, _, value in rows])
    expected = [a for start in range(0, 16, 4) for a in paper.advantages(values[start : start + 4])]
    oracle.step(rows, expected, oracle.sampled_by(rows))
    trainer = train(model, PROMPTS, reward_funcs=sometimes, per_device_train_batch_size=16)
    assert relative_error(before, weights(trainer.model), weights(oracle.model)) < STEP
