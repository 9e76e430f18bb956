"""Arguments of `GRPOTrainer`: their kinds, and what other versions of the interface call them."""

import difflib
import inspect
from collections.abc import Collection, Sequence
from typing import Any

from accelerate.utils.deepspeed import DummyOptim
from torch.optim import Optimizer
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import IntervalStrategy, speed_metrics

from ..config import GRPOConfig
from ..logging import get_logger


logger = get_logger(__name__)

NAMES_OF_BEFORE = {
    "config": "args",
    "ref_model": "beta in args: the reference is the policy at the start",
    "reward_model": "reward_funcs",
    "tokenizer": "processing_class",
}
"""Arguments that trainers of TRL had, and what to use today."""


def check_names(unknown: dict[str, Any], trainer: type) -> None:
    """Refuse arguments that `trainer` does not take.

    Raises:
        TypeError: There is one; the message names the nearest.
    """
    known = list(inspect.signature(trainer).parameters)[:-1]
    for name in unknown:
        nearest = NAMES_OF_BEFORE.get(name) or next(iter(difflib.get_close_matches(name, known, n=1)), None)
        hint = f"use {nearest}." if nearest else f"it takes {', '.join(known)}."
        raise TypeError(f"{name} is no argument of GRPOTrainer; {hint}")


def check_not_here(**arguments: Any) -> None:
    """Refuse arguments of TRL's trainer that are not available.

    Raises:
        ValueError: One is given.
    """
    for name, value in arguments.items():
        if value:
            raise ValueError(
                f"{name} is not available; call tools and environments from a rollout_func, and mask their tokens with "
                "its 'env_mask'."
            )


def check_functions(rollout_func: Any, compute_metrics: Any, advantage_func: Any) -> None:
    """Refuse what cannot be called with what the trainer passes.

    Raises:
        TypeError: An argument is no such function.
    """
    _check_function("rollout_func", rollout_func, ("prompts", "trainer"))
    _check_function("compute_metrics", compute_metrics, ("evaluated",))
    _check_function("advantage_func", advantage_func, ("rewards_per_func", "group"))


def _check_function(name: str, function: Any, arguments: tuple[str, ...]) -> None:
    if function is None:
        return
    form = f"pass a function {name}({', '.join(arguments)})"
    if not callable(function) or inspect.isclass(function):
        raise TypeError(f"{name} is {function!r} ({type(function).__name__}); {form}.")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{name} is a coroutine function, which is not awaited; {form} that runs its own event loop.")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} cannot be called: {error}; {form}.") from None
    except ValueError:  # some built-in callables have no signature
        pass


def check_kinds(**arguments: Any) -> None:
    """Refuse classes where instances are meant.

    Raises:
        TypeError: An argument is of the wrong kind.
    """
    for name, value in arguments.items():
        if inspect.isclass(value):
            raise TypeError(f"{name} is the class {value.__name__}; pass an instance of it.")


def check_optimizers(optimizers: Any) -> None:
    """Refuse what is no pair of an optimizer and its scheduler, each of which may be None.

    Raises:
        TypeError: It is something else.
        ValueError: The scheduler is of another optimizer.
    """
    remedy = "pass a pair (optimizer, scheduler), each an instance or None"
    if not isinstance(optimizers, (tuple, list)) or len(optimizers) != 2:
        raise TypeError(f"optimizers={optimizers!r} is no pair; {remedy}.")
    optimizer, scheduler = optimizers
    if optimizer is not None and not isinstance(optimizer, (Optimizer, DummyOptim)):
        raise TypeError(f"optimizers has {optimizer!r} in place of an optimizer; {remedy}.")
    if scheduler is not None and (inspect.isclass(scheduler) or not hasattr(scheduler, "step")):
        raise TypeError(f"optimizers has {scheduler!r} in place of a scheduler; {remedy}.")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(
            "optimizers has a scheduler of another optimizer, whose learning rate would not change; make it from the "
            "optimizer that is passed with it."
        )


def check_callbacks(callbacks: Any) -> None:
    """Refuse what is no list of callbacks.

    Raises:
        TypeError: It is something else.
    """
    remedy = "pass a list of transformers.TrainerCallback"
    if callbacks is not None and not isinstance(callbacks, (list, tuple)):
        raise TypeError(f"callbacks is a {type(callbacks).__name__}; {remedy}.")
    for callback in callbacks or []:
        kind = callback if inspect.isclass(callback) else type(callback)
        if not hasattr(kind, "on_init_end"):
            raise TypeError(f"callbacks has {callback!r} ({kind.__name__}); {remedy}.")


def config_of(args: Any, model: Any) -> GRPOConfig:
    """Return the options; by default those of `GRPOConfig`, in the folder `"<model>-GRPO"`.

    Raises:
        TypeError: They are of another class.
    """
    if args is None:
        path = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        return GRPOConfig(f"{path.rstrip('/').split('/')[-1] or type(model).__name__}-GRPO")
    if not isinstance(args, GRPOConfig):
        kind = type(args)
        raise TypeError(
            f"args is a {kind.__module__}.{kind.__qualname__}; pass a grpo_trl.GRPOConfig, which has the same options."
        )
    return args


def choose_metric(args: GRPOConfig, callbacks: Sequence[Any] | None, eval_dataset: Any, computes_metrics: bool) -> None:
    """Let early stopping follow the reward unless told otherwise, and say what the reward of several eval sets is.

    Raises:
        ValueError: The metric is a loss, which evaluation does not compute; or early stopping has no evaluation to follow.
    """
    stops_early = any(isinstance(c, EarlyStoppingCallback) or c is EarlyStoppingCallback for c in callbacks or [])
    if stops_early and args.eval_strategy == IntervalStrategy.NO:
        raise ValueError(
            "callbacks has an EarlyStoppingCallback, and eval_strategy='no' makes no evaluation that it could follow; set "
            "eval_strategy='steps' or 'epoch'."
        )
    if stops_early and args.metric_for_best_model is None:
        args.metric_for_best_model, args.greater_is_better = "eval_reward", True
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if metric == "loss" and not computes_metrics:
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model!r} is not computed by an evaluation, which samples and "
            "rewards; use 'eval_reward'."
        )
    if metric == "reward" and isinstance(eval_dataset, dict):
        means = ", ".join(f"eval_{name}_reward" for name in eval_dataset)
        logger.warning("metric_for_best_model='eval_reward' is the mean of %s.", means)


def warn_of_unknown_metric(
    args: GRPOConfig, sets: Collection[str], metrics: Collection[str], others_may_come: bool
) -> None:
    """Warn where `metric_for_best_model` is no metric of an evaluation, which Trainer says after the first one only.

    Args:
        args: The options.
        sets: Names of the evaluation sets; `""` is that of a single one.
        metrics: What is known to be computed on a set.
        others_may_come: Whether functions of the user may add to these; then only a name like a known one is warned of.
    """
    if args.metric_for_best_model is None or args.eval_strategy == IntervalStrategy.NO:
        return
    prefixes = [f"eval_{name}" if name else "eval" for name in sets]
    timed = {metric for prefix in prefixes for metric in speed_metrics(prefix, 0.0, num_samples=1)}
    known = {"eval_reward"} | timed | {f"{prefix}_{metric}" for prefix in prefixes for metric in metrics}
    wanted = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    nearest = difflib.get_close_matches(wanted, sorted(known), n=1, cutoff=0.8 if others_may_come else 0)
    if wanted not in known and nearest:
        logger.warning(
            "metric_for_best_model=%r is no metric of an evaluation unless a function adds it, and the run would end after "
            "the first one; the nearest is %r.",
            args.metric_for_best_model,
            nearest[0],
        )
