"""Every variant's optimizer steps equal those of TRL's trainer on the same completions, in one micro-batch."""

import random

import pytest
import trl
from datasets import Dataset

from tests.helpers.families import make_family
from tests.helpers.models import make_model, make_tokenizer
from tests.helpers.training import relative_error, train, weights


STEP = 1e-4
PROMPTS = ["ab=", "f", "a", "cde12="]
VARIANTS = {
    "grpo": {"loss_type": "grpo"},
    "two-sided clipping": {"loss_type": "grpo", "delta": 1.05, "epsilon": 0.02},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.01, "scale_rewards": "batch"},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    "dapo, sequence ratio": {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    "vespo": {"loss_type": "vespo"},
    "off-policy mask": {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
    "truncated completions": {"loss_type": "grpo", "mask_truncated_completions": True},
    "truncated completions, per token": {"loss_type": "dapo", "mask_truncated_completions": True},
    "high entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.3},
    "entropy bonus": {"loss_type": "grpo", "entropy_coef": 0.5},
    "entropy bonus of high entropy": {"loss_type": "dapo", "entropy_coef": 0.5, "top_entropy_quantile": 0.5},
    "adaptive entropy": {
        **{"loss_type": "grpo", "use_adaptive_entropy": True, "entropy_coef": 0.1},
        **{"entropy_coef_delta": 0.2, "entropy_target": 3.9},
    },
    "gdpo": {"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum"},
}
STEPS = {"num_iterations": 2, "max_steps": 3}
QUICK = ("dapo", "gspo", "high entropy", "gdpo")
"""The variants that every test run compares."""


def rollout(prompts, trainer):
    """Ragged completions, some cut off, all of which follow from the prompt and the place in its group."""
    tokenizer = make_tokenizer()
    output = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "accuracy": [], "brevity": []}
    for row, prompt in enumerate(prompts):
        source = random.Random(f"{prompt}/{row % trainer.args.num_generations}")
        ids = [source.randrange(2, 48) for _ in range(source.randrange(1, 8))]
        ends = source.random() < 0.6
        output["prompt_ids"].append(tokenizer(prompt)["input_ids"])
        output["completion_ids"].append([*ids, tokenizer.eos_token_id] if ends else ids)
        output["logprobs"].append([source.gauss(-3.8, 0.3) for _ in output["completion_ids"][-1]])
        output["accuracy"].append(source.choice([0.0, 0.5, 1.0, 2.0]))
        output["brevity"].append(-float(len(ids)))
    return output


def accuracy(accuracy, **kwargs):
    return accuracy


def brevity(brevity, **kwargs):
    return brevity


OPTIONS = {
    "per_device_train_batch_size": 16,
    "optim": "sgd",
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "num_generations": 4,
    "max_completion_length": 8,
    "reward_weights": [1.0, 0.25],
    "shuffle_dataset": False,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def theirs(path, folder, **options):
    trainer = trl.GRPOTrainer(
        path,
        [accuracy, brevity],
        trl.GRPOConfig(output_dir=str(folder), bf16=False, **OPTIONS, **options),
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=make_tokenizer(),
        rollout_func=rollout,
    )
    trainer.train()
    return weights(trainer.model)


def ours(path, **options):
    trainer = train(path, PROMPTS, reward_funcs=[accuracy, brevity], rollout_func=rollout, **OPTIONS, **options)
    return weights(trainer.model)


@pytest.fixture(scope="module")
def plain(model_path):
    """What the objective without any of the options trains to."""
    return ours(model_path, loss_type="grpo", **STEPS)


def check(path, folder, plain, options):
    before, actual = weights(make_model()), ours(path, **options, **STEPS)
    assert relative_error(before, actual, theirs(path, folder, **options, **STEPS)) < STEP
    if options != {"loss_type": "grpo"}:
        assert relative_error(before, plain, actual) > 10 * STEP  # else this test would not see the option


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)
def test_two_iterations_equal_trls(name, model_path, tmp_path, plain, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    check(model_path, tmp_path, plain, VARIANTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ["gspo", "vespo"])
def test_kl_terms_equal_trls(name, corrected, model_path, tmp_path, plain, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    options = VARIANTS[name] | {"beta": 0.1, "use_bias_correction_kl": corrected}
    check(model_path, tmp_path, plain, options)


@pytest.fixture(scope="module")
def mixture_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixture")
    make_family("qwen3_moe").save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def theirs_balanced(mixture_path, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        return theirs(mixture_path, tmp_path_factory.mktemp("theirs"), **BALANCED)


BALANCED = {"loss_type": "grpo", "router_aux_loss_coef": 0.5, "max_steps": 2}


@pytest.mark.parametrize("shared_prefix", [True, False], ids=["packed", "padded"])
def test_balanced_experts_equal_trls(shared_prefix, mixture_path, theirs_balanced):
    before = weights(make_family("qwen3_moe"))
    actual = ours(mixture_path, shared_prefix=shared_prefix, **BALANCED)
    assert relative_error(before, actual, theirs_balanced) < STEP
    unbalanced = ours(mixture_path, **BALANCED | {"router_aux_loss_coef": 0.0})
    assert relative_error(before, unbalanced, theirs_balanced) > 10 * STEP  # else this test would not see the term
