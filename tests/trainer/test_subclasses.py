"""Subclasses of the trainer: which methods are called, which are refused, and what they may add to the log."""

import pytest
import torch
import trl

from grpo_trl import GRPOTrainer
from grpo_trl.trainer.overrides import NOT_CALLED
from tests.helpers.models import make_model
from tests.helpers.training import ROWS, length, make_trainer


CALLED = {
    *("_load_optimizer_and_scheduler", "_prepare_inputs", "_save_checkpoint", "compute_loss", "get_train_dataloader"),
    *("log", "training_step"),
}


def test_each_method_of_trls_trainer_is_called_or_refused():
    theirs = {name for name, member in vars(trl.GRPOTrainer).items() if callable(member) or hasattr(member, "__func__")}
    assert theirs - {"__init__"} - set(NOT_CALLED) == CALLED


def test_a_method_that_would_never_be_called_is_refused(tmp_path):
    class Scaled(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            return super()._generate_and_score_completions(inputs)

    with pytest.raises(TypeError, match=r"Scaled overrides _generate_and_score_completions, .* pass a rollout_func"):
        make_trainer(tmp_path, kind=Scaled)


def test_methods_of_a_subclass_are_called(tmp_path):
    calls = []

    def noting(name):
        def method(self, *args, **kwargs):
            calls.append(name)
            return getattr(super(trainer_class, self), name)(*args, **kwargs)

        return method

    trainer_class = type("Noting", (GRPOTrainer,), {name: noting(name) for name in CALLED})
    for steps in (1, 2):
        trainer = make_trainer(tmp_path, kind=trainer_class, save_strategy="steps", save_steps=1, max_steps=steps)
        trainer.train(resume_from_checkpoint=steps > 1)
    assert set(calls) == CALLED


def test_a_loss_that_reads_a_dict_is_told_the_attributes(tmp_path):
    class Reading(GRPOTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return inputs["prompt_ids"].sum()

    with pytest.raises(TypeError, match=r"inputs\['prompt_ids'\]: .* no dict; .* attributes input_ids_RS, .*divisor"):
        make_trainer(tmp_path, kind=Reading).train()


def test_what_a_script_notes_is_a_metric_of_the_next_log(tmp_path):
    class Noting(GRPOTrainer):
        def compute_loss(self, *args, **kwargs):
            self._metrics["train"]["doubled"].extend([1.0, torch.tensor(3.0)])
            return super().compute_loss(*args, **kwargs)

    def noting(completions, **kwargs):
        mode = "train" if trainer.model.training else "eval"
        trainer._metrics[mode]["calls"].append(trainer.state.global_step)
        return length(completions)

    model = make_model().eval()  # as from_pretrained returns it
    trainer = make_trainer(tmp_path, model=model, kind=Noting, reward_funcs=noting, eval_dataset=ROWS, max_steps=2)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["doubled"] for entry in logs] == [2.0, 2.0]
    assert [entry["calls"] for entry in logs] == [0.0, 1.0]
    assert trainer.evaluate()["eval_calls"] == 2.0


def test_a_metric_that_the_log_has_cannot_be_noted(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer._metrics["train"]["reward"].append(1.0)
    with pytest.raises(ValueError, match=r"_metrics\[\.\.\.\]\['reward'\] is a metric that the log has"):
        trainer.log({"loss": 0.0, "reward": 1.0})
