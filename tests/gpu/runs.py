"""Runs that need processes of their own.

    python -m tests.gpu.runs determinism FOLDER
    torchrun --nproc_per_node 1 -m tests.gpu.runs ddp FOLDER       # or zero3

The last line that is printed is JSON.
"""

import json
import sys
from pathlib import Path

import torch

from tests.helpers.models import make_model
from tests.helpers.training import sampling_trainer, weights


SIZES = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 256, "initializer_range": 0.05}
DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


def trainer_of(folder: Path, **options):
    defaults = {"use_cpu": False, "bf16": True, "max_completion_length": 64, "logging_steps": 1, "save_strategy": "no"}
    return sampling_trainer(folder, 16, make_model(**SIZES), **(defaults | options))


def determinism(folder: Path) -> dict:
    """A run, another one, and one that resumes the first in the middle of a generation batch."""
    options = {"full_determinism": True, "save_strategy": "steps", "save_steps": 3}
    trainers = [trainer_of(folder / name, **options) for name in ("one", "two")]
    for trainer in trainers:
        trainer.train()
    resumed = trainer_of(folder / "one", **options)
    resumed.train(resume_from_checkpoint=str(folder / "one" / "checkpoint-3"))
    first, *others = [weights(trainer.model) for trainer in (*trainers, resumed)]
    same = [all(torch.equal(first[name], other[name]) for name in first) for other in others]
    return {"repeated": same[0], "resumed": same[1], "handed over": trainers[0]._runner.engine._reason}


def ddp(folder: Path) -> dict:
    return outcome(trainer_of(folder))


def zero3(folder: Path) -> dict:
    config = json.loads((DS_CONFIGS / "zero3_offload.json").read_text())
    config["zero_force_ds_cpu_optimizer"] = False  # which would be compiled first
    return outcome(trainer_of(folder, max_steps=20, deepspeed=config))


def outcome(trainer) -> dict:
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "losses": [entry["loss"] for entry in logged],
        "difference": max(entry["sampling/sampling_logp_difference/mean"] for entry in logged[::2]),
        "handed over": trainer._runner.engine._reason,
    }


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    print(json.dumps({"determinism": determinism, "ddp": ddp, "zero3": zero3}[name](Path(folder))))
