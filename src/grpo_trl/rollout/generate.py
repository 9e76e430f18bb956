"""The engine that calls `model.generate`, for what the group engine cannot serve.

It prefills a prompt once per completion, and reports logprobs only of a distribution that is not the model's own. Its noise
follows from the request as a whole, so that it depends on the batch.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ..errors import OutOfStep
from ..logging import EVERY_RANK, get_logger
from ..model_utils import evaluation_mode, ran_out_of_memory
from ..seeds import derive_seed
from ..types import Completion
from .base import Rollout, RolloutRequest, SamplingOptions, most_rows_in_flight
from .sampling import generation_config, stop_strings


logger = get_logger(__name__)


class GenerateEngine:
    """Samples with `model.generate`, under a seed, without touching the model's own generation settings.

    Args:
        model: The unwrapped policy.
        options: How tokens are sampled.
        max_rows_in_flight: Completions that are decoded at a time, at most; by default 256, on a CPU 128.
        tokenizer: Finds `stop_strings`.
        context: What the forward passes run in, e.g. the accelerator's autocast.
        gather: From a list of objects on this rank to the concatenated lists of all ranks; called only `in_step`.
        show_progress: Whether to draw a bar with the decoding steps and tokens/s; asked in each rollout.
        check: Called at each decoding step, unless ranks wait for each other there; may raise.
        in_step: Whether ranks wait for each other in every forward, so that they must make equally many.
    """

    in_process = True
    splits_groups = True

    def __init__(
        self,
        model: Any,
        options: SamplingOptions,
        *,
        max_rows_in_flight: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        context: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        gather: Callable[[list[Any]], list[Any]] = list,
        show_progress: Callable[[], bool] = lambda: False,
        check: Callable[[], None] = lambda: None,
        in_step: bool = False,
    ):
        self.model = model
        self.options = options
        self.max_rows_in_flight = max_rows_in_flight
        self.context = context
        self.show_progress = show_progress
        self.check = check
        self.in_step = in_step
        self._gather = gather
        self._stop = stop_strings(options, tokenizer)

    def rollout(self, request: RolloutRequest) -> Rollout:
        """Sample what is asked for; where memory runs out, once more with half of the rows.

        Raises:
            OutOfStep: Memory runs out while other ranks wait for this one, which are in another forward by then.
        """
        while True:
            rows = most_rows_in_flight(self.max_rows_in_flight, self.model.device)
            try:
                return self._rollout(request, rows)
            except Exception as error:
                if not ran_out_of_memory(error):
                    raise
                if self.in_step:
                    raise OutOfStep(_remedy(min(rows, request.num_rows))) from error
                if rows == 1:
                    raise
            self.max_rows_in_flight = min(rows, request.num_rows) // 2 or 1
            logger.warning(
                "Memory ran out in model.generate; it starts again with %d completions at a time. max_rows_in_flight=%d "
                "avoids this.",
                self.max_rows_in_flight,
                self.max_rows_in_flight,
                extra=EVERY_RANK,
            )

    def _rollout(self, request: RolloutRequest, rows_at_a_time: int) -> Rollout:
        rows = [ids for ids, part in zip(request.prompt_ids, request.parts, strict=True) for _ in part]
        first = request.parts[0].start  # another rank samples the completions before it, from the same seed
        own_seed = derive_seed(request.seeds[0], "from", first) if first else request.seeds[0]
        starts = range(0, len(rows), rows_at_a_time)
        calls = max(self._gather([len(starts)])) if self.in_step else len(starts)
        completions: list[Completion] = []
        computed = 0
        for call in range(calls):
            part = rows[call * rows_at_a_time : (call + 1) * rows_at_a_time]
            seed = derive_seed(own_seed, call) if call else own_seed
            generated, tokens = self._generate(part or rows[:1], seed)  # other ranks wait for a forward of this one
            computed += tokens
            completions += generated if part else []
        return Rollout(completions, computed_tokens=computed)

    def _generate(self, rows: list[list[int]], seed: int) -> tuple[list[Completion], int]:
        """A completion of each row, and the tokens that were computed for them."""
        input_ids, attention_mask = _left_pad(rows, self.options.pad_token_id, self.model.device)
        check = (lambda: None) if self.in_step else self.check
        ends = _Ends(self.options, self._stop, len(rows), self.model.device, self.show_progress(), check)
        config = generation_config(self.options)
        config.stop_strings = None  # `ends` finds them
        reports = not self.options.samples_from_policy
        config.output_scores = config.return_dict_in_generate = reports  # `ends` reads them
        unchanged = _as_it_was(self.model, seed, config)
        with unchanged, torch.no_grad(), self.context(), contextlib.closing(ends):
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                stopping_criteria=StoppingCriteriaList([ends]),
                synced_gpus=self.in_step,
            )
        sequences = output.sequences if reports else output
        generated = sequences[:, input_ids.shape[1] :].tolist()
        drawn_logps = torch.stack(ends.drawn_logps, dim=1).tolist() if reports else [None] * len(rows)
        completions = [
            Completion(prompt, ids[:length], [True] * length, ended=ended, drawn_logps=logps and logps[:length])
            for prompt, ids, length, ended, logps in zip(
                rows, generated, ends.lengths.tolist(), ends.ended.tolist(), drawn_logps, strict=True
            )
        ]
        return completions, len(rows) * len(generated[0])


def _remedy(rows: int) -> str:
    advice = f"Resume with max_rows_in_flight={rows // 2}" if rows > 1 else "Lower max_completion_length"
    at_a_time = f"{rows} completion{'s' * (rows > 1)} at a time"
    return f"Memory ran out in model.generate with {at_a_time}, while other ranks wait for this one. {advice}."


class _Ends(StoppingCriteria):
    """Ends rows at their end tokens and stop strings, counts their tokens, notes logprobs, and moves a progress bar."""

    def __init__(
        self,
        options: SamplingOptions,
        stop: StopStringCriteria | None,
        rows: int,
        device: torch.device,
        show_progress: bool,
        check: Callable[[], None],
    ):
        self.stop = stop
        self.check = check
        self.greedy = not generation_config(options).do_sample
        self.eos = torch.tensor(options.eos_token_ids, dtype=torch.long, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.drawn_logps: list[Tensor] = []
        """Of each step, if `generate` has scores: those of the distribution that its tokens were sampled from."""
        self.start = time.perf_counter()
        self.bar = tqdm(
            total=options.max_completion_length,
            desc="sampling",
            unit="token",
            leave=False,
            disable=not show_progress,
            position=1,
        )

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: object) -> Tensor:
        self.check()
        if scores:
            logps_RV = scores[-1].double().log_softmax(-1)
            chosen_R = logps_RV.gather(1, input_ids[:, -1:])[:, 0]
            self.drawn_logps.append(torch.zeros_like(chosen_R) if self.greedy else chosen_R)
            scores[-1].untyped_storage().resize_(
                0
            )  # generate keeps the scores of all steps; this gives back their memory
        self.lengths += ~self.ended
        self.ended |= torch.isin(input_ids[:, -1], self.eos)
        if self.stop is not None:
            self.ended |= self.stop(input_ids, scores)
        if not self.bar.disable:
            rate = int(self.lengths.sum()) / (time.perf_counter() - self.start)
            running = len(self.ended) - int(self.ended.sum())
            self.bar.set_postfix_str(f"{running}/{len(self.ended)} running, {rate:,.0f} tokens/s", refresh=False)
            self.bar.update(1)
        return self.ended.clone()

    def close(self) -> None:
        self.bar.close()


def _left_pad(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both of shape (rows, longest), padded on the left."""
    longest = max(map(len, rows))
    input_ids = torch.tensor([[pad_token_id] * (longest - len(ids)) + ids for ids in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows], device=device)
    return input_ids, mask


@contextlib.contextmanager
def _as_it_was(model: Any, seed: int, generation_config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, a seeded random state and `generation_config` inside; all as it was after."""
    # The model's own settings would fill in whatever ours leave open: a top_p, a list of suppressed tokens. A PeftModel
    # hands its settings to the model inside, so that they are replaced wherever a module holds some.
    settings: dict[Any, Any] = {m: m.generation_config for m in model.modules() if "generation_config" in vars(m)}
    devices = [model.device] if model.device.type != "cpu" else []
    try:
        forked = torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda")
        with forked, evaluation_mode(model):
            torch.manual_seed(seed)
            for module in settings:
                module.generation_config = generation_config
            yield
    finally:
        for module, own in settings.items():
            module.generation_config = own
