"""The policy at the start of a run, which the KL term measures against."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .logprobs.head import enable_logprobs
from .model_utils import causal_lm


class Reference:
    """The policy at the start of the run, frozen, that the KL term measures against.

    - full fine-tuning: a frozen copy;
    - a new LoRA adapter that changes nothing yet: the base weights, by switching the adapter off;
    - any other adapter, new or continued: a copy of what is trained, which takes its place while the reference is
      evaluated. It is not part of the model, so nothing that saves the model saves it.

    Args:
        policy: The policy before it is trained, with its adapter.
        new_adapter: Whether the adapter was made for this run.
        reload: Loads the policy as it was at first, for one that ZeRO-3 has sharded, which cannot be copied.
        moves: Whether its weights will follow the policy (`sync_ref_model`), so that a checkpoint saves them.
        unsharded: Inside, the parameters it is given can be read and written as a whole.

    Raises:
        ValueError: It moves, and the policy has an adapter; or the policy is sharded, with nothing to reload it from.
    """

    def __init__(
        self,
        policy: Any,
        new_adapter: bool,
        reload: Callable[[], nn.Module] | None = None,
        moves: bool = False,
        unsharded: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = nullcontext,
    ):
        self.model: nn.Module | None = None
        self.moves = moves
        self._policy = policy
        self._unsharded = unsharded
        self._start: dict[str, Tensor] = {}
        """What is trained of an adapter, as it was at the start; empty where it is enough to switch the adapter off."""
        if not isinstance(policy, PeftModel):
            self.model = _copy(policy, reload).requires_grad_(False).eval()
            return
        if moves:
            raise ValueError(
                "sync_ref_model=True needs a copy of all weights, which an adapter does not have; set "
                "sync_ref_model=False, or train without LoRA."
            )
        if not (new_adapter and _starts_as_the_base(policy)):
            trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
            with unsharded(list(trained.values())):
                self._start = {name: p.detach().clone() for name, p in trained.items()}

    @property
    def replaces_parameters(self) -> bool:
        """Whether parameters of the policy are exchanged while the reference is evaluated."""
        return bool(self._start)

    @contextmanager
    def evaluating(self, wrapped_policy: nn.Module) -> Iterator[nn.Module]:
        """Yield the model to call. The policy's adapter is switched or exchanged inside, and back after."""
        if self.model is not None:
            yield self.model
        elif not self._start:
            with self._policy.disable_adapter():
                yield wrapped_policy
        else:
            now = self._exchange(self._start)
            try:
                yield wrapped_policy
            finally:
                self._exchange(now)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of a reference that moves; others follow from the policy at the start of the run."""
        return causal_lm(self.model).state_dict() if self.moves else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.moves:
            causal_lm(self.model).load_state_dict(state)

    @torch.no_grad()
    def _exchange(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Write `values` to the parameters of these names, and return what these were."""
        for module in self._policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # else forwards go on with the unsharded weights of before
        parameters = dict(self._policy.named_parameters())
        trained = [parameters[name] for name in values]
        with self._unsharded(trained):
            before = [parameter.detach().clone() for parameter in trained]
            for parameter, value in zip(trained, values.values(), strict=True):
                parameter.data.copy_(_placed_like(parameter, value))
        return dict(zip(values, before, strict=True))


def _placed_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """The value sharded as FSDP has sharded the parameter."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, list(parameter.placements))


def _starts_as_the_base(policy: PeftModel) -> bool:
    """Whether a new adapter leaves the policy what the base is, and trains nothing of the base."""
    config: Any = policy.peft_config[policy.active_adapter]
    same = getattr(config, "init_lora_weights", None) in (True, "gaussian")
    return bool(config.peft_type == PeftType.LORA and same and config.bias == "none")


def _copy(policy: nn.Module, reload: Callable[[], nn.Module] | None) -> nn.Module:
    if not any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
        try:
            return copy.deepcopy(policy)
        except TypeError as error:
            raise ValueError(
                f"beta > 0 needs a copy of the model as its reference, and it cannot be copied ({error}); remove from it "
                "what cannot be, or pass the path of the model."
            ) from error
    if reload is None:
        raise ValueError(
            "beta > 0 needs a second copy of a model that ZeRO-3 has sharded already; pass the path of the model instead "
            "of the model, so that it can be loaded twice."
        )
    model = reload()
    enable_logprobs(model)
    return model
