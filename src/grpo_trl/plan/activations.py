"""Bytes that the tokens of a micro-batch take: activations, logits, keys and values.

The numbers of a layer are those of Llama, Qwen and Mistral, counted from what autograd keeps; a test counts them again.
"""

from dataclasses import dataclass
from typing import Any, Literal


Precision = Literal["bf16", "autocast", "float32"]
"""bfloat16 weights (ZeRO); float32 weights under autocast to bfloat16 (DDP and one GPU); float32 throughout."""

SLICE = 256
"""Tokens whose logits exist at a time, enough to keep the matrix products of a CPU as fast as large ones."""
GPU_SLICE = 2048
"""The same on a GPU with room for it, where a slice also reads and adds to all of the head's weight."""
GPU_SLICE_SHARE = 0.1
"""Share of a GPU's memory that these logits may take."""
ROWS_IN_FLIGHT = {"cpu": 128, "cuda": 256}
"""Completions that are decoded at a time, by device, unless `max_rows_in_flight` says otherwise."""
PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of prompts that sampling computes at a time at most, if more than one prompt is in it."""
GPU_TOKENS = 2**14
"""Tokens of a micro-batch on a GPU by default; larger ones are hardly faster."""
KEPT = 2**25
"""Blocks of so many bytes glibc always gives back when they are freed; of smaller ones it may keep pieces."""
LOGIT_BYTES = 20
"""Of one logit and what torch computes from it, forward and backward. On a GPU kernels hold it and its gradient alone."""


@dataclass(frozen=True)
class Shape:
    """A transformer whose layers are attention and a gated feed-forward."""

    layers: int
    hidden: int
    key_value: int
    """Key-value heads times the size of a head."""
    intermediate: int
    """Of the experts that a token uses together, in a mixture of experts."""
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """Read the sizes from the configuration of a model of transformers, e.g. `model.config`.

        Raises:
            ValueError: It has other names for them.
        """
        config = config.get_text_config()
        try:
            hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
        except AttributeError as error:
            raise ValueError(f"The plan cannot read the sizes of a {type(config).__name__}: {error}.") from error
        head = getattr(config, "head_dim", None) or hidden // heads
        key_value_heads = getattr(config, "num_key_value_heads", None) or heads
        intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
        experts = getattr(config, "num_experts_per_tok", None)
        if experts:
            intermediate = experts * (getattr(config, "moe_intermediate_size", None) or intermediate)
        return cls(layers, hidden, key_value_heads * head, intermediate, config.vocab_size)


@dataclass(frozen=True)
class _Bytes:
    """Bytes of a token in one layer, per unit of hidden, key-value and intermediate size."""

    residual: int
    """Of the residual stream, per unit of the hidden size: what checkpointing keeps of a layer."""
    hidden: int
    key_value: int
    intermediate: int
    backward_hidden: int
    """What the backward pass of a layer makes besides."""
    backward_intermediate: int


LAYER: dict[Precision, _Bytes] = {
    "bf16": _Bytes(2, 20, 4, 8, 4, 4),
    "autocast": _Bytes(4, 30, 4, 8, 8, 4),
    "float32": _Bytes(4, 32, 8, 16, 8, 8),
}


def activation_bytes_per_token(shape: Shape, precision: Precision = "bf16", checkpointing: bool = True) -> int:
    """Count the bytes of activations that each token of a micro-batch holds at the peak of its backward pass.

        layer   S = a h + b g + c i          what one layer keeps of a token: 20 h + 4 g + 8 i in bfloat16
                w = d h + e i                what its backward pass makes besides: 4 h + 4 i
        token   L r h + S + w                with checkpointing, r bytes of the residual stream a layer: 2, else 4
                L S + w                      without

    with h = `hidden`, g = `key_value`, i = `intermediate`, L = `layers`. Gradients of weights are not in it, and logits
    are in `logits_bytes`, whose size does not grow with the tokens.
    """
    b = LAYER[precision]
    backward = b.backward_hidden * shape.hidden + b.backward_intermediate * shape.intermediate
    recomputed = _layer_bytes(shape, b) if checkpointing else 0
    return kept_bytes_per_token(shape, precision, checkpointing) + recomputed + backward


def kept_bytes_per_token(shape: Shape, precision: Precision = "bf16", checkpointing: bool = True) -> int:
    """Count the bytes of activations that each token of a micro-batch holds between its forward and backward pass."""
    b = LAYER[precision]
    return shape.layers * (b.residual * shape.hidden if checkpointing else _layer_bytes(shape, b))


def forward_bytes_per_token(shape: Shape, precision: Precision = "bf16") -> int:
    """Count the bytes that each token of a forward pass without gradient takes at its peak, in a feed-forward.

    3 e i + 3 r h       with e bytes of a number of a product: 2, else 4; the rest as in `activation_bytes_per_token`
    """
    return 3 * _number_bytes(precision) * shape.intermediate + 3 * LAYER[precision].residual * shape.hidden


def layer_weights(shape: Shape) -> int:
    """Count the weights of all layers, where every token uses all of them: attention, and a gated feed-forward."""
    return shape.layers * shape.hidden * (2 * shape.hidden + 2 * shape.key_value + 3 * shape.intermediate)


def _number_bytes(precision: Precision) -> int:
    return 4 if precision == "float32" else 2


def _layer_bytes(shape: Shape, b: _Bytes) -> int:
    return b.hidden * shape.hidden + b.key_value * shape.key_value + b.intermediate * shape.intermediate


def slice_tokens(vocabulary: int, gpu_bytes: float | None = None) -> int:
    """Return how many tokens have logits at a time, on a GPU of so many bytes, or on a CPU."""
    fits = gpu_bytes is not None and LOGIT_BYTES * GPU_SLICE * vocabulary <= GPU_SLICE_SHARE * gpu_bytes
    return GPU_SLICE if fits else SLICE


def logits_bytes(shape: Shape, precision: Precision = "bf16", gpu_bytes: float | None = None) -> int:
    """Count the bytes of the logits of one slice of tokens, with all that is computed from them."""
    each = LOGIT_BYTES if gpu_bytes is None else 2 * _number_bytes(precision)
    return each * slice_tokens(shape.vocabulary, gpu_bytes) * shape.vocabulary


def activations(
    shape: Shape,
    tokens: int,
    precision: Precision = "bf16",
    checkpointing: bool = True,
    gpu_bytes: float | None = None,
) -> int:
    """Count the bytes that a micro-batch of so many tokens holds at the peak of its backward pass."""
    return tokens * activation_bytes_per_token(shape, precision, checkpointing) + logits_bytes(
        shape, precision, gpu_bytes
    )


def fragments(shape: Shape, tokens: int, precision: Precision = "bf16", checkpointing: bool = True) -> int:
    """Count the bytes that a CPU's malloc may keep, at worst, in pieces of what a micro-batch has freed.

        tokens (b + 12 V)       b: `activation_bytes_per_token`; no logits where those of a slice are a block of KEPT bytes

    Counted with glibc 2.36, where a process kept up to 0.7 b and 2.7 of the 4 V bytes of logits.
    """
    logits = 4 * shape.vocabulary if 4 * SLICE * shape.vocabulary < KEPT else 0
    return tokens * (activation_bytes_per_token(shape, precision, checkpointing) + 3 * logits)


def largest_micro_batch(
    shape: Shape,
    free_bytes: float,
    precision: Precision = "bf16",
    checkpointing: bool = True,
    gpu_bytes: float | None = None,
) -> int:
    """Count the tokens of the largest micro-batch whose activations and logits fit into `free_bytes`; 0 if none does."""
    room = free_bytes - logits_bytes(shape, precision, gpu_bytes)
    return max(0, int(room // activation_bytes_per_token(shape, precision, checkpointing)))


def key_value_bytes_per_token(shape: Shape, precision: Precision = "bf16") -> int:
    """Count the bytes of the keys and values of one token over all layers."""
    return 2 * _number_bytes(precision) * shape.layers * shape.key_value
