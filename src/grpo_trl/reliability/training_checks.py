"""Refuses training that does nothing, and options that speak of another policy than the one that samples."""

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft import get_model_status
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import RunStopped
from ..logging import get_logger
from ..types import Ranks


logger = get_logger(__name__)


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the size of an element in bytes."""


def check_same_options(options: dict[str, Any], ranks: Ranks) -> None:
    """Refuse ranks that would train with different options.

    Raises:
        ValueError: Some do; the message names the options, on every rank.
    """
    of_all = ranks.gather([options])
    differing = [
        f"{name}: {value!r} on rank 0, {other[name]!r} on rank {rank}"
        for rank, other in enumerate(of_all)
        for name, value in of_all[0].items()
        if other.get(name) != value
    ]
    if differing:
        raise ValueError(f"Ranks have different options ({'; '.join(differing)}). Give all of them the same.")


def check_unchanged(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse options that were changed after the parts of the run were built from them.

    Raises:
        RunStopped: Some were.
    """
    changed = [f"{name} from {before[name]!r} to {now[name]!r}" for name in before if before[name] != now[name]]
    if changed:
        raise RunStopped(
            f"Options were changed after the trainer was made ({', '.join(changed)}), as by a callback. Sampling, rewards "
            "and loss would follow different values; make a new trainer with the new ones, and resume."
        )


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Refuse an optimizer of other parameters than those that are trained; warn if it leaves out some or stands still.

    Raises:
        ValueError: It holds none of them.
    """
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not any(id(parameter) in trained for parameter in held):
        raise ValueError(
            f"The optimizer holds {len(held)} parameters, and none of the {len(trained)} that are trained "
            f"({next(iter(trained.values()), 'none')}, ...), so no step would change the model. It was made for another "
            "model, or before peft_config added its adapter: make it from the parameters of the model that is passed, with "
            "its adapter (get_peft_model), or leave optimizers to the trainer."
        )
    left_out = trained.keys() - {id(parameter) for parameter in held}
    if left_out:
        logger.warning(
            "The optimizer leaves out %d of the %d parameters that are trained (%s, ...); they stay as they are.",
            len(left_out),
            len(trained),
            next(name for key, name in trained.items() if key in left_out),
        )
    if not any(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups):
        logger.warning("The learning rate of the optimizer is 0: no step changes the model.")


def describe_trained(model: nn.Module) -> str:
    """Return what tells the trained parameters of one model from those of another: how many, and of how many numbers."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return f"{len(trained)} of {sum(getattr(p, 'ds_numel', p.numel()) for p in trained)} numbers"


@contextlib.contextmanager
def same_optimizer(folder: str, optimizer: Any, name: str) -> Iterator[None]:
    """Refuse a state that another optimizer saved, where it is loaded inside.

    Raises:
        ValueError: It is of another one.
    """
    before = [set(group) for group in optimizer.param_groups]
    try:
        yield
        lost = {
            option
            for group, options in zip(optimizer.param_groups, before, strict=True)
            for option in options - set(group)
        }
        cause = f"it has no {', '.join(sorted(lost))}" if lost else ""
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        cause = f"{type(error).__name__}: {error}"
    if cause:
        raise ValueError(
            f"resume_from_checkpoint={folder!r} has the state of another optimizer than optim={name!r} ({cause}). Use the "
            "one that the run was started with; to go on with another one, start a new run from the weights: pass the path "
            "as model."
        )


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters that are trained and take no part in the forward pass.

    Raises:
        ValueError: They are switched off or merged into the base, or others are active.
    """
    try:
        status = get_model_status(model)
    except (TypeError, ValueError):  # it has no adapter in its layers
        return
    trained = [name for name, flag in status.requires_grad.items() if flag is not False]
    others = [n for n, p in model.named_parameters() if p.requires_grad and not _belongs_to(n, trained)]
    if not trained or others:
        return
    if status.enabled is False:
        raise ValueError(
            f"The adapter {trained[0]!r} is trained and switched off, so no step would change what the model computes; "
            "call enable_adapter_layers() (of a PeftModel: model.base_model.enable_adapter_layers())."
        )
    if status.merged_adapters:
        raise ValueError(
            f"The adapter {status.merged_adapters[0]!r} is merged into the base, so no step would change what the model "
            "computes; call unmerge_adapter()."
        )
    if not set(trained) & set(status.active_adapters):
        raise ValueError(
            f"The adapters that are trained ({', '.join(trained)}) are not active, and those that are active "
            f"({', '.join(status.active_adapters) or 'none'}) are not trained; call model.set_adapter({trained[0]!r})."
        )


def check_loss(loss: Tensor, model: nn.Module) -> None:
    """Refuse a loss that does not depend on what is trained.

    Raises:
        RunStopped: It does not, or nothing has a gradient here.
    """
    if not torch.is_grad_enabled():
        raise RunStopped("train() runs inside torch.no_grad() or torch.inference_mode(); call it outside.")
    if not loss.requires_grad:
        raise RunStopped(no_gradient([name for name, p in model.named_parameters() if p.requires_grad]))


def no_gradient(trained: list[str]) -> str:
    """Explain why parameters of these names have no gradient."""
    return (
        f"The gradient of the first optimizer step with signal is exactly 0: none of the {len(trained)} parameters that "
        f"are trained ({', '.join(trained[:1])}, ...) takes part in the logprobs of the completions. See whether the right "
        "ones are trained (requires_grad), and whether the model or a hook detaches its outputs."
    )


class WeightsMove:
    """Checks once that completions with signal give a gradient, and that a step with one changes some weight."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}
        self._learning_rate = 0.0
        self._grad_norm = 0.0
        self._has_signal = False
        self._known = False

    def before_step(self, model: nn.Module, learning_rate: float) -> None:
        """Note the weights that a step starts from, until one has been seen to change them."""
        if not self._known:
            self._before = {n: _checksum(p) for n, p in model.named_parameters() if p.requires_grad}
            self._learning_rate, self._grad_norm, self._has_signal = learning_rate, math.nan, False

    def note_gradient(self, norm: Any, has_signal: bool) -> None:
        """Note the norm of the gradient that is about to be applied, and whether completions of this rank have signal.

        Not called where the step is skipped.
        """
        if not self._known:
            self._grad_norm, self._has_signal = float(norm), has_signal

    def after_step(self, model: nn.Module, ranks: Ranks, skipped: bool = False) -> None:
        """Compare the weights. Called on all ranks, where they agree on the gradient; sharded weights move on some rank.

        Args:
            model: What is trained.
            ranks: Of the run.
            skipped: Whether the optimizer made no step after all, as it does where a gradient in fp16 overflows.

        Raises:
            RunStopped: None has moved, or there was no gradient although there was signal.
        """
        if self._known or skipped or not self._before or not math.isfinite(self._grad_norm):
            return
        if not self._grad_norm:
            self._check_signal(ranks)
        elif self._learning_rate > 0:
            self._check_moved(model, ranks)

    def _check_signal(self, ranks: Ranks) -> None:
        if any(ranks.gather([self._has_signal])):
            raise RunStopped(no_gradient(list(self._before)))

    def _check_moved(self, model: nn.Module, ranks: Ranks) -> None:
        now = dict(model.named_parameters())
        moved = any(_checksum(now[name]) != before for name, before in self._before.items())
        self._known = any(ranks.gather([moved]))
        if not self._known:
            dtypes = sorted({str(now[name].dtype).removeprefix("torch.") for name in self._before})
            raise RunStopped(
                f"The first optimizer step with a gradient (norm {self._grad_norm:.3g}) and a learning rate "
                f"({self._learning_rate:.3g}) changed none of the {len(self._before)} trained parameters "
                f"({next(iter(self._before))}, ...; {', '.join(dtypes)}). Either the optimizer holds other parameters than "
                "the model's, or its steps are smaller than the weights can express: raise learning_rate, or load the "
                "model in float32."
            )


def _belongs_to(parameter: str, adapters: Collection[str]) -> bool:
    return any(f".{adapter}." in f".{parameter}." for adapter in adapters)


def _checksum(parameter: nn.Parameter) -> int:
    """The sum of the bit patterns of what this rank holds of a parameter."""
    local: Tensor = getattr(parameter, "ds_tensor", parameter)
    if isinstance(local, DTensor):
        local = local.to_local()
    bits = local.detach().contiguous().view(INTEGERS[local.element_size()])
    return int(bits.sum(dtype=torch.int64))
