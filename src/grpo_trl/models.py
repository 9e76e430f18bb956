"""The policy, its adapter and its tokenizer: loading and checking."""

import types
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from trl.trainer.utils import disable_dropout_in_model

from .logging import get_logger
from .model_utils import causal_lm


logger = get_logger(__name__)

PEFT_PREFIX = "base_model.model."
"""Before the names of an adapter's weights in its file."""


def load_policy(model: str | PreTrainedModel | PeftModel, model_init_kwargs: dict[str, Any]) -> Any:
    """Return the policy: `model` itself, or what `from_pretrained` makes of a path or hub name (float32 unless told).

    Raises:
        TypeError: `model` is neither, or no causal language model.
        ValueError: `from_pretrained` does not take `model_init_kwargs`, or the path holds another kind of model.
        OSError: No model at the path, and no hub that has it.
    """
    if isinstance(model, str):
        model = _load(model, {"dtype": "float32"} | model_init_kwargs)
    elif not isinstance(model, (PreTrainedModel, PeftModel)):
        raise TypeError(f"model is a {type(model).__name__}; pass a path, a PreTrainedModel or a PeftModel.")
    elif any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"The {type(model).__name__} has parameters on the device 'meta', which have no values; load it with "
            "from_pretrained, without a device context."
        )
    elif model_init_kwargs:
        names = " and ".join(model_init_kwargs)
        logger.warning("The model is loaded already, and %s of model_init_kwargs has no effect on it.", names)
    if adapters := [adapter for adapter in getattr(model, "peft_config", {}) if "/" in adapter]:
        raise ValueError(
            f"The adapter {adapters[0]!r} has a '/' in its name, and a checkpoint is saved under it; choose another "
            "adapter_name."
        )
    _check_causal(causal_lm(model))
    return model


def _load(path: str, settings: dict[str, Any]) -> Any:
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        if (Path(path) / "adapter_config.json").exists():
            raise OSError(
                f"model={path!r} is an adapter. To continue it, pass PeftModel.from_pretrained(base, {path!r}, "
                "is_trainable=True), base being the model under it."
            )
        raise OSError(f"model={path!r} is a folder without config.json; pass the path of a local model.")
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, loading = load(path, output_loading_info=True, **settings)
    except (SafetensorError, UnpicklingError, EOFError) as error:
        raise OSError(f"model={path!r} has a damaged file of weights ({type(error).__name__}: {error}).") from error
    except OSError as error:
        raise OSError(
            f"model={path!r} could not be loaded: it is no folder with a model, and no hub answers with one. Pass the "
            f"path of a local model. ({error})"
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise ValueError(
            f"model={path!r} could not be loaded as a causal language model with model_init_kwargs={settings}: {error}"
        ) from error
    if (missing := sorted(loading["missing_keys"])) and not getattr(model, "is_quantized", False):
        raise ValueError(
            f"The checkpoint at model={path!r} has no weights for {len(missing)} parameters ({', '.join(missing[:3])}, "
            "...), which would be random. It is incomplete, or was saved by another kind of model, as a classifier or a "
            "backbone; pass the path of a causal language model."
        )
    return model


def _check_causal(lm: PreTrainedModel) -> None:
    """Refuse a model that does not predict the next token from those before it.

    Raises:
        TypeError: It is another kind of model.
    """
    config = lm.config
    bidirectional = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    kinds = {
        "an encoder and a decoder": getattr(config, "is_encoder_decoder", False),
        "no head that predicts tokens": lm.get_output_embeddings() is None,
        "no left-to-right attention": bidirectional or not lm.can_generate(),
    }
    for kind, found in kinds.items():
        if found:
            raise TypeError(
                f"model is a {type(lm).__name__}, which has {kind}; pass a causal language model, such as "
                "AutoModelForCausalLM.from_pretrained(path)."
            )


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | None, model: Any, trust_remote_code: bool, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer: the one given, or the one beside the model, at `revision` of its repository.

    A missing pad token is set to the end token.

    Raises:
        TypeError: `processing_class` is not a tokenizer.
        ValueError: It has no eos token, or no tokenizer lies beside the model, or the model has no row for its tokens.
    """
    if processing_class is None:
        path = model.config._name_or_path
        if not path:
            raise ValueError(
                "processing_class=None, and the model does not know where it was loaded from; pass a tokenizer."
            )
        at = {} if revision is None else {"revision": revision}
        processing_class = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **at)
        if len(processing_class) <= len(processing_class.all_special_ids):  # made up where there are no files
            raise ValueError(f"processing_class=None, and no tokenizer lies beside the model in {path}; pass one.")
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        inner = " its .tokenizer" if hasattr(processing_class, "tokenizer") else " a tokenizer"
        raise TypeError(f"processing_class is a {type(processing_class).__name__}; pass{inner}.")
    if processing_class.eos_token_id is None:
        raise ValueError(
            "The tokenizer has eos_token=None, so that no completion could end; set it, e.g. tokenizer.eos_token = '</s>'."
        )
    if processing_class.pad_token_id is None:
        processing_class.pad_token = processing_class.eos_token
        logger.warning("The tokenizer has no pad token; its end token %r pads.", processing_class.eos_token)
    _check_special_tokens(processing_class, num_embeddings(model))
    return processing_class


def num_embeddings(model: Any) -> int | None:
    """Return the number of tokens that the model has an embedding for; None where it does not say."""
    return getattr(model.get_input_embeddings(), "num_embeddings", None)


def _check_special_tokens(tokenizer: PreTrainedTokenizerBase, size: int | None) -> None:
    for name in ("pad_token", "eos_token", "bos_token"):
        token_id = getattr(tokenizer, f"{name}_id")
        if size is not None and token_id is not None and token_id >= size:
            raise ValueError(
                f"The tokenizer's {name} {getattr(tokenizer, name)!r} is token {token_id}, and the model has "
                f"embeddings for {size} tokens; call model.resize_token_embeddings({len(tokenizer)})."
            )


def eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All tokens that end a completion: the tokenizer's and those of the model's generation settings."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *declared]))


def context_length(model: Any) -> int | None:
    """The number of positions that the model declares; None where it declares none."""
    declared = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return declared if declared is not None and declared > 0 else None


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
    policy = get_peft_model(model, peft_config)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ValueError(
            f"peft_config is a {type(peft_config).__name__} with inference_mode={peft_config.inference_mode}, whose "
            "adapter has no trainable parameter; set inference_mode=False."
        )
    return policy


def checkpointing_fault(policy: Any) -> str | None:
    """Say why the layers of a policy cannot be recomputed; None where they can be."""
    lm = causal_lm(policy)
    if not lm.supports_gradient_checkpointing:
        return f"{type(lm).__name__} does not support it"
    if isinstance(policy, PeftModel) and policy.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
        return "the keys and values of prefix tuning are lost where layers are recomputed"
    return None


def check_checkpointing(policy: Any) -> None:
    """Refuse to recompute layers that cannot be.

    Raises:
        ValueError: The policy has such layers.
    """
    if fault := checkpointing_fault(policy):
        raise ValueError(f"gradient_checkpointing=True cannot work: {fault}; set gradient_checkpointing=False.")


def has_injected_adapter(model: Any) -> bool:
    """Whether the model carries an adapter that `model.add_adapter` of transformers made, without a `PeftModel`."""
    return isinstance(model, PreTrainedModel) and getattr(model, "_hf_peft_config_loaded", False)


def load_injected_adapter(model: Any, folder: Path) -> None:
    """Load the weights that `model.save_pretrained` wrote of an adapter that `model.add_adapter` made."""
    saved = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    own = {name.removeprefix(PEFT_PREFIX): value for name, value in saved.items()}
    set_peft_model_state_dict(model, own, adapter_name=model.active_adapters()[0])


def train_in_float32(policy: nn.Module) -> None:
    """Cast what is trained to float32, e.g. modules that an adapter copies from a base in half precision."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of `model` to 0, the rate that attention layers keep as a number included."""
    disable_dropout_in_model(model)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 - mypy takes every attribute for a tensor


def has_dropout(model: nn.Module) -> bool:
    """Whether some dropout of `model` is active in training mode."""
    rates = [m.p if isinstance(m, _DropoutNd) else getattr(m, "attention_dropout", 0.0) for m in model.modules()]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def compute_head_in_float32(model: Any) -> None:
    """Keep and compute the language modeling head in float32, under mixed precision too.

    An embedding with the same weights gives its output in the precision it had.

    Source: MiniMax-M1, arXiv 2506.13585; ScaleRL, arXiv 2510.13786.

    Raises:
        ValueError: The head carries an adapter.
    """
    lm = causal_lm(model)
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"cast_lm_head_to_fp32=True needs a linear head without an adapter, and this is a {type(head).__name__}; leave "
            "it out of the adapter's target_modules, or set cast_lm_head_to_fp32=False."
        )

    def forward(self: Any, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return linear(hidden.float(), self.weight.float(), bias)

    embedding = lm.get_input_embeddings()
    if embedding.weight is head.weight:
        embedding.register_forward_hook(partial(_output_in, dtype=head.weight.dtype))
    head.float().__dict__["forward"] = types.MethodType(forward, head)


def _output_in(module: nn.Module, args: Any, output: Tensor, dtype: torch.dtype) -> Tensor:
    return output.to(dtype)
