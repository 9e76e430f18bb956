"""Small models, adapters and tokenizers, made in code."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


VOCABULARY = [
    "<pad>",
    "<eos>",
    "<unk>",
    "<user>",
    "<assistant>",
    *"0123456789",
    *"abcdefghijklmnopqrstuvwxyz",
    " ",
    "=",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.4,  # large, so that a step moves log-probabilities visibly
}
ARCHITECTURES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}
torch.set_num_threads(1)  # tensors this small lose more to threads than they gain


def make_model(architecture: str = "qwen2", seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of about 20,000 parameters, float32."""
    config_class, model_class, extra = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    return model_class(config_class(**(SIZES | extra | changes)))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with a chat template."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


INPUT = torch.tensor([[5, 6, 7, 8]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT).logits.clone()


def lora(**changes: Any) -> LoraConfig:
    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(**(options | changes))


def make_adapted(name: str = "default", **changes: Any) -> PeftModel:
    """A policy with an adapter that does something, as after some training."""
    policy = get_peft_model(make_model(), lora(**changes), adapter_name=name)
    torch.manual_seed(1)
    move(policy)
    return policy


def move(policy: nn.Module) -> None:
    """Change everything that is trained."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
