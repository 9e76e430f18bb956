"""Options of evaluation and of what is logged."""

from dataclasses import dataclass, field


@dataclass
class EvaluationOptions:
    """Evaluation and logging."""

    num_generations_eval: int | None = field(
        default=None, metadata={"help": "Completions per prompt in evaluation. Default: num_generations."}
    )
    log_completions: bool = field(
        default=False,
        metadata={"help": "Print a table of completions at every log, and write it to output_dir/completions."},
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "Rows of that table, drawn at random. Default: all."}
    )
    log_completions_hub_repo: str | None = field(
        default=None, metadata={"help": "Upload its files to this dataset of the hub while the run trains."}
    )
    log_unique_prompts: bool = field(default=False, metadata={"help": "One row per prompt in that table."})
