"""Every option of transformers is read by a run, or is known to be read elsewhere, or says that it has no effect."""

import dataclasses
import sys

from transformers import TrainingArguments

from grpo_trl import GRPOConfig, GRPOTrainer
from grpo_trl.config.inherited import INHERITED
from tests.helpers.models import make_model, make_tokenizer
from tests.helpers.training import length


OPTIONS = {field.name for field in dataclasses.fields(TrainingArguments)}
COPIES = ("asdict", "_asdict_inner", "TrainingArguments.to_dict", "GRPOConfig.fixed_at_construction")
"""Functions that read all options alike."""
ELSEWHERE = {
    "construction": {
        "activation_checkpointing_kwargs", "ddp_backend", "ddp_timeout", "fsdp_config", "gradient_checkpointing_kwargs",
        "tf32", "use_cpu",
    },
    "a script": {"do_eval", "do_predict", "do_train", "local_rank", "resume_from_checkpoint"},
    "an upload": {
        "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token",
    },
    "a tracker": {"project", "run_name", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"},
    "a resumed run": {"restore_callback_states_from_checkpoint"},
    "an optimizer of low rank": {"optim_target_modules"},
    "a rollout_func": {"per_device_eval_batch_size"},
}  # fmt: skip
MOOT = {"dataloader_drop_last", "dataloader_pin_memory", "torch_compile"}
"""Both values mean the same here, or the option is read through others."""


reads: dict[str, set[str]] = {}
"""The functions that read an option."""


class Watched(GRPOConfig):
    def __getattribute__(self, name):
        if name in OPTIONS and self.__dict__.get("watching"):
            reads.setdefault(name, set()).add(sys._getframe(1).f_code.co_qualname)
        return super().__getattribute__(name)


def test_every_option_has_an_effect_or_an_answer(tmp_path):
    args = Watched(
        str(tmp_path), num_generations=2, per_device_train_batch_size=4, max_completion_length=4, max_steps=2, save_steps=1,
        eval_strategy="steps", eval_steps=1, logging_steps=1, load_best_model_at_end=True, use_cpu=True, disable_tqdm=True,
        report_to="none",
    )  # fmt: skip
    args.watching = True
    rows = [{"prompt": text} for text in ("ab=", "f", "a", "cde12=")]
    GRPOTrainer(
        make_model(), length, args, rows, eval_dataset=rows, processing_class=make_tokenizer(),
    ).train()  # fmt: skip
    read = {name for name, readers in reads.items() if any(not reader.startswith(COPIES) for reader in readers)}
    assert OPTIONS - read - INHERITED.keys() - MOOT - set().union(*ELSEWHERE.values()) == set()
