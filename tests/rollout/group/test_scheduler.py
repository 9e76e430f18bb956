from dataclasses import replace

import pytest
import torch

from grpo_trl.model_utils import attending_by
from grpo_trl.rollout.base import RolloutRequest
from grpo_trl.rollout.group.cache import NAME, GroupCache
from grpo_trl.rollout.group.cuda_graphs import EagerSteps
from grpo_trl.rollout.group.scheduler import LUMP, Scheduler
from grpo_trl.rollout.sampling import Sampler
from tests.helpers.families import make_family

from .test_engine import ids, make_options, make_prompts, make_request, sample


@pytest.fixture(scope="module")
def model():
    return make_family("qwen2").double().eval()


class Run:
    """A scheduler that has run, with its completions, prefills and what it told after each step."""

    def __init__(self, model, request, rows=7, lag=0, prompts=5, **changes):
        options = make_options(**changes)
        self.told: list[tuple[int, int]] = []
        self.prefills: list[tuple[int, int]] = []
        cache = GroupCache(rows, prompts, 32, 32)
        scheduler = Scheduler(
            model,
            Sampler(model, options),
            options,
            None,
            request,
            cache,
            self._steps(EagerSteps(model, cache)),
            lambda *step: self.told.append(step),
            lag,
        )
        prefill = scheduler._prefill

        def spy(room):
            running, done = len(scheduler._running), prefill(room)
            if done:
                self.prefills.append((running, sum(p.logits_V is not None for p in scheduler._prefilled)))
            return done

        scheduler._prefill = spy
        with torch.no_grad(), attending_by(model, NAME):
            self.completions = scheduler.run()
        self.computed = scheduler.computed

    def _steps(self, eager):
        self.steps = []

        def compute(step):
            self.steps.append(step)
            return eager(step)

        return compute


@pytest.mark.parametrize("lag", [1, 3])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_a_host_that_reads_behind_gets_the_same_completions(model, lag, rows):
    request = make_request(num_generations=4)
    expected, run = sample(model, num_generations=4), Run(model, request, rows, lag)
    assert [c.ids for c in run.completions] == ids(expected)
    assert [c.ended for c in run.completions] == [c.ended for c in expected.completions]
    for mine, other in zip(run.completions, expected.completions, strict=True):
        assert mine.sampler_logps == pytest.approx(other.sampler_logps, abs=1e-6)
    tokens = sum(map(len, ids(expected)))
    ended_early = sum(c.ended and len(c.ids) < 10 for c in expected.completions)
    assert tokens < run.computed <= tokens + lag * ended_early
    assert sum(count for count, _ in run.told) == tokens
    assert sum(done for _, done in run.told) == len(run.completions)


def test_tokens_after_an_unread_end_are_dropped_also_where_every_row_ends_at_once(model):
    run = Run(model, make_request(), lag=2, eos_token_ids=tuple(range(48)))
    assert [len(c.ids) for c in run.completions] == [1] * 15
    assert all(c.ended for c in run.completions)


@pytest.mark.parametrize("rows", [1, 2, 64])
def test_parts_of_groups_are_sampled_as_in_the_whole(model, rows):
    whole, places = make_request(num_generations=4), [range(3, 4), range(4), range(0, 2), range(1, 3), range(2, 4)]
    groups = [ids(sample(model, num_generations=4))[start : start + 4] for start in range(0, 20, 4)]
    run = Run(model, replace(whole, places=places), rows)
    assert [c.ids for c in run.completions] == [
        group[place] for group, part in zip(groups, places, strict=True) for place in part
    ]


def test_prompts_are_admitted_in_lumps(model):
    """Rows for several prompts are free, or all that are left, before further prompts are prefilled."""
    prompts = make_prompts(*[3 + i % 5 for i in range(24)])
    request = RolloutRequest(["unread"] * 24, prompts, 2, list(range(24)))
    run = Run(model, request, rows=32, prompts=24)
    assert run.prefills[0] == (0, 16)
    assert all(running <= 32 - 2 * LUMP or prefilled < LUMP for running, prefilled in run.prefills[1:])
    assert len(run.prefills) < 6
    alone = Run(model, RolloutRequest(["unread"] * 24, prompts, 2, list(range(24))), rows=3)
    assert [c.ids for c in alone.completions] == [c.ids for c in run.completions]
