"""Decoding on a GPU: what the group engine samples, against plain forwards."""

import logging

import pytest
import torch

from grpo_trl.rollout.base import RolloutRequest, SamplingOptions
from grpo_trl.rollout.generate import GenerateEngine
from grpo_trl.rollout.group.engine import GroupEngine
from tests.helpers.families import FAMILIES, WINDOWED, make_family


ENDS = (1, 7)
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "head_dim": 32,
    "initializer_range": 0.08,
}
MODELS = {name: (name, {}) for name in FAMILIES} | {f"{name} windowed": (name, WINDOWED[name]) for name in WINDOWED}
FLOAT64 = [name for name, family in FAMILIES.items() if family.dtype == torch.float64]
EVERY_MODEL = pytest.mark.parametrize("family, changes", MODELS.values(), ids=MODELS)
DTYPES = (torch.float32, torch.bfloat16)


def make_model(family, changes, dtype):
    sizes = {} if family == "deepseek_v3" else SIZES  # whose head sizes are given one by one
    if family == "gemma2":  # transformers 5.17 leaves its soft cap out elsewhere
        changes = changes | {"attn_implementation": "eager"}
    return make_family(family, **(sizes | changes)).to("cuda", dtype).eval()


def make_request(prompts=(30, 3, 57, 12, 41, 1), num_generations=4):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(2, 48, (length,), generator=generator).tolist() for length in prompts]
    return RolloutRequest([""] * len(ids), ids, num_generations, list(range(len(ids))))


def sample(model, request=None, length=60, **options):
    """Of an engine that must not hand the request over."""
    rows = options.pop("rows", 16)
    sampling = SamplingOptions(max_completion_length=length, pad_token_id=0, eos_token_ids=ENDS, **options)
    engine = GroupEngine(model, sampling, max_rows_in_flight=rows)
    rollout = engine.rollout(request or make_request())
    assert engine._reason is None, engine._reason
    return engine, rollout.completions


def plain_logps(model, completion):
    """Of a completion's tokens, from one plain forward."""
    tokens = torch.tensor([completion.prompt_ids + completion.ids], device="cuda")
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(completion.prompt_ids) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, tokens[0, len(completion.prompt_ids) :, None])[:, 0].cpu()


@EVERY_MODEL
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_of_sampled_tokens_are_as_good_as_those_of_plain_forwards(family, changes, dtype):
    """Both against float64; also of the tokens that are further from the prompt than a window reaches."""
    dtype = torch.promote_types(dtype, FAMILIES[family].dtype) if family in FLOAT64 else dtype
    model = make_model(family, changes, dtype)
    completions = sample(model)[1]
    plain = [plain_logps(model, c) for c in completions]
    exact = [plain_logps(model.double(), c) for c in completions]
    own = [torch.tensor(c.sampler_logps, dtype=torch.float64) for c in completions]
    for first in (0, 20):
        mine, theirs = (torch.cat([(a - b)[first:].abs() for a, b in zip(x, exact, strict=True)]) for x in (own, plain))
        assert len(mine) > 50
        assert mine.mean() <= 2 * theirs.mean() + 1e-6, (
            first,
            mine.mean().item(),
            theirs.mean().item(),
            mine.max().item(),
        )


@EVERY_MODEL
def test_greedy_completions_are_those_of_generate(family, changes):
    dtype = FAMILIES[family].dtype
    model, request = make_model(family, changes, dtype), make_request(num_generations=2)
    _, completions = sample(model, request, generation_kwargs={"do_sample": False})
    options = SamplingOptions(60, 0, ENDS, generation_kwargs={"do_sample": False})
    expected = GenerateEngine(model, options).rollout(request).completions
    assert [c.ids for c in completions] == [c.ids for c in expected]


@EVERY_MODEL
def test_recorded_steps_are_those_of_steps_that_are_launched_one_by_one(family, changes, monkeypatch, caplog):
    model = make_model(family, changes, FAMILIES[family].dtype)
    with caplog.at_level(logging.WARNING):
        engine, recorded = sample(model)
    assert engine._records or family in FLOAT64, caplog.messages
    monkeypatch.setattr(GroupEngine, "_records", False, raising=False)
    engine = GroupEngine(model, engine.options, max_rows_in_flight=16)
    engine._records = False
    eager = engine.rollout(make_request()).completions
    assert [c.ids for c in recorded] == [c.ids for c in eager]
