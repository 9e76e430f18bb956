"""Options of sampling with vLLM, and of samplers that are not the old policy."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..objective.correction import CorrectionMode


@dataclass
class VLLMOptions:
    """Sampling with vLLM."""

    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM instead of the trainer's own engine."})
    vllm_mode: Literal["colocate", "server"] = field(
        default="colocate",
        metadata={"help": "Where vLLM runs: in the trainer's process ('colocate') or behind a URL ('server')."},
    )
    vllm_model_impl: Literal["auto", "vllm", "transformers"] = field(
        default="vllm", metadata={"help": "Whose code of the model vLLM runs (colocate)."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False,
        metadata={"help": "Take vLLM's weights and cache off the GPU while the policy is updated (colocate)."},
    )
    vllm_structured_outputs_regex: str | None = field(
        default=None, metadata={"help": "A regular expression that completions must match."}
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "URL of the server. Default: http://vllm_server_host:vllm_server_port."}
    )
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Host of the server."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Port of the server."})
    vllm_server_timeout: float = field(
        default=240.0,
        metadata={"help": "Seconds that a server may be away, at the start and in the middle, before the run stops."},
    )
    vllm_group_port: int = field(
        default=51216, metadata={"help": "Port of the NCCL group that carries weights from GPU to GPU (server)."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory that vLLM takes (colocate)."}
    )
    vllm_max_model_length: int | None = field(
        default=None,
        metadata={"help": "Tokens of prompt and completion together, at most (colocate). Default: as the model."},
    )
    vllm_tensor_parallel_size: int = field(
        default=1, metadata={"help": "Ranks that share one vLLM, each of which has a part of the weights (colocate)."}
    )
    vllm_importance_sampling_correction: bool | None = field(
        default=None,
        metadata={
            "help": "Weigh the policy gradient by old policy / sampling distribution. None: with vLLM. True: also where "
            "top_p and the like change what the trainer's own engine samples from."
        },
    )
    vllm_importance_sampling_mode: CorrectionMode | None = field(
        default=None,
        metadata={
            "help": "One weight per token or per completion; a weight outside the bounds is moved to them ('truncate') or "
            "set to 0 ('mask'). None: 'sequence_mask', or 'token_truncate' where top_p and the like truncate the samples."
        },
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=3.0, metadata={"help": "Upper bound of that weight. None: none."}
    )
    vllm_importance_sampling_clip_min: float | None = field(
        default=None, metadata={"help": "Lower bound of that weight. None: none."}
    )
    vllm_check_steps: int = field(
        default=100,
        metadata={
            "help": "After the first and every so many syncs of weights, compare vLLM's logprobs with the trainer's, and "
            "stop the run if they differ."
        },
    )
    old_logprobs: Literal["auto", "trainer", "sampler"] = field(
        default="auto",
        metadata={
            "help": "Whose logprobs stand for the old policy's: computed by the 'trainer', or as the 'sampler' reports "
            "them, which saves a pass. Default: the sampler's with generations_ahead, else the trainer's."
        },
    )
    generations_ahead: int = field(
        default=0,
        metadata={
            "help": "Sample so many generation batches ahead, while earlier ones are trained on (server). Generation "
            "batch n comes from the weights with which the training on n - generations_ahead began."
        },
    )


def check_vllm_options(args: Any) -> None:
    """Check how the options of vLLM go together.

    Raises:
        ValueError: They cannot work.
    """
    if args.world_size % args.vllm_tensor_parallel_size:
        raise ValueError(
            f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size} must divide the {args.world_size} processes of "
            "the run; use 1, or another divisor."
        )
    if args.generations_ahead < 0:
        raise ValueError(f"generations_ahead={args.generations_ahead} cannot work; use 0 (none) or more, e.g. 1.")
    if args.generations_ahead and not (args.use_vllm and args.vllm_mode == "server"):
        raise ValueError(
            f"generations_ahead={args.generations_ahead} needs a sampler beside the trainer; set use_vllm=True and "
            "vllm_mode='server'."
        )
    if args.generations_ahead and args.old_logprobs == "trainer":
        raise ValueError(
            f"generations_ahead={args.generations_ahead} cannot work with old_logprobs='trainer', which has other weights "
            "by the time the completions are there; set old_logprobs='auto'."
        )
    sampler = sampler_is_old_policy(args)
    if args.use_vllm and sampler and (found := changed_distribution(args)):
        raise ValueError(
            f"old_logprobs={args.old_logprobs!r} with generations_ahead={args.generations_ahead} takes the sampler's "
            f"logprobs, and with {', '.join(found)} vLLM reports those of another distribution than the policy's. Set "
            "old_logprobs='trainer' and generations_ahead=0, or do not change the distribution."
        )
    _check_correction(args)


def sampler_is_old_policy(args: Any) -> bool:
    """Whether the sampler's logprobs stand for those of the old policy, which is the one that sampled."""
    return bool(args.old_logprobs == "sampler" or args.generations_ahead > 0)


def changed_distribution(args: Any) -> list[str]:
    """List the options that make tokens come from another distribution than the policy's, e.g. `["top_p=0.9"]`."""
    changed = {
        "top_p": args.top_p < 1,
        "top_k": args.top_k > 0,
        "min_p": bool(args.min_p),
        "repetition_penalty": args.repetition_penalty != 1,
        "generation_kwargs": set(args.generation_kwargs or {}) - {"stop_strings"},
        "vllm_structured_outputs_regex": args.vllm_structured_outputs_regex is not None,
    }
    return [f"{name}={getattr(args, name)}" for name, changes in changed.items() if changes]


def correction_mode(args: Any) -> CorrectionMode | None:
    """Return the `vllm_importance_sampling_mode` that holds; None where samples are not weighed."""
    corrects = args.vllm_importance_sampling_correction
    if not (args.use_vllm if corrects is None else corrects):
        return None
    # The product of a completion's weights vanishes with its length where some tokens cannot be sampled
    return args.vllm_importance_sampling_mode or ("token_truncate" if changed_distribution(args) else "sequence_mask")


def _check_correction(args: Any) -> None:
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    if low is not None and high is not None and not 0 <= low <= high:
        raise ValueError(
            f"vllm_importance_sampling_clip_min={low} must be between 0 and vllm_importance_sampling_clip_max={high}."
        )
    mode = correction_mode(args)
    if args.loss_type == "vespo" and mode and not mode.startswith("token"):
        raise ValueError(
            f"vllm_importance_sampling_mode={mode!r} does not go with loss_type='vespo', which multiplies the weights of a "
            "completion's tokens itself; use 'token_truncate' or 'token_mask'."
        )
