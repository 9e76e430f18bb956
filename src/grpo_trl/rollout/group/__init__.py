"""The in-process rollout engine: continuous batching in which a group shares its prompt."""
