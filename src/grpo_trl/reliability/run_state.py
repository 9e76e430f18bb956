"""The state that a checkpoint adds to what Trainer saves: one file per rank."""

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..data.schedule import Schedule
from ..metrics import MetricLog
from ..objective import Counts
from ..types import Completion, GenerationBatch, Ranks


ON_FIRST_RANK = ("prompts", "reference")
"""Parts whose state is the same on all ranks, and is saved once."""
FROM_CHECKPOINT = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("logging_steps", "save_steps", "eval_steps"),
)
"""Options that a resumed run takes from its checkpoint, as Trainer does: the optimizer's state and its own have them."""
PER_PROCESS = (
    *("output_dir", "run_name", "report_to", "disable_tqdm", "local_rank", "resume_from_checkpoint"),
    *("log_level", "log_level_replica", "project", "hub_token", "hub_model_id", "push_to_hub", "do_train", "do_eval"),
    *(
        "log_completions",
        "log_completions_hub_repo",
        "num_completions_to_print",
        "log_unique_prompts",
        "reward_workers",
        "trackio_space_id",
    ),
)
"""Options that say where and how a process reports, and not what it trains."""


class Stateful(Protocol):
    """A part of a run that a checkpoint saves."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class RunState:
    """What a rank is in the middle of, besides what Trainer saves."""

    run: dict[str, Any]
    """See `fingerprint`."""
    options: dict[str, Any]
    """See `training_options`."""
    world_size: int
    generation_batch: GenerationBatch | None
    """None where the next optimizer step begins a new one."""
    parts: dict[str, dict[str, Any]]
    """The `state_dict` of each part of the run, by name."""

    def save(self, folder: Path, rank: int) -> None:
        """Write this rank's file into a checkpoint."""
        batch = None if self.generation_batch is None else _plain_generation_batch(self.generation_batch)
        parts = {name: state for name, state in self.parts.items() if rank == 0 or name not in ON_FIRST_RANK}
        torch.save(vars(self) | {"generation_batch": batch, "parts": parts}, _file(folder, rank))

    @classmethod
    def load(cls, folder: Path, rank: int) -> "RunState":
        """Read a rank's file of a checkpoint.

        Raises:
            ValueError: There is none.
        """
        path = _file(folder, rank)
        if not path.exists():
            raise ValueError(
                f"resume_from_checkpoint={str(folder)!r} has no {path.name}. To start from its weights, pass it as model."
            )
        with data_only(folder):
            values = torch.load(path, map_location="cpu", weights_only=True)
        batch = values.pop("generation_batch")
        if batch is not None:
            batch["mini_batches"] = [
                [Completion(**completion) for completion in mini_batch] for mini_batch in batch["mini_batches"]
            ]
            batch["counts"] = [Counts(**counts) for counts in batch["counts"]]
            batch = GenerationBatch(**batch)
        return cls(generation_batch=batch, **values)


@contextlib.contextmanager
def data_only(folder: Path | str) -> Iterator[None]:
    """Explain why a file of a checkpoint is not loaded: it holds more than data, and would execute code.

    Raises:
        ValueError: It does.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} has a file that holds more than tensors and plain values, which no "
            "trainer has saved; it is not loaded, since it could execute code. Resume from another checkpoint."
        ) from error


def resumed_state(folder: Path, ranks: Ranks, expected: dict[str, Any]) -> RunState:
    """Read this rank's state of the run that a checkpoint holds.

    Between two generation batches the number of ranks may change: the first rank takes over the metrics not yet logged.
    `expected` is the `fingerprint` of the run that resumes.

    Raises:
        ValueError: The checkpoint is not from this trainer; its run has other prompts, generation batches or steps; or it
            is inside a generation batch, which was assigned to another number of ranks.
    """
    first = RunState.load(folder, 0)
    _check_run(folder, first, ranks, expected)
    if first.world_size == ranks.world_size:
        own = RunState.load(folder, ranks.rank)
        return replace(own, parts={**first.parts, **own.parts})
    if first.generation_batch is not None:
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r} is inside generation batch {first.generation_batch.index}, whose "
            f"completions were assigned to {first.world_size} ranks; there are {ranks.world_size} now. Resume with "
            f"{first.world_size} ranks, or from a checkpoint at the end of a generation batch."
        )
    metrics = MetricLog()
    for other in range(first.world_size if ranks.rank == 0 else 0):
        metrics.load_state_dict(RunState.load(folder, other).parts["metrics"])
    return replace(first, parts=first.parts | {"metrics": metrics.state_dict()})


def training_options(args: dict[str, Any]) -> dict[str, Any]:
    """Return what a run trains with, in plain types, from all options by name."""
    return {name: plain(value) for name, value in args.items() if name not in PER_PROCESS}


def changed_options(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Describe which options of a resumed run are not those of its checkpoint, and which have an effect; None if all are.

    >>> changed_options({"beta": 0.1, "learning_rate": 1e-6}, {"beta": 0.2, "learning_rate": 1e-5})
    'in effect from here on: beta=0.2 (before: 0.1); kept as they were: learning_rate=1e-06 (given: 1e-05)'
    """
    changed = [name for name in old if name in new and old[name] != new[name]]
    taken = [f"{name}={new[name]!r} (before: {old[name]!r})" for name in changed if name not in FROM_CHECKPOINT]
    kept = [f"{name}={old[name]!r} (given: {new[name]!r})" for name in changed if name in FROM_CHECKPOINT]
    parts = {"in effect from here on": taken, "kept as they were": kept}
    return "; ".join(f"{title}: {', '.join(names)}" for title, names in parts.items() if names) or None


def _check_run(folder: Path, saved: RunState, ranks: Ranks, expected: dict[str, Any]) -> None:
    """Refuse a run that cannot resume with these options."""
    old, new = saved.run, expected
    changed = {name: (old.get(name), new.get(name)) for name in old | new if old.get(name) != new.get(name)}
    if not changed:
        return
    if changed.keys() & {"ranks", "completions of a micro-step"}:
        changed["ranks"] = saved.world_size, ranks.world_size
    differences = ", ".join(f"{name}: {then} then, {now} now" for name, (then, now) in changed.items() if then != now)
    raise ValueError(
        f"resume_from_checkpoint={str(folder)!r} holds a run that cannot resume like this ({differences}). Use the "
        "options, dataset, backend and ranks it was started with. To start a new run from its weights, pass it as model."
    )


def fingerprint(schedule: Schedule, prompts: dict[str, Any], noise: int, backend: str) -> dict[str, Any]:
    """Collect what must be unchanged for a run to resume: its steps over all ranks, its prompts, noise and backend.

    Args:
        schedule: Of the run.
        prompts: `PromptOrder.fingerprint`.
        noise: The seed of sampling.
        backend: `sharding.backend_of`; under DeepSpeed a checkpoint holds a shard of each rank.
    """
    values = vars(schedule) | prompts | {"seed of sampling": noise, "backend": backend}
    ranks = values.pop("world_size")
    values["completions of a micro-step"] = values.pop("batch_size") * ranks
    return values | ({"ranks": ranks} if backend.startswith("ZeRO") else {})


def _file(folder: Path, rank: int) -> Path:
    return folder / f"grpo_state_{rank}.pt"


def _plain_generation_batch(generation_batch: GenerationBatch) -> dict[str, Any]:
    """A generation batch in types that can be loaded without running code."""
    return {
        "index": generation_batch.index,
        "mini_batches": [
            [dict(vars(completion)) for completion in mini_batch] for mini_batch in generation_batch.mini_batches
        ],
        "table": {name: [plain(value) for value in values] for name, values in generation_batch.table.items()},
        "counts": [vars(counts) for counts in generation_batch.counts],
        "tokens": generation_batch.tokens,
    }


def plain(value: Any) -> Any:
    """Return a value in types that can be loaded without running code; what is not plain becomes text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return str(value)
