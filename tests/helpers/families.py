"""Small random models of many families, made in code, and ragged completions of several groups."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from grpo_trl.types import Completion


SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.25,  # attention is far from uniform, and float32 is good to 3e-6
}
GROUPED = {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 4, "layer_types": ["sliding_attention", "full_attention"]}
SHORT, LONG = 6, 64
"""A window that is shorter than prompts and completions, and one that is longer than both together."""


@dataclass(frozen=True)
class Family:
    """The prefix of the names of configuration and model, and what differs from `SIZES`."""

    prefix: str
    changes: dict[str, Any]
    config: str = "Config"
    dtype: torch.dtype = torch.float32


FAMILIES = {
    "qwen2": Family("Qwen2", GROUPED),
    "qwen3": Family("Qwen3", GROUPED | {"head_dim": 8}),
    "llama": Family("Llama", GROUPED),
    "mistral": Family("Mistral", GROUPED | {"head_dim": 8, "sliding_window": None}),
    "phi3": Family("Phi3", GROUPED | {"sliding_window": None}),
    "gemma2": Family(
        "Gemma2", GEMMA | {"sliding_window": LONG, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    ),
    "gemma3": Family("Gemma3", GEMMA | {"sliding_window": LONG}, config="TextConfig"),
    "granite": Family(
        "Granite",
        GROUPED
        | {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.5,
        },
    ),
    "olmo2": Family("Olmo2", GROUPED),
    "gpt_neox": Family("GPTNeoX", {}),
    # where experts are chosen, rounding can choose another one
    "qwen3_moe": Family(
        "Qwen3Moe",
        GROUPED | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        dtype=torch.float64,
    ),
    "deepseek_v3": Family(
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 8,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
        },
        dtype=torch.float64,
    ),
}
WINDOWED = {
    "mistral": {"sliding_window": SHORT},
    "gemma2": {"sliding_window": SHORT},
    "gemma3": {"sliding_window": SHORT},
    "qwen2": {"use_sliding_window": True, "sliding_window": SHORT, "max_window_layers": 1},
}
UNSHARED = {"cohere": Family("Cohere", GROUPED | {"logit_scale": 0.25, "tie_word_embeddings": True})}
"""Families of which only the head differs from those above."""


def make_family(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a few thousand parameters; what starts as 0 or 1 (biases, norms) is random too."""
    family = (FAMILIES | UNSHARED)[name]
    config_class = getattr(transformers, family.prefix + family.config)
    torch.manual_seed(seed)
    model = getattr(transformers, family.prefix + "ForCausalLM")(config_class(**(SIZES | family.changes | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    if family.dtype == torch.float64:
        model.set_experts_implementation("eager")  # the others have no float64
    return model.to(family.dtype)


def make_completions(groups: list[tuple[int, list[int]]], seed: int = 0, masked: float = 0.0) -> list[Completion]:
    """From each group's length of the prompt and those of its completions; a share of tokens is masked out."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(2, SIZES["vocab_size"], (length,), generator=generator).tolist()

    completions = []
    for prompt_length, lengths in groups:
        prompt = draw(prompt_length)
        for length in lengths:
            mask = (torch.rand(length, generator=generator) >= masked).tolist()
            completions.append(Completion(prompt, draw(length), mask))
    return completions


RAGGED = [
    (9, [14, 1, 0, 7, 12, 1, 3, 9, 2, 5, 0, 4, 8, 1, 11, 6]),
    (1, [10]),
    (13, [0, 0]),
    (3, [2, 13, 1]),
    (8, [1]),
]
"""Groups of 1 to 16; completions of one token and of none; the last prompt has no branch to attend to it."""


def score_alone(
    model: PreTrainedModel, completion: Completion, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of one completion, from the logits of a plain forward over nothing else."""
    count = len(completion.ids)
    logits = model(input_ids=torch.tensor([completion.prompt_ids + completion.ids]), use_cache=False).logits[0]
    logps = (logits[len(completion.prompt_ids) - 1 :][:count] / temperature).log_softmax(-1)
    return logps[range(count), completion.ids], -(logps.exp() * logps).sum(-1)


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that never went through `enable_logprobs`."""
    copied = type(model)(copy.deepcopy(model.config)).to(model.dtype)
    copied.load_state_dict(model.state_dict())
    return copied.train(model.training)
