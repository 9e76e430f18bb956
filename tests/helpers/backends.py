"""Trains with an engine for several ranks, and saves what comes of it.

    torchrun --nproc_per_node 2 -m tests.helpers.backends NAME FILE

One launch makes all cases of an engine, because starting takes most of the time. Without a launcher and without an engine
the same cases are made in one process.
"""

import contextlib
import os
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    TrainerCallback,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import is_bitsandbytes_available

from grpo_trl import GRPOConfig
from grpo_trl.distributed import sharding
from grpo_trl.rollout.vllm.weights import policy_weights
from tests.helpers.families import make_family
from tests.helpers.garbage import freeze_imports
from tests.helpers.models import SIZES, make_model, make_tokenizer
from tests.helpers.training import completions_of, sampling_trainer, train, weights
from tests.vllm.helpers import wait_until
from tests.vllm.stub import StubServer


ENGINES = ("DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3")
STEPS = 5
PROMPTS = ["ab=", "f", "a", "cde12="]
ONE_RANK_SAMPLES_NO_SIGNAL = ["ab=", "a", "equal", "equal"]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def continued_adapter(**options):
    return get_peft_model(make_model(), LoraConfig(**(LORA | options)))


def continued_with_whole_modules():
    return continued_adapter(modules_to_save=["lm_head"])


def mixture_of_experts():
    return make_family("qwen3_moe").float()


CASES = {
    "token": {},
    "sequence": {"loss_level": "sequence"},
    "token, with a reference": {"beta": 0.1},
    # a smaller step: the KL of whole completions magnifies rounding
    "sequence, with a reference": {"loss_level": "sequence", "beta": 0.1, "learning_rate": 0.001},
    "two iterations": {"num_iterations": 2, "beta": 0.1},
    "two iterations, sequence": {"num_iterations": 2, "loss_level": "sequence", "learning_rate": 0.001},
    "a rank that samples no signal": {"prompts": ONE_RANK_SAMPLES_NO_SIGNAL},
    # nothing can be assigned: the other rank has empty micro-batches only
    "one completion that trains": {"prompts": ["single", "equal", "equal", "equal"]},
    "no rank with signal": {"prompts": ["equal"] * 4},
    "another number of micro-batches on each rank": {"max_tokens_per_micro_batch": 16},
    "accumulation": {"gradient_accumulation_steps": 4, "completions": 4},
    "clipped": {"max_grad_norm": 0.5},
    "checkpointing": {"gradient_checkpointing": True, "beta": 0.1},
    "a mixture of experts": {"model": mixture_of_experts, "gradient_checkpointing": True},
    "LoRA": {"lora": LORA, "beta": 0.1},
    "LoRA with whole modules": {"lora": LORA | {"modules_to_save": ["lm_head"]}},
    "LoRA on the head": {"lora": LORA | {"target_modules": ["lm_head", "q_proj"]}},
    "LoRA that is continued": {"model": continued_adapter, "beta": 0.1},
    "LoRA with whole modules that is continued": {"model": continued_with_whole_modules, "beta": 0.1},
    "DoRA": {"lora": LORA | {"use_dora": True}},
}
STRICT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_gather_16bit_weights_on_model_save": True,
}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


# ---- Engines ----
def engine_config(stage: int, **zero) -> dict:
    """As ds_configs has it; parameters of stage 3 are whole no longer than they must be, as in a model that is large."""
    automatic = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    strict = STRICT if stage == 3 else {}
    return dict.fromkeys(automatic, "auto") | {
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": "auto", **strict, **zero},
    }


@contextlib.contextmanager
def engine(name: str | None, **zero):
    """The options of a run with an engine, inside; what DeepSpeed and accelerate keep of it is forgotten after."""
    with contextlib.ExitStack() as stack:
        if name == "FSDP2":
            stack.enter_context(fsdp_on_cpu())
        try:
            yield {"deepspeed": engine_config(int(name[-1]), **zero)} if name and name.startswith("ZeRO") else {}
        finally:
            unset_hf_deepspeed_config()
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
            AcceleratorState._reset_state()
            GradientState._reset_state()


@contextlib.contextmanager
def fsdp_on_cpu():
    """accelerate has FSDP for accelerators only, and makes it DDP elsewhere; torch's FSDP2 runs on CPUs just as well."""
    init = PartialState.__init__

    def as_on_gpus(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    with (
        mock.patch.dict(os.environ, FSDP2),
        mock.patch.object(PartialState, "__init__", as_on_gpus),
        mock.patch("grpo_trl.trainer.trainer.fsdp_was_asked_for", return_value=False),
    ):
        yield


def gathered(model) -> dict:
    """Whole weights, wherever they lie."""
    sharded = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if sharded:
        import deepspeed

        with deepspeed.zero.GatheredParameters(sharded):
            return weights(model)
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    return {name: p.detach().double().clone() for name, p in whole.items()}


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_on_all_ranks() -> None:
    if distributed.is_initialized():
        distributed.barrier()


# ---- What is given to the trainer ----
class Start(TrainerCallback):
    """Keeps the weights that training starts from."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights = gathered(model)


def run_case(name, prompts=PROMPTS, completions=16, lora=None, model=make_model, **options):
    """Weights before and after; `completions` is what a micro-step has over all ranks."""
    start = Start()
    defaults = {"learning_rate": 0.01, "max_steps": STEPS, "per_device_train_batch_size": completions // ranks()}
    torch.manual_seed(0)
    peft_config = None if lora is None else LoraConfig(**lora)
    with engine(name) as of_engine:
        trainer = train(
            model(), prompts, callbacks=[start], peft_config=peft_config, **(defaults | options | of_engine)
        )
        return {"before": start.weights, "after": gathered(trainer.model)}


def shards_left_by_micro_batches(name):
    """For each forward that trains, whether it finds gradients of this rank's shards: those of the micro-batch before."""
    found, model = [], make_model()

    def hook(module, args):
        if module.training and torch.is_grad_enabled():
            found.append(any(p.grad is not None for p in module.parameters()))

    model.register_forward_pre_hook(hook)
    run_case(name, model=lambda: model, max_tokens_per_micro_batch=16, max_steps=2)
    return found


# ---- What the trainer samples itself ----
ADAMW = {"optim": "adamw_torch", "lr_scheduler_type": "linear", "max_grad_norm": 0.5}
"""What must be restored too."""


def sampler(folder, of_engine, lora=None, model=make_model, **options):
    """`model` is a path, or makes one."""
    peft_config = None if lora is None else LoraConfig(**lora)
    defaults = {"optim": "sgd", "reward_funcs": early_letters}
    return sampling_trainer(
        folder,
        16 // ranks(),
        model=model if isinstance(model, str) else model(),
        peft_config=peft_config,
        **(defaults | options | of_engine),
    )


def early_letters(completions):
    return [sum(letter < "n" for letter in text) / max(len(text), 1) for text in completions]


def written_by(trainer):
    return [(c.prompt_ids, c.ids) for c in completions_of(trainer)]


def sampled(name, folder, **options):
    """A run that samples, evaluates and saves its model; and the same resumed inside a generation batch."""
    if name == "FSDP2":
        options |= ADAMW  # torch restores no optimizer that has no state, as SGD has none
    with engine(name) as of_engine, counted_gatherings() as gatherings:
        whole = sampler(f"{folder}/whole", of_engine, **options)
        whole.train()
        result = {"written": written_by(whole), "gatherings": list(gatherings)}
        result["evaluated"] = whole.evaluate(whole.train_dataset)["eval_reward"]
        result["gatherings with evaluation"] = list(gatherings)
        with slow_writing(whole):
            whole.save_model(f"{folder}/model")
        result["there"] = any(Path(folder, "model").glob("*.safetensors"))
        result["after"] = gathered(whole.model)
        run_on_all_ranks()
    result["saved"] = weights(loaded(f"{folder}/model"))
    result["folders"] = [path.name for path in Path(folder, "model").iterdir() if path.is_dir()]
    if name is None:
        return result
    with engine(name) as of_engine:
        resumed = sampler(f"{folder}/resumed", of_engine, **options)
        resumed.train(resume_from_checkpoint=f"{folder}/whole/checkpoint-3")
        result["resumed"] = {"after": gathered(resumed.model), "written": written_by(resumed)}
    return result


@contextlib.contextmanager
def counted_gatherings():
    """For each time that sampling gathers all weights, in how many groups; these are small, so that there are several."""
    counts: list[int] = []
    group = sharding.groups_of_bytes

    def counting(parameters, most):
        groups = group(parameters, 2**14)
        counts.append(len(groups))
        return groups

    with mock.patch.object(sharding, "groups_of_bytes", counting):
        yield counts


@contextlib.contextmanager
def slow_writing(trainer):
    """The rank that writes begins a second later."""
    save = trainer._save

    def late(*args, **kwargs):
        time.sleep(trainer.args.should_save)
        save(*args, **kwargs)

    with mock.patch.object(trainer, "_save", late):
        yield


def loaded(folder):
    if Path(folder, "adapter_config.json").exists():
        return PeftModel.from_pretrained(make_model(), folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def from_path(name, folder, **options):
    """The model is given as a path: stage 3 shards it while it is loaded, and its reference too. So is a reward model."""
    path, judge = f"{folder}/model", f"{folder}/judge"
    make_model().save_pretrained(path)
    torch.manual_seed(1)
    Qwen2ForSequenceClassification(Qwen2Config(**(SIZES | {"num_labels": 1}))).save_pretrained(judge)
    make_tokenizer().save_pretrained(judge)
    run_on_all_ranks()
    with engine(name) as of_engine:
        trainer = sampler(f"{folder}/run", of_engine, model=path, reward_funcs=judge, save_strategy="no", **options)
        if name is not None and not trainer.args.ds3_gather_for_generation:
            with pytest.raises(ValueError, match=r"before train.* cannot work with ds3_gather_for_generation=False"):
                trainer.evaluate(trainer.train_dataset)
        trainer.train()
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        return {"after": gathered(trainer.model), "steps": trainer.state.global_step, "rewards": rewards}


def loaded_after_options(name, folder):
    """ZeRO-3 shards a model that a script loads itself, once it has made its options."""
    path = f"{folder}/model"
    make_model().save_pretrained(path)
    run_on_all_ranks()
    with engine(name) as of_engine:
        sizes = {"per_device_train_batch_size": 16 // ranks(), "num_generations": 4}
        options = GRPOConfig(folder, use_cpu=True, report_to="none", **sizes, **of_engine)  # noqa: F841 - is kept
        model = AutoModelForCausalLM.from_pretrained(path)
        sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        trainer = sampler(folder, of_engine, model=lambda: model, beta=0.0, save_strategy="no")
        trainer.train()
        return {"sharded": sharded, "after": gathered(trainer.model)}


def mistakes(name, folder):
    """Errors of a second training, a model of another trainer, and other backends."""
    said = {}
    with engine(name) as of_engine:
        trainer = sampler(folder, of_engine, max_steps=1)
        trainer.train()
        with pytest.raises(RuntimeError) as met:
            trainer.train()
        said["a second training"] = met.value
        with pytest.raises(ValueError) as met:  # noqa: PT011 - is read elsewhere
            sampler(folder, of_engine, model=lambda: trainer.model)
        said["the model of another trainer"] = met.value
        with pytest.raises(ValueError) as met:  # noqa: PT011
            sampler(folder, {})
        said["a trainer without DeepSpeed"] = met.value
    with engine("DDP") as of_engine:
        trainer = sampler(folder, of_engine)
        with pytest.raises(ValueError) as met:  # noqa: PT011
            trainer.train(resume_from_checkpoint=True)
        said["a checkpoint of another backend"] = met.value
    return {mistake: str(error) for mistake, error in said.items()}


def sampling_that_fails(name, folder):
    """The first generation batch meets an error in the middle, on the last rank, and is built again."""
    seen, errors = [], []

    def fail():
        seen.append(0)
        if len(seen) == 3 and int(os.environ.get("RANK", "0")) == ranks() - 1:
            raise KeyError("made up")

    with engine(name) as of_engine:
        trainer = sampler(folder, of_engine, save_strategy="no")
        make = trainer._builder.build

        def built_again(*args):
            try:
                return make(*args)
            except (KeyError, RuntimeError) as met:
                errors.append(repr(met))
                return make(*args)

        trainer._runner.engine.check = fail
        trainer._builder.build = built_again
        trainer.train()
        return {"errors": errors, "steps": trainer.state.global_step, "after": gathered(trainer.model)}


def in_half_precision(name, folder):
    """KL terms of all steps; at the first one the policy is the reference."""
    with engine(name) as of_engine:
        trainer = sampler(folder, of_engine, bf16=True, logging_steps=1, save_strategy="no")
        trainer.train()
        return [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]


def evaluated_first(name, folder):
    """An evaluation before training, and the steps that are made after it."""
    with engine(name) as of_engine:
        trainer = sampler(folder, of_engine, save_strategy="no")
        before = trainer.evaluate(trainer.train_dataset)["eval_reward"]
        trainer.train()
        return {"evaluated": before, "steps": trainer.state.global_step, "after": gathered(trainer.model)}


# ---- Sampling on a server ----
@contextlib.contextmanager
def stub_server(folder):
    """Its URL on every rank, and the server on the first; it samples from the weights that it is sent."""
    told = Path(folder, "url")
    with contextlib.ExitStack() as stack:
        stub = None
        if os.environ.get("RANK", "0") == "0":
            stub = stack.enter_context(StubServer(model=make_model()).running())
            told.parent.mkdir(parents=True)
            Path(folder, "part").write_text(stub.url)
            Path(folder, "part").rename(told)
        wait_until(told.exists)
        yield told.read_text(), stub
        run_on_all_ranks()


def sampled_on_a_server(name, folder, lora=None):
    """What the server has been sent in the end, and how many weights were gathered while each one was."""
    found: list[int] = []

    def counted(model):
        for item in policy_weights(model):
            found.append(sum("AVAILABLE" in str(getattr(p, "ds_status", "")).split(".") for p in model.parameters()))
            yield item

    options = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_check_steps": 100 if lora else 1,  # the stub applies no adapter; the first one changes nothing
        "save_strategy": "no",
        "max_steps": 4,
        "logging_steps": 1,
    }
    patched = mock.patch("grpo_trl.rollout.vllm.engine.policy_weights", counted)
    with engine(name) as of_engine, stub_server(folder) as (url, stub), patched:
        trainer = sampler(f"{folder}/run", of_engine, lora=lora, vllm_server_base_url=url, **options)
        trainer.train()
        trainer._runner.engine.sync_weights()
        result = {"steps": trainer.state.global_step, "after": gathered(trainer.model), "gathered": found}
        run_on_all_ranks()
        if stub is not None and lora is None:
            result["received"] = weights(stub.model)
        elif stub is not None:
            result["received"] = load_file(Path(stub.loaded, "adapter_model.safetensors"))
        run_on_all_ranks()
        trainer._runner.engine.close()
        return result


# ---- Adapters on weights of another precision ----
def coarse_base(name, folder, **options):
    """What moves of an adapter on a base in another precision, and what is saved of it."""
    with engine(name) as of_engine:
        start = Start()
        trainer = sampler(folder, of_engine, lora=LORA, callbacks=[start], save_strategy="no", **options)
        trainer.train()
        trainer.save_model(f"{folder}/model")
        after = gathered(trainer.model)
        run_on_all_ranks()
    saved = weights(PeftModel.from_pretrained(make_model(), f"{folder}/model"))
    return {
        "moved": {n for n in after if not torch.equal(start.weights[n].nan_to_num(), after[n].nan_to_num())},
        "finite": all(bool(value.isfinite().all()) for n, value in after.items() if "lora_" in n),
        "saved": all(torch.equal(saved[n], value) for n, value in after.items() if "lora_" in n),
        "kl": [entry["kl"] for entry in trainer.state.log_history if "kl" in entry],
    }


def four_bits(storage):
    """Options of a model whose base has four bits a weight, `storage` being the type of the tensors that hold them."""
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32", bnb_4bit_quant_storage=storage
    )
    return {"model_init_kwargs": {"quantization_config": quantized, "dtype": "float32"}}


def coarse_bases(name, folder):
    results = {
        "bfloat16 base": coarse_base(name, f"{folder}/base", model=lambda: make_model().bfloat16()),
        "bfloat16": coarse_base(name, f"{folder}/all", model=lambda: make_model().bfloat16(), bf16=True),
    }
    if is_bitsandbytes_available() and name != "FSDP2":
        import bitsandbytes

        make_model().save_pretrained(f"{folder}/model")
        run_on_all_ranks()
        # once a layer was evaluated, some CPUs have a layout for it that cannot be trained through
        with mock.patch.object(bitsandbytes.nn.modules, "has_avx512bf16", return_value=False):
            options = {"model": f"{folder}/model", **four_bits("float32")}
            results["four bits"] = coarse_base(name, f"{folder}/four", **options)
    return results


# ---- All of an engine ----
def run_all(name, folder):
    results = {}
    for case, options in CASES.items():
        results[case] = run_case(name, **options)
        os.makedirs(folder, exist_ok=True)  # says that training has begun
    results["sampled"] = sampled(name, f"{folder}/sampled")
    results["sampled with LoRA"] = sampled(name, f"{folder}/lora", lora=LORA, **ADAMW)
    results["sampled with LoRA that is continued"] = sampled(
        name, f"{folder}/continued", model=continued_with_whole_modules
    )
    results["from a path"] = from_path(name, f"{folder}/path")
    results["from a path with LoRA"] = from_path(
        name, f"{folder}/path-lora", lora=LORA | {"modules_to_save": ["lm_head"]}
    )
    results["in half precision"] = in_half_precision(name, f"{folder}/half")
    results["evaluated first"] = evaluated_first(name, f"{folder}/evaluated")
    results["coarse bases"] = coarse_bases(name, f"{folder}/coarse")
    if name is not None:
        results["on a server"] = sampled_on_a_server(name, f"{folder}/server")
        adapter = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
        results["on a server with LoRA"] = sampled_on_a_server(name, f"{folder}/server-lora", lora=adapter)
    if name == "FSDP2":
        results["shards left by micro-batches"] = shards_left_by_micro_batches(name)
    else:  # there model.generate writes
        results["sampling that fails"] = sampling_that_fails(name, f"{folder}/fails")
    if name is None or name == "ZeRO-3":
        results["loaded after options"] = loaded_after_options(name, f"{folder}/after")
    if name is not None and name.startswith("ZeRO"):
        results["mistakes"] = mistakes(name, f"{folder}/mistakes")
    if name == "ZeRO-3":
        results["not gathered"] = from_path(name, f"{folder}/whole", ds3_gather_for_generation=False)
        results["not gathered on saving"] = not_gathered_on_saving(f"{folder}/shards")
    return results


def not_gathered_on_saving(folder):
    """Whole weights as DeepSpeed's script finds them in a checkpoint of shards."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with engine("ZeRO-3", stage3_gather_16bit_weights_on_model_save=False) as of_engine:
        trainer = sampler(folder, of_engine, save_steps=6)
        trainer.train()
        after = gathered(trainer.model)
        run_on_all_ranks()
    found = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/checkpoint-6")
    return {"after": after, "found": {name: value.double() for name, value in found.items()}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    freeze_imports()
    name, file = sys.argv[-2:]  # `deepspeed` puts --local_rank before them
    torch.save(run_all(name, f"{file}-runs"), f"{file}.{os.environ['RANK']}")
