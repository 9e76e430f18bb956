import contextlib
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from grpo_trl import cpu_kernels
from grpo_trl.objective.correction import Correction
from grpo_trl.rollout.base import Rollout, RolloutRequest, SamplingOptions
from grpo_trl.rollout.generate import GenerateEngine
from grpo_trl.rollout.group import cache, comparison, scheduler
from grpo_trl.rollout.group import engine as group
from grpo_trl.rollout.group.engine import GroupEngine
from grpo_trl.rollout.sampling import SERVED_KWARGS
from grpo_trl.seeds import uniforms
from tests.helpers.families import FAMILIES, WINDOWED, make_family
from tests.helpers.models import SIZES, make_model, make_tokenizer

from ..test_sampling import inverse_cdf, sample_nucleus


PAD, EOS = 0, 1
ENDS = (EOS, 7, 12, 20, 33, 41)
"""So many that completions end at every length."""
MODELS = {name: (name, {}) for name in FAMILIES} | {f"{name} windowed": (name, WINDOWED[name]) for name in WINDOWED}
EVERY_MODEL = pytest.mark.parametrize("family, changes", MODELS.values(), ids=MODELS)
GREEDY = {"generation_kwargs": {"do_sample": False}}


@pytest.fixture(autouse=True)
def brief_comparison(monkeypatch):
    """Of few tokens at each engine's first rollout, but where it is what is tested."""
    monkeypatch.setattr(group, "TOKENS", 4)


def make_options(**changes) -> SamplingOptions:
    defaults = {"max_completion_length": 10, "pad_token_id": PAD, "eos_token_ids": ENDS}
    return SamplingOptions(**(defaults | changes))


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 48, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = make_prompts(5, 1, 13, 3, 8)


def make_request(prompts=PROMPTS, num_generations: int = 3, seeds=None) -> RolloutRequest:
    seeds = list(range(100, 100 + len(prompts))) if seeds is None else seeds
    return RolloutRequest(["unread"] * len(prompts), prompts, num_generations, seeds)


def sample(model, prompts=PROMPTS, num_generations: int = 3, seeds=None, rows: int = 256, **changes) -> Rollout:
    """Of an engine that must not hand the request over."""
    engine = GroupEngine(model, make_options(**changes), max_rows_in_flight=rows, tokenizer=make_tokenizer())
    rollout = engine.rollout(make_request(prompts, num_generations, seeds))
    assert engine._reason is None
    return rollout


def generate(model, prompts=PROMPTS, num_generations: int = 3, rows: int = 256, **changes) -> Rollout:
    engine = GenerateEngine(model, make_options(**changes), max_rows_in_flight=rows, tokenizer=make_tokenizer())
    return engine.rollout(make_request(prompts, num_generations))


def decode_with_scaling(monkeypatch, factor: float) -> None:
    """Let decoding, and it alone, multiply the products of queries and keys by `factor`."""
    right = cache.GroupCache._allocate
    monkeypatch.setattr(
        cache.GroupCache, "_allocate", lambda self, k, v, scaling, *rest: right(self, k, v, factor * scaling, *rest)
    )


def ids(rollout: Rollout) -> list[list[int]]:
    return [completion.ids for completion in rollout.completions]


def ended(rollout: Rollout) -> list[bool]:
    return [completion.ended for completion in rollout.completions]


def warnings(caplog) -> list[str]:
    """All but those of kernels in C++, which a process without g++ gives once."""
    found = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [record.getMessage() for record in found if record.name != cpu_kernels.__name__]


# ---- Oracles ----
def keep_all(probs):
    return probs


def keep_top_k(count):
    def keep(probs):
        chosen = sorted(range(len(probs)), key=lambda i: -probs[i])[:count]
        return renormalized(probs, chosen)

    return keep


def keep_top_p(mass):
    def keep(probs):
        chosen, before = [], 0.0
        for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
            if before < mass:
                chosen.append(i)
            before += probs[i]
        return renormalized(probs, chosen)

    return keep


def keep_min_p(share):
    return lambda probs: renormalized(probs, [i for i, p in enumerate(probs) if p >= share * max(probs)])


def renormalized(probs, chosen):
    total = sum(probs[i] for i in chosen)
    return [p / total if i in chosen else 0.0 for i, p in enumerate(probs)]


OPTIONS = {
    "none": ({}, keep_all),
    "temperature": ({"temperature": 0.7}, keep_all),
    "top_p": ({"top_p": 0.8}, keep_top_p(0.8)),
    "top_k": ({"top_k": 5}, keep_top_k(5)),
    "min_p": ({"min_p": 0.2}, keep_min_p(0.2)),
    "top_p and temperature": ({"top_p": 0.8, "temperature": 1.4}, keep_top_p(0.8)),
}
OPTION = pytest.mark.parametrize("option, keep", OPTIONS.values(), ids=OPTIONS)


def distributions(model, completion, temperature: float) -> list[list[float]]:
    """Of each token of a completion, from one plain forward."""
    tokens = torch.tensor([completion.prompt_ids + completion.ids])
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens, use_cache=False).logits[0, len(completion.prompt_ids) - 1 : -1]
    return (logits.double() / temperature).softmax(-1).tolist()


def assert_follows_from_seeds(model, rollout, request, options, keep=keep_all):
    """Every token is where its noise cuts the distribution that a plain forward gives, and the row stops where it must."""
    model.eval()
    assert len(rollout.completions) == len(request.prompt_ids) * request.num_generations
    for row, completion in enumerate(rollout.completions):
        prompt, g = divmod(row, request.num_generations)
        assert completion.prompt_ids == request.prompt_ids[prompt]
        assert 1 <= len(completion.ids) <= options.max_completion_length
        assert completion.mask == [True] * len(completion.ids)
        assert not set(completion.ids[:-1]) & set(options.eos_token_ids)
        assert completion.ended == (completion.ids[-1] in options.eos_token_ids)
        assert completion.ended or len(completion.ids) == options.max_completion_length
        noise = uniforms(request.seeds[prompt], g, len(completion.ids)).tolist()
        expected = []
        for probs, u in zip(distributions(model, completion, options.temperature), noise, strict=True):
            if options.top_p < 1:
                expected.append(sample_nucleus(probs, u, options.top_p))
            else:
                expected.append(inverse_cdf(keep(probs), u))
        assert completion.ids == expected
    assert rollout.computed_tokens == sum(len(completion.ids) for completion in rollout.completions)


# ---- What is written ----
@EVERY_MODEL
def test_greedy_completions_are_those_of_generate(family, changes):
    model = make_family(family, **changes)
    for prompts, num_generations, rows in [(PROMPTS, 2, 3), (PROMPTS[:3], 1, 64)]:
        expected = generate(model, prompts, num_generations, **GREEDY)
        written = sample(model, prompts, num_generations, rows=rows, **GREEDY)
        assert ids(written) == ids(expected)
        assert ended(written) == ended(expected)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 1), (3, 4), (9, 2), (8, 8)])
def test_greedy_completions_are_those_of_generate_for_any_shape(shape, rows):
    model = make_family("qwen2")
    prompts = make_prompts(*[1 + (5 * i) % 17 for i in range(shape[0])])
    expected = ids(generate(model, prompts, shape[1], **GREEDY))
    assert ids(sample(model, prompts, shape[1], rows=rows, **GREEDY)) == expected
    assert len({len(row) for row in expected}) > 1 or shape[0] == 1


@EVERY_MODEL
def test_each_token_follows_from_its_noise_and_a_plain_forward(family, changes):
    model, request, options = make_family(family, **changes).double(), make_request(num_generations=4), make_options()
    rollout = sample(model, num_generations=4, rows=6)
    assert_follows_from_seeds(model, rollout, request, options)
    lengths = {len(row) for row in ids(rollout)}
    assert len(lengths) > 3
    assert max(lengths) > 7


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@OPTION
def test_each_token_follows_from_its_noise_and_the_processed_distribution(option, keep, rows):
    model, request = make_family("qwen2").double(), make_request(num_generations=3)
    rollout = sample(model, rows=rows, **option)
    assert_follows_from_seeds(model, rollout, request, make_options(**option), keep)


@pytest.mark.parametrize("most, prefills", [(1, [13, 8, 5, 3, 1]), (6, [13, 8, 5, 4]), (12, [13, 8, 9]), (30, [30])])
def test_prompts_that_do_not_fit_into_one_prefill_are_computed_by_several(monkeypatch, most, prefills):
    monkeypatch.setitem(scheduler.PREFILL_TOKENS, "cpu", most)
    model = make_family("qwen2").double()
    engine = GroupEngine(model, make_options())
    engine.rollout(make_request())
    shapes = record_inputs(model)
    rollout = engine.rollout(make_request())
    assert [columns for _, columns in shapes[: len(prefills)]] == prefills
    assert {columns for _, columns in shapes[len(prefills) :]} == {1}
    assert_follows_from_seeds(model, rollout, make_request(), make_options())


@pytest.mark.parametrize("length", [1, 2, 17, 40])
def test_completions_of_any_maximal_length(length):
    model = make_family("qwen2").double()
    changes = {"max_completion_length": length, "eos_token_ids": (EOS,)}
    rollout = sample(model, rows=4, **changes)
    assert_follows_from_seeds(model, rollout, make_request(), make_options(**changes))
    assert max(map(len, ids(rollout))) == length


def test_all_rows_may_end_with_their_first_token():
    everything = tuple(range(48))
    model = make_family("qwen2").double()
    rollout = sample(model, rows=2, eos_token_ids=everything)
    assert_follows_from_seeds(model, rollout, make_request(), make_options(eos_token_ids=everything))


# ---- What the noise depends on ----
@pytest.fixture(scope="module")
def precise():
    return make_family("qwen2").double()


@pytest.mark.parametrize("rows", [1, 2, 7, 15, 1000])
def test_completions_do_not_depend_on_the_rows_in_flight(precise, rows):
    assert ids(sample(precise, rows=rows)) == ids(sample(precise, rows=4))


def test_completions_depend_neither_on_other_prompts_nor_on_their_order(precise):
    together = ids(sample(precise))
    order = [3, 0, 4, 2, 1]
    shuffled = ids(sample(precise, [PROMPTS[i] for i in order], seeds=[100 + i for i in order], rows=5))
    for place, i in enumerate(order):
        alone = ids(sample(precise, [PROMPTS[i]], seeds=[100 + i]))
        assert together[3 * i : 3 * i + 3] == alone == shuffled[3 * place : 3 * place + 3]


def test_more_completions_leave_the_first_ones_as_they_are(precise):
    many = ids(sample(precise, num_generations=9, rows=8))
    for count in (1, 2, 8):
        few = ids(sample(precise, num_generations=count, rows=8))
        assert few == [row for i, row in enumerate(many) if i % 9 < count]


def test_a_longer_limit_leaves_the_beginning_as_it_is(precise):
    long = ids(sample(precise, max_completion_length=30, num_generations=6))
    for length in (1, 4, 9):
        assert ids(sample(precise, max_completion_length=length, num_generations=6)) == [row[:length] for row in long]


def test_equal_prompts_with_other_seeds_get_other_completions(precise):
    rows = ids(sample(precise, [PROMPTS[0]] * 4, seeds=[1, 2, 3, 1], num_generations=5))
    groups = [rows[i : i + 5] for i in range(0, 20, 5)]
    assert groups[0] == groups[3]
    assert len({tuple(map(tuple, g)) for g in groups}) == 3
    assert all(len(set(map(tuple, g))) > 1 for g in groups)
    assert ids(sample(precise, seeds=[0] * 5)) != ids(sample(precise))


def test_the_global_random_state_is_neither_used_nor_changed(precise):
    torch.manual_seed(1)
    first = ids(sample(precise))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert ids(sample(precise)) == first
    assert torch.equal(torch.get_rng_state(), before)


# ---- Log-probabilities ----
@OPTION
def test_log_probabilities_are_those_of_plain_forwards_before_and_after_processing(option, keep):
    model, temperature = make_family("llama"), option.get("temperature", 1.0)
    rollout = sample(model, rows=4, **option)
    for completion in rollout.completions:
        probs = distributions(model, completion, temperature)
        policy = [probs[n][token] for n, token in enumerate(completion.ids)]
        assert completion.sampler_logps == pytest.approx(torch.tensor(policy).log().tolist(), abs=1e-4)
        drawn = [keep(probs[n])[token] for n, token in enumerate(completion.ids)]
        expected = None if keep is keep_all else pytest.approx(torch.tensor(drawn).log().tolist(), abs=1e-3)
        assert completion.drawn_logps == expected


@pytest.mark.parametrize("engine", [sample, generate])
@pytest.mark.parametrize(
    "option, keep", [({"top_p": 0.7}, keep_top_p(0.7)), ({"top_k": 5}, keep_top_k(5))], ids=["top_p", "top_k"]
)
def test_the_corrected_estimate_of_an_expectation_is_unbiased(engine, option, keep):
    """20,000 tokens of a truncated distribution; the exact sum is over the tokens that it has."""
    model = make_family("llama")
    value_V = torch.rand(48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    completions = engine(model, [PROMPTS[0]], 20_000, rows=1000, max_completion_length=1, **option).completions
    (policy,) = distributions(model, completions[0], 1.0)
    policy_V, drawn_V = torch.tensor(policy), torch.tensor(keep(policy))
    exact = float((policy_V * value_V)[drawn_V > 0].sum())
    tokens_R = torch.tensor([c.ids[0] for c in completions])
    old_R1, drawn_R1 = policy_V.log()[tokens_R, None], torch.tensor([c.drawn_logps for c in completions]).double()
    weights_R1 = Correction("token_truncate", None).weights(old_R1, drawn_R1, torch.ones_like(old_R1, dtype=torch.bool))
    terms_R = weights_R1[:, 0] * value_V[tokens_R]
    assert abs(terms_R.mean() - exact) < 4 * terms_R.std() / len(tokens_R) ** 0.5 + 1e-5
    uncorrected_R = value_V[tokens_R]
    assert abs(uncorrected_R.mean() - exact) > 10 * uncorrected_R.std() / len(tokens_R) ** 0.5


def test_greedy_tokens_have_the_models_log_probability_and_no_other_choice():
    model = make_family("qwen2")
    for completion in sample(model, temperature=0.6, **GREEDY).completions:
        probs = distributions(model, completion, 0.6)
        expected = torch.tensor([probs[n][token] for n, token in enumerate(completion.ids)]).log().tolist()
        assert completion.sampler_logps == pytest.approx(expected, abs=1e-4)


# ---- Statistics ----
def chi_square_p_value(counts: dict, probs: dict) -> float:
    """Outcomes that are expected less than 5 times are counted together."""
    total = sum(counts.values())
    assert not [outcome for outcome, count in counts.items() if count and not probs.get(outcome)]
    common = [outcome for outcome in probs if probs[outcome] * total >= 5]
    cells = [(counts.get(outcome, 0), probs[outcome] * total) for outcome in common]
    observed_rest = total - sum(observed for observed, _ in cells)
    expected_rest = total - sum(expected for _, expected in cells)
    if expected_rest > 1:
        cells.append((observed_rest, expected_rest))
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)).item()


def exact_probabilities(model, prompt, temperature, keep) -> dict[tuple[int, ...], float]:
    """Of all completions of two tokens, or of the end token alone."""

    def after(tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].double()
        return [p for p in enumerate(keep((logits / temperature).softmax(-1).tolist())) if p[1] > 0]

    result = {}
    for first, p in after(prompt):
        if first == EOS:
            result[(first,)] = p
        else:
            result |= {(first, second): p * q for second, q in after([*prompt, first])}
    return result


@OPTION
def test_tokens_are_drawn_with_their_probabilities(option, keep):
    model = make_model(vocab_size=12, num_hidden_layers=1, initializer_range=0.25).eval()
    prompt, temperature = [4, 9, 2], option.get("temperature", 1.0)
    engine = GroupEngine(
        model, make_options(max_completion_length=2, eos_token_ids=(EOS,), **option), max_rows_in_flight=20_000
    )
    counts: dict[tuple[int, ...], int] = {}
    for row in ids(engine.rollout(make_request([prompt], 20_000, seeds=[6]))):
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert chi_square_p_value(counts, exact_probabilities(model, prompt, temperature, keep)) > 1e-4
    wrong = exact_probabilities(model, prompt, temperature * 1.1, keep_all)
    assert chi_square_p_value(counts, wrong) < 1e-6


# ---- Options ----
SERVED = {
    "bad_words_ids": {"bad_words_ids": [[8], [3], [47, 26], [47, 4, 42]]},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "min_new_tokens": {"min_new_tokens": 6},
    "min_length": {"min_length": 12},
    "suppress_tokens": {"suppress_tokens": list(range(0, 48, 2))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(0, 48, 2))},
    "sequence_bias": {"sequence_bias": {(30,): 2.5, (31, 32): 4.0, (30, 31): 4.0, (30, 17): 9.0}},
    "forced_eos_token_id": {"forced_eos_token_id": 41},
    "forced_bos_token_id": {"forced_bos_token_id": 29},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.6)},
    "renormalize_logits": {"renormalize_logits": True},
}
CHOOSING = {"epsilon_cutoff": 0.04, "eta_cutoff": 0.04, "typical_p": 0.5, "top_h": 0.4}
"""Options that narrow the choice of a token; with greedy decoding they change nothing."""


def alone(model, prompts, **changes) -> list[tuple[list[int], bool]]:
    """Greedy completions of GenerateEngine, a prompt at a time: padding counts as history there."""
    rollouts = [generate(model, [prompt], 1, **changes) for prompt in prompts]
    return [(rollout.completions[0].ids, rollout.completions[0].ended) for rollout in rollouts]


def test_every_served_option_has_a_test():
    assert {*SERVED, *CHOOSING, "do_sample", "stop_strings"} == SERVED_KWARGS


@pytest.mark.parametrize("settings", SERVED.values(), ids=SERVED)
@pytest.mark.parametrize("greedy", [{"do_sample": False}, {}], ids=["greedy", "top_k of 1"])
def test_served_options_mean_what_they_mean_to_generate(settings, greedy):
    model = make_model()
    changes = {"generation_kwargs": settings | greedy, "top_k": 0 if greedy else 1, "max_completion_length": 14}
    rollout = sample(model, num_generations=1, rows=3, **changes)
    expected = alone(model, PROMPTS, **changes)
    assert [(c.ids, c.ended) for c in rollout.completions] == expected
    if "_" in next(iter(settings)) and "renormalize_logits" not in settings:
        without = alone(model, PROMPTS, **(changes | {"generation_kwargs": greedy}))
        assert expected != without


def test_the_repetition_penalty_is_that_of_generate():
    model = make_model()
    changes = GREEDY | {"repetition_penalty": 1.7, "max_completion_length": 14, "eos_token_ids": (EOS,)}
    rollout = sample(model, num_generations=1, rows=3, **changes)
    expected = alone(model, PROMPTS, **changes)
    assert [(c.ids, c.ended) for c in rollout.completions] == expected
    assert expected != alone(model, PROMPTS, **(changes | {"repetition_penalty": 1.0}))


def keep_epsilon(probs):
    chosen = [i for i, p in enumerate(probs) if p >= 0.04]
    return renormalized(probs, chosen or [max(range(len(probs)), key=probs.__getitem__)])


def keep_eta(probs):
    entropy = -sum(p * torch.tensor(p, dtype=torch.float64).log().item() for p in probs if p)
    cutoff = min(0.04, 0.04**0.5 * torch.tensor(-entropy, dtype=torch.float64).exp().item())
    chosen = [i for i, p in enumerate(probs) if p >= cutoff]
    return renormalized(probs, chosen or [max(range(len(probs)), key=probs.__getitem__)])


def keep_typical(probs):
    logs = torch.tensor(probs, dtype=torch.float64).log().tolist()
    entropy = -sum(p * log for p, log in zip(probs, logs, strict=True) if p)
    chosen, before = [], 0.0
    for i in sorted(range(len(probs)), key=lambda i: abs(-logs[i] - entropy)):
        if before < 0.5:
            chosen.append(i)
        before += probs[i]
    return renormalized(probs, chosen)


@pytest.mark.parametrize(
    "name, keep", [("epsilon_cutoff", keep_epsilon), ("eta_cutoff", keep_eta), ("typical_p", keep_typical)]
)
def test_options_that_narrow_the_choice_do_what_their_papers_say(precise, name, keep):
    option = {"generation_kwargs": {name: CHOOSING[name]}}
    rollout = sample(precise, rows=4, **option)
    assert_follows_from_seeds(precise, rollout, make_request(), make_options(**option), keep)
    assert ids(rollout) != ids(sample(precise))


def test_top_h_narrows_the_choice(precise):
    rollout = sample(precise, generation_kwargs={"top_h": 0.4})
    free = sample(precise)
    assert ids(rollout) != ids(free)
    likely = [logp for c in rollout.completions for logp in c.sampler_logps]
    assert min(likely) > min(logp for c in free.completions for logp in c.sampler_logps) + 0.5


def test_history_processors_see_other_histories_per_row(precise):
    rollout = sample(precise, rows=6, num_generations=4, generation_kwargs={"no_repeat_ngram_size": 1})
    for row, completion in enumerate(rollout.completions):
        noise = uniforms(100 + row // 4, row % 4, 10).tolist()
        for n, (probs, token) in enumerate(zip(distributions(precise, completion, 1.0), completion.ids, strict=True)):
            seen = {*completion.prompt_ids, *completion.ids[:n]}
            kept = renormalized(probs, [i for i in range(48) if i not in seen])
            assert sum(kept[:token]) <= noise[n] + 1e-9
            assert sum(kept[: token + 1]) >= noise[n] - 1e-9
            assert token not in seen


@pytest.mark.parametrize("rows", [11, 256])
def test_stop_strings_end_a_completion_and_belong_to_it(rows):
    tokenizer = make_tokenizer()
    model = make_family("qwen2", vocab_size=len(tokenizer)).double()
    strings = ["b", "17", "q8", "zzzzzz"]  # a completion may be shorter than the last one
    prompts = [[15, 16], [15, 6], [23, 24, 25, 26, 27, 28, 29, 30, 31, 42], [3], [9, 6]]  # "1" ends the second and last
    changes = {"max_completion_length": 12, "eos_token_ids": (EOS,)}
    free = sample(model, prompts, 60, rows=rows, **changes)
    cut = sample(model, prompts, 60, rows=rows, **changes, generation_kwargs={"stop_strings": strings})
    reasons = set()
    for plain, stopped in zip(free.completions, cut.completions, strict=True):
        text = ["".join(tokenizer.batch_decode(plain.prompt_ids + plain.ids[: n + 1])) for n in range(len(plain.ids))]
        stops = [n + 1 for n, written in enumerate(text) if written.endswith(tuple(strings))]
        end = stops[0] if stops else len(plain.ids)
        assert stopped.ids == plain.ids[:end]
        assert stopped.ended == (bool(stops) or stopped.ids[-1] == EOS)
        assert stopped.sampler_logps == pytest.approx(plain.sampler_logps[:end], abs=1e-9)
        if stops and stops[0] == 1 and text[0].endswith("17"):
            reasons.add("across the prompt's end")
        elif stops:
            reasons.add(next(s for s in strings if text[end - 1].endswith(s)))
    assert reasons >= {"b", "17", "across the prompt's end"}
    assert cut.computed_tokens == sum(len(c.ids) for c in cut.completions)


def test_greedy_completions_with_stop_strings_are_those_of_generate():
    model = make_model()
    strings = list("bdfhjl")
    changes = {"generation_kwargs": {"do_sample": False, "stop_strings": strings}, "eos_token_ids": (EOS,)}
    rollout = sample(model, num_generations=1, **changes)
    assert [(c.ids, c.ended) for c in rollout.completions] == alone(model, PROMPTS, **changes)
    assert any(c.ended and c.ids[-1] != EOS for c in rollout.completions)


def test_stop_strings_need_a_tokenizer(model):
    with pytest.raises(ValueError, match=r"stop_strings=.*tokenizer"):
        GroupEngine(model, make_options(generation_kwargs={"stop_strings": ["b"]}))


def test_an_end_at_the_last_possible_token_counts_as_an_end(precise):
    rollout = sample(precise, num_generations=16)
    last = [c for c in rollout.completions if len(c.ids) == 10]
    assert {c.ended for c in last} == {True, False}
    assert all(c.ended == (c.ids[-1] in ENDS) for c in rollout.completions)


def test_every_end_token_ends_a_completion(precise):
    rollout = sample(precise, num_generations=64)
    assert {c.ids[-1] for c in rollout.completions if c.ended} == set(ENDS)


# ---- What is handed over ----
def assert_generate_writes(engine, model, options, caplog, reason: str):
    for _ in range(2):
        rollout = engine.rollout(make_request())
        assert all(c.sampler_logps is None for c in rollout.completions)
        assert ids(rollout) == ids(GenerateEngine(model, options, tokenizer=make_tokenizer()).rollout(make_request()))
    assert len(warnings(caplog)) == 1
    assert "model.generate" in warnings(caplog)[0]
    assert reason in warnings(caplog)[0]


@pytest.mark.parametrize("option", [{"guidance_scale": 1.5}, {"encoder_repetition_penalty": 1.2}])
def test_an_option_that_is_not_served_is_handed_to_generate(model, caplog, option):
    options = make_options(generation_kwargs=option)
    engine = GroupEngine(model, options, tokenizer=make_tokenizer())
    assert_generate_writes(engine, model, options, caplog, next(iter(option)))


def test_beams_are_not_served(model, caplog):
    GroupEngine(model, make_options(generation_kwargs={"num_beams": 2, "top_h": 0.5}))
    (line,) = warnings(caplog)
    assert "num_beams" in line
    assert "top_h" not in line


def test_an_option_that_is_none_is_no_option(model, caplog):
    sample(model, generation_kwargs={"num_beams": None, "guidance_scale": None})
    assert not warnings(caplog)


@pytest.mark.parametrize("change", [{"attention_dropout": 0.1}], ids=str)
def test_a_model_that_cannot_be_served_is_handed_to_generate(caplog, change):
    model = make_model(**change)
    engine = GroupEngine(model, make_options(), tokenizer=make_tokenizer())
    assert_generate_writes(engine, model, make_options(), caplog, "attention_dropout")


def test_a_model_that_attends_in_chunks_is_handed_to_generate(model, caplog):
    model.config.attention_chunk_size = 64
    engine = GroupEngine(model, make_options(), tokenizer=make_tokenizer())
    assert_generate_writes(engine, model, make_options(), caplog, "attention_chunk_size=64")


def test_a_model_that_the_engine_computes_wrongly_is_handed_to_generate(model, caplog, monkeypatch):
    decode_with_scaling(monkeypatch, 2)
    engine = GroupEngine(model, make_options(), tokenizer=make_tokenizer())
    assert not warnings(caplog)
    assert_generate_writes(engine, model, make_options(), caplog, "Qwen2ForCausalLM decoded by groups differ")


def test_a_model_that_raises_when_decoded_by_groups_is_handed_to_generate(model, caplog, monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no such thing")

    monkeypatch.setattr(cache.GroupCache, "attend", refuse)
    engine = GroupEngine(model, make_options(), tokenizer=make_tokenizer())
    assert_generate_writes(engine, model, make_options(), caplog, "NotImplementedError: no such thing")


def test_sharded_weights_are_handed_to_generate_in_step(model, caplog, monkeypatch):
    """Ranks go on until the last is done, and no rank leaves earlier than others."""
    calls = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **kwargs: calls.append(kwargs.pop("synced_gpus")) or generate(**kwargs)
    )

    def check():
        pytest.fail("a rank that leaves would be waited for")

    for in_step in (True, False):
        engine = GroupEngine(
            model, make_options(), tokenizer=make_tokenizer(), in_step=in_step, check=check if in_step else lambda: None
        )
        engine.rollout(make_request())
    assert calls == [True]
    assert "its weights are sharded" in warnings(caplog)[0]


def test_options_that_say_what_is_so_anyway_are_served(model, caplog):
    sample(model, generation_kwargs={"num_beams": 1, "use_cache": True})
    assert not warnings(caplog)


@pytest.mark.parametrize("mixed_precision", [False, True])
def test_half_precision_is_allowed_to_differ_more(model, caplog, monkeypatch, mixed_precision):
    decode_with_scaling(monkeypatch, 1.02)
    engine = GroupEngine(model, make_options(), mixed_precision=mixed_precision)
    engine.rollout(make_request())
    assert len(warnings(caplog)) == (not mixed_precision)


@pytest.mark.parametrize("at", ["construction", "first rollout"])
def test_ranks_hand_over_together(model, caplog, at):
    calls = []

    def gather(reasons):
        calls.append(reasons)
        other = "another rank cannot" if len(calls) == (1 if at == "construction" else 2) else None
        return [*reasons, other if len(calls) == 1 else (other, None)]

    engine = GroupEngine(model, make_options(), tokenizer=make_tokenizer(), gather=gather)
    assert_generate_writes(engine, model, make_options(), caplog, "another rank cannot")
    assert calls == ([[None]] if at == "construction" else [[None], [(None, None)]])


def test_an_error_in_the_first_round_reaches_every_rank(model, monkeypatch):
    """The rank that meets it gathers first, and a rank that meets none raises what another met."""
    reports = []
    engine = GroupEngine(model, make_options(), gather=lambda mine: reports.append(mine) or mine)
    monkeypatch.setattr(engine, "_disagreement", lambda request: raise_(torch.OutOfMemoryError("made up")))
    with pytest.raises(torch.OutOfMemoryError, match="made up"):
        engine.rollout(make_request())
    assert reports[1:] == [[(None, "OutOfMemoryError('made up')")]]
    met = iter([[None], [(None, None), *reports[1]]])
    other = GroupEngine(model, make_options(), gather=lambda mine: next(met))
    with pytest.raises(RuntimeError, match=r"Another rank .* OutOfMemoryError\('made up'\)"):
        other.rollout(make_request())


def raise_(error):
    raise error


# ---- The comparison at the first rollout ----
@pytest.fixture
def compared(monkeypatch):
    """Arguments and result of each comparison."""
    monkeypatch.setattr(group, "TOKENS", comparison.TOKENS)
    seen, compare = [], group.compare

    def spy(model, completions, *args):
        seen.append((completions, compare(model, completions, *args)))
        return seen[-1][1]

    monkeypatch.setattr(group, "compare", spy)
    return seen


def test_enough_tokens_are_compared_and_past_a_window(compared):
    for family, changes, window in (("qwen2", {}, 0), ("mistral", WINDOWED["mistral"], 6)):
        sample(make_family(family, **changes), max_completion_length=100)
        completions, comparison = compared.pop()
        assert comparison.agrees
        assert [len(c.ids) for c in completions] == [32 + window] * 4
        assert comparison.tokens >= 64
        assert {len(c.prompt_ids) for c in completions} == {1, 13}
    sample(make_family("mistral", sliding_window=60), max_completion_length=50)
    assert [len(c.ids) for c in compared.pop()[0]] == [50] * 4


def test_plain_forwards_compute_logits_of_the_compared_tokens_alone(model, compared):
    prompts, shapes = make_prompts(60, 60), []
    model.lm_head.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape[1]))
    sample(model, prompts, num_generations=1)
    assert max(shapes) == 11


def test_what_disagrees_is_compared_once_more_on_more_tokens(model, caplog, monkeypatch, compared):
    decode_with_scaling(monkeypatch, 2)
    options = make_options(max_completion_length=100)
    GroupEngine(model, options).rollout(make_request())
    (few, _), (more, last) = compared
    assert ([len(c.ids) for c in few], [len(c.ids) for c in more]) == ([32] * 4, [100] * 8)
    (line,) = warnings(caplog)
    assert f"differ from plain ones by {last.difference:.2g} nats on average over 800 tokens" in line
    assert f"where {last.allowed:.2g} are allowed (the model differs from itself by {last.noise:.2g}" in line


def test_one_unlucky_sample_does_not_decide(model, caplog, monkeypatch):
    first = comparison.Comparison(0.5, 0.0, 0.1, 64)
    results = iter([first, comparison.Comparison(0.05, 0.0, 0.1, 256)])
    monkeypatch.setattr(group, "compare", lambda *args: next(results))
    GroupEngine(model, make_options()).rollout(make_request())
    assert not warnings(caplog)


def test_a_model_that_differs_from_itself_in_another_batch_may_differ_from_the_engine_too(model):
    """One row weighs differently from two: noise is measured, and multiplies what is allowed."""
    completions = sample(model, num_generations=2, eos_token_ids=()).completions
    quiet = comparison.compare(model, completions, 1.0, False)
    assert quiet.agrees
    assert quiet.allowed == pytest.approx(1e-3)
    weight = model.lm_head.weight

    def shift(module, args, logits):
        return logits * (1.05 if len(logits) == 2 else 1.0)

    model.lm_head.register_forward_hook(shift)
    noisy = comparison.compare(model, completions, 1.0, False)
    assert noisy.noise > 0.01
    assert noisy.allowed == pytest.approx(4 * noisy.noise)
    assert noisy.difference == pytest.approx(quiet.difference, abs=1e-6)
    assert weight is model.lm_head.weight


def test_a_rank_tells_the_others_its_reason_and_asks_once_only(model):
    calls = []

    def gather(reasons):
        calls.append(reasons)
        return [None, *reasons] if len(calls) == 1 else [(None, None), *reasons]

    GroupEngine(make_model(attention_dropout=0.1), make_options(), gather=gather)
    assert len(calls) == 1
    assert "attention_dropout" in calls[0][0]
    calls.clear()
    engine = GroupEngine(model, make_options(), gather=gather)
    for _ in range(3):
        engine.rollout(make_request())
    assert calls == [[None], [(None, None)]]


# ---- Memory ----
def record_inputs(model) -> list[tuple[int, int]]:
    """Rows and columns of each forward from now on."""
    shapes: list[tuple[int, int]] = []
    layer = model.get_submodule("model.layers.0")
    layer.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4  # of make_model(): layers, keys and values, heads, their size, float32
COLUMNS = 16  # prompts of up to 13 tokens, completions of up to 10


def bytes_of(rows: int, prompts: int) -> int:
    """Of keys and values, and of three times the logits in float32."""
    return (rows + prompts) * COLUMNS * BYTES_PER_TOKEN + rows * 3 * 4 * SIZES["vocab_size"]


@pytest.mark.parametrize("fits", [1, 4, 9])
def test_fewer_rows_are_in_flight_where_memory_is_short(model, caplog, monkeypatch, fits):
    expected = ids(sample(model))
    slots = min(5, 2 * -(-fits // 3))
    monkeypatch.setattr(group, "free_memory", lambda device: bytes_of(fits, slots) / group.FREE_SHARE + 1)
    engine = GroupEngine(model, make_options(), max_rows_in_flight=64)
    rollout = engine.rollout(make_request())
    assert ids(rollout) == expected
    assert len(warnings(caplog)) == 1
    assert warnings(caplog)[0].startswith(f"{fits} completions are decoded at a time instead of 15")
    assert f"max_rows_in_flight={fits} " in warnings(caplog)[0]
    shapes = record_inputs(model)
    engine.rollout(make_request())
    assert max(rows for rows, _ in shapes) == fits


def test_rows_that_just_fit_are_all_in_flight(model, caplog, monkeypatch):
    monkeypatch.setattr(group, "free_memory", lambda device: bytes_of(15, 5) / group.FREE_SHARE + 1)
    GroupEngine(model, make_options()).rollout(make_request())
    assert not warnings(caplog)
    monkeypatch.setattr(group, "free_memory", lambda device: bytes_of(15, 5) / group.FREE_SHARE - 1)
    GroupEngine(model, make_options()).rollout(make_request())
    assert len(warnings(caplog)) == 1


def test_where_not_one_row_fits_the_error_names_the_option(model, monkeypatch):
    engine = GroupEngine(model, make_options())
    monkeypatch.setattr(group, "free_memory", lambda device: bytes_of(1, 2) / group.FREE_SHARE - 1)
    with pytest.raises(MemoryError, match="max_completion_length=10 tokens"):
        engine.rollout(make_request())


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "deepseek_v3"])
def test_the_cache_takes_the_bytes_that_were_computed_before(family, monkeypatch):
    caches = []
    sample_with = GroupEngine._sample

    def spy(self, request, options, stop, cache, *args):
        caches.append((cache, self._bytes_of(cache)))
        return sample_with(self, request, options, stop, cache, *args)

    monkeypatch.setattr(GroupEngine, "_sample", spy)
    model = make_family(family)
    vocabulary = model.config.vocab_size
    sample(model, rows=7)
    (compared, unknown), (used, computed) = caches
    assert unknown == compared.max_rows * 3 * 4 * vocabulary
    held = sum(part.nbytes for x in used._layers.values() for part in (x.prompts, x.own))
    assert held == computed - 7 * 3 * 4 * vocabulary > 0


def test_rows_in_flight_never_exceed_the_option(model):
    engine = GroupEngine(model, make_options(), max_rows_in_flight=4)
    engine.rollout(make_request())
    shapes = record_inputs(model)
    engine.rollout(make_request(num_generations=5))
    assert max(rows for rows, _ in shapes) == 4


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("made up"), RuntimeError("CUDA error: out of memory")], ids=str
)
def test_where_memory_runs_out_sampling_starts_again_with_half_of_the_rows(precise, caplog, monkeypatch, error):
    """And gives the same completions; the next round does not try as many again."""
    expected = ids(sample(precise))
    engine = GroupEngine(precise, make_options(), max_rows_in_flight=14)
    engine.rollout(make_request())
    attend, failed = cache.GroupCache.attend_step, []

    def fail(self, *args):
        if self.max_rows > 4 and int(self.now.lengths_R.max()) == 2:
            failed.append(self.max_rows)
            raise error
        return attend(self, *args)

    monkeypatch.setattr(cache.GroupCache, "attend_step", fail)
    assert ids(engine.rollout(make_request())) == expected
    assert failed == [14, 7]
    assert [line for line in warnings(caplog) if "max_rows_in_flight=3" in line] == warnings(caplog)[1:]
    engine.rollout(make_request())
    assert failed == [14, 7]


def test_memory_that_runs_out_with_one_row_is_an_error(model, monkeypatch):
    engine = GroupEngine(model, make_options(), max_rows_in_flight=1)
    engine.rollout(make_request())
    monkeypatch.setattr(cache.GroupCache, "attend", lambda *args: raise_(torch.OutOfMemoryError("made up")))
    with pytest.raises(torch.OutOfMemoryError):
        engine.rollout(make_request())


def test_what_autocast_copies_is_left_out_of_the_memory_for_keys(model):
    engine = GroupEngine(model, make_options(), mixed_precision=True)
    assert engine._bytes_of_casts() == 0
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert engine._bytes_of_casts() == 2 * matrices
        assert GroupEngine(model.bfloat16(), make_options())._bytes_of_casts() == 0


def test_rows_that_would_fit_without_autocasts_copies_are_fewer_with_them(model, monkeypatch):
    engine = GroupEngine(model, make_options(), mixed_precision=True)
    engine.rollout(make_request())  # measures a token
    monkeypatch.setattr(group, "free_memory", lambda device: bytes_of(15, 5) / group.FREE_SHARE + 1)
    assert engine._sized_cache(make_request()).max_rows == 15
    with torch.autocast("cpu", torch.bfloat16):
        cache = engine._sized_cache(make_request())
        assert engine._bytes_of(cache) <= bytes_of(15, 5) - group.FREE_SHARE * engine._bytes_of_casts()


# ---- What is computed ----
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_each_prompt_is_computed_once_and_no_row_after_its_end(model, rows):
    engine = GroupEngine(model, make_options(), max_rows_in_flight=rows)
    engine.rollout(make_request())
    shapes = record_inputs(model)
    rollout = engine.rollout(make_request())
    lengths = [len(row) for row in ids(rollout)]
    # the last token of a completion is drawn and not computed
    assert sum(rows * columns for rows, columns in shapes) == sum(map(len, PROMPTS)) + sum(lengths) - len(lengths)
    assert rollout.computed_tokens == sum(lengths)
    if rows == 64:
        assert shapes[0] == (1, sum(map(len, PROMPTS)))
        assert [shape[0] for shape in shapes[1:]] == [
            sum(length > n for length in lengths) for n in range(1, max(lengths))
        ]
        assert {shape[1] for shape in shapes[1:]} == {1}


def test_logits_of_a_prompt_are_computed_at_its_last_token_only(model):
    engine = GroupEngine(model, make_options())
    engine.rollout(make_request())
    shapes = []
    model.lm_head.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    engine.rollout(make_request())
    assert shapes[0] == (1, len(PROMPTS))


# ---- What is left as it was ----
@pytest.fixture
def mixed_model(model):
    """A model whose submodules are in different modes and whose generation settings are its own."""
    model.train()
    model.model.layers[0].eval()
    model.generation_config = GenerationConfig(eos_token_id=3, top_k=1)
    return model


def snapshot(model) -> tuple:
    modes = [module.training for module in model.modules()]
    settings = model.generation_config.to_dict(), model.config._attn_implementation
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    return modes, settings, forwards, torch.get_rng_state().tolist(), torch.is_grad_enabled()


def test_model_and_random_state_are_as_they_were_after_sampling(mixed_model):
    before, config = snapshot(mixed_model), mixed_model.generation_config
    trained = []
    mixed_model.model.layers[1].register_forward_hook(lambda module, *rest: trained.append(module.training))
    sample(mixed_model)
    assert snapshot(mixed_model) == before
    assert mixed_model.generation_config is config
    assert set(trained) == {False}


def test_model_and_random_state_are_as_they_were_after_an_exception(mixed_model, monkeypatch):
    engine = GroupEngine(mixed_model, make_options())
    engine.rollout(make_request())
    before, config = snapshot(mixed_model), mixed_model.generation_config
    layer = mixed_model.model.layers[1]
    forward, calls = layer.forward, []

    def fail_at_the_third_token(*args, **kwargs):
        calls.append(layer.training)
        if len(calls) == 3:
            raise RuntimeError("made up")
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", fail_at_the_third_token)
    with pytest.raises(RuntimeError, match="made up"):
        engine.rollout(make_request())
    assert calls == [False] * 3
    monkeypatch.undo()
    layer.__dict__.pop("forward", None)
    assert snapshot(mixed_model) == before
    assert mixed_model.generation_config is config
    assert ids(engine.rollout(make_request())) == ids(sample(mixed_model))


def test_generation_settings_of_the_model_change_nothing(model):
    expected = ids(sample(model, top_p=0.9))
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=1, temperature=3.0, suppress_tokens=list(range(9)), min_new_tokens=9, eos_token_id=30
    )
    assert ids(sample(model, top_p=0.9)) == expected


def test_a_forward_that_was_put_on_a_layer_is_in_force_and_stays(model):
    """As accelerate's hooks do it."""
    linear, calls = model.model.layers[0].mlp.down_proj, []
    plain = linear.forward

    def hooked(*args):
        calls.append(args)
        return -plain(*args)

    linear.forward = hooked
    rollout = sample(model, **GREEDY)
    assert calls
    assert linear.__dict__.get("forward") is hooked
    assert ids(rollout) == ids(generate(model, **GREEDY))


def test_gradient_checkpointing_does_no_harm(model):
    expected = ids(sample(model))
    model.train()
    model.gradient_checkpointing_enable()
    assert ids(sample(model)) == expected
    assert model.is_gradient_checkpointing
    assert model.training


def test_weights_that_change_between_two_rollouts_are_used(precise):
    model = make_family("qwen2").double()
    engine = GroupEngine(model, make_options())
    assert ids(engine.rollout(make_request())) == ids(sample(precise))
    model.load_state_dict(make_family("qwen2", seed=5).double().state_dict())
    assert_follows_from_seeds(model, engine.rollout(make_request()), make_request(), make_options())


@pytest.mark.parametrize("merged", [False, True])
def test_an_adapter_is_in_force(merged):
    base = make_model()
    policy = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=2))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn_like(parameter)
    if merged:
        policy.merge_adapter()
    written = ids(sample(policy, **GREEDY))
    assert written == ids(generate(policy, **GREEDY))
    assert written != ids(sample(base, **GREEDY))


def test_half_precision_is_near_plain_forwards(caplog):
    model = make_model(initializer_range=0.2).to(torch.bfloat16)
    rollout = sample(model)
    differences = []
    for completion in rollout.completions:
        probs = distributions(model, completion, 1.0)
        differences += [
            abs(torch.tensor(probs[n][token]).log().item() - completion.sampler_logps[n])
            for n, token in enumerate(completion.ids)
        ]
    assert sum(differences) / len(differences) < 0.03
    assert max(differences) < 0.2
    assert not warnings(caplog)


def test_sampling_runs_inside_the_context_and_without_gradient(model):
    inside, seen = [False], []

    @contextlib.contextmanager
    def context():
        inside[0] = True
        yield
        inside[0] = False

    model.lm_head.register_forward_hook(lambda *call: seen.append((inside[0], torch.is_grad_enabled())))
    engine = GroupEngine(model, make_options(max_completion_length=3), context=context)
    for _ in range(2):
        engine.rollout(make_request())
    assert set(seen) == {(True, False)}


def test_autocast_is_served(model, caplog):
    engine = GroupEngine(
        model, make_options(), context=lambda: torch.autocast("cpu", torch.bfloat16), mixed_precision=True
    )
    rollout = engine.rollout(make_request())
    assert not warnings(caplog)
    differences = []
    for completion in rollout.completions:
        with torch.autocast("cpu", torch.bfloat16):
            probs = distributions(model, completion, 1.0)
        differences += [
            abs(torch.tensor(probs[n][token]).log().item() - completion.sampler_logps[n])
            for n, token in enumerate(completion.ids)
        ]
    assert sum(differences) / len(differences) < 0.05


def break_weights(model):
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)


@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_are_not_finite_raise(greedy):
    model = make_model(tie_word_embeddings=False)
    engine = GroupEngine(model, make_options(**(GREEDY if greedy else {})))
    engine.rollout(make_request())
    break_weights(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.rollout(make_request())


def test_logits_that_are_not_finite_at_the_first_rollout_raise():
    model = make_model(tie_word_embeddings=False)
    break_weights(model)
    with pytest.raises(FloatingPointError, match="not finite"):
        GroupEngine(model, make_options()).rollout(make_request())


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_is_written_to_stderr_only_if_shown(model, capsys, shown):
    engine = GroupEngine(model, make_options(), show_progress=lambda: shown)
    rollout = engine.rollout(make_request())
    assert ids(rollout) == ids(sample(model))
    captured = capsys.readouterr()
    assert ("sampling" in captured.err) == shown
    assert captured.out == ""


def test_steps_are_told_with_their_tokens_and_ends(model):
    engine = GroupEngine(model, make_options(), max_rows_in_flight=4)
    engine.rollout(make_request())
    told = []
    request = make_request()
    model.eval()
    with torch.no_grad():
        rollout = engine._sample(
            request, engine.options, None, engine._sized_cache(request), lambda *step: told.append(step)
        )
    assert sum(tokens for tokens, _ in told) == rollout.computed_tokens
    assert sum(done for _, done in told) == len(rollout.completions)
    assert max(tokens for tokens, _ in told) <= 4
