"""Builds sampling with vLLM from the configuration."""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..config import GRPOConfig
from ..config.vllm import changed_distribution, correction_mode
from ..logging import get_logger
from ..logprobs.comparison import COARSE_TOLERANCE, TOLERANCE
from ..logprobs.evaluator import LogprobEvaluator
from ..model_utils import causal_lm
from ..objective.correction import Correction
from ..rollout.base import RolloutEngine
from ..rollout.vllm import ColocatedVLLM, VLLMEngine, VLLMServer
from ..rollout.vllm.client import Client
from ..rollout.vllm.weights import check_adapter
from ..types import Ranks
from .ahead import SamplesAhead
from .build import make_ranks, make_sampling_options
from .weight_sync import WeightSync


logger = get_logger(__name__)

LOCAL_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0", "::1")
SHARED_MEMORY = Path("/dev/shm")


def make_vllm_engine(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    args: GRPOConfig,
    eos_token_ids: tuple[int, ...],
    interruptible: Callable[[], AbstractContextManager[None]],
) -> VLLMEngine:
    """Connect to the server, or build vLLM in this process.

    Raises:
        ValueError: The policy or an option cannot be served.
        ConnectionError: No server answers.
    """
    if getattr(causal_lm(model), "is_quantized", False):
        raise ValueError("use_vllm=True cannot serve a quantized policy; load it unquantized, or set use_vllm=False.")
    if isinstance(model, PeftModel):
        check_adapter(model)
    ranks, server = make_ranks(args), args.vllm_mode == "server"
    folder = Path(tempfile.mkdtemp(prefix="grpo_trl-", dir=_parent(args)))
    if server:
        folder = ranks.gather([folder])[0]
    writes = not server or ranks.rank == 0
    client = _connect(args, folder, writes) if server else _build(model, tokenizer, args, ranks)
    return VLLMEngine(
        client,
        model,
        make_sampling_options(args, tokenizer, eos_token_ids),
        folder,
        writes=writes,
        loads_base=not server,
        check_steps=args.vllm_check_steps,
        regex=args.vllm_structured_outputs_regex,
        interruptible=interruptible,
    )


def make_weight_sync(
    engine: RolloutEngine, model: nn.Module, args: GRPOConfig, evaluator: LogprobEvaluator
) -> WeightSync | None:
    """Build what keeps the engine on the policy; None for one without weights of its own.

    Logprobs may differ more where they are computed in half precision.
    """
    if not isinstance(engine, VLLMEngine):
        return None
    half = args.half_precision or next(model.parameters()).dtype != torch.float32
    return WeightSync(engine, evaluator, make_ranks(args), COARSE_TOLERANCE if half else TOLERANCE)


def make_ahead(engine: RolloutEngine, args: GRPOConfig, check: Callable[[], None]) -> SamplesAhead | None:
    """Build what samples generation batches ahead; None without `generations_ahead`."""
    return SamplesAhead(engine, args.generations_ahead, check) if args.generations_ahead else None


def make_correction(args: GRPOConfig) -> Correction | None:
    """Return how the loss corrects for a sampler that is not the old policy; None if it is off."""
    mode = correction_mode(args)
    if mode is None:
        return None
    if mode.startswith("sequence") and (found := changed_distribution(args)):
        logger.warning(
            "With %s, vllm_importance_sampling_mode=%r weighs a completion by the probability of sampling nothing else at "
            "any of its tokens, which vanishes with its length; 'token_truncate' weighs each token by itself.",
            ", ".join(found),
            mode,
        )
    return Correction(mode, args.vllm_importance_sampling_clip_max, args.vllm_importance_sampling_clip_min)


def _url(args: GRPOConfig) -> str:
    return args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"


def _parent(args: GRPOConfig) -> Path | None:
    """Where vLLM reads what the trainer writes: memory on this machine, a folder that all machines share elsewhere."""
    if args.vllm_mode == "server" and urlsplit(_url(args)).hostname not in LOCAL_HOSTS:
        parent = Path(str(args.output_dir)).absolute()
        parent.mkdir(parents=True, exist_ok=True)
        return parent
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else None


def _connect(args: GRPOConfig, folder: Path, writes: bool) -> Client:
    return VLLMServer(_url(args), args.vllm_server_timeout, folder, args.device, args.vllm_group_port, writes=writes)


def _build(model: Any, tokenizer: PreTrainedTokenizerBase, args: GRPOConfig, ranks: Ranks) -> Client:
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((kind for name, kind in half.items() if getattr(args, name)), next(model.parameters()).dtype)
    return ColocatedVLLM(
        causal_lm(model).config,
        tokenizer,
        dtype=dtype,
        ranks=ranks,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        max_lora_rank=_lora_rank(model),
        sleeps=args.vllm_enable_sleep_mode,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_len=args.vllm_max_model_length,
        model_impl=args.vllm_model_impl,
        trust_remote_code=args.trust_remote_code,
    )


def _lora_rank(model: Any) -> int | None:
    if not isinstance(model, PeftModel):
        return None
    config: Any = model.peft_config[model.active_adapter]
    return int(config.r)
