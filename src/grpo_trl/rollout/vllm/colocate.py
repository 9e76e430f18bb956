"""vLLM in the trainer's process."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...seeds import seeded
from ...types import Ranks
from .client import Sample
from .worker import EXTENSION


class ColocatedVLLM:
    """An engine of vLLM in this process, on this rank's device.

    It starts from random weights of the policy's architecture, so that nothing is sampled before a sync. The global random
    state, the number of threads and `torch.set_num_threads` are as they were after each call.

    Args:
        config: The policy's `transformers.PretrainedConfig`.
        dtype: Of weights and activations, e.g. `torch.bfloat16`.
        ranks: Of the run.
        tensor_parallel_size: Neighboring ranks that share one engine; they call `generate` together, with equally many
            prompts.
        max_lora_rank: Of the adapter that is trained; None without one.
        sleeps: Whether weights and cache leave the GPU between sampling and the next sync.
        options: Further arguments of `vllm.LLM`.

    Raises:
        ValueError: vLLM is not installed.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        *,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
        tensor_parallel_size: int = 1,
        max_lora_rank: int | None = None,
        sleeps: bool = False,
        **options: Any,
    ):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read when vLLM is imported
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError(
                "use_vllm=True with vllm_mode='colocate' needs vLLM in this environment; install grpo_trl[vllm], or set "
                "vllm_mode='server'."
            ) from error
        self._tensor_parallel = tensor_parallel_size
        self._ranks = ranks = Ranks() if ranks is None else ranks
        self._sleeps = sleeps
        self._adapter: Path | None = None
        self._adapters = 0
        if max_lora_rank is not None:
            options |= {"enable_lora": True, "max_lora_rank": max_lora_rank, "max_loras": 1, "max_cpu_loras": 1}
        if ranks.world_size > 1:
            options |= {"distributed_executor_backend": "external_launcher"}
        if not torch.cuda.is_available():
            # a prompt in parts takes back a seeded sample, which the CPU's generator cannot: the engine would die
            options |= {"enforce_eager": True, "enable_chunked_prefill": False}
        with tempfile.TemporaryDirectory(prefix="grpo_trl-") as folder, unchanged_process():
            config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            self._llm: Any = LLM(
                model=folder,
                load_format="dummy",
                dtype=str(dtype).removeprefix("torch."),
                tensor_parallel_size=tensor_parallel_size,
                enable_sleep_mode=sleeps,
                logprobs_mode="processed_logprobs",
                worker_extension_cls=EXTENSION,
                generation_config="vllm",
                seed=ranks.rank // tensor_parallel_size,
                **options,
            )
        self.max_model_length = int(self._llm.llm_engine.model_config.max_model_len)

    def generate(self, prompt_ids: list[list[int]], params: list[dict[str, Any]]) -> list[list[Sample]]:
        from vllm.lora.request import LoRARequest

        everybody = self._shared(list(zip(prompt_ids, params, strict=True)))
        adapter = None if self._adapter is None else LoRARequest("policy", self._adapters, str(self._adapter))
        with unchanged_process():
            if self._sleeps:
                self._llm.wake_up()
            outputs = self._llm.generate(
                [{"prompt_token_ids": ids} for ids, _ in everybody],
                [_sampling_params(one) for _, one in everybody],
                use_tqdm=False,
                lora_request=adapter,
            )
            if self._sleeps:
                self._llm.sleep(level=1)
        first = self._ranks.rank % self._tensor_parallel * len(prompt_ids)
        return [[_sample(one) for one in output.outputs] for output in outputs[first : first + len(prompt_ids)]]

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        with unchanged_process():
            if self._sleeps:
                self._llm.wake_up(tags=["weights"])
            self._llm.collective_rpc("load_policy", args=(weights,))
        self._drop_cache()

    def load_adapter(self, folder: Path) -> None:
        self._adapter = folder
        self._adapters += 1
        self._drop_cache()

    def close(self) -> None:
        del self._llm

    def _drop_cache(self) -> None:
        with unchanged_process():
            dropped = self._llm.reset_prefix_cache()
        if not dropped:
            raise RuntimeError("vLLM could not drop its prefix cache: requests are still running.")

    def _shared(self, requests: list[Any]) -> list[Any]:
        """The requests of all ranks that share this engine, in the order of ranks; each has equally many."""
        if self._tensor_parallel == 1:
            return requests
        start = self._ranks.rank // self._tensor_parallel * self._tensor_parallel
        of_ranks = self._ranks.gather([requests])[start : start + self._tensor_parallel]
        return [request for one in of_ranks for request in one]


def _sampling_params(params: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    outputs = params.get("structured_outputs")
    changes = {"structured_outputs": StructuredOutputsParams(**outputs)} if outputs else {}
    return SamplingParams(**(params | changes), detokenize=bool(params.get("stop")))


def _sample(output: Any) -> Sample:
    logps = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
    return Sample(
        list(output.token_ids),
        [math.nan if logp is None else logp for logp in logps],
        ended=output.finish_reason == "stop",
    )


@contextlib.contextmanager
def unchanged_process() -> Iterator[None]:
    """Undo what vLLM does to the process besides its work: it seeds and moves random states, and disables threads."""
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    with seeded(0):
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(threads)
