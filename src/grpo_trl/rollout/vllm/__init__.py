"""vLLM as a rollout engine: in the trainer's process, or on a server."""

from .colocate import ColocatedVLLM
from .engine import VLLMEngine
from .server import VLLMServer


__all__ = ["ColocatedVLLM", "VLLMEngine", "VLLMServer"]
