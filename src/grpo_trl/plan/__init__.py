"""What a configuration does and costs, before it is run."""

from .activations import (
    GPU_TOKENS,
    PREFILL_TOKENS,
    ROWS_IN_FLIGHT,
    Precision,
    Shape,
    activation_bytes_per_token,
    activations,
    fragments,
    key_value_bytes_per_token,
    largest_micro_batch,
    logits_bytes,
    slice_tokens,
)
from .batch import batch_lines
from .cards import CARDS, Card, card_named
from .estimate import (
    LAID_OUT_SHARE,
    Setup,
    choose,
    fitted,
    largest_tokens,
    launches,
    peak,
    phases,
    room_for_activations,
    step_seconds,
)
from .memory import METHODS, Job, Memory, Traffic, memory, offloaded, traffic
from .setup import MEASURED_PROMPTS, RunPlan, setup_of


__all__ = [
    "CARDS",
    "GPU_TOKENS",
    "LAID_OUT_SHARE",
    "MEASURED_PROMPTS",
    "METHODS",
    "PREFILL_TOKENS",
    "ROWS_IN_FLIGHT",
    "Card",
    "Job",
    "Memory",
    "Precision",
    "RunPlan",
    "Setup",
    "Shape",
    "Traffic",
    "activation_bytes_per_token",
    "activations",
    "batch_lines",
    "card_named",
    "choose",
    "fitted",
    "fragments",
    "key_value_bytes_per_token",
    "largest_micro_batch",
    "largest_tokens",
    "launches",
    "logits_bytes",
    "memory",
    "offloaded",
    "peak",
    "phases",
    "room_for_activations",
    "setup_of",
    "slice_tokens",
    "step_seconds",
    "traffic",
]
