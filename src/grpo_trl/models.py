"""Policy, adapter and reference: loading, freezing, checking."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import disable_dropout_in_model

from .logprobs.head import enable_logprobs
from .model_utils import causal_lm


REF_ADAPTER = "ref"


def load_policy(model: str | PreTrainedModel | PeftModel, model_init_kwargs: dict[str, Any]) -> Any:
    """The policy: `model` itself, or what `from_pretrained` makes of a path or hub name (float32 unless told).

    Raises:
        TypeError: `model` is neither.
        ValueError: `model_init_kwargs` came with a model that is loaded already.
        OSError: No model at the path, and no hub that has it.
    """
    if isinstance(model, str):
        settings = {"dtype": "float32"} | model_init_kwargs
        if Path(model).is_dir() and not (Path(model) / "config.json").exists():
            if (Path(model) / "adapter_config.json").exists():
                raise OSError(
                    f"model={model!r} is an adapter. To continue it, pass PeftModel.from_pretrained(base, {model!r}, "
                    "is_trainable=True), base being the model under it."
                )
            raise OSError(f"model={model!r} is a folder without config.json; pass the path of a local model.")
        try:
            return AutoModelForCausalLM.from_pretrained(model, **settings)
        except OSError as error:
            raise OSError(
                f"model={model!r} could not be loaded: it is no folder with a model, and no hub answers with one. Pass the "
                f"path of a local model. ({error})"
            ) from error
    if model_init_kwargs:
        raise ValueError(
            f"model_init_kwargs={model_init_kwargs} has no effect on a model that is loaded already; pass its path as "
            "model, or give these arguments to from_pretrained yourself."
        )
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        raise TypeError(f"model is a {type(model).__name__}; pass a path, a PreTrainedModel or a PeftModel.")
    return model


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | None, model: Any, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer: the one given, or the one that lies beside the model.

    Raises:
        TypeError: `processing_class` is not a tokenizer.
        ValueError: It has no pad or no eos token, or no tokenizer lies beside the model.
    """
    if processing_class is None:
        path = model.config._name_or_path
        if not path:
            raise ValueError(
                "processing_class=None, and the model does not know where it was loaded from; pass a tokenizer."
            )
        processing_class = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if len(processing_class) <= len(processing_class.all_special_ids):  # made up where there are no files
            raise ValueError(f"processing_class=None, and no tokenizer lies beside the model in {path}; pass one.")
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class is a {type(processing_class).__name__}; pass a tokenizer.")
    if processing_class.eos_token_id is None:
        raise ValueError(
            "The tokenizer has eos_token=None, so that no completion could end; set it, e.g. tokenizer.eos_token = '</s>'."
        )
    if processing_class.pad_token_id is None:
        raise ValueError(
            "The tokenizer has pad_token=None; set it, e.g. tokenizer.pad_token = tokenizer.eos_token (padding is never "
            "trained on)."
        )
    return processing_class


def eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All tokens that end a completion: the tokenizer's and those of the model's generation settings."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *declared]))


def context_length(model: Any) -> int | None:
    """The number of positions that the model declares; None where it declares none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def add_adapter(model: Any, peft_config: PeftConfig | None) -> Any:
    """The policy with a new adapter; unchanged without `peft_config`.

    Raises:
        TypeError: `peft_config` is not a `peft.PeftConfig`.
        ValueError: The model carries an adapter already, or nothing in it is trainable.
    """
    if peft_config is None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "The model has no trainable parameter; load an adapter with PeftModel.from_pretrained(..., "
                "is_trainable=True) to continue it, or pass peft_config to start a new one."
            )
        return model
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is a {type(peft_config).__name__}; pass a peft.PeftConfig such as LoraConfig().")
    if isinstance(model, PeftModel):
        raise ValueError(
            "peft_config came with a PeftModel, which has an adapter already; pass peft_config=None to continue it, or "
            "model.merge_and_unload() as the model to start a new one on top of it."
        )
    return get_peft_model(model, peft_config)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of `model` to 0, the rate that attention layers keep as a number included."""
    disable_dropout_in_model(model)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - mypy takes every attribute for a tensor


class Reference:
    """The frozen policy that the KL term measures against.

    - full fine-tuning: a frozen copy;
    - a new adapter: the base weights, by switching the adapter off;
    - an adapter that was trained before: a frozen copy of that adapter.

    Args:
        policy: The policy before it is trained, with its adapter.
        new_adapter: Whether the adapter was made for this run.
        reload: Loads the policy as it was at first, for one that ZeRO-3 has sharded, which cannot be copied.
        moves: Whether its weights will follow the policy (`sync_ref_model`), so that a checkpoint saves them.

    Raises:
        ValueError: It moves, and the policy has an adapter; the adapter trains biases of the model under it, which the
            reference would share; or it is a prompt that was trained before, which cannot be copied; or the policy is
            sharded, with nothing to reload it from.
    """

    def __init__(
        self, policy: Any, new_adapter: bool, reload: Callable[[], nn.Module] | None = None, moves: bool = False
    ):
        self.model: nn.Module | None = None
        self.moves = moves
        self._policy = policy
        self._adapter: str | None = None
        if not isinstance(policy, PeftModel):
            self.model = _copy(policy, reload).requires_grad_(False).eval()
            return
        if moves:
            raise ValueError(
                "sync_ref_model=True needs a copy of all weights, which an adapter does not have; set "
                "sync_ref_model=False, or train without LoRA."
            )
        config = policy.peft_config[policy.active_adapter]
        if (bias := getattr(config, "bias", "none")) != "none":
            raise ValueError(
                f"The adapter has bias={bias!r}: it trains biases of the model under it, which the reference would share. "
                "Set bias='none' in peft_config, or beta=0.0 to train without a reference."
            )
        if not new_adapter and config.is_prompt_learning:
            raise ValueError(
                f"The adapter is a trained prompt ({config.peft_type}), of which no reference can be kept; set beta=0.0."
            )
        if not new_adapter:
            self._adapter = _freeze_adapter(policy)

    @contextmanager
    def evaluating(self, wrapped_policy: nn.Module) -> Iterator[nn.Module]:
        """The model to call; the policy's adapter is switched inside and back after."""
        if self.model is not None:
            yield self.model
        elif self._adapter is None:
            with self._policy.disable_adapter():
                yield wrapped_policy
        else:
            with _adapter(self._policy, self._adapter):
                yield wrapped_policy

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of a reference that moves; others follow from the policy at the start of the run."""
        return causal_lm(self.model).state_dict() if self.moves else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.moves:
            causal_lm(self.model).load_state_dict(state)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside, the policy has no second adapter that would be saved with it."""
        config = None if self._adapter is None else self._policy.peft_config.pop(self._adapter)
        try:
            yield
        finally:
            if config is not None:
                self._policy.peft_config[self._adapter] = config


def _copy(policy: nn.Module, reload: Callable[[], nn.Module] | None) -> nn.Module:
    if not any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        return copy.deepcopy(policy)
    if reload is None:
        raise ValueError(
            "beta > 0 needs a second copy of a model that ZeRO-3 has sharded already; pass the path of the model instead "
            "of the model, so that it can be loaded twice."
        )
    model = reload()
    enable_logprobs(model)
    return model


@contextmanager
def _adapter(policy: PeftModel, name: str) -> Iterator[None]:
    """Another adapter inside; the active one, and what is trainable, as they were after."""
    active = policy.active_adapter
    with _trainable_as_it_was(policy):
        try:
            policy.set_adapter(name)
            yield
        finally:
            policy.set_adapter(active)


@contextmanager
def _trainable_as_it_was(policy: PeftModel) -> Iterator[None]:
    """peft makes the parameters of an adapter trainable when it is added or made active."""
    trainable = {parameter: parameter.requires_grad for parameter in policy.parameters()}
    try:
        yield
    finally:
        for parameter, requires_grad in trainable.items():
            parameter.requires_grad_(requires_grad)


def _freeze_adapter(policy: PeftModel) -> str:
    """Copy the active adapter to one that is never trained; its name."""
    active = policy.active_adapter
    if REF_ADAPTER not in policy.peft_config:
        with _trainable_as_it_was(policy):
            policy.add_adapter(REF_ADAPTER, policy.peft_config[active])
    parameters = dict(policy.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parts = name.split(".")
            if REF_ADAPTER in parts:
                parameter.copy_(parameters[".".join(active if part == REF_ADAPTER else part for part in parts)])
                parameter.requires_grad_(False)
    return REF_ADAPTER
