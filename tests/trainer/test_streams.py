"""A streamed dataset trains, resumes and evaluates as a set of its rows does."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset, IterableDatasetDict

from grpo_trl.errors import RunStopped
from grpo_trl.trainer.generation import GenerationBatchBuilder
from grpo_trl.types import Ranks
from tests.helpers.training import PROMPTS, checkpoints, length, sampling_trainer, weights


def streamed(prompts=PROMPTS, **columns):
    rows = [dict(zip(("prompt", *columns), row, strict=True)) for row in zip(prompts, *columns.values(), strict=True)]
    return IterableDataset.from_generator(lambda: iter(rows))


def ends(trainer):
    logs = [
        {k: v for k, v in entry.items() if k in ("loss", "reward", "num_tokens")} for entry in trainer.state.log_history
    ]
    return weights(trainer.model), logs


def same(first, second):
    return all(torch.equal(first[0][name], value) for name, value in second[0].items()) and first[1] == second[1]


def trained(folder, resume=None, **options):
    trainer = sampling_trainer(folder, **({"completions": 8, "logging_steps": 1} | options))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_stream_trains_as_the_set_of_its_rows(tmp_path):
    """More than a pass; a step has one generation batch, half of one, or two."""
    for number, options in enumerate(
        (
            {"max_steps": 10},
            {"max_steps": 4, "steps_per_generation": 2, "completions": 4},
            {"max_steps": 3, "num_iterations": 1, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
        )
    ):
        options |= {"shuffle_dataset": False, "save_strategy": "no"}
        in_set = trained(tmp_path / f"set-{number}", **options)
        stream = trained(tmp_path / f"stream-{number}", train_dataset=streamed(), **options)
        assert same(ends(stream), ends(in_set))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_on_a_stream_resumes_bit_for_bit(tmp_path, shuffle):
    """From inside a generation batch, from the end of one, and in a second pass of the stream."""
    options = {"shuffle_dataset": shuffle, "max_steps": 9}
    whole = trained(tmp_path / "whole", train_dataset=streamed(PROMPTS[:7]), **options)
    for step in (3, 8 - shuffle):
        resume = str(tmp_path / f"whole/checkpoint-{step}")
        resumed = trained(tmp_path / f"from-{step}", resume, train_dataset=streamed(PROMPTS[:7]), **options)
        assert same(ends(resumed), ends(whole))


def test_a_stream_that_changes_is_not_resumed(tmp_path):
    trained(tmp_path, train_dataset=streamed(), max_steps=3)
    with pytest.raises(RunStopped, match="does not stream the prompts of generation batch 1 again"):
        trained(tmp_path, True, train_dataset=streamed(PROMPTS[::-1]))


def test_ranks_that_read_different_prompts_stop():
    def differs(values):
        """The second rank has no error, and other prompts."""
        return [*values, None if values[0] is None else "other"]

    order = SimpleNamespace(digest=lambda generation: f"digest of {generation}")
    for gather, ahead in ((lambda values: values * 2, 0), (differs, 0), (differs, 2)):
        builder = SimpleNamespace(order=order, ranks=Ranks(0, 2, gather), ahead=SimpleNamespace(distance=ahead))
        message = f"other prompts on rank 1 than on rank 0 in generation batch {4 + ahead}"
        with pytest.raises(RunStopped, match=message) if gather is differs else nullcontext():
            GenerationBatchBuilder._read_prompts(builder, 4)


def test_a_stream_needs_max_steps(tmp_path):
    with pytest.raises(ValueError, match=r"max_steps=-1 and train_dataset is streamed.*max_steps=1000"):
        sampling_trainer(tmp_path, 8, train_dataset=streamed(), max_steps=-1)


def test_a_prompt_that_is_too_long_stops_the_run_which_is_saved(tmp_path):
    """Not among the first, which are checked before training."""
    rows = [*PROMPTS * 2, "a" * 60, *PROMPTS]
    options = {"shuffle_dataset": False, "save_strategy": "no", "max_steps": 18, "max_tokens_per_micro_batch": 40}
    with pytest.raises(RunStopped, match="row 16 of the stream has 60 tokens"):
        trained(tmp_path / "run", train_dataset=streamed(rows), **options)
    assert checkpoints(tmp_path / "run") == ["checkpoint-16"]
    dropped = trained(tmp_path / "run", True, train_dataset=streamed(rows), prompt_overflow="drop", **options)
    never = trained(tmp_path / "never", train_dataset=streamed(rows), prompt_overflow="drop", **options)
    assert same(ends(dropped), ends(never))


def test_streams_are_evaluated_as_sets_are(tmp_path):
    def untimed(metrics):
        return {name: value for name, value in metrics.items() if not name.endswith(("time", "second", "sampling"))}

    texts = {"few": PROMPTS[:3], "all": PROMPTS}
    sets = {name: Dataset.from_dict({"prompt": prompts}) for name, prompts in texts.items()}
    streams = {name: streamed(prompts) for name, prompts in texts.items()}
    trainer = sampling_trainer(tmp_path, 8, eval_dataset=IterableDatasetDict(streams))
    expected = [untimed(trainer.evaluate(one)) for one in (sets, sets["all"])]
    actual = [untimed(trainer.evaluate(one)) for one in (None, streams["all"])]
    assert "eval_few_reward" in expected[0]
    for one, other in zip(actual, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-12, nan_ok=True)


def test_reward_functions_get_the_columns_of_a_stream(tmp_path):
    def checked(completions, prompts, answer):
        seen.update(zip(prompts, answer, strict=True))
        return length(completions)

    seen = {}
    answers = [{"parts": [text, None]} for text in PROMPTS]
    trained(tmp_path, train_dataset=streamed(answer=answers), reward_funcs=checked, max_steps=8, save_strategy="no")
    assert seen == dict(zip(PROMPTS, answers, strict=True))

    def unserved(completions, solution):
        return length(completions)

    with pytest.raises(ValueError, match="solution"):
        sampling_trainer(tmp_path, 8, train_dataset=streamed(answer=answers), reward_funcs=unserved)
