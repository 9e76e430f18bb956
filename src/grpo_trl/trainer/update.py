"""An optimizer step: the loss of a mini-batch and its gradient, micro-batch by micro-batch."""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..attention.shared_prefix import serve_shared_prefix
from ..config.vllm import sampler_is_old_policy
from ..logprobs.compute import compute_logprobs
from ..logprobs.evaluator import LogprobEvaluator
from ..metrics import Mean, MetricLog, Sum
from ..objective import grpo_loss, make_objective
from ..reliability.guards import NonFinite
from ..reliability.training_checks import check_loss
from ..types import MicroBatch, MiniBatch
from .build_vllm import make_correction
from .entropy import EntropyControl
from .loss_metrics import loss_metrics
from .recording import RecordedTrainer
from .router import RouterBalance


class UpdatingTrainer(RecordedTrainer):
    """A trainer whose micro-batch is a `MiniBatch`, the whole of an optimizer step, or None before it.

    A subclass calls `_start_updates` first, and has what is declared here when it is complete.
    """

    _evaluator: LogprobEvaluator
    _entropy: EntropyControl
    _router: RouterBalance

    def _start_updates(self) -> None:
        self._objective = make_objective(self.args)
        self._correction = make_correction(self.args)
        self._nonfinite = NonFinite(self.args.max_nonfinite_steps)
        self._train_metrics, self._step_metrics, self._step_flos = MetricLog(), MetricLog(), 0.0
        self._step_loss = self._step_entropy = torch.zeros((), device=self.args.device)
        self._step_has_signal = False

    def training_step(  # type: ignore[override]  # Trainer passes on a mini-batch, or None for the micro-steps before it
        self, model: nn.Module, inputs: MiniBatch | None, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run forward and backward of a mini-batch, micro-batch by micro-batch; return the sum of the losses."""
        if inputs is None:
            return torch.zeros((), device=self.args.device)
        divisor = self._objective.aggregation.divisor(inputs.counts)
        with self._watchdog.phase("the update"):
            completions = self._entropy.prepare(model, inputs, divisor)
            self._router.prepare(model, completions)
            forward_backward = partial(self._forward_backward, model)
            loss = self._evaluator.in_micro_batches(completions, divisor, forward_backward, undo=model.zero_grad)
            self._entropy.finish(self._step_entropy)
        self._train_metrics.drain(self._step_metrics)
        self._train_metrics.add("loss", Mean.of(loss))
        set_aside = len(inputs.completions) - len(self._evaluator.with_gradient(inputs.completions))
        self._train_metrics.add("policy_signal", Mean(0.0, set_aside))
        if self._entropy.has_bonus:
            self._train_metrics.add("entropy_coef", Mean(self._entropy.coefficient))
        if self._router.active:
            self._train_metrics.add("aux_loss", Mean(self._router.value))
        self._step_loss = loss
        # from another sampler's probabilities all ratios may be clipped, or all completions left out
        of_sampler = self.args.use_vllm or sampler_is_old_policy(self.args)
        self._step_has_signal = not of_sampler and any(
            c.has_signal and any(c.mask if c.mask_policy is None else c.mask_policy) for c in completions
        )
        return loss

    def _forward_backward(self, model: nn.Module, micro_batches: list[MicroBatch]) -> Tensor:
        """Under DDP only the last micro-batch synchronizes gradients. It is empty, so until then no rank waits for another.

        Backends that shard weights or gradients synchronize in each micro-batch, and never hold whole gradients longer.
        """
        self._step_metrics, self._step_flos = MetricLog(), 0.0
        self._step_entropy = loss = torch.zeros((), device=self.args.device)
        if self.args.world_size > 1 and not self._waits_in_forward:
            micro_batches = [*micro_batches, self._evaluator.packer.micro_batch([], micro_batches[0].divisor)]
        for number, micro_batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            self.accelerator.gradient_state._set_sync_gradients(last)
            with (
                nullcontext() if last or self._waits_in_forward else self.accelerator.no_sync(model),
                # for what the backward pass recomputes
                serve_shared_prefix(model) if micro_batch.layout else nullcontext(),
            ):
                loss = loss + super().training_step(model, micro_batch)  # type: ignore[arg-type]
            self._step_flos += super().floating_point_ops({"input_ids": micro_batch.input_ids_RS})
        return loss

    def compute_loss(  # type: ignore[override]  # Trainer passes on a micro-batch
        self, model: nn.Module, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the micro-batch's share of the loss; its gradient averages over ranks, as DDP and ZeRO do."""
        logprobs = compute_logprobs(
            model,
            inputs,
            self.args.temperature,
            entropy_gradient=self._entropy.has_bonus,
            router_load=self._router.active,
        )
        old_logps_BT = logprobs.logps_BT.detach() if inputs.old_logps_BT is None else inputs.old_logps_BT
        correction_BT = None
        if self._correction is not None and inputs.drawn_logps_BT is not None:
            correction_BT = self._correction.weights(old_logps_BT, inputs.drawn_logps_BT, inputs.mask_BT)
        output = grpo_loss(
            logprobs.logps_BT,
            old_logps_BT,
            inputs.advantages_BU,
            inputs.mask_BT,
            objective=self._objective,
            ref_logps_BT=inputs.ref_logps_BT,
            sampler_logps_BT=inputs.sampler_logps_BT,
            mask_policy_BT=inputs.mask_policy_BT,
            entropy_BT=logprobs.entropy_BT,
            entropy_weight=self._entropy.weight,
            correction_BT=correction_BT,
        )
        check_loss(output.loss, model)
        self._step_metrics.add_all(loss_metrics(output, logprobs, inputs, correction_BT))
        self._step_entropy = self._step_entropy + output.entropy
        loss = output.loss / inputs.divisor + self._router.loss(logprobs.router_load_2E)
        return loss * self.args.world_size

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:  # type: ignore[override]
        return inputs  # on the device already, in the precision that it needs

    def _track_num_input_tokens(self, inputs: MiniBatch | None) -> None:
        """Tokens are counted when a generation batch is sampled."""

    def floating_point_ops(self, inputs: MiniBatch | None) -> float:  # type: ignore[override]
        return self._step_flos if inputs else 0.0

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called between clipping and the update, which is skipped here if it is not finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, DTensor):  # under FSDP2
            grad_norm = grad_norm.full_tensor()
        if self.args.fp16:
            known_norm = None  # overflows at times; the loss scale is lowered then, and the step skipped
        elif self.is_deepspeed_enabled and self.accelerator.optimizer_step_was_skipped:
            known_norm = math.inf  # by now DeepSpeed has stepped, or has found out and not stepped
        else:
            known_norm = grad_norm
        if self._nonfinite.should_skip(self._step_loss, known_norm, self.accelerator.reduce):
            self._train_metrics.add("nonfinite_steps", Sum(float(self.is_world_process_zero())))
            model.zero_grad()
        else:
            self._weights_move.note_gradient(grad_norm, self._step_has_signal)
        return grad_norm
