"""Trains the cases below and saves what comes of them: `torchrun --nproc_per_node 2 -m tests.helpers.ranks FILE`.

The global batch is the same for any number of ranks, so the results must be too.
"""

import functools
import os
import signal
import sys
import tempfile
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.errors import RunStopped
from tests.helpers.garbage import freeze_imports
from tests.helpers.models import make_model, make_tokenizer
from tests.helpers.training import checkpoints, completions_of, length, needed, sampling_trainer, train, weights


INFORMATIVE = ["ab=", "f", "a", "cde12="]
ONE_RANK_SAMPLES_NO_SIGNAL = ["ab=", "a", "equal", "equal"]
CASES = {
    "token": {},
    "sequence with reference": {"loss_level": "sequence", "beta": 0.1},
    "two iterations": {"num_iterations": 2, "max_steps": 4, "beta": 0.1},
    "a rank that samples no signal": {"prompts": ONE_RANK_SAMPLES_NO_SIGNAL},
    "a rank that samples no signal, sequence": {
        "prompts": ONE_RANK_SAMPLES_NO_SIGNAL,
        "loss_level": "sequence",
        "max_steps": 2,
    },
    # nothing can be assigned: the other rank has an empty micro-batch only
    "one completion that trains": {"prompts": ["single", "equal", "equal", "equal"]},
    "generation batches of two steps": {
        "steps_per_generation": 2,
        "completions": 8,
        "max_steps": 4,
        "shuffle_dataset": True,
    },
    "generation batches shorter than a step": {
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 2,
        "completions": 8,
    },
    "scaled by the batch": {"scale_rewards": "batch"},
    "per token, high entropy, adaptive bonus": {
        "loss_type": "dapo",
        "top_entropy_quantile": 0.5,
        "use_adaptive_entropy": True,
        "entropy_coef_delta": 0.1,
        "entropy_target": 10.0,
        "max_steps": 2,
    },
    "luspo and GDPO": {
        "loss_type": "luspo",
        "multi_objective_aggregation": "normalize_then_sum",
        "max_tokens_per_micro_batch": 16,
    },
    "vespo, far off policy": {"loss_type": "vespo", "num_iterations": 2, "off_policy_mask_threshold": 0.1, "beta": 0.1},
    "accumulation": {"gradient_accumulation_steps": 4, "completions": 4},
    "one group for both ranks": {"completions": 4, "max_steps": 3, "prompts": ["ab=", "cde12=", "a"]},
    "three groups for two ranks": {
        "completions": 4,
        "gradient_accumulation_steps": 3,
        "prompts": ["ab=", "cde12=", "a"],
    },
    "padded": {"shared_prefix": False, "beta": 0.1},
    "another number of micro-batches on each rank": {
        "prompts": ["ab=", "cde12=", "a", "f"],
        "max_tokens_per_micro_batch": 16,
        "beta": 0.1,
    },
    "micro-batches of a rank that samples no signal": {
        "prompts": ONE_RANK_SAMPLES_NO_SIGNAL,
        "max_tokens_per_micro_batch": 12,
    },
    "checkpointing": {"gradient_checkpointing": True, "beta": 0.1},
    "adapter": {
        "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "beta": 0.1,
    },
}


class Start(TrainerCallback):
    """Keeps the weights that training starts from."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights = weights(model)


def run_case(prompts=INFORMATIVE, completions=16, **options):
    """Weights before and after, log, evaluation, and tokens of the forwards that train.

    `completions` is what a micro-step has over all ranks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    options = {"learning_rate": 0.01, "per_device_train_batch_size": completions // world_size} | options
    start, model, computed = Start(), make_model(), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()) if module.training else None,
        with_kwargs=True,
    )
    trainer = train(model, prompts, callbacks=[start], **options)
    evaluation = trainer.evaluate(Dataset.from_dict({"prompt": ["a", "bc", "def", "9", "equal"]}))
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return {
        "before": start.weights,
        "after": weights(trainer.model),
        "log": log,
        "evaluation": evaluation,
        "computed": sum(computed),
    }


def sampled(completions=16, **options):
    """What this rank samples by itself: in an evaluation of fewer prompts than ranks, in training, and in another one.

    Training has so many `completions` in a micro-step over all ranks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as folder:
        defaults = {
            "output_dir": folder,
            "per_device_train_batch_size": completions // world_size,
            "num_generations": 4,
            "max_steps": 2,
            "max_completion_length": 8,
            "logging_steps": 1,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        trainer = GRPOTrainer(
            make_model().double(),
            [length, starts_late],
            GRPOConfig(**(defaults | options)),
            Dataset.from_dict({"prompt": [*INFORMATIVE, "x", "yz", "0=", "1=2"]}),
            processing_class=make_tokenizer(),
        )
        few = trainer.evaluate(Dataset.from_dict({"prompt": ["bc"]}))
        trainer.train()
        more = trainer.evaluate(Dataset.from_dict({"prompt": ["a", "bc", "def"]}))
    written = [(c.prompt_ids, c.ids) for c in completions_of(trainer)]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"written": written, "metrics": [few, *logs, more], "after": weights(trainer.model)}


def starts_late(completions):
    return [float(sum(map(ord, text)) % 5) for text in completions]


SAMPLED = {
    "whole groups": {},
    "one group of two ranks": {"completions": 8, "num_generations": 8},
    "three groups of two ranks": {
        "completions": 12,
        "multi_objective_aggregation": "normalize_then_sum",
        "mask_truncated_completions": True,
    },
}


# ---- What one rank meets and all must survive ----
LAST = int(os.environ.get("WORLD_SIZE", "1")) - 1
"""The rank that meets it."""


def is_last():
    return int(os.environ.get("RANK", "0")) == LAST


class OnLastRank(TrainerCallback):
    """Calls a function on the last rank at the end of a step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and is_last():
            self.function()


def in_generation_batches_of_two_steps(folder, resume=None, **options):
    """Sampled by the trainer; every step is saved. The trainer, and what it raised."""
    trainer = sampling_trainer(folder, completions=8 // (LAST + 1), **options)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (SystemExit, RunStopped) as stop:
        return trainer, stop
    return trainer, None


def end(trainer):
    written = [(c.prompt_ids, c.ids, c.advantage) for c in completions_of(trainer)]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"after": weights(trainer.model), "written": written, "log": logs}


def interrupted(folder):
    """A run, the same run resumed inside a generation batch, and stopped by a signal to one rank and resumed."""
    whole, _ = in_generation_batches_of_two_steps(f"{folder}/whole")
    resumed, _ = in_generation_batches_of_two_steps(f"{folder}/resumed", f"{folder}/whole/checkpoint-3")
    callbacks = [OnLastRank(3, lambda: os.kill(os.getpid(), signal.SIGTERM))]
    _, stop = in_generation_batches_of_two_steps(f"{folder}/stopped", callbacks=callbacks, save_strategy="no")
    saved = checkpoints(f"{folder}/stopped")
    again, _ = in_generation_batches_of_two_steps(f"{folder}/stopped", True, save_strategy="no")
    return {"ends": [end(whole), end(resumed), end(again)], "code": stop.code, "saved": saved}


def short_of_memory(folder):
    """Training, with and without memory that runs out on the last rank."""
    ends = []
    for limit in (10**9, 30):
        model = make_model()
        sizes = []

        def hook(module, args, kwargs, limit=limit, sizes=sizes):
            if "logprob_request" in kwargs and is_last():
                sizes.append(kwargs["input_ids"].numel())
                if sizes[-1] > limit:
                    raise torch.OutOfMemoryError("made up")

        model.register_forward_pre_hook(hook, with_kwargs=True)
        trainer, _ = in_generation_batches_of_two_steps(
            f"{folder}/{limit}", model=model, save_strategy="no", optim="sgd"
        )
        ends.append(weights(trainer.model))
    return {"ends": ends, "largest": max(sizes, default=None)}


def budgeted(folder):
    """Training with memory to spare; with little on the last rank; and with too little there for what was chosen."""
    runs = []
    for tokens, limit in ((10**6, 10**9), (40, 10**9), (40, 30)):
        free = needed(tokens if is_last() else 10**6, recomputed=True)
        model = make_model()
        model.register_forward_pre_hook(functools.partial(limited, limit), with_kwargs=True)
        with mock.patch("grpo_trl.trainer.memory_budget.free_memory", return_value=free):
            options = {"gradient_checkpointing": None, "save_strategy": "no", "optim": "sgd"}
            trainer, _ = in_generation_batches_of_two_steps(f"{folder}/{tokens}-{limit}", model=model, **options)
        chosen = trainer._memory.state_dict()
        runs.append({"after": weights(model), "chosen": chosen, "used": trainer._evaluator.packer.max_tokens})
    return runs


def limited(limit, module, args, kwargs):
    """A hook that runs out of memory on the last rank where a forward that trains has more than `limit` tokens."""
    if "logprob_request" in kwargs and module.training and is_last() and kwargs["input_ids"].numel() > limit:
        raise torch.OutOfMemoryError("made up")


def not_finite(folder):
    """The last rank's gradient is broken in the second step."""
    model, steps = make_model(), []

    def hook(gradient):
        steps.append(0)
        return gradient * float("nan") if is_last() and len(steps) == 3 else gradient  # two micro-batches a step

    model.model.embed_tokens.weight.register_hook(hook)
    snapshots = Snapshots()
    options = {"num_iterations": 1, "beta": 0.0, "save_strategy": "no", "logging_steps": 1}
    trainer, _ = in_generation_batches_of_two_steps(f"{folder}/run", model=model, callbacks=[snapshots], **options)
    return {"moved": snapshots.moved, "skipped": [entry.get("nonfinite_steps") for entry in trainer.state.log_history]}


class Snapshots(TrainerCallback):
    """Whether each step moved the weights."""

    def __init__(self):
        self.moved, self.before = [], None

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.before = weights(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        after = weights(model)
        self.moved.append(any(not torch.equal(after[name], value) for name, value in self.before.items()))
        self.before = after


def failing_rewards(folder):
    """A reward function that throws on the last rank: what is excluded, and what stops all ranks."""
    outcome = {}
    for action in ("exclude", "raise"):
        options = {"on_reward_error": action, "reward_funcs": hates_short, "save_strategy": "no", "logging_steps": 1}
        trainer, stop = in_generation_batches_of_two_steps(f"{folder}/{action}", **options)
        failures = [entry.get("rewards/hates_short/failures") for entry in trainer.state.log_history]
        outcome[action] = {"steps": trainer.state.global_step, "stop": repr(stop), "failures": failures}
    return outcome


def hates_short(completions):
    if is_last() and any(len(text) % 3 == 0 for text in completions):
        raise KeyError("made up")
    return length(completions)


INCIDENTS = {
    "interrupted": interrupted,
    "short of memory": short_of_memory,
    "budgeted": budgeted,
    "not finite": not_finite,
    "failing rewards": failing_rewards,
}


def run_incidents(folder):
    """Each in a folder of its own, which all ranks share."""
    return {name: incident(f"{folder}/{name}") for name, incident in INCIDENTS.items()}


def run_sampled():
    return {name: sampled(**options) for name, options in SAMPLED.items()}


def run_cases():
    return {name: run_case(**case) for name, case in CASES.items()}


if __name__ == "__main__":
    freeze_imports()
    results = run_cases() | {"sampled": run_sampled(), "incidents": run_incidents(f"{sys.argv[1]}-runs")}
    torch.save(results, f"{sys.argv[1]}.{os.environ['RANK']}")
