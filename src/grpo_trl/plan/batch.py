"""How prompts become generation batches and optimizer steps, in words."""

from ..data.schedule import Schedule


def batch_lines(schedule: Schedule) -> list[str]:
    """Describe what a run does with its prompts, a line for each fact."""
    completions, steps = schedule.completions_per_generation_batch, schedule.optimizer_steps_per_generation_batch
    trained = schedule.batch_size * schedule.accumulation * schedule.world_size
    served = f"; a generation batch serves {_count(steps, 'step')}"
    lines = [
        f"generation batch: {schedule.prompts_per_generation_batch} prompts x {schedule.num_generations} = {completions} "
        f"completions, {completions // schedule.world_size} on each of {_count(schedule.world_size, 'rank')}",
        f"optimizer step: {trained} completions" + (served if steps >= 1 else f", of {1 / steps:g} generation batches"),
        "on policy: every step trains on completions of the current policy"
        if schedule.on_policy
        else f"off policy: {1 - 1 / steps:.0%} of the steps, up to {_count(steps - 1, 'step')} old",
    ]
    if schedule.num_prompts is not None:
        left = schedule.unseen_prompts
        lines.append(
            f"epoch: {_count(schedule.num_prompts, 'prompt')} = "
            f"{_count(schedule.optimizer_steps_per_epoch, 'optimizer step')}"
            + f"; {left} of them, too few for a generation batch, are left out"
            * bool(left)
        )
    return lines


def _count(number: float, name: str) -> str:
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {name}{'s' * (number != 1)}"
