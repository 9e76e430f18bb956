"""What a configuration does and costs, before it is run."""

from .activations import (
    Precision,
    Shape,
    activation_bytes_per_token,
    activations,
    key_value_bytes_per_token,
    largest_micro_batch,
    logits_bytes,
)
from .memory import METHODS, Job, Memory, Traffic, memory, traffic


__all__ = [
    "METHODS",
    "Job",
    "Memory",
    "Precision",
    "Shape",
    "Traffic",
    "activation_bytes_per_token",
    "activations",
    "key_value_bytes_per_token",
    "largest_micro_batch",
    "logits_bytes",
    "memory",
    "traffic",
]
