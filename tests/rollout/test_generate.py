import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from grpo_trl.errors import OutOfStep
from grpo_trl.rollout.base import Rollout, RolloutRequest, SamplingOptions
from grpo_trl.rollout.generate import GenerateEngine, _Ends
from grpo_trl.rollout.sampling import generation_config
from tests.helpers.models import make_model


PAD, EOS = 0, 1
PROMPTS = [[15, 16], [17, 18, 19, 20, 21, 22], [23]]


def make_options(**changes) -> SamplingOptions:
    return SamplingOptions(**({"max_completion_length": 6, "pad_token_id": PAD, "eos_token_ids": (EOS,)} | changes))


def sample(model, seed: int = 0, prompts=PROMPTS, num_generations: int = 3, rows=None, **changes) -> Rollout:
    engine = GenerateEngine(model, make_options(**changes), max_rows_in_flight=rows)
    return engine.rollout(RolloutRequest(["unread"] * len(prompts), prompts, num_generations, [seed] * len(prompts)))


def ids(rollout: Rollout) -> list[list[int]]:
    return [completion.ids for completion in rollout.completions]


def test_rows_come_group_after_group_with_their_prompt(model):
    rollout = sample(model)
    assert [c.prompt_ids for c in rollout.completions] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert rollout.columns == {}
    for completion in rollout.completions:
        assert completion.mask == [True] * len(completion.ids)
        assert completion.sampler_logps is completion.drawn_logps is None
        assert completion.ended == (completion.ids[-1] == EOS)
    assert rollout.computed_tokens == 9 * 6


def test_completions_of_a_group_differ(model):
    assert len({tuple(row) for row in ids(sample(model, num_generations=8))[:8]}) > 1


def test_ranks_that_share_a_group_sample_different_completions(model):
    """From one seed."""
    engine = GenerateEngine(model, make_options())
    parts = [engine.rollout(RolloutRequest(["unread"], [[15]], 8, [5], [part])) for part in (range(4), range(4, 8))]
    assert [len(part.completions) for part in parts] == [4, 4]
    assert ids(parts[0]) != ids(parts[1])
    assert ids(engine.rollout(RolloutRequest(["unread"], [[15]], 4, [5]))) == ids(parts[0])


def test_the_seed_alone_fixes_the_completions(model):
    first = ids(sample(model, seed=5))
    torch.manual_seed(99)
    torch.rand(7)
    assert ids(sample(model, seed=5)) == first
    assert ids(sample(model, seed=6)) != first


@pytest.fixture
def mixed_model(model):
    """A model whose submodules are in different modes and whose generation settings are its own."""
    model.train()
    model.model.layers[0].eval()
    model.generation_config = GenerationConfig(eos_token_id=3, top_k=1)
    return model


def snapshot(model) -> tuple:
    modes = [module.training for module in model.modules()]
    return modes, model.generation_config.to_dict(), torch.get_rng_state().tolist()


def test_model_and_random_state_are_as_they_were_after_sampling(mixed_model):
    before, config = snapshot(mixed_model), mixed_model.generation_config
    sample(mixed_model)
    assert snapshot(mixed_model) == before
    assert mixed_model.generation_config is config


def test_model_and_random_state_are_as_they_were_after_an_exception(mixed_model, monkeypatch):
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
        sample(mixed_model)
    assert calls == [False] * 3  # it was in evaluation mode
    assert snapshot(mixed_model) == before
    assert mixed_model.generation_config is config


@pytest.mark.parametrize("own_config", [False, True])
def test_an_adapter_and_the_model_under_it_keep_their_settings(own_config):
    policy = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    base = policy.get_base_model()
    if own_config:
        policy.generation_config = GenerationConfig(top_k=1, max_new_tokens=2, suppress_tokens=[5])
    outer, inner = policy.generation_config, base.generation_config
    assert ids(sample(policy)) == ids(sample(make_model()))  # a new adapter changes nothing
    assert policy.generation_config is outer
    assert base.generation_config is inner


HOSTILE = {
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "temperature": 5.0,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(10, 40)),
    "bad_words_ids": [[9]],
    "max_new_tokens": 2,
    "min_new_tokens": 2,
    "forced_eos_token_id": 3,
    "eos_token_id": 4,
}


@pytest.mark.parametrize(
    "settings", [HOSTILE, HOSTILE | {"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}]
)
def test_generation_settings_of_the_model_change_nothing(model, settings):
    expected = ids(sample(model, num_generations=8))
    model.generation_config = GenerationConfig(**settings)
    assert ids(sample(model, num_generations=8)) == expected


def test_the_end_token_is_kept_and_nothing_follows_it(model):
    ends = (EOS, 7, 12, 20, 33)
    rows = ids(sample(model, num_generations=30, eos_token_ids=ends, max_completion_length=12))
    seen = set()
    for row in rows:
        assert not set(row[:-1]) & set(ends)
        assert row[-1] in ends or len(row) == 12
        seen |= {row[-1]} & set(ends)
    assert seen == set(ends)


def test_sampling_stops_where_every_completion_has_ended_whatever_the_end_token(model):
    calls = []
    model.register_forward_hook(lambda *call: calls.append(call))
    assert [len(row) for row in ids(sample(model, eos_token_ids=tuple(range(48))))] == [1] * 9
    assert len(calls) == 1


def test_padding_with_the_end_token_does_not_lengthen_a_completion(model):
    changes = {"eos_token_ids": (EOS, 7, 12, 20), "num_generations": 20}
    assert ids(sample(model, pad_token_id=EOS, **changes)) == ids(sample(model, pad_token_id=PAD, **changes))


@pytest.mark.parametrize("length", [1, 4])
def test_completions_have_at_most_max_completion_length_tokens(model, length):
    rows = ids(sample(model, max_completion_length=length, eos_token_ids=(47,)))
    assert max(map(len, rows)) == length


def test_ragged_prompts_give_what_each_prompt_gives_alone(model):
    together = ids(sample(model, num_generations=1, top_k=1, max_completion_length=10))
    alone = [ids(sample(model, prompts=[p], num_generations=1, top_k=1, max_completion_length=10))[0] for p in PROMPTS]
    assert together == alone
    assert len({tuple(row) for row in alone}) == len(PROMPTS)


def greedy(model, prompt: list[int], length: int) -> list[int]:
    written: list[int] = []
    while len(written) < length and EOS not in written:
        written.append(int(model(input_ids=torch.tensor([prompt + written])).logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("option", [{"temperature": 1e-4}, {"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}])
def test_every_sampling_option_reaches_the_sampler(model, option):
    expected = [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert ids(sample(model, num_generations=1, **option)) == expected
    assert ids(sample(model, num_generations=1)) != expected


OPTIONS_THAT_CHANGE = [
    {"top_p": 0.7}, {"repetition_penalty": 1.5, "top_k": 9}, {"generation_kwargs": {"typical_p": 0.6}},
    {"generation_kwargs": {"do_sample": False}},
]  # fmt: skip


@pytest.mark.parametrize("settings", OPTIONS_THAT_CHANGE, ids=str)
def test_drawn_logprobs_are_those_of_the_distribution_that_was_sampled_from(model, settings):
    options = make_options(temperature=0.8, eos_token_ids=(EOS, 7, 12, 20), **settings)
    rollout = GenerateEngine(model, options).rollout(RolloutRequest(["unread"] * 3, PROMPTS, 8, [0] * 3))
    assert len({len(c.ids) for c in rollout.completions}) > 1
    config = generation_config(options)
    for completion in rollout.completions:
        assert len(completion.drawn_logps) == len(completion.ids)
        processors = model._get_logits_processor(config, input_ids_seq_length=len(completion.prompt_ids))
        for n, (token, logp) in enumerate(zip(completion.ids, completion.drawn_logps, strict=True)):
            before = torch.tensor([completion.prompt_ids + completion.ids[:n]])
            scores = processors(before, model(input_ids=before).logits[:, -1])[0]
            expected = scores.double().log_softmax(-1)[token].item() if config.do_sample else 0.0
            assert logp == pytest.approx(expected, abs=1e-4)


def test_the_scores_of_earlier_steps_are_not_held(model):
    held, ends = [], _Ends.__call__

    def watch(self, input_ids, scores):
        result = ends(self, input_ids, scores)
        held.append(sum(one.untyped_storage().nbytes() for one in scores))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Ends, "__call__", watch)
        sample(model, top_p=0.9)
    assert held == [0] * 6


def test_the_repetition_penalty_reaches_the_sampler(model):
    def repeats(penalty: float) -> int:
        rollout = sample(model, top_k=1, max_completion_length=30, repetition_penalty=penalty, eos_token_ids=(47,))
        return sum(len(c.ids) - len(set(c.ids)) for c in rollout.completions)

    assert repeats(1e6) < repeats(1.0)


def test_generation_kwargs_reach_the_generation_config(model):
    allowed = {15, 16}
    suppressed = [token for token in range(48) if token not in allowed]
    rows = ids(sample(model, generation_kwargs={"suppress_tokens": suppressed}))
    assert {token for row in rows for token in row} == allowed


def test_sampling_runs_inside_the_context_and_without_gradient(model):
    inside, seen = [False], []

    @contextlib.contextmanager
    def context():
        inside[0] = True
        yield
        inside[0] = False

    model.lm_head.register_forward_hook(lambda *call: seen.append((inside[0], torch.is_grad_enabled())))
    engine = GenerateEngine(model, make_options(max_completion_length=2), context=context)
    engine.rollout(RolloutRequest(["unread"], [[15]], 1, seeds=[0]))
    assert set(seen) == {(True, False)}


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_is_written_to_stderr_only_if_shown(model, capsys, shown):
    engine = GenerateEngine(model, make_options(), show_progress=lambda: shown)
    with_bar = engine.rollout(RolloutRequest(["unread"] * 3, PROMPTS, 3, seeds=[0] * 3))
    assert ids(with_bar) == ids(sample(model))
    captured = capsys.readouterr()
    assert ("sampling" in captured.err) == shown
    assert captured.out == ""


def test_the_progress_bar_tells_how_many_completions_still_run(capsys):
    ends = _Ends(
        make_options(eos_token_ids=(EOS, 7)),
        None,
        rows=4,
        device=torch.device("cpu"),
        show_progress=True,
        check=lambda: None,
    )
    ends.bar.mininterval = 0  # draws every step
    assert ends(torch.tensor([[1, 5], [5, EOS], [5, 7], [5, 5]]), None).tolist() == [False, True, True, False]
    assert ends(torch.tensor([[5, 5], [EOS, 8], [7, 8], [5, EOS]]), None).tolist() == [False, True, True, True]
    ends.close()
    drawn = capsys.readouterr().err
    assert drawn.index("2/4 running") < drawn.index("1/4 running")
    assert ends.lengths.tolist() == [2, 1, 1, 2]


def test_stop_strings_end_a_completion_and_nothing_follows(model, tokenizer):
    changes = {"max_completion_length": 12, "pad_token_id": EOS}
    free = sample(model, num_generations=20, **changes)
    engine = GenerateEngine(
        model, make_options(**changes | {"generation_kwargs": {"stop_strings": ["b", "17"]}}), tokenizer=tokenizer
    )
    stopped = engine.rollout(RolloutRequest(["unread"] * 3, PROMPTS, 20, [0] * 3))
    assert any(c.ids[-1] != EOS and c.ended and len(c.ids) < 12 for c in stopped.completions)
    for plain, cut in zip(free.completions, stopped.completions, strict=True):
        texts = ["".join(tokenizer.batch_decode(plain.ids[: n + 1])) for n in range(len(plain.ids))]
        end = next((n + 1 for n, text in enumerate(texts) if text.endswith(("b", "17"))), len(plain.ids))
        assert cut.ids == plain.ids[:end]
        assert cut.ended == (cut.ids[-1] == EOS or texts[end - 1].endswith(("b", "17")))


# ---- Rows in flight ----
@pytest.fixture
def batches(model, monkeypatch):
    """The number of rows of each call of `model.generate`."""
    sizes, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **kwargs: sizes.append(len(kwargs["input_ids"])) or generate(**kwargs)
    )
    return sizes


@pytest.mark.parametrize("rows, expected", [(1, [1] * 9), (4, [4, 4, 1]), (9, [9]), (64, [9]), (None, [9])])
def test_no_more_rows_are_in_flight_than_the_option_says(model, batches, rows, expected):
    rollout = sample(model, rows=rows)
    assert batches == expected
    assert [c.prompt_ids for c in rollout.completions] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len(set(map(tuple, ids(rollout)))) > 4
    assert ids(sample(model, rows=rows)) == ids(rollout)


def test_by_default_rows_in_flight_are_bounded_too(model, batches):
    sample(model, prompts=PROMPTS[:1], num_generations=300, max_completion_length=1)
    assert batches == [128, 128, 44]


def test_ranks_in_step_make_equally_many_calls(model, batches):
    engine = GenerateEngine(
        model, make_options(), max_rows_in_flight=4, gather=lambda counts: [*counts, 5], in_step=True
    )
    generate = model.generate
    model.generate = lambda synced_gpus, **kwargs: generate(**kwargs)
    rollout = engine.rollout(RolloutRequest(["unread"] * 3, PROMPTS, 3, [0] * 3))
    assert batches == [4, 4, 1, 1, 1]
    assert ids(rollout) == ids(sample(model, rows=4))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("made up"), MemoryError(), RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
])  # fmt: skip
def test_where_memory_runs_out_it_starts_again_with_half_of_the_rows(model, monkeypatch, error):
    sizes, generate = [], model.generate

    def fail(**kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise error
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", fail)
    assert len(ids(sample(model))) == 9
    assert sizes == [9, 4, 2, 2, 2, 2, 1]


@pytest.mark.parametrize(
    "in_step, rows, error, message",
    [
        (True, 8, OutOfStep, "with 4 completions at a time, .* Resume with max_rows_in_flight=2"),
        (True, 1, OutOfStep, "Lower max_completion_length"),
        (False, 1, torch.OutOfMemoryError, "made up"),
    ],
)
def test_memory_that_runs_out_with_one_row_or_in_step_is_an_error(model, monkeypatch, in_step, rows, error, message):
    def fail(**kwargs):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(model, "generate", fail)
    engine = GenerateEngine(model, make_options(), max_rows_in_flight=rows, in_step=in_step)
    with pytest.raises(error, match=message):
        engine.rollout(RolloutRequest(["unread"], [[15]], 4, seeds=[0]))
