from dataclasses import replace

import pytest

from grpo_trl.rollout.group import speculation
from grpo_trl.rollout.group.engine import GroupEngine
from grpo_trl.rollout.group.speculation import NGrams
from tests.helpers.families import WINDOWED, make_family

from .test_engine import make_options, make_request


class Counted:
    """An engine's completions, and the forwards over running rows that they took."""

    def __init__(self, model, rows=64, request=None, ngrams=0, **changes):
        request = request or make_request(num_generations=4)
        engine = GroupEngine(model, make_options(**changes), max_rows_in_flight=rows, speculative_ngrams=ngrams)
        engine.rollout(replace(request, prompts=request.prompts[:1], prompt_ids=request.prompt_ids[:1], seeds=[0]))
        assert engine._reason is None
        self.steps = 0
        engine.check = self.count
        self.rollout = engine.rollout(request)

    def count(self):
        self.steps += 1

    def __eq__(self, other):
        mine, others = self.rollout.completions, other.rollout.completions
        assert [c.ids for c in mine] == [c.ids for c in others]
        assert [c.ended for c in mine] == [c.ended for c in others]
        for one, another in zip(mine, others, strict=True):
            assert one.sampler_logps == pytest.approx(another.sampler_logps, abs=1e-9)
        return True


@pytest.mark.parametrize(
    "family, changes",
    [("qwen2", {}), ("gemma2", WINDOWED["gemma2"]), ("mistral", WINDOWED["mistral"]), ("gpt_neox", {})],
)
@pytest.mark.parametrize("rows", [3, 64])
def test_guesses_change_no_completion(family, changes, rows):
    model = make_family(family, **changes).double().eval()
    options = {"rows": rows, "max_completion_length": 23, "temperature": 0.2, "eos_token_ids": (1, 7)}
    plain = Counted(model, **options)
    speculative = [Counted(model, ngrams=ngrams, **options) for ngrams in (1, 2)]
    assert all(each == plain for each in speculative)
    assert speculative[0].steps < plain.steps


@pytest.mark.parametrize("guessed", [1, 7])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_guesses_behind_the_longest_completion_do_no_harm(monkeypatch, guessed, length):
    monkeypatch.setattr(speculation, "GUESSED", guessed)
    model = make_family("qwen2").double().eval()
    options = {"max_completion_length": length, "temperature": 0.5, "eos_token_ids": ()}
    assert Counted(model, ngrams=1, **options) == Counted(model, **options)


def test_options_that_narrow_the_choice_hold_for_guesses_and_those_that_read_tokens_guess_nothing():
    model = make_family("qwen2").double().eval()
    for options in ({"top_p": 0.8}, {"top_k": 5}, {"repetition_penalty": 1.3}):
        plain, speculative = Counted(model, **options), Counted(model, ngrams=1, **options)
        assert speculative == plain
    assert speculative.steps == plain.steps


def test_what_followed_the_last_tokens_where_they_occurred_last_is_guessed():
    seen = NGrams(2)
    seen.learn([1, 2, 3, 1, 2, 4, 1, 2])
    assert seen.guess([9, 1, 2], 4) == [4, 1, 2, 4]
    assert seen.guess([2, 3], 1) == [1]
    assert seen.guess([5, 6], 3) == seen.guess([2], 3) == []
    seen.learn([7, 1, 2, 8, 5, 6], start=4)
    assert seen.guess([1, 2], 1) == [4]
    assert seen.guess([2, 8], 3) == [5, 6]
    assert seen.guess([8, 5], 3) == [6]
