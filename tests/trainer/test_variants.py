"""No cut of an optimizer step changes the move, whatever the variant."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.helpers.models import make_model
from tests.helpers.training import completion_of, relative_error, train, weights


STEP = 1e-4
PROMPTS = ["ab=", "equal", "a", "cde12="]
COMBINATIONS = {
    "high entropy, adaptive bonus": {
        "loss_type": "dapo",
        "top_entropy_quantile": 0.5,
        "use_adaptive_entropy": True,
        "entropy_coef_delta": 0.1,
        "entropy_target": 10.0,
    },
    "bonus, luspo, GDPO": {
        "loss_type": "luspo",
        "entropy_coef": 0.1,
        "multi_objective_aggregation": "normalize_then_sum",
    },
    "vespo, far off policy, corrected KL": {
        "loss_type": "vespo",
        "off_policy_mask_threshold": 0.1,
        "beta": 0.1,
        "use_bias_correction_kl": True,
    },
    "mean ratio, cispo, k2": {
        "loss_type": "cispo",
        "epsilon_high": 1.01,
        "importance_sampling_level": "sequence",
        "beta": 0.1,
        "kl_estimator": "k2",
    },
    "constant, two-sided": {"loss_type": "dr_grpo", "delta": 1.5, "scale_rewards": "none"},
}
CUTS = {
    "small micro-batches": {"max_tokens_per_micro_batch": 14},
    "padded": {"shared_prefix": False},
    "micro-steps": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "checkpointing": {"gradient_checkpointing": True, "max_tokens_per_micro_batch": 20},
}


def moved(model, **options):
    options = {"per_device_train_batch_size": 16, "num_iterations": 2, "max_steps": 2, "learning_rate": 0.02} | options
    return train(model, PROMPTS, **options)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_no_cut_of_a_step_changes_the_move(name):
    before = weights(make_model())
    whole = weights(moved(make_model(), **COMBINATIONS[name]).model)
    first = list(COMBINATIONS).index(name)
    for cut in (list(CUTS)[first % 4], list(CUTS)[(first + 1) % 4]):
        options = CUTS[cut]
        actual = weights(moved(make_model(), **COMBINATIONS[name], **options).model)
        assert relative_error(before, actual, whole) < STEP, cut


@pytest.mark.parametrize("name", ["high entropy, adaptive bonus", "vespo, far off policy, corrected KL"])
def test_an_adapter_moves_alike_packed_and_padded(name):
    def adapted():
        torch.manual_seed(0)
        return get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))

    before = weights(adapted())
    packed = weights(moved(adapted(), **COMBINATIONS[name]).model)
    padded = weights(moved(adapted(), **COMBINATIONS[name], shared_prefix=False).model)
    assert relative_error(before, padded, packed) < STEP


def test_completions_that_were_cut_off_are_not_trained_on_but_count_as_completions():
    def first_ends(prompts, trainer):
        rows = [completion_of(prompt, row % 4) for row, prompt in enumerate(prompts)]
        ids = [[2, 3, 1] if row % 4 == 0 else [2, 3, 4, 5] for row in range(len(rows))]
        return {"prompt_ids": [row[0] for row in rows], "completion_ids": ids, "logprobs": None,
                "score": [float(row % 4) for row in range(len(rows))]}  # fmt: skip

    def only_first(rewards_per_func, group):
        return [-1.0, 0.0, 0.0, 0.0]

    def run(**options):
        options = {"rollout_func": first_ends, "per_device_train_batch_size": 16} | options
        return train(make_model(), PROMPTS, advantage_func=only_first, **options)

    masked = train(
        make_model(),
        PROMPTS,
        rollout_func=first_ends,
        advantage_func=lambda rewards_per_func, group: [-1.0, 5.0, 5.0, 5.0],
        mask_truncated_completions=True,
        per_device_train_batch_size=16,
    )
    before = weights(make_model())
    assert relative_error(before, weights(masked.model), weights(run().model)) < STEP
    assert masked.state.log_history[0]["completions/clipped_ratio"] == 0.75


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "vespo"])
def test_metrics_are_those_that_the_surrogate_has(loss_type):
    log = train(make_model(), PROMPTS, loss_type=loss_type, per_device_train_batch_size=16).state.log_history[0]
    has_range = loss_type not in ("cispo", "sapo", "vespo")
    assert ("clip_ratio/region_mean" in log) == has_range
    assert ("cispo_clip_ratio" in log) == (loss_type == "cispo")
    if loss_type == "vespo":
        assert log["vespo/phi_seq_mean"] == pytest.approx(1.0)
    assert log["policy_signal"] > 0
