"""Training on injected completions, and what an independent computation says of it."""

import copy
import os
import random
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.plan import Shape, activations
from tests.helpers import oracle
from tests.helpers.models import make_model, make_tokenizer


def injected(prompts, trainer):
    """A rollout_func: ragged completions with a score; both follow from the prompt and the place in its group."""
    group = trainer.args.num_generations
    output = {"prompt_ids": [], "completion_ids": [], "logprobs": None, "score": []}
    for row, prompt in enumerate(prompts):
        ids, completion, score = completion_of(prompt, row % group)
        output["prompt_ids"].append(ids)
        output["completion_ids"].append(completion)
        output["score"].append(score)
    return output


def completion_of(prompt, place):
    """(prompt ids, completion ids, score). One completion in eight is empty.

    The prompt "equal" gives equal scores, and "single" one completion that is not empty.
    """
    source = random.Random(f"{prompt}/{place}")
    ids = make_tokenizer()(prompt)["input_ids"]
    completion = [source.randrange(2, 48) for _ in range(source.randrange(8))]
    if prompt == "single":
        return ids, [3, 14, 15] if place == 2 else [], float(place)
    return ids, completion, 0.7 if prompt == "equal" else source.choice([0.0, 0.5, 1.0, 2.0])


def score(score):
    return score


def train(
    model,
    prompts,
    *,
    reward_funcs=score,
    rollout_func=injected,
    peft_config=None,
    callbacks=None,
    advantage_func=None,
    **options,
):
    """Train with plain SGD at a constant rate; returns the trainer."""
    defaults = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "max_completion_length": 8,
        "shuffle_dataset": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(Path(tempfile.gettempdir()) / "grpo_trl-tests"),
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = GRPOTrainer(
        model,
        reward_funcs,
        GRPOConfig(**(defaults | options)),
        Dataset.from_dict({"prompt": prompts}),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        rollout_func=rollout_func,
        callbacks=callbacks,
        advantage_func=advantage_func,
    )
    trainer.train()
    return trainer


PROMPTS = ["ab=", "f", "a", "cde12=", "x", "yz", "0=", "1=2"]


def sampling_trainer(
    folder,
    completions,
    model=None,
    reward_funcs=None,
    peft_config=None,
    callbacks=None,
    train_dataset=None,
    eval_dataset=None,
    **options,
):
    """A trainer that samples itself: `completions` for each of six steps, of generation batches that are used twice.

    It saves each step. By default its reward is the length of a completion.
    """
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": completions,
        "num_generations": 4,
        "num_iterations": 2,
        "beta": 0.1,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_steps": 6,
        "max_completion_length": 8,
        "gradient_checkpointing": False,
        "logging_steps": 4,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return GRPOTrainer(
        model or make_model(),
        reward_funcs or length,
        GRPOConfig(**(defaults | options)),
        Dataset.from_dict({"prompt": PROMPTS}) if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


def length(completions):
    return [float(len(text)) for text in completions]


ROWS = [{"prompt": text, "answer": str(i)} for i, text in enumerate(["ab=", "f", "a", "cde12="])]


def make_trainer(
    folder, data=ROWS, reward_funcs=length, model=None, tokenizer=None, args=None, kind=GRPOTrainer, **options
):
    """A trainer that makes one optimizer step of two groups of two, and saves nothing."""
    names = (
        "eval_dataset",
        "callbacks",
        "peft_config",
        "compute_metrics",
        "tools",
        "environment_factory",
        "optimizers",
    )
    arguments = {name: options.pop(name) for name in names if name in options}
    defaults = {
        "output_dir": str(folder),
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    args = GRPOConfig(**(defaults | options)) if args is None else args
    model = make_model() if model is None else model
    return kind(model, reward_funcs, args, data, processing_class=tokenizer or make_tokenizer(), **arguments)


def completions_of(trainer):
    """What this rank trains on of the generation batch in use."""
    return [completion for mini_batch in trainer._generation_batch.mini_batches for completion in mini_batch]


def needed(tokens, recomputed, gpu_bytes=None):
    """Bytes that must be free before the first step for `tokens` of a micro-batch of `make_model()`, under SGD."""
    model = make_model()
    gradients = 4 * sum(p.numel() for p in model.parameters())
    return gradients + activations(Shape.of(model.config), tokens, "float32", recomputed, gpu_bytes) / 0.8


def weights(model):
    return {name: p.detach().double().cpu().clone() for name, p in model.named_parameters()}


def relative_error(before, actual, expected):
    """Size of the difference between two moves, relative to the expected move."""
    difference = sum((actual[n] - expected[n]).square().sum() for n in before).sqrt()
    return (difference / sum((expected[n] - before[n]).square().sum() for n in before).sqrt()).item()


class Oracle:
    """Steps of SGD on the papers' formula, one unpadded completion at a time, in float64."""

    def __init__(self, model: PreTrainedModel, level, beta=0.0, temperature=1.0, learning_rate=0.1, epsilon=0.2):
        self.model = copy.deepcopy(model).double().eval()
        self.reference = copy.deepcopy(self.model)
        self.level, self.beta, self.temperature = level, beta, temperature
        self.learning_rate, self.epsilon = learning_rate, epsilon

    def logps(self, model, ids, completion):
        if not completion:
            return torch.zeros(0, dtype=torch.float64)
        logits = model(torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1] / self.temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]

    def sampled_by(self, rows):
        """Log-probabilities of each row under the policy as it is now."""
        with torch.no_grad():
            return [self.logps(self.model, ids, completion).tolist() for ids, completion, _ in rows]

    def step(self, rows, advantages, old):
        """One optimizer step on all rows, given as (prompt ids, completion ids, score)."""
        self.model.zero_grad()
        for (ids, completion, _), advantage, old_logps in zip(rows, advantages, old, strict=True):
            logps = self.logps(self.model, ids, completion)
            with torch.no_grad():
                ref = self.logps(self.reference, ids, completion).tolist()
            _, (slopes,) = oracle.grpo(
                self.level,
                [logps.tolist()],
                [old_logps],
                [advantage],
                self.epsilon,
                self.epsilon,
                self.beta,
                [ref] if self.beta else None,
            )
            if completion:
                (logps @ torch.tensor(slopes, dtype=torch.float64) / len(rows)).backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= self.learning_rate * parameter.grad


def rows_of(prompts, group=4):
    """Rows of a generation batch and their advantages, group after group."""
    groups = [[completion_of(prompt, place) for place in range(group)] for prompt in prompts]
    advantages = [a for rows in groups for a in oracle.advantages([score for _, _, score in rows])]
    return [row for rows in groups for row in rows], advantages


def checkpoints(folder):
    """Names of the checkpoints in an output_dir."""
    return sorted(name for name in os.listdir(folder) if name.startswith("checkpoint"))
