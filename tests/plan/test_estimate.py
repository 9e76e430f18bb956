"""Batches, phases and times of a plan, by properties."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_trl import GRPOConfig
from grpo_trl.data.schedule import Schedule
from grpo_trl.plan import (
    CARDS,
    Job,
    RunPlan,
    Setup,
    Shape,
    batch_lines,
    card_named,
    largest_tokens,
    launches,
    memory,
    peak,
    phases,
    setup_of,
    step_seconds,
)


GIB = 2**30
SCHEDULE = Schedule(1000, 8, batch_size=16, accumulation=4, steps_per_generation=4, num_iterations=1, world_size=8)
SHAPE = Shape(layers=28, hidden=3584, key_value=512, intermediate=18944, vocabulary=152_064)
SETUP = Setup(Job("ZeRO-3", 8, 7_600_000_000), SHAPE, "bf16", SCHEDULE, 200, 1000, rows_in_flight=256)


def test_the_lines_say_what_is_left_out_and_what_is_off_policy():
    text = "\n".join(batch_lines(replace(SCHEDULE, num_iterations=2)))
    assert "64 prompts x 8 = 512 completions, 64 on each of 8 ranks" in text
    assert "512 completions; a generation batch serves 2 steps" in text
    assert "off policy: 50% of the steps, up to 1 step old" in text
    assert "1,000 prompts = 30 optimizer steps; 40 of them, too few for a generation batch, are left out" in text
    assert "on policy" in "\n".join(batch_lines(SCHEDULE))
    assert "epoch" not in "\n".join(batch_lines(replace(SCHEDULE, num_prompts=None)))
    assert "512 completions, of 2 generation batches" in "\n".join(
        batch_lines(replace(SCHEDULE, steps_per_generation=2))
    )


@pytest.mark.parametrize("method", ["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"])
@pytest.mark.parametrize("offload", [False, True])
def test_the_components_of_a_phase_are_those_of_the_memory_plan(method, offload):
    offload = offload and method.startswith("ZeRO")
    job = Job(method, 8, 10**9, 10**9, offload_optimizer=offload, offload_param=offload and method == "ZeRO-3")
    setup = replace(SETUP, job=job)
    held = {name: size for name, size in phases(setup)["update"].items() if name in phases(setup)["logprobs"]}
    for name in ("activations", "logits", "gathered weights"):
        held.pop(name, None)
    assert sum(held.values()) == pytest.approx(memory(job).held)


def test_what_grows_with_an_option_grows():
    more = {
        "sampling": [replace(SETUP, completion_tokens=2000), replace(SETUP, prompt_tokens=2000)],
        "update": [
            replace(SETUP, checkpointing=False),
            replace(SETUP, max_tokens=100_000),
            replace(SETUP, precision="float32"),
            replace(SETUP, reference_copies=True),
        ],
    }
    for phase, setups in more.items():
        before = sum(phases(SETUP)[phase].values())
        assert all(sum(phases(setup)[phase].values()) > before for setup in setups), phase


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_largest_micro_batch_fills_the_card(checkpointing):
    setup = replace(SETUP, checkpointing=checkpointing, gpu_bytes=80 * GIB)
    tokens = largest_tokens(setup, 80 * GIB)
    fits, too_large = (sum(phases(replace(setup, max_tokens=n))["update"].values()) for n in (tokens, tokens + 1))
    assert fits <= 80 * GIB < too_large
    beside = replace(setup, sampler="vllm", sampler_share=0.5)
    assert largest_tokens(beside, 80 * GIB) < tokens
    assert largest_tokens(replace(beside, sampler_sleeps=True), 80 * GIB) == tokens
    assert largest_tokens(setup, GIB) == 0


def test_vllm_takes_its_share_of_the_card_and_what_samples_elsewhere_takes_nothing():
    setup = replace(SETUP, gpu_bytes=80 * GIB, sampler_share=0.3)
    beside, asleep, server = (
        phases(replace(setup, **options))
        for options in ({"sampler": "vllm"}, {"sampler": "vllm", "sampler_sleeps": True}, {"sampler": "server"})
    )
    assert all(components["vLLM"] == 0.3 * 80 * GIB for components in beside.values())
    assert [phase for phase, components in asleep.items() if "vLLM" in components] == ["sampling"]
    assert server["sampling"].keys() == phases(setup)["update"].keys() - {
        "gradients",
        "gathered weights",
        "activations",
        "logits",
    }


def test_sharding_and_offload_need_less_in_their_order():
    peaks = {name: peak(setup) for name, setup in launches(SETUP)}
    assert peaks["ZeRO-3 with offload"] < peaks["ZeRO-3"] < peaks["ZeRO-1"] < peaks["DDP"]
    assert peaks["ZeRO-2 with offload"] < peaks["ZeRO-2"]


def test_a_better_card_takes_less_time_and_a_reference_more():
    total = {name: sum(step_seconds(SETUP, card).values()) for name, card in CARDS.items()}
    assert total["B200"] < total["H200"] < total["H100"] < total["A100-80GB"] < total["L4"]
    assert step_seconds(replace(SETUP, reference=True), card_named("h100"))["logprobs"] > 0
    assert step_seconds(SETUP, card_named("h100"))["logprobs"] == 0


def test_an_unknown_card_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="gpu='H101' is unknown; did you mean H100"):
        card_named("H101")


def tiny(**sizes):
    defaults = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        return Qwen2ForCausalLM(Qwen2Config(**(defaults | heads | sizes)))


def config(tmp_path, **options):
    return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


def test_a_setup_is_read_from_a_model_without_weights(tmp_path):
    model = tiny()
    setup = setup_of(config(tmp_path, beta=0.1), model, SCHEDULE, prompt_tokens=10)
    assert setup.job.trained == sum(p.numel() for p in model.parameters())
    assert (setup.job.frozen, setup.precision, setup.reference_copies) == (0, "float32", True)
    assert setup.job.ranks == SCHEDULE.world_size
    assert setup.micro_batch_tokens == 16 * 512 + 2 * 10


def test_an_adapter_leaves_the_base_frozen_and_needs_no_reference(tmp_path):
    model = tiny(dtype="bfloat16").bfloat16()
    size = sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    setup = setup_of(config(tmp_path, beta=0.1), model, SCHEDULE, prompt_tokens=1, new_adapter=True)
    assert setup.job.frozen == size
    assert setup.job.frozen_bytes == 2
    assert 0 < setup.job.trained < size
    assert (setup.reference, setup.reference_copies) == (True, False)


@pytest.mark.parametrize("optim, states", [("adamw_torch", 2), ("sgd", 0), ("adamw_8bit", 0.5), ("adafactor", 0.1)])
def test_the_optimizer_has_its_states(tmp_path, optim, states):
    setup = setup_of(config(tmp_path, optim=optim), tiny(), SCHEDULE, prompt_tokens=1)
    assert setup.job.optimizer_bytes == 4 * states


def test_the_plan_fits_on_a_screen_and_into_a_file(tmp_path):
    plan = RunPlan(SETUP, card_named("H100"), 80 * GIB)
    assert len(plan.lines()) <= 12
    assert all(len(line) < 200 for line in plan.lines())
    written = plan.as_dict()
    assert written["summary"]["peak memory (GiB)"] == peak(replace(SETUP, gpu_bytes=80 * GIB)) / GIB
    assert written["summary"]["seconds per optimizer step"] > 0
    assert next(name for name, _, fits in plan.fitting() if fits).startswith("ZeRO")
