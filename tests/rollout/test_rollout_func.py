import math

import pytest

from grpo_trl.rollout.base import RolloutRequest
from grpo_trl.rollout.rollout_func import RolloutFuncEngine


REQUEST = RolloutRequest(prompts=["a", "b"], prompt_ids=[[5], [6]], num_generations=2, seeds=[0, 0])


def make_output(**changes) -> dict:
    output = {
        "prompt_ids": [[5], [5], [6, 6], [6, 6]],
        "completion_ids": [[7, 1], [8], [], [9, 9, 1]],
        "logprobs": [[-0.5, -1], [-0.25], [], [-3.0, -2.0, -1.0]],
    }
    output |= changes
    return {key: value for key, value in output.items() if value is not ...}


def run(**changes):
    engine = RolloutFuncEngine(lambda prompts, trainer: make_output(**changes), None, (1,), num_tokens=50)
    return engine.rollout(REQUEST)


def test_the_function_gets_every_prompt_in_a_row_and_the_trainer():
    calls = []

    def rollout_func(prompts, trainer):
        calls.append((prompts, trainer))
        return make_output()

    trainer = object()
    RolloutFuncEngine(rollout_func, trainer, (1,)).rollout(REQUEST)
    assert calls == [(["a", "a", "b", "b"], trainer)]


def test_the_function_may_change_its_prompts():
    def rollout_func(prompts, trainer):
        assert [len(prompt) for prompt in prompts] == [1] * 4
        for prompt in prompts:
            prompt[0]["content"] = ""
            prompt.append({"role": "assistant", "content": "c"})
        return make_output()

    prompts = [[{"role": "user", "content": name}] for name in "ab"]
    RolloutFuncEngine(rollout_func, None, (1,)).rollout(RolloutRequest(prompts, [[5], [6]], 2, [0, 0]))
    assert prompts == [[{"role": "user", "content": name}] for name in "ab"]


def test_what_is_returned_becomes_completions():
    completions = run().completions
    assert [c.prompt_ids for c in completions] == [[5], [5], [6, 6], [6, 6]]
    assert [c.ids for c in completions] == [[7, 1], [8], [], [9, 9, 1]]
    assert [c.mask for c in completions] == [[True] * 2, [True], [], [True] * 3]
    assert [c.ended for c in completions] == [True, False, False, True]
    assert [c.sampler_logps for c in completions] == [[-0.5, -1.0], [-0.25], [], [-3.0, -2.0, -1.0]]


def test_log_probabilities_may_be_none_for_all_or_for_a_row():
    assert [c.sampler_logps for c in run(logprobs=None).completions] == [None] * 4
    logprobs = [None, [-0.25], [], None]
    assert [c.sampler_logps for c in run(logprobs=logprobs).completions] == logprobs


def test_env_mask_marks_the_tokens_that_the_model_wrote():
    rollout = run(env_mask=[[1, 0], [1], [], [0, 1, 1]])
    assert [c.mask for c in rollout.completions] == [[True, False], [True], [], [False, True, True]]
    assert rollout.columns == {}


def test_env_mask_of_none_counts_every_token():
    assert [c.mask for c in run(env_mask=None).completions] == [[True] * 2, [True], [], [True] * 3]


def test_further_keys_are_columns():
    rollout = run(turns=[1, 2, 3, 4], env="abcd", level=3)
    assert rollout.columns == {"turns": [1, 2, 3, 4], "env": ["abcd"] * 4, "level": [3] * 4}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"logprobs": ..., "prompt_ids": ...}, "no prompt_ids, logprobs; it must return prompt_ids, completion_ids"),
        ({"completion_ids": ...}, "no completion_ids; "),
        ({"completion_ids": [[7]] * 2}, r"'completion_ids' with 2 entries for 4 prompts; .*num_generations=2 times"),
        ({"logprobs": [[-1.0]] * 5}, "'logprobs' with 5 entries for 4 prompts"),
        ({"env_mask": [[1]]}, "'env_mask' with 1 entries for 4 prompts"),
        ({"turns": [1]}, "'turns' with 1 entries for 4 prompts"),
        ({"prompt_ids": 3}, "'prompt_ids' with int for 4 prompts"),
        ({"prompt_ids": [[5], [4], [6, 6], [6, 6]]}, r"different prompt_ids for the 2 .*\(rows 0 to 1\).*'env_mask'"),
        ({"prompt_ids": [[5], [5], [6, 6], [6]]}, r"different prompt_ids for the 2 completions.*\(rows 2 to 3\)"),
        ({"prompt_ids": [[5], [5], [], []]}, "empty prompt_ids in row 2"),
        ({"logprobs": [[-1.0, -1.0], [-1.0], [-1.0], [-1.0] * 3]}, "1 logprobs for the 0 tokens .* in row 2"),
        ({"env_mask": [[1, 1], [1], [], [1, 1]]}, "2 env_mask for the 3 tokens of completion_ids in row 3"),
        (
            {"completion_ids": [[7, 1], [8], [], [9, 50, 1]]},
            r"'completion_ids' with 50 in row 3, .*0 to 49",
        ),
        ({"completion_ids": [[7, 1], [-1], [], [9, 9, 1]]}, "'completion_ids' with -1 in row 1, which is no token"),
        ({"prompt_ids": [[5.0], [5], [6, 6], [6, 6]]}, "'prompt_ids' with 5.0 in row 0, which is no token"),
        ({"prompt_ids": [["5"], [5], [6, 6], [6, 6]]}, "'prompt_ids' with '5' in row 0, which is no token"),
        (
            {"logprobs": [[-0.5, math.nan], [-1], [], [-1] * 3]},
            r"logprobs with \[-0.5, nan\] in row 0; they must",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused(changes, message):
    with pytest.raises(ValueError, match="rollout_func returned " + message):
        run(**changes)


@pytest.mark.parametrize("returned", [None, [[5]], "ids"])
def test_what_is_no_dict_is_refused(returned):
    with pytest.raises(TypeError, match=f"rollout_func returned {type(returned).__name__}; it must return a dict"):
        RolloutFuncEngine(lambda prompts, trainer: returned, None, (1,)).rollout(REQUEST)


def test_tokens_that_something_else_inserted_need_no_logprob():
    mask = {"env_mask": [[1, 0], [1], [], [1] * 3], "logprobs": [[-0.5, math.nan], [-0.25], [], [-1.0] * 3]}
    assert run(**mask).completions[0].sampler_logps[0] == -0.5


def test_groups_with_the_same_prompt_as_their_neighbour_are_accepted():
    completions = run(prompt_ids=[[5]] * 4).completions
    assert [c.prompt_ids for c in completions] == [[5]] * 4
