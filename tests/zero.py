"""Trains with DeepSpeed's engine and saves what comes of it: `torchrun --nproc_per_node 2 -m tests.zero STAGE FILE`.

One launch makes all cases of a stage, because starting takes most of the time. Without a launcher `expected` makes the same
cases in one process.
"""

import contextlib
import os
import sys

import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from grpo_trl import GRPOConfig, GRPOTrainer

from .conftest import make_model, make_tokenizer
from .training import completions_of, train, weights


STEPS = 5
PROMPTS = ["ab=", "f", "a", "cde12="]
ONE_RANK_WITHOUT_SIGNAL = ["ab=", "a", "equal", "equal"]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
CASES = {
    "token": {},
    "sequence": {"loss_level": "sequence"},
    "token, with a reference": {"beta": 0.1},
    # a smaller step: the KL of whole completions magnifies rounding
    "sequence, with a reference": {"loss_level": "sequence", "beta": 0.1, "learning_rate": 0.001},
    "two iterations": {"num_iterations": 2, "beta": 0.1},
    "a rank without signal": {"prompts": ONE_RANK_WITHOUT_SIGNAL},
    "another number of pieces on each rank": {"max_tokens_per_piece": 16},
    "accumulation": {"gradient_accumulation_steps": 4, "completions": 4},
    "clipped": {"max_grad_norm": 0.5},
    "LoRA": {"lora": LORA, "beta": 0.1},
    "LoRA with whole modules": {"lora": LORA | {"modules_to_save": ["lm_head"]}},
    "DoRA": {"lora": LORA | {"use_dora": True}},
}
STRICT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_gather_16bit_weights_on_model_save": True,
}


def engine_config(stage: int) -> dict:
    """As ds_configs has it; parameters of stage 3 are whole no longer than they must be, as in a model that is large."""
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    strict = STRICT if stage == 3 else {}
    return dict.fromkeys(automatic, "auto") | {
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": "auto", **strict},
    }


@contextlib.contextmanager
def engine(stage: int | None):
    """The options of a run under a stage, inside; what DeepSpeed and accelerate keep of it is forgotten after."""
    try:
        yield {} if stage is None else {"deepspeed": engine_config(stage)}
    finally:
        if stage is not None:
            unset_hf_deepspeed_config()
            AcceleratorState._reset_state()
            GradientState._reset_state()


def gathered(model) -> dict:
    """Whole weights, wherever they lie."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not sharded:
        return weights(model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        return weights(model)


class Start(TrainerCallback):
    """Keeps the weights that training starts from."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights = gathered(model)


def run_case(stage, prompts=PROMPTS, completions=16, lora=None, **options):
    """Weights before and after; `completions` is what a micro-step has over all ranks."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    start = Start()
    defaults = {"learning_rate": 0.01, "max_steps": STEPS, "per_device_train_batch_size": completions // world_size}
    torch.manual_seed(0)
    peft_config = None if lora is None else LoraConfig(**lora)
    with engine(stage) as of_engine:
        trainer = train(
            make_model(), prompts, callbacks=[start], peft_config=peft_config, **(defaults | options | of_engine)
        )
        return {"before": start.weights, "after": gathered(trainer.model)}


# ---- What the trainer samples itself ----
def length(completions):
    return [sum(letter < "n" for letter in text) / max(len(text), 1) for text in completions]


def make_sampling_trainer(folder, of_engine, lora=None, model=None, **options):
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16 // world_size,
        "num_generations": 4,
        "num_iterations": 2,
        "beta": 0.1,
        "learning_rate": 0.01,
        "optim": "sgd",
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
        length,
        GRPOConfig(**(defaults | options | of_engine)),
        Dataset.from_dict({"prompt": [*PROMPTS, "x", "yz", "0=", "1=2"]}),
        processing_class=make_tokenizer(),
        peft_config=None if lora is None else LoraConfig(**lora),
    )


def written_by(trainer):
    return [(c.prompt_ids, c.ids) for c in completions_of(trainer)]


def sampled(stage, folder, **options):
    """A run that samples; where it was saved and resumed inside a window; and the model that it saves."""
    with engine(stage) as of_engine:
        whole = make_sampling_trainer(f"{folder}/whole", of_engine, **options)
        whole.train()
        whole.save_model(f"{folder}/model")
        whole.accelerator.wait_for_everyone()
        result = {"after": gathered(whole.model), "written": written_by(whole)}
    result["saved"] = weights(loaded(f"{folder}/model", options.get("lora")))
    if stage is None:
        return result
    with engine(stage) as of_engine:
        resumed = make_sampling_trainer(f"{folder}/resumed", of_engine, **options)
        resumed.train(resume_from_checkpoint=f"{folder}/whole/checkpoint-3")
        result["resumed"] = {"after": gathered(resumed.model), "written": written_by(resumed)}
    return result


def loaded(folder, lora):
    if lora is None:
        return AutoModelForCausalLM.from_pretrained(folder)
    return PeftModel.from_pretrained(make_model(), folder)


def from_path(stage, folder, **options):
    """The model is given as a path: stage 3 shards it while it is loaded, and its reference too."""
    path = f"{folder}/model"
    make_model().save_pretrained(path)  # the first rank alone writes
    if stage is not None:
        torch.distributed.barrier()
    with engine(stage) as of_engine:
        trainer = make_sampling_trainer(f"{folder}/run", of_engine, model=path, save_strategy="no", **options)
        trainer.train()
        return {"after": gathered(trainer.model), "steps": trainer.state.global_step}


def sampling_that_fails(stage, folder):
    """The first window meets an error in the middle, and is made anew."""
    seen, errors = [], []

    def fail():
        seen.append(0)
        if len(seen) == 3:
            raise KeyError("made up")

    with engine(stage) as of_engine:
        trainer = make_sampling_trainer(folder, of_engine, save_strategy="no")
        make = trainer._windows.make

        def made_anew(*args):
            try:
                return make(*args)
            except KeyError as met:
                errors.append(repr(met))
                return make(*args)

        trainer._runner.engine.check = fail
        trainer._windows.make = made_anew
        trainer.train()
        return {"errors": errors, "steps": trainer.state.global_step, "after": gathered(trainer.model)}


def run_all(stage, folder):
    results = {name: run_case(stage, **case) for name, case in CASES.items()}
    results["sampled"] = sampled(stage, f"{folder}/sampled")
    results["sampled with LoRA"] = sampled(stage, f"{folder}/lora", lora=LORA)
    results["from a path"] = from_path(stage, f"{folder}/path")
    results["not gathered"] = from_path(stage, f"{folder}/not-gathered", ds3_gather_for_generation=False)
    results["sampling that fails"] = sampling_that_fails(stage, f"{folder}/fails")
    return results


if __name__ == "__main__":
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # compiles nothing
    torch.set_num_threads(1)
    results = run_all(int(sys.argv[1]), f"{sys.argv[2]}-runs")
    torch.save(results, f"{sys.argv[2]}.{os.environ['RANK']}")
