"""Options of generation batches, mini-batches and micro-batches."""

from dataclasses import dataclass, field


@dataclass
class BatchOptions:
    """Batches."""

    num_generations: int = field(default=8, metadata={"help": "Completions per prompt, at least 2."})
    num_iterations: int = field(default=1, metadata={"help": "How often each generation batch is trained on."})
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "Micro-steps that one generation batch of completions lasts. Default: gradient_accumulation_steps."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions of a generation batch over all ranks; the other way to say steps_per_generation. Default: "
            "per_device_train_batch_size * world size * steps_per_generation."
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that one forward and backward computes at most, each group's prompt counted once. An optimizer "
            "step has as many of them as that needs. Default: what fits into memory; on a CPU at most "
            "per_device_train_batch_size completions."
        },
    )
    shared_prefix: str = field(  # or a bool
        default="auto",
        metadata={
            "help": "Compute a prompt once for all of its completions: 'auto' does so wherever the model can be served, "
            "true makes a model that cannot an error, false pads instead.",
        },
    )
    shuffle_dataset: bool = field(default=True, metadata={"help": "Shuffle the prompts in each epoch."})
