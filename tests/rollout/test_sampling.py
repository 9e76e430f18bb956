import math

import numpy as np
import pytest
import torch

from grpo_trl.rollout import sampling
from grpo_trl.rollout.base import SamplingOptions
from grpo_trl.rollout.sampling import Sampler, generation_config, stop_strings
from tests.helpers.models import make_model, make_tokenizer


VOCABULARY = 48
LARGEST = (2**52 - 1) / 2**52
"""The largest number that `uniforms` gives."""


def make_options(**changes) -> SamplingOptions:
    return SamplingOptions(**({"max_completion_length": 6, "pad_token_id": 0, "eos_token_ids": (1,)} | changes))


def make_sampler(**changes) -> Sampler:
    return Sampler(make_model(), make_options(**changes))


def draw(sampler, logits, noise, prompts=None, written=None):
    rows = len(logits)
    noise = torch.as_tensor(noise, dtype=torch.float64)
    drawn = sampler.draw(logits, noise, prompts or [[5, 6]] * rows, written or [[]] * rows)
    assert drawn.tokens_R.shape == drawn.logps_R.shape == drawn.drawn_logps_R.shape == (rows,)
    assert drawn.tokens_R.dtype == torch.long
    assert drawn.logps_R.dtype == drawn.drawn_logps_R.dtype == torch.float64
    return drawn


def random_logits(rows: int, dtype=torch.float32, scale: float = 2.0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)


def probabilities(logits_V: torch.Tensor, temperature: float = 1.0) -> np.ndarray:
    scores = np.array(logits_V.tolist(), dtype=np.float64) / temperature
    masses = np.exp(scores - scores.max())
    return masses / masses.sum()


def inverse_cdf(probs: np.ndarray, noise: float) -> int:
    below = 0.0
    for token, p in enumerate(probs):
        below += p
        if noise < below:
            return token
    return int(np.flatnonzero(probs)[-1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.5])
def test_a_token_is_where_its_noise_cuts_the_cumulative_distribution(dtype, temperature):
    logits = random_logits(400, dtype)
    noise = np.random.default_rng(1).random(400)
    drawn = draw(make_sampler(temperature=temperature), logits, noise)
    for row in range(400):
        probs = probabilities(logits[row], temperature)
        token = inverse_cdf(probs, noise[row])
        assert drawn.tokens_R[row] == token
        assert drawn.logps_R[row].item() == pytest.approx(math.log(probs[token]), abs=2e-6)
        assert drawn.drawn_logps_R[row] == drawn.logps_R[row]


def test_noise_at_a_boundary_takes_the_token_above_it():
    logits = torch.zeros(4, 4, dtype=torch.float64)
    assert draw(make_sampler(), logits, [0.0, 0.25, 0.5, 0.75]).tokens_R.tolist() == [0, 1, 2, 3]
    below = [math.nextafter(x, 0.0) for x in (0.25, 0.5, 0.75, 1.0)]
    assert draw(make_sampler(), logits, below).tokens_R.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("noise", [0.0, 2.0**-52, 0.5, LARGEST])
def test_a_masked_token_is_never_drawn(dtype, noise):
    generator = torch.Generator().manual_seed(4)
    logits = random_logits(300, dtype)
    kept = torch.rand(logits.shape, generator=generator) < 0.3
    kept[:, 20] = True
    kept[:100, 0] = kept[:100, -1] = False
    kept[100:110] = False
    kept[100:110, 20] = True
    logits[~kept] = -torch.inf
    drawn = draw(make_sampler(), logits, [noise] * 300)
    assert kept[torch.arange(300), drawn.tokens_R].all()
    assert drawn.logps_R.isfinite().all()
    assert (drawn.tokens_R[100:110] == 20).all()
    columns = torch.arange(VOCABULARY).expand(300, -1)
    if noise == 0.0:
        assert torch.equal(drawn.tokens_R, columns.masked_fill(~kept, VOCABULARY).amin(1))
    if noise == LARGEST and dtype == torch.float64:
        likely = kept & (logits > -5)
        assert (drawn.tokens_R >= columns.masked_fill(~likely, -1).amax(1)).all()


@pytest.mark.parametrize("rows", [1, 50])
def test_the_largest_noise_draws_a_token_that_exists_in_a_large_vocabulary(rows):
    logits = random_logits(rows, vocabulary=150_000, scale=1.0)
    logits[:, -7:] = -torch.inf
    tokens = draw(make_sampler(), logits, [LARGEST] * rows).tokens_R
    assert (tokens < 150_000 - 7).all()
    assert (tokens > 149_000).all()


def test_improbable_tokens_of_a_large_vocabulary_are_not_lost_to_rounding():
    logits = torch.zeros(20, 150_000)
    logits[:, 0] = 16.0  # a further token adds less than float32 resolves
    rest = torch.tensor(-16.0).exp().double().item()
    chosen = [1 + 7_451 * row for row in range(20)]
    total = 1 + 149_999 * rest
    noise = [(1 + (token - 0.5) * rest) / total for token in chosen]
    assert draw(make_sampler(), logits, noise).tokens_R.tolist() == chosen


def test_a_constant_added_to_the_logits_changes_nothing():
    logits = random_logits(100, torch.float64)
    noise = np.random.default_rng(2).random(100)
    reference = draw(make_sampler(), logits, noise)
    for shift in (-800.0, 800.0):
        shifted = draw(make_sampler(), logits + shift, noise)
        assert torch.equal(shifted.tokens_R, reference.tokens_R)
        assert torch.allclose(shifted.logps_R, reference.logps_R, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"repetition_penalty": 1.3}, {"top_p": 0.7, "min_p": 0.1}])
@pytest.mark.parametrize("at_a_time", [1, VOCABULARY, 3 * VOCABULARY, 7 * VOCABULARY + 5])
def test_how_many_rows_are_drawn_at_a_time_changes_nothing(monkeypatch, settings, at_a_time):
    sampler = make_sampler(**settings)
    logits, noise = random_logits(20), np.random.default_rng(3).random(20)
    prompts = [[5 + row % 3] * (1 + row % 4) for row in range(20)]
    written = [[9 + row] * (row % 5) for row in range(20)]
    reference = draw(sampler, logits, noise, prompts, written)
    sizes, draw_part = [], sampler._draw
    monkeypatch.setattr(sampler, "_draw", lambda *args: sizes.append(tuple(map(len, args))) or draw_part(*args))
    monkeypatch.setattr(sampling, "DRAWN_AT_A_TIME", at_a_time)
    drawn = draw(sampler, logits, noise, prompts, written)
    assert torch.equal(drawn.tokens_R, reference.tokens_R)
    assert torch.equal(drawn.logps_R, reference.logps_R)
    assert torch.equal(drawn.drawn_logps_R, reference.drawn_logps_R)
    most = max(1, at_a_time // VOCABULARY)
    assert [size[0] for size in sizes] == [min(most, 20 - i) for i in range(0, 20, most)]
    assert all(len(set(size)) == 1 for size in sizes)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_processors_choose_the_token_and_the_policy_gives_its_log_probability(temperature):
    logits, noise = random_logits(200), np.random.default_rng(5).random(200)
    drawn = draw(make_sampler(top_k=4, temperature=temperature), logits, noise)
    for row in range(200):
        probs = probabilities(logits[row], temperature)
        kept = np.where(probs >= np.sort(probs)[-4], probs, 0.0)
        kept /= kept.sum()
        token = inverse_cdf(kept, noise[row])
        assert drawn.tokens_R[row] == token
        assert drawn.logps_R[row].item() == pytest.approx(math.log(probs[token]), abs=2e-6)
        assert drawn.drawn_logps_R[row].item() == pytest.approx(math.log(kept[token]), abs=2e-6)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 3.0}, {"generation_kwargs": {"suppress_tokens": [7]}}])
def test_logits_are_left_as_they_were(settings):
    logits = random_logits(5)
    before = logits.clone()
    draw(make_sampler(**settings), logits, [0.5] * 5)
    assert torch.equal(logits, before)


def test_greedy_takes_the_most_probable_token_whatever_the_noise():
    logits = random_logits(50)
    sampler = make_sampler(temperature=0.5, generation_kwargs={"do_sample": False})
    for noise in (0.0, LARGEST):
        drawn = draw(sampler, logits, [noise] * 50)
        assert torch.equal(drawn.tokens_R, logits.argmax(-1))
        assert torch.equal(drawn.drawn_logps_R, torch.zeros(50, dtype=torch.float64))
        expected = [math.log(probabilities(row, 0.5).max()) for row in logits]
        assert drawn.logps_R.tolist() == pytest.approx(expected, abs=2e-6)


def test_processors_that_read_tokens_get_histories_without_padding():
    sampler = make_sampler(repetition_penalty=1.5)
    seen = []
    processors_of = sampler._processors_of

    def spy(prompt_length, device):
        processors = processors_of(prompt_length, device)

        def process(input_ids, scores):
            seen.extend((prompt_length, row) for row in input_ids.tolist())
            assert len(input_ids) == len(scores)
            return processors(input_ids, scores)

        return process

    sampler._processors_of = spy
    prompts = [[5], [6, 7, 8], [5], [9, 10], [11, 12]]
    written = [[13, 14], [], [15, 16], [17], [18, 19]]
    draw(sampler, random_logits(5), [0.5] * 5, prompts, written)
    assert sorted(seen) == sorted((len(p), p + w) for p, w in zip(prompts, written, strict=True))


def test_the_repetition_penalty_reads_each_rows_own_tokens():
    sampler = make_sampler(repetition_penalty=2.0, temperature=0.8)
    logits, noise = random_logits(60), np.random.default_rng(7).random(60)
    prompts = [[5 + row % 3] * (1 + row % 4) for row in range(60)]
    written = [[(9 + row) % VOCABULARY, (3 * row) % VOCABULARY][: row % 3] for row in range(60)]
    drawn = draw(sampler, logits, noise, prompts, written)
    for row in range(60):
        penalized = logits[row].double()
        for token in {*prompts[row], *written[row]}:
            penalized[token] = penalized[token] / 2 if penalized[token] > 0 else penalized[token] * 2
        probs = probabilities(penalized, 0.8)
        token = inverse_cdf(probs, noise[row])
        assert drawn.tokens_R[row] == token
        assert drawn.drawn_logps_R[row].item() == pytest.approx(math.log(probs[token]), abs=5e-6)
        policy = math.log(probabilities(logits[row], 0.8)[token])
        assert drawn.logps_R[row].item() == pytest.approx(policy, abs=5e-6)


def test_min_new_tokens_counts_from_each_rows_own_prompt():
    sampler = make_sampler(generation_kwargs={"min_new_tokens": 2, "do_sample": False})
    logits = torch.zeros(6, VOCABULARY)
    logits[:, 1] = 5.0  # the end token
    logits[:, 30] = 1.0
    prompts = [[5], [5, 6, 7, 8], [5], [5, 6, 7, 8], [5], [5, 6, 7, 8]]
    written = [[], [], [9], [9], [9, 10], [9, 10]]
    drawn = draw(sampler, logits, [0.5] * 6, prompts, written)
    assert drawn.tokens_R.tolist() == [30, 30, 30, 30, 1, 1]


def test_a_forced_end_token_counts_from_each_rows_own_prompt():
    sampler = make_sampler(generation_kwargs={"forced_eos_token_id": 44, "do_sample": False})
    logits = torch.zeros(4, VOCABULARY)
    logits[:, 30] = 1.0
    prompts = [[5], [5, 6, 7, 8], [5], [5, 6, 7, 8]]
    written = [[9] * 4, [9] * 4, [9] * 5, [9] * 5]  # of 6
    assert draw(sampler, logits, [0.5] * 4, prompts, written).tokens_R.tolist() == [30, 30, 44, 44]


@pytest.mark.parametrize(
    "settings, blind",
    [
        ({}, True),
        ({"temperature": 0.5, "top_p": 0.5, "top_k": 4, "min_p": 0.1}, True),
        ({"generation_kwargs": {"suppress_tokens": [3], "typical_p": 0.4, "epsilon_cutoff": 0.1}}, True),
        ({"repetition_penalty": 1.1}, False),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, False),
        ({"generation_kwargs": {"begin_suppress_tokens": [2]}}, False),
        ({"generation_kwargs": {"sequence_bias": {(3,): 1.0}}}, False),
    ],
)
def test_rows_are_processed_together_only_where_no_processor_reads_tokens(settings, blind, monkeypatch):
    sampler = make_sampler(**settings)
    calls = []
    processors_of = sampler._processors_of
    monkeypatch.setattr(
        sampler, "_processors_of", lambda length, device: calls.append(length) or processors_of(length, device)
    )
    draw(sampler, random_logits(3), [0.5] * 3, [[5], [5, 6], [7, 8, 9]])
    assert len(calls) == ((0 if not settings else 1) if blind else 3)


def test_processors_of_a_few_prompt_lengths_are_kept(monkeypatch):
    monkeypatch.setattr(sampling, "KEPT_PROCESSORS", 2)
    sampler = make_sampler(generation_kwargs={"min_new_tokens": 2})
    prompts = [[5] * length for length in (1, 2, 3, 4, 5)]
    logits = random_logits(5)
    kept = draw(sampler, logits, [0.5] * 5, prompts)
    assert len(sampler._processors) <= 2
    monkeypatch.setattr(sampling, "KEPT_PROCESSORS", 64)
    assert torch.equal(kept.tokens_R, draw(sampler, logits, [0.5] * 5, prompts).tokens_R)


def test_logits_that_are_not_finite_give_log_probabilities_that_are_not():
    logits = random_logits(3)
    logits[1, 5] = torch.nan
    logits[2] = -torch.inf
    drawn = draw(make_sampler(), logits, [0.5] * 3)
    assert drawn.logps_R.isfinite().tolist() == [True, False, False]
    assert ((drawn.tokens_R >= 0) & (drawn.tokens_R < VOCABULARY)).all()


def test_generation_config_says_everything_and_generation_kwargs_win():
    options = make_options(temperature=0.7, top_p=0.8, top_k=9, min_p=0.05, repetition_penalty=1.2)
    config = generation_config(options)
    said = {"do_sample", "max_new_tokens", "pad_token_id", "temperature", "top_p", "top_k", "min_p"}
    assert {name: getattr(config, name) for name in said} == {
        "do_sample": True,
        "max_new_tokens": 6,
        "pad_token_id": 0,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 9,
        "min_p": 0.05,
    }
    assert config.eos_token_id == [1]
    assert config.repetition_penalty == 1.2
    changed = generation_config(make_options(generation_kwargs={"do_sample": False, "min_new_tokens": 2}))
    assert changed.do_sample is False
    assert changed.min_new_tokens == 2


def test_no_stop_strings_are_no_criterion():
    assert stop_strings(make_options(), make_tokenizer()) is None
    assert stop_strings(make_options(generation_kwargs={"stop_strings": []}), None) is None
    assert stop_strings(make_options(generation_kwargs={"stop_strings": ["b"]}), make_tokenizer()) is not None
