import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from grpo_trl.rollout import inverse_cdf as inversion
from grpo_trl.rollout import processors, sampling
from grpo_trl.rollout.base import SamplingOptions
from grpo_trl.rollout.processors import History
from grpo_trl.rollout.sampling import Sampler, generation_config, stop_strings
from tests.helpers.models import make_model, make_tokenizer


VOCABULARY = 48
LARGEST = (2**52 - 1) / 2**52
"""The largest number that `uniforms` gives."""


@pytest.fixture(autouse=True, params=["kernel", "torch"])
def way(request, monkeypatch):
    """Float32 is sampled from by a kernel on a CPU, the rest, and all on a GPU, by torch's operations."""
    if request.param == "torch":
        monkeypatch.setattr(inversion, "_kernel", lambda: None)
    elif inversion._kernel() is None:
        pytest.skip("needs g++")


def make_options(**changes) -> SamplingOptions:
    return SamplingOptions(**({"max_completion_length": 6, "pad_token_id": 0, "eos_token_ids": (1,)} | changes))


def make_sampler(**changes) -> Sampler:
    return Sampler(make_model(), make_options(**changes))


def sample(sampler, logits, noise, prompts=None, generated=None):
    """Tokens and log-probabilities under the policy."""
    return sample_with_drawn_logps(sampler, logits, noise, prompts, generated)[:2]


def sample_with_drawn_logps(sampler, logits, noise, prompts=None, generated=None):
    rows = len(logits)
    history = make_history(prompts or [[5, 6]] * rows, generated or [[]] * rows) if sampler.reads_tokens else None
    tokens, logps, drawn_logps = sampler.sample(logits, torch.as_tensor(noise, dtype=torch.float64), history)
    assert tokens.shape == logps.shape == drawn_logps.shape == (rows,)
    assert tokens.dtype == torch.long
    assert logps.dtype == drawn_logps.dtype == torch.float64
    return tokens, logps, drawn_logps


def make_history(prompts, generated) -> History:
    """Behind a row's tokens its first one stands again."""
    rows = [prompt + ids for prompt, ids in zip(prompts, generated, strict=True)]
    longest = max(map(len, rows))
    padded = torch.tensor([row + row[:1] * (longest - len(row)) for row in rows])
    return History(padded, list(map(len, prompts)), list(map(len, generated)))


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
    tokens, logps = sample(make_sampler(temperature=temperature), logits, noise)
    for row in range(400):
        probs = probabilities(logits[row], temperature)
        token = inverse_cdf(probs, noise[row])
        assert tokens[row] == token
        assert logps[row].item() == pytest.approx(math.log(probs[token]), abs=2e-6)


def test_noise_at_a_boundary_takes_the_token_above_it():
    logits = torch.zeros(4, 4, dtype=torch.float64)
    assert sample(make_sampler(), logits, [0.0, 0.25, 0.5, 0.75])[0].tolist() == [0, 1, 2, 3]
    below = [x - 2.0**-52 for x in (0.25, 0.5, 0.75, 1.0)]
    assert sample(make_sampler(), logits, below)[0].tolist() == [0, 1, 2, 3]


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
    tokens, logps = sample(make_sampler(), logits, [noise] * 300)
    assert kept[torch.arange(300), tokens].all()
    assert logps.isfinite().all()
    assert (tokens[100:110] == 20).all()
    columns = torch.arange(VOCABULARY).expand(300, -1)
    if noise == 0.0:
        assert torch.equal(tokens, columns.masked_fill(~kept, VOCABULARY).amin(1))
    if noise == LARGEST and dtype == torch.float64:
        likely = kept & (logits > -5)
        assert (tokens >= columns.masked_fill(~likely, -1).amax(1)).all()


@pytest.mark.parametrize("rows", [1, 50])
def test_the_largest_noise_draws_a_token_that_exists_in_a_large_vocabulary(rows):
    logits = random_logits(rows, vocabulary=150_000, scale=1.0)
    logits[:, -7:] = -torch.inf
    tokens, _ = sample(make_sampler(), logits, [LARGEST] * rows)
    assert (tokens < 150_000 - 7).all()
    assert (tokens > 149_000).all()


def test_improbable_tokens_of_a_large_vocabulary_are_not_lost_to_rounding():
    logits = torch.zeros(20, 150_000)
    logits[:, 0] = 16.0  # a further token adds less than float32 resolves
    rest = torch.tensor(-16.0).exp().double().item()
    chosen = [1 + 7_451 * row for row in range(20)]
    total = 1 + 149_999 * rest
    noise = [(1 + (token - 0.5) * rest) / total for token in chosen]
    assert sample(make_sampler(), logits, noise)[0].tolist() == chosen


def test_a_constant_added_to_the_logits_changes_nothing():
    logits = random_logits(100, torch.float64)
    noise = np.random.default_rng(2).random(100)
    tokens, logps = sample(make_sampler(), logits, noise)
    for shift in (-800.0, 800.0):
        shifted_tokens, shifted_logps = sample(make_sampler(), logits + shift, noise)
        assert torch.equal(shifted_tokens, tokens)
        assert torch.allclose(shifted_logps, logps, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"top_p": 0.7, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("at_a_time", [1, 7 * VOCABULARY + 5])
def test_how_many_rows_are_drawn_at_a_time_changes_nothing(monkeypatch, settings, at_a_time):
    sampler = make_sampler(**settings)
    logits, noise = random_logits(20), np.random.default_rng(3).random(20)
    prompts = [[5 + row % 3] * (1 + row % 4) for row in range(20)]
    generated = [[9 + row] * (row % 5) for row in range(20)]
    expected = sample(sampler, logits, noise, prompts, generated)
    sizes, sample_part = [], sampler._sample
    monkeypatch.setattr(sampler, "_sample", lambda *args: sizes.append(len(args[0])) or sample_part(*args))
    monkeypatch.setitem(sampling.ELEMENTS_AT_A_TIME, "cpu", at_a_time)
    assert all(map(torch.equal, sample(sampler, logits, noise, prompts, generated), expected))
    most = max(1, at_a_time // VOCABULARY)
    assert sizes == [min(most, 20 - i) for i in range(0, 20, most)]


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.7}], ids=str)
def test_the_order_of_summation_and_the_rows_beside_it_change_nothing(settings):
    """Weights are integers: as many bits as a permutation within blocks could disturb, were they rounded."""
    logits, noise = random_logits(30, vocabulary=1000), np.random.default_rng(4).random(30)
    sampler = make_sampler(**settings)
    tokens, logps = sample(sampler, logits, noise)
    for row in range(30):
        alone = sample(sampler, logits[row : row + 1], noise[row : row + 1])
        assert (alone[0].item(), alone[1].item()) == (tokens[row].item(), logps[row].item())
    _, permuted = sample(make_sampler(top_k=1), logits.flip(1), noise)
    _, straight = sample(make_sampler(top_k=1), logits, noise)
    assert torch.equal(permuted, straight)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.7, "top_k": 9, "min_p": 0.01}], ids=str)
def test_sampling_is_allowed_where_only_deterministic_algorithms_are(settings):
    torch.use_deterministic_algorithms(True)
    try:
        sample(make_sampler(**settings), random_logits(4), [0.5] * 4)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way", ["torch"], indirect=True)
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.7, "top_k": 9}, {"repetition_penalty": 1.2}], ids=str)
def test_no_float_is_summed_in_a_scan_and_no_vocabulary_sorted(settings):
    """Of which a GPU's are not deterministic, and slow."""
    calls = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            shape = args[0].shape if args and isinstance(args[0], torch.Tensor) else ()
            calls.append((func.overloadpacket.__name__, getattr(output, "dtype", None), shape))
            return output

    sampler = make_sampler(**settings)
    with Spy():
        sample(sampler, random_logits(4, vocabulary=2000), [0.5] * 4)
    assert {dtype for name, dtype, _ in calls if name == "cumsum"} == {torch.long}
    assert all(shape[-1] < 200 for name, _, shape in calls if name in ("sort", "argsort", "multinomial"))


@pytest.mark.parametrize("way", ["kernel"], indirect=True)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 63, 64, 65, 1000])
@pytest.mark.parametrize("narrowing", [(), (9, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.05), (20, 0.9, 0.02)], ids=str)
def test_the_kernel_samples_what_torch_does(vocabulary, narrowing, monkeypatch):
    logits, noise = random_logits(50, vocabulary=vocabulary), torch.rand(50, dtype=torch.float64)
    found = [inversion.sample_tokens(logits, noise, inversion.Narrowing(*narrowing))]
    monkeypatch.setattr(inversion, "_kernel", lambda: None)
    found.append(inversion.sample_tokens(logits, noise, inversion.Narrowing(*narrowing)))
    (tokens, *sums), (expected, *others) = found
    assert torch.equal(tokens, expected)
    assert torch.allclose(torch.stack(sums), torch.stack(others), atol=1e-6)


def test_a_sampler_that_cannot_be_compiled_samples_all_the_same(monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function: broken)
    on_gpu = inversion._on_device.__wrapped__("cuda")
    logits, noise = random_logits(5), torch.rand(5, dtype=torch.float64)
    for _ in range(2):
        assert all(map(torch.equal, on_gpu(logits, noise), inversion._sample_from_all(logits, noise)))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "no compiler" in line


# ---- Narrowing ----
def sample_nucleus(probs: np.ndarray, noise: float, top_p: float) -> int:
    """Of the tokens that have less than `top_p` above them."""
    masses = np.array(probs)
    kept = np.array([p if masses[masses > p].sum() < top_p else 0.0 for p in masses])
    return inverse_cdf(kept / kept.sum(), noise)


@pytest.mark.parametrize("top_p", [0.02, 0.3, 0.9])
def test_top_p_cuts_the_distribution_of_the_nucleus(top_p):
    logits, noise = random_logits(300, torch.float64), np.random.default_rng(6).random(300)
    tokens, logps = sample(make_sampler(top_p=top_p), logits, noise)
    for row in range(300):
        probs = probabilities(logits[row])
        assert tokens[row] == sample_nucleus(probs, noise[row], top_p)
        assert logps[row].item() == pytest.approx(math.log(probs[tokens[row]]), abs=1e-9)


@pytest.mark.parametrize("settings", [{"top_p": 0.6}, {"top_p": 0.9, "top_k": 6, "min_p": 0.05}, {"top_k": 3}], ids=str)
def test_narrowed_tokens_have_their_probabilities_among_what_transformers_keeps(settings):
    logits = random_logits(1, vocabulary=30, scale=1.2)
    kept = logits
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in settings:
            kept = warper(settings[name])(None, kept)
    count = 20_000
    noise = np.random.default_rng(8).random(count)
    tokens, _ = sample(make_sampler(**settings), logits.expand(count, -1), noise)
    expected = kept[0].double().softmax(-1) * count
    observed = tokens.bincount(minlength=30).double()
    assert (observed[expected == 0] == 0).all()
    deviation = ((observed - expected)[expected > 0] / expected[expected > 0].sqrt()).abs()
    assert deviation.max() < 4.5


def test_tokens_as_probable_as_the_last_of_the_nucleus_belong_to_it():
    logits = torch.zeros(400, 8)
    tokens, _, drawn_logps = sample_with_drawn_logps(
        make_sampler(top_p=0.5), logits, np.random.default_rng(2).random(400)
    )
    assert set(tokens.tolist()) == set(range(8))
    assert drawn_logps.tolist() == pytest.approx([math.log(1 / 8)] * 400)


CHANGED = [
    {"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": 6, "min_p": 0.05, "temperature": 0.7},
    {"repetition_penalty": 1.4}, {"repetition_penalty": 1.4, "top_p": 0.7}, {"generation_kwargs": {"typical_p": 0.5}},
    {"generation_kwargs": {"suppress_tokens": [5, 6, 7]}, "top_k": 9},
]  # fmt: skip


@pytest.mark.parametrize("settings", CHANGED, ids=str)
def test_drawn_logprobs_are_those_of_the_distribution_that_transformers_samples_from(settings):
    model, options = make_model(), make_options(**settings)
    logits, history = random_logits(60), torch.tensor([[5, 6]])
    processors_ = model._get_logits_processor(generation_config(options), input_ids_seq_length=2)
    sampler = Sampler(model, options)
    tokens, _, drawn_logps = sample_with_drawn_logps(sampler, logits, np.random.default_rng(9).random(60))
    expected = processors_(history.expand(60, -1), logits).double().log_softmax(-1)
    assert drawn_logps.tolist() == pytest.approx(expected[torch.arange(60), tokens].tolist(), abs=2e-6)
    assert not sampler.samples_from_policy


@pytest.mark.parametrize("vocabulary", [1, 15, 48, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_log_sum_exp_is_that_of_float64(vocabulary, dtype):
    logits = (6 * torch.randn(20, vocabulary, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[::2, 1:] = -math.inf
    assert inversion.logsumexp(logits).tolist() == pytest.approx(logits.double().logsumexp(-1).tolist(), abs=2e-6)
    logits[3] = -math.inf
    logits[4, 0] = math.nan
    assert inversion.logsumexp(logits).isfinite().tolist() == [row not in (3, 4) for row in range(20)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_drawn_logprobs_are_the_policy_s_where_nothing_changes_its_distribution(temperature):
    sampler = make_sampler(temperature=temperature)
    _, logps, drawn_logps = sample_with_drawn_logps(sampler, random_logits(60), [0.4] * 60)
    assert torch.equal(logps, drawn_logps)
    assert sampler.samples_from_policy


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_processors_choose_the_token_and_the_policy_gives_its_log_probability(temperature):
    logits, noise = random_logits(200), np.random.default_rng(5).random(200)
    tokens, logps = sample(make_sampler(top_k=4, temperature=temperature), logits, noise)
    for row in range(200):
        probs = probabilities(logits[row], temperature)
        kept = np.where(probs >= np.sort(probs)[-4], probs, 0.0)
        assert tokens[row] == inverse_cdf(kept / kept.sum(), noise[row])
        assert logps[row].item() == pytest.approx(math.log(probs[tokens[row]]), abs=2e-6)


@pytest.mark.parametrize("settings", [
    {}, {"top_p": 0.5, "top_k": 20, "min_p": 0.1}, {"repetition_penalty": 3.0},
    {"generation_kwargs": {"suppress_tokens": [7]}}, {"generation_kwargs": {"min_new_tokens": 2}},
], ids=str)  # fmt: skip
def test_logits_are_left_as_they_were(settings):
    logits = random_logits(5)
    before = logits.clone()
    sample(make_sampler(**settings), logits, [0.5] * 5)
    assert torch.equal(logits, before)


def test_greedy_takes_the_most_probable_token_whatever_the_noise():
    logits = random_logits(50)
    sampler = make_sampler(temperature=0.5, generation_kwargs={"do_sample": False})
    for noise in (0.0, LARGEST):
        tokens, logps, drawn_logps = sample_with_drawn_logps(sampler, logits, [noise] * 50)
        assert torch.equal(tokens, logits.argmax(-1))
        assert not drawn_logps.any()
        expected = [math.log(probabilities(row, 0.5).max()) for row in logits]
        assert logps.tolist() == pytest.approx(expected, abs=2e-6)


def test_logits_that_are_not_finite_give_log_probabilities_that_are_not():
    logits = random_logits(4)
    logits[1, 5] = torch.nan
    logits[2] = -torch.inf
    logits[3, 5] = torch.inf
    for settings in ({}, {"top_p": 0.5}, {"repetition_penalty": 1.5}):
        tokens, logps = sample(make_sampler(**settings), logits, [0.5] * 4)
        assert logps.isfinite().tolist() == [True, False, False, False]
        assert ((tokens >= 0) & (tokens < 64)).all()


# ---- Processors ----
HISTORIES = [([5], [13, 14]), ([6, 7, 8], []), ([5], [15, 16]), ([9, 10], [17]), ([11, 12], [18, 19]), ([5], [7] * 5)]
READING = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "a penalty below 1": {"repetition_penalty": 0.7},
    "min_new_tokens": {"generation_kwargs": {"min_new_tokens": 2}},
    "min_length": {"generation_kwargs": {"min_length": 4}},
    "begin_suppress_tokens": {"generation_kwargs": {"begin_suppress_tokens": [3, 20]}},
    "forced_eos_token_id": {"generation_kwargs": {"forced_eos_token_id": 44}},
    "forced_bos_token_id": {"generation_kwargs": {"forced_bos_token_id": 40}},
    "exponential_decay_length_penalty": {"generation_kwargs": {"exponential_decay_length_penalty": (1, 1.4)}},
    "no_repeat_ngram_size": {"generation_kwargs": {"no_repeat_ngram_size": 1}},
    "sequence_bias": {"generation_kwargs": {"sequence_bias": {(3,): 1.0, (13, 14): -2.0}}},
    "several": {
        "repetition_penalty": 1.2,
        "generation_kwargs": {"min_new_tokens": 2, "no_repeat_ngram_size": 1, "suppress_tokens": [9]},
    },
}


@pytest.mark.parametrize("settings", READING.values(), ids=READING)
def test_rows_of_any_lengths_are_processed_as_transformers_does_each_alone(settings):
    model, options = make_model(), make_options(**settings)
    sampler = Sampler(model, options)
    logits = random_logits(len(HISTORIES))
    prompts, generated = zip(*HISTORIES, strict=True)
    mine = sampler._processors(logits, make_history(prompts, generated))
    for row, (prompt, ids) in enumerate(HISTORIES):
        config = generation_config(options)
        config.max_length = len(prompt) + 6
        model._prepare_special_tokens(config, device="cpu")
        alone = model._get_logits_processor(config, input_ids_seq_length=len(prompt), device="cpu")
        expected = alone(torch.tensor([prompt + ids]), logits[row : row + 1])
        assert torch.allclose(mine[row], expected[0], atol=1e-6)
    assert sampler.reads_tokens


@pytest.mark.parametrize(
    "settings, reads",
    [
        ({}, False),
        ({"temperature": 0.5, "top_p": 0.5, "top_k": 4, "min_p": 0.1}, False),
        ({"generation_kwargs": {"suppress_tokens": [3], "typical_p": 0.4, "epsilon_cutoff": 0.1}}, False),
        ({"generation_kwargs": {"renormalize_logits": True}}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"generation_kwargs": {"sequence_bias": {(3,): 1.0}}}, True),
    ],
)
def test_histories_are_kept_only_where_a_processor_reads_them(settings, reads):
    sampler = make_sampler(**settings)
    assert sampler.reads_tokens == reads
    if not reads:
        sampler.sample(random_logits(3), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))


@pytest.mark.parametrize(
    "name, one_by_one", [("repetition_penalty", 0), ("min_new_tokens", 0), ("no_repeat_ngram_size", 6)]
)
def test_rows_are_processed_one_by_one_only_where_order_is_read(monkeypatch, name, one_by_one):
    sampler = make_sampler(**READING[name])
    calls, made = [], sampler._processors._of_prompt_length
    monkeypatch.setattr(sampler._processors, "_of_prompt_length", lambda length: calls.append(length) or made(length))
    prompts, generated = zip(*[([5] * (1 + i), [6] * i) for i in range(6)], strict=True)
    sample(sampler, random_logits(6), [0.5] * 6, prompts, generated)
    assert len(calls) == one_by_one


def test_processors_of_a_few_prompt_lengths_are_kept(monkeypatch):
    monkeypatch.setattr(processors, "KEPT_LENGTHS", 2)
    sampler = make_sampler(generation_kwargs={"no_repeat_ngram_size": 1})
    prompts = [[5] * length for length in (1, 2, 3, 4, 5)]
    logits = random_logits(5)
    tokens, _ = sample(sampler, logits, [0.5] * 5, prompts)
    assert len(sampler._processors._made) <= 2
    monkeypatch.setattr(processors, "KEPT_LENGTHS", 64)
    assert torch.equal(tokens, sample(sampler, logits, [0.5] * 5, prompts)[0])


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
