"""vLLM in this process, the real one: its samples are the policy's, after every step and whatever the policy is."""

import dataclasses
import random
import re

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from grpo_trl.objective.correction import Correction
from grpo_trl.rollout.base import RolloutRequest
from grpo_trl.rollout.sampling import generation_config
from grpo_trl.rollout.vllm import ColocatedVLLM, VLLMEngine
from tests.helpers.models import make_tokenizer

from .helpers import OPTIONS, PROMPTS, largest_difference, policy, request, step


pytestmark = pytest.mark.vllm
CLOSE = 1e-4


def make_engine(model, folder, options=OPTIONS, **changes):
    lora = hasattr(model, "peft_config")
    client = ColocatedVLLM(
        model.config,
        make_tokenizer(),
        dtype=torch.float32,
        max_lora_rank=8 if lora else None,
        max_model_len=256,
    )
    return VLLMEngine(client, model, options, folder, loads_base=lora, **changes)


@pytest.mark.parametrize("tied, lora", [(True, False), (False, False), (True, True), (False, True)])
def test_samples_follow_the_policy_step_after_step(tied, lora, tmp_path):
    model = policy(tied, lora)
    engine = make_engine(model, tmp_path / "sync")
    last = None
    for _ in range(3):
        if last is not None:
            assert largest_difference(model, last) > 0.05, "the step is too small for this test"
        engine.sync_weights()
        last = engine.rollout(request()).completions
        assert len(last) == 9
        assert largest_difference(model, last) < CLOSE
        step(model)
    engine.close()


@pytest.fixture(scope="module")
def colocated(tmp_path_factory):
    """A policy, and a client that has its weights."""
    model = policy()
    client = make_engine(model, tmp_path_factory.mktemp("sync"))._client
    VLLMEngine(client, model, OPTIONS, tmp_path_factory.mktemp("sync")).sync_weights()
    return client, model


def engine_with(colocated, tmp_path, **options):
    client, model = colocated
    return VLLMEngine(client, model, dataclasses.replace(OPTIONS, **options), tmp_path)


def test_a_completion_follows_from_its_seed_and_its_place_alone(colocated, tmp_path):
    engine = engine_with(colocated, tmp_path)
    together = engine.rollout(request()).completions
    alone = engine.rollout(RolloutRequest(PROMPTS[1:2], PROMPTS[1:2], 3, [11])).completions
    assert [c.ids for c in alone] == [c.ids for c in together[3:6]]
    assert len({tuple(c.ids) for c in together[3:6]}) > 1, "the places of a group have noise of their own"
    other = engine.rollout(request(seed=2)).completions
    assert [c.ids for c in other] != [c.ids for c in together]


def test_completions_end_at_end_tokens_and_stop_strings_which_belong_to_them(colocated, tmp_path):
    tokenizer = make_tokenizer()
    engine = engine_with(
        colocated, tmp_path, eos_token_ids=(1, 7, 8, 9), generation_kwargs={"stop_strings": ["a", "b"]}
    )
    completions = engine.rollout(request(num_generations=16)).completions
    ends = [tokenizer.decode([c.ids[-1]]) if c.ended else None for c in completions]
    assert {"a", "b"} & set(ends), "no stop string was met"
    assert set("234") & set(ends), "no end token was met"
    for completion, end in zip(completions, ends, strict=True):
        text = [tokenizer.decode([token]) for token in completion.ids]
        assert not {"<eos>", *"234ab"} & set(text[:-1])
        assert completion.ended == (text[-1] in {"<eos>", *"234ab"}), end
        assert completion.ended or len(text) == OPTIONS.max_completion_length


@pytest.mark.parametrize("options", [{"top_p": 0.7}, {"top_k": 4}, {"min_p": 0.1}])
def test_drawn_logprobs_are_those_of_the_truncated_distribution(colocated, tmp_path, options):
    engine = engine_with(colocated, tmp_path, **options)
    engine.sync_weights()
    rollout = engine.rollout(request())
    assert all(c.sampler_logps is None for c in rollout.completions), "they are not the model's"
    assert largest_difference(colocated[1], engine.probe(request())) < CLOSE, "probes are, whatever is truncated"
    config = generation_config(engine._options)
    for completion in rollout.completions:
        ids = torch.tensor([completion.prompt_ids + completion.ids])
        with torch.no_grad():
            logits_TV = colocated[1](ids).logits[0, len(completion.prompt_ids) - 1 : -1]
        processors = colocated[1]._get_logits_processor(config, input_ids_seq_length=0)
        scores_TV = processors(ids[:, :1].expand(len(logits_TV), 1), logits_TV)
        expected = scores_TV.log_softmax(-1)[torch.arange(len(completion.ids)), completion.ids]
        assert (expected - torch.tensor(completion.drawn_logps)).abs().max() < 1e-3


def test_a_regex_holds(colocated, tmp_path):
    client, model = colocated
    engine = VLLMEngine(client, model, OPTIONS, tmp_path, regex="[0-9]+=[a-c]+")
    for completion in engine.rollout(request()).completions:
        text = make_tokenizer().decode(completion.ids, skip_special_tokens=True)
        assert re.fullmatch("[0-9]+(=[a-c]*)?", text)  # or a beginning of it, where the length cut it off


def test_sampling_leaves_random_states_and_threads_as_they_were(colocated, tmp_path):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    threads = torch.get_num_threads()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    engine = engine_with(colocated, tmp_path)
    engine.rollout(request())
    engine.sync_weights()
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_only_dropping_the_prefix_cache_makes_a_sync_whole(colocated, tmp_path, monkeypatch):
    client, model = colocated
    engine = engine_with(colocated, tmp_path)
    engine.rollout(request())
    step(model)
    with monkeypatch.context() as patch:
        patch.setattr(client, "_drop_cache", lambda: None)
        engine.sync_weights()
        assert largest_difference(model, engine.rollout(request()).completions) > 0.01
    engine.sync_weights()
    assert largest_difference(model, engine.rollout(request()).completions) < CLOSE


def test_the_corrected_estimate_of_an_expectation_is_unbiased(colocated, tmp_path):
    """20,000 tokens under top-p; the exact sum is over the nucleus."""
    client, model = colocated
    options = dataclasses.replace(OPTIONS, top_p=0.7, max_completion_length=1, eos_token_ids=())
    engine = VLLMEngine(client, model, options, tmp_path)
    engine.sync_weights()
    prompt = [9, 10, 11]
    drawn = engine.rollout(RolloutRequest([prompt] * 2, [prompt] * 2, 10_000, [3, 10**6])).completions
    tokens_R = torch.tensor([c.ids[0] for c in drawn])
    with torch.no_grad():
        policy_V = (model(torch.tensor([prompt])).logits[0, -1].double() / OPTIONS.temperature).softmax(-1)
    value_V = torch.rand(48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nucleus_V = TopPLogitsWarper(0.7)(None, policy_V.log()[None])[0].isfinite()
    assert 2 <= nucleus_V.sum() < 48
    assert nucleus_V[tokens_R].all()
    exact = (policy_V * value_V)[nucleus_V].sum()
    old_R1 = policy_V.log()[tokens_R, None]
    drawn_R1 = torch.tensor([c.drawn_logps for c in drawn], dtype=torch.float64)
    weights_R1 = Correction("token_truncate", None).weights(old_R1, drawn_R1, torch.ones_like(old_R1, dtype=torch.bool))
    terms_R = weights_R1[:, 0] * value_V[tokens_R]
    assert abs(terms_R.mean() - exact) < 4 * terms_R.std() / len(tokens_R) ** 0.5 + 1e-5


def test_a_call_may_have_more_tokens_than_a_step_of_vllm_computes(colocated, tmp_path):
    engine = engine_with(colocated, tmp_path, max_completion_length=2)
    most = colocated[0]._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    prompts = [[2 + (7 * row + place) % 46 for place in range(250)] for row in range(most // 250 + 10)]
    assert len(engine.rollout(request(prompts, num_generations=2)).completions) == 2 * len(prompts)


def test_an_option_that_vllm_does_not_serve_is_named(colocated, tmp_path):
    with pytest.raises(ValueError, match="typical_p"):
        engine_with(colocated, tmp_path, generation_kwargs={"typical_p": 0.9})
