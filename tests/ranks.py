"""Trains the cases below and saves what comes of them: `torchrun --nproc_per_node 2 -m tests.ranks FILE`.

The global batch is the same for any number of ranks, so the results must be too.
"""

import os
import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from grpo_trl import GRPOConfig, GRPOTrainer

from .conftest import make_model, make_tokenizer
from .training import train, weights


INFORMATIVE = ["ab=", "f", "a", "cde12="]
ONE_RANK_WITHOUT_SIGNAL = ["ab=", "a", "equal", "equal"]
CASES = {
    "token": {},
    "sequence with reference": {"loss_level": "sequence", "beta": 0.1},
    "two iterations": {"num_iterations": 2, "max_steps": 4, "beta": 0.1},
    "a rank without signal": {"prompts": ONE_RANK_WITHOUT_SIGNAL},
    "a rank without signal, sequence": {"prompts": ONE_RANK_WITHOUT_SIGNAL, "loss_level": "sequence", "max_steps": 2},
    "windows of two steps": {"steps_per_generation": 2, "completions": 8, "max_steps": 4, "shuffle_dataset": True},
    "windows shorter than a step": {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "completions": 8},
    "scaled by the batch": {"scale_rewards": "batch"},
    "accumulation": {"gradient_accumulation_steps": 4, "completions": 4},
    "padded": {"shared_prefix": False, "beta": 0.1},
    "another number of pieces on each rank": {
        "prompts": ["ab=", "cde12=", "a", "f"],
        "max_tokens_per_piece": 16,
        "beta": 0.1,
    },
    "pieces of a rank without signal": {"prompts": ONE_RANK_WITHOUT_SIGNAL, "max_tokens_per_piece": 12},
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
    """Weights before and after, log and evaluation of one case; `completions` is what a micro-step has over all ranks."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    options = {"learning_rate": 0.01, "per_device_train_batch_size": completions // world_size} | options
    start = Start()
    trainer = train(make_model(), prompts, callbacks=[start], **options)
    evaluation = trainer.evaluate(Dataset.from_dict({"prompt": ["a", "bc", "def", "9", "equal"]}))
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return {"before": start.weights, "after": weights(trainer.model), "log": log, "evaluation": evaluation}


def sampled():
    """What this rank samples by itself: in an evaluation of fewer prompts than ranks, in training, and in another one."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            make_model().double(),
            length,
            GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=16 // world_size,
                num_generations=4,
                max_steps=2,
                max_completion_length=8,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            Dataset.from_dict({"prompt": [*INFORMATIVE, "x", "yz", "0=", "1=2"]}),
            processing_class=make_tokenizer(),
        )
        few = trainer.evaluate(Dataset.from_dict({"prompt": ["bc"]}))
        trainer.train()
        more = trainer.evaluate(Dataset.from_dict({"prompt": ["a", "bc", "def"]}))
    written = [(c.prompt_ids, c.ids) for c in trainer._window.completions]
    return {"written": written, "evaluations": [few, more], "after": weights(trainer.model)}


def length(completions):
    return [float(len(text)) for text in completions]


def run_cases():
    return {name: run_case(**case) for name, case in CASES.items()}


if __name__ == "__main__":
    results = run_cases() | {"sampled": sampled()}
    torch.save(results, f"{sys.argv[1]}.{os.environ['RANK']}")
